"""Limits of programs that a model wrote, the verdict on them, and pass@k (Chen et al. 2021)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest
from helpers import environment
from hypothesis import given
from hypothesis import strategies as st

from hft_cli.evaluation.isolation import FILES, MACHINES, NETWORK
from hft_cli.evaluation.judge import ProgramError, decode, encode
from hft_cli.evaluation.sandbox import CodeEval, isolation, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits need Linux")


def test_a_program_passes_only_if_it_runs_to_its_end():
    assert run_program("x = 1") == "passed"
    assert run_program("assert False") == "failed: AssertionError"
    assert run_program("import sys; sys.exit(0)") == "failed: SystemExit"
    assert run_program("import os; os._exit(0)") == "failed: ended early"
    assert run_program("print('passed')\n1 / 0") == "failed: ZeroDivisionError"
    assert run_program("def f(:") == "failed: SyntaxError"


def test_time_memory_and_files_are_limited():
    assert run_program("while True: pass", seconds=1) == "timed out"
    assert run_program("import time; time.sleep(60)", seconds=1) == "timed out"
    assert run_program("x = bytearray(2**31)") == "failed: MemoryError"
    assert run_program("open('a', 'wb').write(bytes(2**22))") == "failed: OSError"


def test_a_program_gets_an_empty_folder_and_no_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_SECRET", "x")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = "import os\nbefore = os.listdir()\nopen('a', 'w').close()"
    test = f"assert before == [] and os.getcwd().startswith({str(tmp_path)!r}) and 'SOME_SECRET' not in os.environ"
    assert run_program(program, "import os\n" + test) == "passed"
    assert not list(tmp_path.iterdir())


def test_a_program_can_use_installed_packages():
    assert run_program("import numpy\ndef f(): return numpy.int64(numpy.ones(3).sum())", "assert f() == 3") == "passed"


# Attempts to pass `assert f() == 1` that the judge must see through.
CHEATS = {
    "equal to everything": "class E:\n    def __eq__(self, other): return True\ndef f(): return E()",
    "ends early": "import os\ndef f(): os._exit(0)",
    "finds the test in memory": (
        "import gc, sys\n"
        "def f():\n"
        "    frame, texts = sys._getframe(), gc.get_objects()\n"
        "    while frame: texts, frame = texts + list(frame.f_locals.values()), frame.f_back\n"
        "    return 1 if any(isinstance(text, str) and 'f() == ' in text[:20] for text in texts) else 2"
    ),
    "replaces Python's names": "import builtins\nbuiltins.AssertionError = builtins.int\ndef f(): return 2",
    "answers before it is asked": (
        "import os\n"
        "for descriptor in range(30):\n"
        '    try: os.write(descriptor, b\'{"value": null, "after": []}\\n\' * 3)\n'
        "    except OSError: pass\n"
        "os._exit(0)"
    ),
    "floods": (
        "import os\n"
        "while True:\n"
        "    for descriptor in range(30):\n"
        "        try: os.write(descriptor, b'x' * 65536)\n"
        "        except OSError: pass"
    ),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_program_cannot_give_itself_the_verdict(cheat):
    assert run_program(CHEATS[cheat], "assert f() == 1").startswith("failed: ")


# What a program must not be able to do: each ends with True if it could.
FORBIDDEN = {
    "mount": "done = libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0",
    "new user namespace": "done = libc.unshare(0x10000000) == 0",
    "other network namespace": (
        "done = False\n"
        "for path in glob.glob('/proc/*/ns/net'):\n"
        "    try: done = done or libc.setns(os.open(path, os.O_RDONLY), 0) == 0\n"
        "    except OSError: pass"
    ),
    "environment of hft": (
        "done = False\n"
        "for path in glob.glob('/proc/[0-9]*/environ'):\n"
        "    try: done = done or b'SOME_SECRET=' in open(path, 'rb').read()\n"
        "    except OSError: pass"
    ),
    "process": "try: done = os.fork() >= 0\nexcept OSError: done = False",
    "thread": (
        "import threading\ntry: threading.Thread(target=print).start(); done = True\nexcept RuntimeError: done = False"
    ),
    "signal": "try: os.kill(os.getpid(), 0); done = True\nexcept OSError: done = False",
    "become another user": "try: os.setuid(1); done = True\nexcept OSError: done = False",
}


@pytest.mark.skipif(os.uname().machine not in MACHINES, reason="system calls have other numbers on this machine")
@pytest.mark.parametrize("attempt", FORBIDDEN)
def test_a_program_has_no_rights(attempt, monkeypatch):
    if attempt == "environment of hft" and os.getuid() != 0 and not isolation():
        pytest.skip("the kernel refuses namespaces: a program can read what belongs to its user")
    monkeypatch.setenv("SOME_SECRET", "x")
    program = "import ctypes, glob, os\nlibc = ctypes.CDLL(None)\n" + FORBIDDEN[attempt]
    assert run_program(program, "assert done is False") == "passed"


def test_the_network_is_blocked_if_the_kernel_allows_it():
    if NETWORK not in isolation():
        pytest.skip("the kernel of this machine refuses a network namespace")
    # With a network the error would be a ConnectionRefusedError, because nothing listens on this port.
    program = "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)"
    assert run_program(program) == "failed: OSError"


def test_only_its_folder_is_written_if_the_kernel_allows_it(tmp_path):
    if FILES not in isolation():
        pytest.skip("the kernel of this machine refuses a mount namespace")
    (tmp_path / "mine").write_text("mine")
    assert run_program(f"open({str(tmp_path / 'mine')!r}, 'w')") == "failed: OSError"
    assert (tmp_path / "mine").read_text() == "mine"


def test_all_descendants_are_ended_without_namespaces():
    """In a process of its own, whose children are ended."""
    code = """
