"""Two processes that check a program which a model wrote: one runs the program, the other its test.

The judge runs the test and prints the verdict. The program's process only answers what the judge asks for: call this
function with these values, get this attribute. A value passes as JSON. What is not plain data stays in its process, and
the judge has a `Remote` for it. So a program can give wrong values, but it cannot reach the test or the verdict, and an
object of its own that calls itself equal to everything equals nothing.

Started by `sandbox.py` as `python -I -S -c START`. Standard library only.
"""

from __future__ import annotations

import builtins
import json
import operator
import os
import signal
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from hft_cli.evaluation.isolation import PROCESSES, end_children, hide_processes, isolate, limit

LONGEST = 2**22  # bytes of a message

# What the judge can have the program's process do with an object.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "getattr": getattr,
    "getitem": operator.getitem,
    "iter": iter,
    "next": next,
    "len": len,
    "eq": operator.eq,
}

ENDED_EARLY = "failed: ended early"

CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class ProgramError(Exception):
    """The program raised an exception that has no class here, ended, or sent something else than an answer."""


class Channel:
    """Two pipes to the other process, which carry a line of JSON for each message."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write = read, write
        self.received = b""

    def send(self, message: Any) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(self.write, data) :]

    def receive(self) -> Any:
        """The next message; None when the other process has ended.

        Raises:
            ProgramError: if it is too long, or not JSON.
        """
        while b"\n" not in self.received:
            data = os.read(self.read, 1 << 16)
            if not data:
                return None
            self.received += data
            if len(self.received) > LONGEST:
                raise ProgramError("failed: too long an answer")
        line, _, self.received = self.received.partition(b"\n")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise ProgramError("failed: no answer") from None


# Kind of a plain value, its class, to JSON, and from JSON.
PLAIN: tuple[tuple[str, type, Callable[[Any], Any], Callable[[Any], Any]], ...] = (
    ("int", int, hex, lambda text: int(text, 16)),
    ("float", float, float.hex, float.fromhex),
    (
        "complex",
        complex,
        lambda value: [value.real.hex(), value.imag.hex()],
        lambda parts: complex(*map(float.fromhex, parts)),
    ),
    ("decimal", Decimal, str, Decimal),
    (
        "fraction",
        Fraction,
        lambda value: [hex(value.numerator), hex(value.denominator)],
        lambda parts: Fraction(*(int(part, 16) for part in parts)),
    ),
    ("bytes", bytes, bytes.hex, bytes.fromhex),
    (
        "range",
        range,
        lambda value: [hex(part) for part in (value.start, value.stop, value.step)],
        lambda parts: range(*(int(part, 16) for part in parts)),
    ),
)


def encode(value: Any, reference: Callable[[Any], int]) -> Any:
    """A value as JSON. `reference` gives the number of an object that is not plain data."""
    if value is None or isinstance(value, bool | str):
        return value
    for kind, plain, to_json, _ in PLAIN:
        if isinstance(value, plain):
            return {kind: to_json(value)}
    if isinstance(value, dict):
        return {"dict": [[encode(part, reference) for part in item] for item in value.items()]}
    for kind, container in CONTAINERS.items():
        if isinstance(value, container):
            return {kind: [encode(part, reference) for part in value]}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encode(value.item(), reference)
    if type(value) is type(sys) and value.__name__ in sys.stdlib_module_names:
        return {"module": value.__name__}
    return {"object": reference(value)}


def decode(value: Any, object_of: Callable[[int], Any]) -> Any:
    """The value that was encoded. `object_of` gives the object, or its `Remote`, for a number.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, ArithmeticError: if it is not an encoded value.
    """
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in CONTAINERS:
        return CONTAINERS[kind](decode(part, object_of) for part in content)
    if kind == "dict":
        return {decode(key, object_of): decode(part, object_of) for key, part in content}
    return object_of(content) if kind == "object" else FROM_JSON[kind](content)


def _standard_module(name: str) -> Any:
    if name not in sys.stdlib_module_names:
        raise ValueError(name)
    return __import__(name)


FROM_JSON: dict[str, Callable[[Any], Any]] = {"module": _standard_module, **{row[0]: row[3] for row in PLAIN}}


# The program's process.


def serve(channel: Channel) -> None:
    """Run the program of the first message, then answer the judge until it closes the channel."""
    job = channel.receive()
    sys.path += job["path"]
    limit(job["seconds"], job["memory"])
    names: dict[str, Any] = {"__name__": "__main__"}
    objects: dict[int, Any] = {}  # id -> object that the judge has a Remote for; they stay alive

    def reference(value: Any) -> int:
        objects[id(value)] = value
        return id(value)

    def answer(operation: str, parts: list[Any], named: dict[str, Any]) -> dict[str, Any]:
        values = [decode(part, objects.__getitem__) for part in parts]
        if operation == "run":
            exec(compile(values[0], "program.py", "exec"), names)
            return {"value": None}
        if operation == "name":
            value = names[values[0]]
        else:
            keywords = {name: decode(part, objects.__getitem__) for name, part in named.items()}
            value = OPERATIONS[operation](*values, **keywords)
        return {"value": encode(value, reference), "after": [encode(part, reference) for part in values]}

    request: Any = ["run", [job["program"]], {}]
    while request is not None:
        try:
            message = answer(*request)
        except BaseException as error:  # also SystemExit: a program that exits before its test has not passed
            message = {"error": type(error).__name__, "text": _text(error)}
        channel.send(message)
        request = channel.receive()


def _text(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:
        return ""


# The judge's process.


class Program:
    """The program, as the judge sees it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def ask(self, operation: str, *values: Any, **named: Any) -> Any:
        """Have the program's process do one of OPERATIONS. Lists, dicts and sets get the changes that it made to them.

        Raises:
            Exception: what the program raised, if that is a class of Python's own.
            ProgramError: otherwise.
        """
        encoded = [encode(value, _number) for value in values]
        try:
            self.channel.send([operation, encoded, {name: encode(value, _number) for name, value in named.items()}])
        except BrokenPipeError:
            raise ProgramError(ENDED_EARLY) from None
        return self.answer(values)

    def answer(self, values: tuple[Any, ...] = ()) -> Any:
        """The answer to a request with these values."""
        message = self.channel.receive()
        if message is None:
            raise ProgramError(ENDED_EARLY)
        if isinstance(message, dict) and "error" in message:
            raise _exception(str(message["error"]), str(message.get("text")))
        try:
            after = [decode(part, self.remote) for part in message.get("after", [])]
            value = decode(message["value"], self.remote)
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            raise ProgramError("failed: no answer") from None
        for here, there in zip(values, after, strict=False):
            _update(here, there)
        return value

    def remote(self, number: int) -> Remote:
        return Remote(self, number)


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError wants five values
            pass
    return ProgramError(f"failed: {name}")


