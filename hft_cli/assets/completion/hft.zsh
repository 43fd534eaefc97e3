# eval "$(hft completion zsh)", for instance in ~/.zshrc after compinit
_hft() {
    local -a found=("${(@f)$(hft completion words "${BUFFER[1,CURSOR]}" 2>/dev/null)}")
    compadd -Q -S '' -- ${(M)found:#*=}
    compadd -Q -- ${found:#*=}
    _files
}
compdef _hft hft
