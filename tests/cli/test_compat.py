"""cli/compat.py: what it relies on in Hydra and argparse is still there."""

from __future__ import annotations

import inspect

from hft_cli.cli.arguments import Parser
from hft_cli.cli.compat import hydra_parser, option_names


def test_the_options_of_a_parser_are_listed():
    parser = Parser("hft x", "", "")
    parser.add_argument("-o", "--out")
    assert option_names(parser) == ["-h", "--help", "-o", "--out"]


def test_hydra_reads_its_arguments_with_this_parser():
    import hydra

    assert "args_parser = get_args_parser()" in inspect.getsource(hydra.main)
    parsed = hydra_parser().parse_args(["-m", "seed=1", "a=b"])
    assert (parsed.multirun, parsed.overrides) == (True, ["seed=1", "a=b"])
