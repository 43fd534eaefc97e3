"""Programs of a model run with limits, and pass@k is Chen et al.'s estimate."""

from __future__ import annotations

import os
import sys

import pytest

from hft_cli.evaluation.sandbox import CodeEval, network_is_cut, pass_at_k, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")


def test_a_program_passes_only_by_coming_to_its_end():
    assert run("x = 1") == "passed"
    assert run("assert False") == "failed: AssertionError"
    assert run("import sys; sys.exit(0)") == "failed: SystemExit"
    assert run("import os; os._exit(0)") == "failed: ended early"
    assert run("print('passed')\n1 / 0") == "failed: ZeroDivisionError"


def test_time_memory_and_files_are_limited():
    assert run("while True: pass", seconds=1) == "timed out"
    assert run("x = bytearray(2**31)") == "failed: MemoryError"
    assert run("open('a', 'wb').write(bytes(2**22))") == "failed: OSError"


def test_it_starts_in_an_empty_folder_that_goes_away_and_sees_nothing_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_SECRET", "x")
    program = f"import os\nassert os.listdir() == []\nopen({str(tmp_path / 'where')!r}, 'w').write(os.getcwd())\n"
    assert run(program + "assert 'SOME_SECRET' not in os.environ") == "passed"
    assert not os.path.exists((tmp_path / "where").read_text())


def test_there_is_no_network_where_the_kernel_lets_us_cut_it():
    if not network_is_cut():
        pytest.skip("the kernel refuses a network namespace here")
    # With a network, nobody listening there would be a ConnectionRefusedError.
    program = "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)"
    assert run(program) == "failed: OSError"


def test_pass_at_k_is_the_share_of_draws_of_k_programs_with_a_right_one():
    right, wrong = "def f(): return 1", "def f(): return 2"
    assert pass_at_k(["assert f() == 1"], [[right, wrong, wrong, wrong]], [1, 2, 4]) == {
        "pass@1": pytest.approx(1 / 4),
        "pass@2": pytest.approx(1 / 2),
        "pass@4": 1.0,
    }
    figures, found = CodeEval().compute(references=["assert f() == 1"], predictions=[[wrong]], k=[1, 10])
    assert figures == {"pass@1": 0.0}
    assert found == {0: [(0, "failed: AssertionError")]}


def test_the_program_file_itself_is_gone_before_it_runs():
    assert run("import os\nassert not os.path.exists('program.py')") == "passed"
