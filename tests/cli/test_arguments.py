"""Arguments of the commands that read files: options, their KEY=VALUE spelling, mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from hft_cli.cli.arguments import Parser, path, round_number
from hft_cli.errors import UserError


def parser() -> Parser:
    made = Parser("hft x", "RUN… --out FOLDER [--round K] [--norms]", "does x")
    made.add_argument("runs", nargs="+", type=path)
    made.add_argument("--out", type=path, required=True)
    made.add_argument("--round", type=round_number)
    made.add_argument("--norms", action="store_true")
    return made


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--out", "a b", "--round", "2"],
        ["--round=2", "run", "--out=a b"],
        ["run", "out=a b", "round=2"],
        ["round=2", "--out", "a b", "run"],
    ],
)
def test_options_are_read_in_each_spelling_and_order(words):
    options = parser().parse(words)
    assert (options.runs, options.out, options.round) == ([Path("run")], Path("a b"), 2)


def test_places_may_stand_on_both_sides_of_an_option():
    assert parser().parse(["a", "--norms", "b", "--out", "c", "d"]).runs == [Path("a"), Path("b"), Path("d")]


def test_a_folder_with_an_equals_sign_is_a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("seed=1").mkdir()
    options = parser().parse(["seed=1", "sweep/seed=2", "out=a=b"])
    assert (options.runs, options.out) == ([Path("seed=1"), Path("sweep/seed=2")], Path("a=b"))


def test_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parser().parse(["~/run", "out=~/x"]).out == Path("/home/me/x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--outt", "x"], r"Unknown option '--outt'\. Did you mean '--out'\? Available: --help, --out, "),
        (["run", "-o", "x"], r"Unknown option '-o'"),
        (["run", "rond=1", "out=x"], r"Unknown key 'rond'\. Did you mean 'round'\? Available: out, round, norms"),
        (["run", "out=x", "round=two"], r"round=two is not a number"),
        (["run", "out=x", "--round", "-1"], r"Unknown option '-1'"),
        (["run", "out="], r"A path is empty"),
        (["run", "--out"], r"Argument --out: expected one argument\. Usage: hft x RUN… --out FOLDER"),
        (["run"], r"arguments are required: --out\. Usage: hft x RUN…"),
        (["out=x"], r"arguments are required: runs\. Usage: hft x RUN…"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words, message):
    with pytest.raises(UserError, match=message) as error:
        parser().parse(words)
    assert "\n" not in str(error.value)


def test_the_help_names_the_options_and_the_log_flags(capsys):
    with pytest.raises(SystemExit) as end:
        parser().parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("usage: hft x RUN…", "does x", "--out", "--quiet", "HFT_LOG_LEVEL"))
