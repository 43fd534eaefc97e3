"""`python -m hft_cli.cli`: the `hft` command."""

from hft_cli.cli.main import main

main()
