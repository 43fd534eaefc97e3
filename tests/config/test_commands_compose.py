"""Every `hft train`, `hft plan` and `hft eval` command that the documents and scripts give composes and is accepted."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import composed_by

from hft_cli.config.typed import refuse_unread
from hft_cli.config.validate import check, check_eval

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("conf/**/README.md"), *ROOT.glob("scripts/**/README.md"),
             *ROOT.glob("hft_cli/**/README.md"), *ROOT.glob("conf/**/*.yaml"), *ROOT.glob("scripts/slurm/*.sbatch"),
             ROOT / "scripts/hosts.sh"]  # fmt: skip
# What stands before the arguments of `hft train` in a script that passes them on.
PASSES_ON = re.compile(r"(?:sbatch .*?(?:one_node|several_nodes)\.sbatch|scripts/hosts\.sh [\w ]+ --) (?=\+)")
# A command up to what ends it in a text or a script, which does not count between quotes.
COMMAND = re.compile(r"(?:'[^']*'|(?!\s+#| && |\s{3,}|[),;:] |, |[.,;]$).)*")
PLACEHOLDERS = ("…", "|", "[group", "$", "NAME")  # a grammar or a shell's variable, not a command


def commands(text: str) -> Iterator[str]:
    """The commands in a text: in code, between backquotes, or in a comment; a line may be continued."""
    text = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda span: span[0].replace("\n", " "), text)
    text = re.sub(r"\\\n(?:#\s)?\s*", " ", text.replace("$(BIN)/", "").replace("$(DEMO)", "runs/demo"))
    for line in PASSES_ON.sub("hft train ", text).splitlines():
        for match in re.finditer(r"\bhft (?:train|plan|eval) [^`]*", line):
            command = COMMAND.match(match[0])[0].strip(" .")
            if "=" in command and not any(sign in command for sign in PLACEHOLDERS):
                yield command


def documented() -> list[str]:
    found = {command for path in DOCUMENTS for command in commands(path.read_text())}
    for place in ("pocket", "node", "slurm"):
        script = [ROOT / "scripts/experiments.sh", place]
        found |= set(subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines())
    return sorted(found)


@pytest.mark.parametrize("line", documented())
def test_a_documented_command_composes_and_is_accepted(line):
    _, command, *words = shlex.split(line)
    words = [word for word in words if not re.match(r"\+?hydra[/.]|--cfg$|job$", word)]
    swept = "-m" in words
    if swept:  # its first job
        words = [re.sub(r"^([^=]+=[^,\[{]+),.*", r"\1", word) for word in words if word != "-m"]
    config = composed_by(command, *words)
    if command != "eval" and not swept:
        refuse_unread(config, words)
    if command == "plan" and config.data.name == "none":
        return  # a plan stands in for data that are not named
    check_eval(config) if command == "eval" else check(config)


def test_the_comparison_on_smollm2_composes(tmp_path, monkeypatch):
    stub = tmp_path / "hft"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\037" "$@" >>"{tmp_path}/words"\necho >>"{tmp_path}/words"\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    subprocess.run([ROOT / "scripts/smollm2/compare.sh", "MODEL", "the rows", "PARAREL", "OUT"], check=True)
    lines = [line.split("\037")[:-1] for line in (tmp_path / "words").read_text().splitlines()]
    check_eval(composed_by("eval", *lines.pop()[1:]))
    assert len(lines) == 6
    for command, multirun, *words in lines:
        assert (command, multirun) == ("train", "-m")
        methods = next(word for word in words if word.startswith("method=")).removeprefix("method=").split(",")
        words = [re.sub(r"^([^=]+=[^,\[{]+),.*", r"\1", word) for word in words if not word.startswith("method=")]
        for method in methods:
            check(composed_by(command, f"method={method}", *words))


def test_the_commands_of_the_documents_are_found():
    lines = documented()
    assert len(lines) > 40
    assert "hft train -m experiment=ratio_ablation size=pocket output_dir=runs/ratio_ablation" in lines
    assert any(line.startswith("hft plan ") for line in lines)
    assert any(line.startswith("hft eval ") for line in lines)
