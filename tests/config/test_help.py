"""`--help` shows every group, option and key with what its field says about it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from helpers import environment

from hft_cli.config.conf import experiments
from hft_cli.config.help import WIDTH, config_keys, help_text, limits_text
from hft_cli.config.schema import SCHEMAS
from hft_cli.paths import group_options


@pytest.mark.parametrize("command", SCHEMAS)
def test_help_lists_every_key_once_with_its_default(command):
    keys = re.findall(r"^  ([\w.]+)=", help_text(command), re.MULTILINE)
    assert sorted(keys) == sorted(config_keys(SCHEMAS[command]))


def test_help_of_train_lists_every_option_of_every_group():
    text = " ".join(help_text("train").split())
    for group in ("data", "engine", "method", "model", "recipe", "selection", "suite", "tracking", "continual"):
        assert f" {group} {', '.join(group_options(group))} " in text
    assert f" experiment {', '.join(experiments())} " in text


@pytest.mark.parametrize(
    "entry",
    [
        "train.learning_rate=2e-05 Peak learning rate. [above 0]",
        "selection.ratio=0.5 Share of the matrices in the transformer layers that is updated.",
        "[one of auto, messages, prompt_completion, alpaca, sharegpt, orca, trace, text]",
        "train.max_steps=null Optimizer steps of each round; null: as train.epochs says. [steps; at least 1]",
        "model.path=(set in conf/)",
    ],
)
def test_a_key_is_shown_with_default_help_and_limits(entry):
    assert entry in " ".join(help_text("train").split())


def test_no_line_of_help_is_too_long():
    assert [line for line in help_text("plan").splitlines() if len(line) > WIDTH] == []


def test_limits_end_a_message():
    assert limits_text(SCHEMAS["train"], "selection.ratio") == " It must be in [0, 1]."
    assert limits_text(SCHEMAS["train"], "model.path") == limits_text(SCHEMAS["train"], "nothing") == ""


def test_help_reads_the_registries_without_importing_torch():
    code = "import sys; from hft_cli.config.help import help_text; help_text('train'); "
    code += "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert run.stdout == "[]\n"
