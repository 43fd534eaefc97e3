"""Feed arbitrary bytes to everything that reads a file, a message or an argument: only a clear error may come out.

    pip install atheris
    python scripts/fuzz.py [TARGET …] [--runs N] [--findings FOLDER]

Each target takes bytes, and turns them into its input: as they are, or as JSON of the keys and values that the reader
knows, with which it gets further. It must accept the input or raise an error that hft reports in one line. atheris
(libFuzzer) looks for inputs that reach new lines. What it finds goes into FOLDER; the inputs that were found so far are
in tests/findings, and tests/test_fuzz.py tries them, and a few hundred random ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.architectures import shapes_from_fields
from hft_cli.checkpoint.model_config import read_model_config
from hft_cli.checkpoint.tensors import read_header
from hft_cli.cli.overrides import hydra_arguments
from hft_cli.config.schema import read_config
from hft_cli.data.files import read_rows
from hft_cli.data.preferences import read_preference
from hft_cli.data.rows import ChatReader
from hft_cli.data.turns import Names
from hft_cli.errors import NodeError, UserError
from hft_cli.files import read_record
from hft_cli.launch.jobs import WORKERS, read_job
from hft_cli.launch.peer import Peer
from hft_cli.run_dir import FrozenRecord, Ledger, PlanRecord, ResultsRecord, RunDir

FINDINGS = Path(__file__).parents[1] / "tests/findings"

CLEAR = (UserError, NodeError)  # errors that hft reports in one line

SECONDS = 10  # an input that takes longer is a finding

LONGEST = 5000  # letters of an error

MEGABYTES = 4096  # a target that takes more memory is a finding

VALUES = (
    None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e308, float("inf"), float("nan"), 2**31, 2**63, 2**64, -(2**63),
    10**30, "", " ", "a", "user", "assistant", "system", "tool", "null", "0", "\ud800", "\x00", "é", "[]", "{}",
    "x" * 300, [], {},
)  # fmt: skip


class Bytes:
    """Choices that bytes stand for; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def choice(self, choices: Sequence[Any]) -> Any:
        return choices[self.number() % len(choices)]

    @property
    def left(self) -> bytes:
        return self.data[self.at :]


def json_value(source: Bytes, words: Sequence[str], depth: int = 5) -> Any:
    """JSON of the keys and values `words`, and of VALUES."""
    kind = source.number() % 8 if depth else 7
    if kind <= 2:
        return {source.choice(words): json_value(source, words, depth - 1) for _ in range(source.number() % 7)}
    if kind == 3:
        return [json_value(source, words, depth - 1) for _ in range(source.number() % 5)]
    return source.choice(words) if kind <= 5 else source.choice(VALUES)


def json_object(source: Bytes, words: Sequence[str]) -> dict[str, Any]:
    """An object of these keys, with any values."""
    return {source.choice(words): json_value(source, words) for _ in range(1 + source.number() % 8)}


