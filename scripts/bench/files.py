"""Time Half-Reset and `hft verify` on two random models beside `cp` and hashing of the same files.

    python scripts/bench/files.py --gigabytes 2 --repeats 3 --folder /tmp/bench

The models are Llamas in bfloat16, in shards, and in the page cache. Each repeat runs all commands one after the other;
the table has the medians. The start-up of a command is that of a Half-Reset of the embedded model, and is taken off.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from table import Row, markdown

from hft_cli.checkpoint.architectures import shapes_from_fields
from hft_cli.checkpoint.tensors import StoredTensor, Writer
from hft_cli.files import write_json
from hft_cli.paths import resolve_path

SHARDS = 6
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32_000, "dtype": "bfloat16",
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
}  # fmt: skip


def write_model(folder: Path, gigabytes: float, seed: int) -> None:
    """A Llama with random bits in SHARDS files."""
    folder.mkdir(parents=True)
    config = {**CONFIG, "num_hidden_layers": 1}
    while _bytes({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}) < gigabytes * 1e9:
        config["num_hidden_layers"] += 1
    write_json(folder / "config.json", config)
    shapes = shapes_from_fields(config) or {}
    names = sorted(shapes)
    index = {}
    block = hashlib.shake_128(str(seed).encode()).digest(1 << 20)
    for shard in range(SHARDS):
        file = folder / f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        chosen = {
            name: StoredTensor(file, "BF16", shapes[name], 0, 2 * _elements(shapes[name]))
            for name in names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        }
        with Writer(file, chosen, {"format": "pt"}) as writer:
            for name, tensor in chosen.items():
                whole, rest = divmod(tensor.size, len(block))
                writer.add(name, [*[block] * whole, block[:rest]])
                index[name] = file.name
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    for file in Path(resolve_path("pocket:model")).glob("token*"):
        shutil.copy(file, folder)


def _elements(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def _bytes(config: dict[str, Any]) -> int:
    return 2 * sum(map(_elements, (shapes_from_fields(config) or {}).values()))


def hash_both(*folders: Path) -> None:
    files = [file for folder in folders for file in folder.glob("*.safetensors")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_hash, files))


def _hash(path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def hft(cache: Path, *arguments: object) -> None:
    command = [sys.executable, "-m", "hft_cli", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "XDG_CACHE_HOME": str(cache)})


def measure(work: Path, gigabytes: float, repeats: int) -> dict[str, list[float]]:
    """Name -> seconds of each repeat."""
    base, tuned, out = work / "base", work / "tuned", work / "out"
    write_model(base, gigabytes, seed=1)
    write_model(tuned, gigabytes, seed=2)
    pocket = resolve_path("pocket:model")
    time.sleep(3)  # files that have just changed are not kept in the cache of hashes
    times: dict[str, list[float]] = {}

    def take(name: str, function: Callable[..., object], *arguments: object) -> None:
        start = time.perf_counter()
        function(*arguments)
        times.setdefault(name, []).append(time.perf_counter() - start)

    cache, copy, run, again = (out / name for name in ("cache", "copy", "run", "again"))
    reset = (cache, "train", "method=half_reset", f"model.path={tuned}", f"model.base={base}")
    small = (cache, "train", "method=half_reset", f"model.path={pocket}", f"model.base={pocket}")
    for _ in range(repeats):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        hash_both(base, tuned)  # into the page cache
        take("cp -r of the model", subprocess.check_call, ["cp", "-r", str(tuned), str(copy)])
        take("hashing both models", hash_both, base, tuned)
        take("start-up", hft, *small, f"output_dir={out}/small")
        take("Half-Reset", hft, *reset, f"output_dir={run}")
        shutil.rmtree(copy)
        take("Half-Reset, hashes known", hft, *reset, f"output_dir={again}")
        shutil.rmtree(again)
        take("hft verify", hft, cache, "verify", run)
    return times


def rows(work: Path, gigabytes: float, repeats: int) -> list[Row]:
    """The measurements with their bars, those of `hft` without its start-up."""
    times = measure(work, gigabytes, repeats)
    copy, hashing, start = (
        statistics.median(times[name]) for name in ("cp -r of the model", "hashing both models", "start-up")
    )
    bars = {
        "Half-Reset": 1.25 * (copy + hashing),
        "Half-Reset, hashes known": 1.25 * copy,
        "hft verify": 1.25 * 2 * hashing,
    }
    label = f"{gigabytes:g} GB, "
    return [
        Row(label + name, tuple(value - start * (name in bars) for value in values), bar=bars.get(name))
        for name, values in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of each model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the models are written; a temporary folder if left out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        print(markdown(rows(Path(work), arguments.gigabytes, arguments.repeats)))


if __name__ == "__main__":
    main()