def _update(here: Any, there: Any) -> None:
    """Give a list, dict or set the content that the program left in it."""
    if isinstance(here, list) and isinstance(there, list):
        here[:] = there
    elif isinstance(here, dict | set) and type(here) is type(there):
        here.clear()
        here.update(there)


class Remote:
    """An object of the program's process."""

    def __init__(self, program: Program, number: int) -> None:
        self._program, self._number = program, number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._program.ask("call", self, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return self._program.ask("getattr", self, name)

    def __getitem__(self, key: Any) -> Any:
        return self._program.ask("getitem", self, key)

    def __iter__(self) -> Any:
        return self._program.ask("iter", self)

    def __next__(self) -> Any:
        return self._program.ask("next", self)

    def __len__(self) -> int:
        return int(self._program.ask("len", self))

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._program.ask("eq", self, other) is True

    def __hash__(self) -> int:
        return hash(self._number)


def _number(value: Any) -> int:
    if isinstance(value, Remote):
        return int(vars(value)["_number"])
    raise TypeError(f"A test cannot give the program a {type(value).__name__}.")


class Names(dict[str, Any]):
    """The names of a test: its own, then Python's, then the program's."""

    def __init__(self, program: Program) -> None:
        super().__init__(__name__="__main__")
        self.program = program

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        return self.program.ask("name", name)


def judge() -> NoReturn:
    """Start the program's process, run the test of the job on standard input, and print the verdict as JSON."""
    reached = isolate(Path.cwd())
    to_program, to_judge = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # before the job is read: the program's process never has the test
        os.close(to_program[1])
        os.close(to_judge[0])
        os.setsid()  # a signal to the group of the program does not reach the judge
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        if PROCESSES in reached:
            hide_processes()
        serve(Channel(to_program[0], to_judge[1]))
        os._exit(0)
    os.close(to_program[0])
    os.close(to_judge[1])
    job = json.load(sys.stdin)

    def finish(result: str) -> NoReturn:
        signal.setitimer(signal.ITIMER_REAL, 0)
        end_children()
        print(json.dumps({"result": result, "isolation": reached}), flush=True)
        os._exit(0)

    signal.signal(signal.SIGALRM, lambda *_: finish("timed out"))
    signal.setitimer(signal.ITIMER_REAL, job["seconds"] + 1)
    result = verdict(Program(Channel(to_judge[0], to_program[1])), job)
    if result == ENDED_EARLY and os.WTERMSIG(os.waitpid(child, 0)[1]) in (signal.SIGKILL, signal.SIGXCPU):
        result = "timed out"  # more processor time than it may have
    finish(result)


def verdict(program: Program, job: dict[str, Any]) -> str:
    """Run the program, then the test."""
    test = job.pop("test")
    try:
        program.channel.send(job)
        program.answer()
        exec(compile(test, "test.py", "exec"), Names(program))
    except ProgramError as error:
        return str(error)
    except BaseException as error:
        return f"failed: {type(error).__name__}"
    return "passed"