@cache
def _folder() -> Path:
    """A folder in memory for the files that targets read."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="hft-fuzz-", dir=shared if shared.is_dir() else None))


def _file(name: str, content: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(content)
    return path


def _text(source: Bytes, words: Sequence[str]) -> bytes:
    """The bytes as they are, or an object as JSON."""
    if source.number() % 4 == 0:
        return source.left
    return json.dumps(json_object(source, words)).encode("utf-8", "surrogatepass")


TENSOR = (
    "__metadata__",
    "a",
    "b",
    "model.layers.0.mlp.up_proj.weight",
    "dtype",
    "shape",
    "data_offsets",
    "F32",
    "BF16",
)


def header(data: bytes) -> None:
    """The header of a safetensors file, with the length that belongs to it or another one."""
    source = Bytes(data)
    kind = source.number() % 4
    text = _text(source, TENSOR)
    if kind == 0:
        entry = {"dtype": source.choice(TENSOR), "shape": json_value(source, TENSOR, 2), "data_offsets": [0, 4]}
        text = json.dumps({"a": entry}).encode()
    length = len(text) if kind < 3 else int.from_bytes(data[:8], "little")
    read_header(_file("model.safetensors", length.to_bytes(8, "little") + text + bytes(source.number() % 9)))


RECORDS = {"plan.json": PlanRecord, "draws.json": Ledger, "frozen.json": FrozenRecord, "results.json": ResultsRecord}
RECORD_WORDS = (
    "base", "base_sha256", "suite_sha256", "rounds", "name", "round", "seed", "level", "ratio", "updated", "frozen",
    "matrices_reached", "elements_reached", "updated_fraction", "sha256", "tensors", "dtype", "stage", "eval",
    "continual", "verification",
)  # fmt: skip


def ledger(data: bytes) -> None:
    """The records of a run: its plan, draws, frozen tensors and results."""
    source = Bytes(data)
    name = source.choice(list(RECORDS))
    read_record(_file(name, _text(source, RECORD_WORDS)), RECORDS[name])


def config(data: bytes) -> None:
    """A run's config.yaml."""
    source = Bytes(data)
    words = ("seed", "model", "path", "data", "train", "max_steps", "suite", "allow_code", "method", "name", "&a", "*a")
    run = RunDir(_folder())
    _file(run.config.name, _text(source, words))
    read_config(run)


def model_config(data: bytes) -> None:
    """A model's config.json, and the shapes that follow from it."""
    source = Bytes(data)
    words = (
        "model_type", "llama", "mistral", "qwen3", "mixtral", "olmo2", "architectures", "hidden_size", "vocab_size",
        "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "num_local_experts", "tie_word_embeddings", "attention_bias", "rope_scaling", "max_position_embeddings",
    )  # fmt: skip
    shapes_from_fields(read_model_config(_file("config.json", _text(source, words))))


JOB_WORDS = (
    "model", "path", "name", "todo", "data_dir", "batch_size", "seed", "settings", "limit", "chat", "out", "base",
    "draw", "phase", "train", "engine", "rows", "dtype",
)  # fmt: skip


def job(data: bytes) -> None:
    """The job file of a worker."""
    source = Bytes(data)
    kind = source.choice(list(WORKERS))
    read_job(kind, _file(WORKERS[kind].file, _text(source, JOB_WORDS)))


ROW_WORDS = (
    "messages", "role", "content", "user", "assistant", "system", "tool", "prompt", "completion", "instruction",
    "input", "output", "response", "question", "answer", "conversations", "from", "value", "human", "gpt", "text",
    "chosen", "rejected", "score_chosen", "score_rejected", "weight", "train", "loss", "mask", "tools", "tool_calls",
    "function", "name", "arguments", "history", "type", "image", "reasoning_content", "thinking",
    "chat_template_kwargs", "id", "dataset", "Human: a\n\nAssistant: b", "<think>a</think>b",
)  # fmt: skip


def rows(data: bytes) -> None:
    """A file of rows, each read as a chat."""
    source = Bytes(data)
    name = source.choice(("rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.csv", "rows.parquet", "rows.arrow"))
    lines = [_text(source, ROW_WORDS) for _ in range(1 + source.number() % 2)]
    read = ChatReader("auto", Names())
    for _, row in read_rows(str(_file(name, b"\n".join(lines))), "train"):
        read(row)


def row(data: bytes) -> None:
    """A row, read as a chat and as a pair."""
    source = Bytes(data)
    for read in (ChatReader("auto", Names()), lambda fields: read_preference(fields, Names())):
        try:
            read(json.loads(json.dumps(json_object(source, ROW_WORDS))))
        except CLEAR:
            continue


class Wire:
    """A socket from which all bytes come at once."""

    def __init__(self, data: bytes) -> None:
        self.read, write = os.pipe()
        os.write(write, data[: 1 << 15])
        os.close(write)

    def setsockopt(self, *option: Any) -> None:
        pass

    def fileno(self) -> int:
        return self.read

    def recv(self, size: int) -> bytes:
        return os.read(self.read, size)


