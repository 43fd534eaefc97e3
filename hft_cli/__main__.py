"""`python -m hft_cli`: the `hft` command."""

from hft_cli.cli.main import main

main()
