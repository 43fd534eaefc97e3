"""What may come next on a command line."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from helpers import environment, hft

from hft_cli.cli.commands import COMMANDS, run_command
from hft_cli.cli.completion import OPTIONS, SHELLS, next_words
from hft_cli.config.schema import SCHEMAS
from hft_cli.errors import UserError


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hft tr", ["train"]),
        ("hft train +meth", ["+method="]),
        ("hft train +method=h", ["+method=half_reset", "+method=hft", "+method=hft_dpo"]),
        ("hft train -m method=fft,kl", ["method=fft,kl"]),
        ("hft train 'data.path=a b.jsonl' data.loss=co", ["data.loss=completion"]),
        ("hft train train.learning_r", ["train.learning_rate="]),
        ("hft train train.learning_rate=", []),
        ("hft train experiment=var", ["experiment=variance"]),
        ("hft train size=po", ["size=pocket"]),
        ("hft plan gpu_mem", ["gpu_memory="]),
        ("hft train gpu_mem", []),
        ("hft verify --in", ["--infer"]),
        ("hft draw pocket --format=s", ["--format=swift"]),
        ("hft draw qw", ["qwen3_8b"]),
        ("hft completion z", ["zsh"]),
        ("hft show ", ["draws", "tokens"]),
        ("hft nonsense ", []),
        ("hft train data.path='an open quote ", ["--cfg=job", "--help", "-m"]),
    ],
)
def test_the_next_words_of_a_line(line, words):
    found = next_words(line, COMMANDS)
    assert [word for word in found if word in words] == words if "open quote" in line else found == words


def test_a_line_without_a_word_gets_all_commands():
    assert next_words("hft ", COMMANDS) == sorted(COMMANDS)
    assert next_words("", COMMANDS) == sorted(COMMANDS)


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"completion", "show"}))
def test_the_options_of_a_command_are_those_of_its_parser(name, capsys):
    with pytest.raises(SystemExit):
        run_command(name, ["--help"])
    told = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--help"}
    assert {word.partition("=")[0] for word in OPTIONS[name]() if word.startswith("--")} == told


def test_every_command_completes_something():
    assert OPTIONS.keys() | SCHEMAS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_asks_for_the_next_words(shell, capsys):
    assert run_command("completion", [shell]) == 0
    assert "hft completion words" in capsys.readouterr().out


def test_bash_completes_after_an_equals_sign():
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    script = hft("completion", "bash").out
    ask = 'COMP_LINE="hft train +method=hf" COMP_POINT=20; _hft; printf "%s\\n" "${COMPREPLY[@]}"'
    code = f'hft() {{ {environment_command()} "$@"; }}\n{script}\n{ask}'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.split() == ["hft", "hft_dpo"]  # bash has +method= already


def test_fish_completes_groups_and_keys(tmp_path):
    if not shutil.which("fish"):
        pytest.skip("there is no fish")
    script = hft("completion", "fish").out
    for line, wanted in (("hft tra", "train"), ("hft train +method=hf", "+method=hft"), ("hft draw --for", "--format")):
        code = f"function hft; {environment_command()} $argv; end\n{script}\ncomplete -C '{line}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment()
        )
        assert wanted in done.stdout.split(), done.stderr


def environment_command() -> str:
    import sys

    return f'"{sys.executable}" -m hft_cli'


def test_an_unknown_shell_is_one_line():
    with pytest.raises(UserError, match=r"Unknown shell 'bas'\. Did you mean 'bash'"):
        run_command("completion", ["bas"])
    with pytest.raises(UserError, match="One argument too many"):
        run_command("completion", ["bash", "x"])
