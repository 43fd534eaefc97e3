"""Limits of programs that a model wrote, and pass@k (Chen et al. 2021)."""

from __future__ import annotations

import os
import sys

import pytest

from hft_cli.evaluation.sandbox import CodeEval, is_network_blocked, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits need Linux")


def test_a_program_passes_only_if_it_runs_to_its_end():
    assert run_program("x = 1") == "passed"
    assert run_program("assert False") == "failed: AssertionError"
    assert run_program("import sys; sys.exit(0)") == "failed: SystemExit"
    assert run_program("import os; os._exit(0)") == "failed: ended early"
    assert run_program("print('passed')\n1 / 0") == "failed: ZeroDivisionError"


def test_time_memory_and_files_are_limited():
    assert run_program("while True: pass", seconds=1) == "timed out"
    assert run_program("x = bytearray(2**31)") == "failed: MemoryError"
    assert run_program("open('a', 'wb').write(bytes(2**22))") == "failed: OSError"


def test_a_program_gets_an_empty_folder_and_no_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_SECRET", "x")
    program = f"import os\nassert os.listdir() == []\nopen({str(tmp_path / 'where')!r}, 'w').write(os.getcwd())\n"
    assert run_program(program + "assert 'SOME_SECRET' not in os.environ") == "passed"
    assert not os.path.exists((tmp_path / "where").read_text())


def test_the_network_is_blocked_if_the_kernel_allows_it():
    if not is_network_blocked():
        pytest.skip("the kernel of this machine refuses a network namespace")
    # With a network the error would be a ConnectionRefusedError, because nothing listens on this port.
    program = "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)"
    assert run_program(program) == "failed: OSError"


def test_pass_at_k_is_the_share_of_draws_with_a_correct_program():
    correct, wrong = "def f(): return 1", "def f(): return 2"
    assert CodeEval().pass_at_k(["assert f() == 1"], [[correct, wrong, wrong, wrong]], [1, 2, 4]) == {
        "pass@1": pytest.approx(1 / 4),
        "pass@2": pytest.approx(1 / 2),
        "pass@4": 1.0,
    }
    figures, results = CodeEval().compute(references=["assert f() == 1"], predictions=[[wrong]], k=[1, 10])
    assert figures == {"pass@1": 0.0}
    assert results == {0: [(0, "failed: AssertionError")]}


def test_the_program_file_is_deleted_before_it_runs():
    assert run_program("import os\nassert not os.path.exists('program.py')") == "passed"
