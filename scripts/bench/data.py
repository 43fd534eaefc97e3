"""Time the preparation of rows: read, check, render and tokenize N chats, and again from the cache, with peak memory.

    python scripts/bench/data.py ROWS.jsonl --model MODEL --rows 300000

The rows of the file are repeated, each time with another number in its first turn, until there are N. Each measurement
is a process of its own. Memory is what the process and its helpers hold themselves (Pss_Anon of /proc, the largest sum
that was sampled): pages of mapped files, which the system can drop, do not count, and shared pages count once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def write_rows(source: Path, rows: int, out: Path) -> None:
    """Write `rows` chats of the shape `messages`, no two of them equal."""
    chats = [json.loads(line) for line in source.read_text().splitlines() if line.strip()]
    with out.open("w") as file:
        for number in range(rows):
            chat = chats[number % len(chats)]
            first, *others = chat["messages"]
            first = {**first, "content": f"{number // len(chats)}. {first['content']}"}
            file.write(json.dumps({**chat, "messages": [first, *others]}) + "\n")


def measure(path: str, model: str, max_length: int) -> dict[str, float]:
    """Prepare the rows once in this process: seconds to read and to tokenize, MB, and the counts."""
    from transformers import AutoTokenizer

    from hft_cli.data.rows import read_chats
    from hft_cli.data.tokenization import tokenize

    tokenizer = AutoTokenizer.from_pretrained(model)
    with Memory() as memory:
        start = time.perf_counter()
        chats = read_chats(path)
        read = time.perf_counter()
        summary = tokenize(chats, tokenizer, max_length=max_length).summary
        end = time.perf_counter()
    return {"read": read - start, "tokenize": end - read, "mb": memory.peak / 1e6, "tokens": summary.tokens}


class Memory:
    """Samples the anonymous memory of this process and its children while it is entered; `peak` in bytes."""

    def __enter__(self) -> Memory:
        self.peak, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.1):
            self.peak = max(self.peak, sum(map(anonymous, family(os.getpid()))))


def family(process: int) -> Iterable[int]:
    """The process and all processes that it has started."""
    yield process
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from family(int(child))


def anonymous(process: int) -> int:
    """Bytes of memory of a process that no file backs, its share of what it shares; 0 if it has ended."""
    try:
        status = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("Pss_Anon")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON lines with `messages`")
    parser.add_argument("--model", default="hft_cli/assets/pocket/model", help="folder of the tokenizer")
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[dict[str, float]]] = {"first": [], "cached": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        write_rows(arguments.file, arguments.rows, path)
        print(f"{arguments.rows:,} chats, {path.stat().st_size / 1e6:,.0f} MB")
        for repeat in range(arguments.repeats):
            os.environ["HF_DATASETS_CACHE"] = str(Path(folder, f"cache{repeat}"))
            for when in found:
                with ProcessPoolExecutor(1, context) as pool:
                    job = pool.submit(measure, str(path), arguments.model, arguments.max_length)
                    found[when].append(job.result())
    print(f"{'':8}{'rows/s':>10}{'read s':>10}{'tokens s':>10}{'peak MB':>10}   median of {arguments.repeats}")
    for when, results in found.items():
        read, tokens, mb = (statistics.median(each[key] for each in results) for key in ("read", "tokenize", "mb"))
        print(f"{when:8}{arguments.rows / (read + tokens):10,.0f}{read:10.1f}{tokens:10.1f}{mb:10,.0f}")


if __name__ == "__main__":
    main()