PEER_WORDS = (
    "rank", "host", "facts", "versions", "config", "files", "ended", "log", "stop", "mistake", "failed", "go", "start",
    "worker", "job", "end", "bye", "reason", "status",
)  # fmt: skip


def protocol(data: bytes) -> None:
    """What a stranger, or a node that knows the secret, sends to node 0."""
    source = Bytes(data)
    stranger = source.number() % 2 == 0
    text = _text(source, PEER_WORDS)
    sender = Peer(Wire(b""), "a", b"key")  # type: ignore[arg-type]
    line = text + b"\n" if stranger else sender.line(text)
    peer = Peer(Wire(line), "b", None if stranger else b"key", leads=True)  # type: ignore[arg-type]
    try:
        peer.receive_hello(b"secret", set()) if stranger else peer.receive()
    finally:
        os.close(sender.sock.fileno())
        os.close(peer.sock.fileno())


ARGUMENT_WORDS = (
    "method=hft", "+method=hft", "model.path=", "data.path=", "output_dir=", "experiment=demo", "size=pocket", "-m",
    "--cfg", "job", "+", "~", "=", "'", '"', "\\", "$", "{", "}", "[", "]", ",", "(", ")", " ", "data.columns.a=",
    "model.kinds={a:attn}", "${oc.env:HOME}", "suite.benchmarks.mmlu.limit=1", "seed=1,2", "é", "\n", "@", "run=",
)  # fmt: skip


def arguments(data: bytes) -> None:
    """What stands behind `hft train`, up to the configuration that Hydra composes of it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    source = Bytes(data)
    words: list[str] = []
    for _ in range(1 + source.number() % 4):
        parts = [source.choice(ARGUMENT_WORDS) for _ in range(1 + source.number() % 4)]
        words.append("".join(parts) if source.number() % 4 else source.left[:40].decode(errors="replace"))
    translated = hydra_arguments(source.choice(("train", "plan", "eval")), words)
    with suppress(HydraException):  # cli/main.py makes one line of it
        OverridesParser.create().parse_overrides([word for word in translated if not word.startswith("-")])


@dataclass(frozen=True)
class Target:
    """What bytes are fed to, and its share of the runs."""

    feed: Callable[[bytes], None]
    share: float


TARGETS = {
    "header": Target(header, 0.2),
    "ledger": Target(ledger, 0.1),
    "config": Target(config, 0.01),
    "model_config": Target(model_config, 0.1),
    "job": Target(job, 0.1),
    "rows": Target(rows, 0.12),
    "row": Target(row, 0.2),
    "protocol": Target(protocol, 0.15),
    "arguments": Target(arguments, 0.02),
}


def feed(name: str, data: bytes) -> None:
    """Feed a target. Whatever is not a clear error is raised."""
    try:
        TARGETS[name].feed(data)
    except CLEAR as error:
        if not 0 < len(str(error).strip()) < LONGEST:
            raise AssertionError(f"an error of {len(str(error))} letters") from error


def fuzz(name: str, runs: int, findings: Path) -> None:
    """Let atheris feed a target, in this process. It ends the process."""
    import atheris

    atheris.instrument_all()
    corpus = findings / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-runs={runs}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", "-max_len=600", "-verbosity=1"]
    options += [f"-artifact_prefix={findings}/{name}-", str(corpus)]
    atheris.Setup([sys.argv[0], *options], lambda data: feed(name, data))
    atheris.Fuzz()


def main() -> int:
    """Run the targets one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; none: all")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs in all")
    parser.add_argument("--findings", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        fuzz(options.targets[0], options.runs, options.findings)
    names = options.targets or list(TARGETS)
    whole = sum(TARGETS[name].share for name in names)
    failed = []
    for name in names:
        runs, start = round(options.runs * TARGETS[name].share / whole), time.monotonic()
        command = [sys.executable, __file__, name, "--here", "--runs", str(runs), "--findings", str(options.findings)]
        status = subprocess.run(command, check=False).returncode
        print(f"{name}: {runs:,} inputs, {time.monotonic() - start:.0f} s, status {status}", flush=True)
        failed += [name] if status else []
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
