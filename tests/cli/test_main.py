"""The entry point: help, exit status, and how little it imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from helpers import QUICK, Ended, command, environment, hft, wait_for_step, wait_until_gone

from hft_cli.cli import main
from hft_cli.cli.commands import COMMANDS


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    return done.stdout


def test_help_names_every_command_and_imports_little():
    code = "import sys, hft_cli.cli.main as c; sys.argv=['hft','--help']\ntry: c.main()\nexcept SystemExit: pass\n"
    text = run_python(code + "print(sorted({'torch','hydra','transformers','pydantic'} & set(sys.modules)))")
    assert all(f"  hft {name} {row.usage}\n      {row.summary}" in text for name, row in COMMANDS.items())
    assert text.endswith("[]\n")


def test_help_takes_little_time():
    times = []
    for _ in range(5):
        start = os.times()  # processor time of children, not the clock: other programs run beside this one
        subprocess.run(command("--help"), capture_output=True, check=True)
        end = os.times()
        times.append(end.children_user + end.children_system - start.children_user - start.children_system)
    assert min(times) < 0.3


def test_the_runner_and_the_report_import_no_torch():
    code = "import sys, hft_cli.runner.training, hft_cli.cli.main, hft_cli.report.write; "
    assert run_python(code + "print({'torch','transformers','deepspeed','trl'} & set(sys.modules))") == "set()\n"


@pytest.mark.parametrize("words", [(), ("help",), ("-h",)])
def test_without_a_command_the_overview_is_printed(words):
    ended = hft(*words)
    assert (ended.status, ended.err) == (0, "")
    assert "hft materialize RUN|DELTA --out FOLDER" in ended.out


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_dev_null(closed, tmp_path):
    code = (
        "import sys; from hft_cli.cli import main as m; "
        "m._dispatch = lambda argv: sys.stderr.write('x') - 1 + (open('file', 'w').fileno() < 3); m.main()"
    )
    words = ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-c", code]
    assert subprocess.run(words, cwd=tmp_path, env=environment()).returncode == 0


def test_a_locale_without_utf8_does_not_matter():
    code = (
        "import sys; from hft_cli.cli import main as m; "
        "m._dispatch = lambda argv: print(sys.getfilesystemencoding(), *map(ascii, argv)) or 0; m.main()"
    )
    ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-c", code, "ü"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment() | ascii_only)
    assert done.stdout == "utf-8 '\\xfc'\n"


def test_an_unknown_command_is_one_line_with_the_nearest():
    message = "hft: Unknown command 'trian'. Did you mean 'train'? Available: " + ", ".join(COMMANDS) + ".\n"
    assert hft("trian") == Ended(2, "", message)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (PermissionError(13, "Permission denied", "runs/first"), 2, "hft: Permission denied: runs/first"),
        (FileNotFoundError("no such thing"), 2, "hft: no such thing"),
        (OSError(28, "No space left on device"), 1, "hft: No space left on device"),
        (MemoryError(), 1, "hft: out of memory."),
        (main.Stopped(15), 143, "hft: stopped. The same command continues."),
        (KeyboardInterrupt(), 130, "hft: stopped. The same command continues."),
    ],
)
def test_an_error_is_one_line_and_a_status(error, status, message, monkeypatch, capsys):
    def fail(name: str, words: list[str]) -> int:
        raise error

    monkeypatch.setattr(main, "run_command", fail)
    monkeypatch.setattr(main, "set_up_logging", lambda: None)
    monkeypatch.setattr(main.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "argv", ["hft", "report", "x"])
    errors: list[str] = []
    monkeypatch.setattr(main.logger, "error", lambda text, *values: errors.append(text % values))
    with pytest.raises(SystemExit) as end:
        main.main()
    assert (end.value.code, errors) == (status, [message])


@pytest.mark.parametrize("words", [("train", "--help"), ("plan", "+method=hft"), ("show", "tokens", "+method=hft")])
def test_output_into_a_closed_pipe_ends_quietly(words):
    with subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.end_to_end
def test_a_stopped_run_says_how_to_continue(tmp_path):
    words = ("train", *QUICK, "+method=hft", "train.max_steps=4000", f"output_dir={tmp_path / 'run'}")
    start = {"stderr": subprocess.PIPE, "text": True, "env": environment()}
    with subprocess.Popen(
        command(*words), **start, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    ) as process:
        wait_for_step(tmp_path / "run/rounds/01-order/progress.json", process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert "Stopping after this step, with a checkpoint." in err
    assert err.endswith("hft: stopped. The same command with resume=true continues.\n")
    wait_until_gone(tmp_path / "run")
