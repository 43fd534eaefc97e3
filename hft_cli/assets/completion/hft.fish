# hft completion fish > ~/.config/fish/completions/hft.fish
complete --command hft --arguments '(hft completion words (commandline --cut-at-cursor))'