import os, time
from hft_cli.evaluation import isolation
isolation._new_namespaces = lambda: False
assert isolation.isolate(None) == []
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        os.write(write, b"started")
        time.sleep(600)
    os._exit(0)
os.read(read, 7)
os.close(write)
isolation.end_children()
assert os.read(read, 1) == b""  # no process has the other end open
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), timeout=300, check=False)
    assert done.returncode == 0


def test_a_test_sees_the_names_of_the_program():
    program = """
import math
class Point:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
def first(points): return points[0]
def sort(values): values.sort()
def count():
    while True: yield 1
def fail(): raise ValueError("no")
"""
    test = """
assert first([Point(1), Point(2)]) == Point(1) != Point(2)
assert first([Point(7)]).x == 7 and math.isclose(math.pi, 3.14, abs_tol=0.01)
values = [3, 1, 2]
assert sort(values) is None and values == [1, 2, 3]
ones = count()
assert [next(ones), next(ones)] == [1, 1]
try:
    fail()
except ValueError as error:
    assert str(error) == "no"
else:
    assert False
"""
    assert run_program(program, test) == "passed"
    assert run_program("def f(): raise KeyError", "f()") == "failed: KeyError"
    assert run_program("class Own(Exception): pass\ndef f(): raise Own", "f()") == "failed: Own"
    assert run_program("f = 1", "g()") == "failed: NameError"


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.binary()
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.builds(range, st.integers(), st.integers()),
    lambda values: st.lists(values) | st.lists(values).map(tuple) | st.dictionaries(st.integers() | st.text(), values),
    max_leaves=10,
) | st.sets(st.integers())


@given(value=PLAIN)
def test_plain_values_pass_as_they_are(value):
    passed = decode(encode(value, lambda other: pytest.fail(f"{other!r} is not plain")), None)
    assert type(passed) is type(value)
    assert passed == value or repr(passed) == repr(value)  # NaN is not equal to itself, and sets have no order


@pytest.mark.parametrize("value", [{}, {"list": 1}, {"int": "x"}, {"module": "numpy"}, {"a": 1, "b": 2}, {"call": []}])
def test_what_is_no_value_is_refused(value):
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError, ProgramError)):
        decode(value, None)


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
