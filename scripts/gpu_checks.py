"""Check on GPUs what the tests check on CPUs only: engines, precisions, optimizers, losses, resume, memory, generation.

    python scripts/gpu_checks.py [--only WORD] [--size 1b] [--out gpu.json]

Each check is one or two runs of `hft train` on the embedded model, whose frozen matrices are proven bit for bit, or one
of a random Llama of `--size`, whose peak memory is compared with the plan. ZeRO uses all GPUs, over NCCL. `--only
optimizer` runs the checks whose names have that word. On a machine without a GPU the same checks run on the CPU, to try
this script. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "bench"))

import step
from table import machine

from hft_cli.config.optimizers import OPTIMIZERS
from hft_cli.files import read_json, write_json
from hft_cli.text import markdown_table

ENGINES = ("single", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
SMALL = ("data=pocket_order", "suite=none", "train.log_every=1", "train.learning_rate=1e-3", "train.max_length=64",
         "train.batch_size=8", "train.micro_batch_size=2", "data.max_rows=64", "data.test_path=null",
         "train.max_steps=10")  # fmt: skip
# Ways to train -> (engine, arguments).
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fft": ("zero2", ("method=fft",)),
    "lora": ("single", ("method=lora",)),
    "dpo": ("zero3", ("method=hft_dpo", "data=pocket_preferences", "dpo.max_steps=10", "dpo.learning_rate=1e-3")),
    "kl": ("zero2", ("anchor=kl",)),
    "l2_sp": ("zero2", ("anchor=l2_sp",)),
    "gem": ("zero2", ("data=pocket_two_tasks", "continual=gem")),
    "replay": ("single", ("data=pocket_two_tasks", "continual=replay")),
    "mofo": ("single", ("method=fft", "train.momentum_filter=0.1")),
    "importance": ("single", ("selection=importance", "data.general=pocket:facts.jsonl")),
    "packing": ("single", ("train.packing=true",)),
    "activation checkpointing": ("zero3", ("train.gradient_checkpointing=true",)),
}
# Attention -> the package that it needs.
ATTENTION = {
    "sdpa": None,
    "eager": None,
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}
PATIENCE = 600  # seconds after which a run hangs


@dataclass(frozen=True)
class Outcome:
    """What a check found. `fault` is empty if all is well; `skipped` says why it was not run."""

    name: str
    seconds: float = 0.0
    found: str = ""
    fault: str = ""
    skipped: str = ""


class Failed(Exception):
    """A command failed, or what it left is wrong."""


def train(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run `hft train` and return its results; Failed with the end of what it said, or if a frozen weight moved."""
    shutil.rmtree(folder, ignore_errors=True)
    method = () if any(each.startswith("method=") for each in arguments) else ("method=hft",)
    done = subprocess.run(_command(folder, *method, *arguments), capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        raise Failed(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}")
    results: dict[str, Any] = read_json(folder / "results.json")
    if not all(each["frozen_bit_identical"] for each in results["rounds"]):
        raise Failed("frozen weights moved")
    return results


def _command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "hft_cli", "train", "engine.device=auto", f"output_dir={folder}", *arguments]


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def engine_check(work: Path, engine: str, dtype: str) -> str:
    """Train on an engine; its losses must be those of one process."""
    train(work / "run", *SMALL, f"engine={engine}", f"model.dtype={dtype}")
    train(work / "single", *SMALL, "engine=single", f"model.dtype={dtype}")
    return _same_losses(work, 0.01 if dtype == "float32" else 0.05)


def attention_check(work: Path, attention: str) -> str:
    """Train without padding; its losses must be those with padding."""
    arguments = (*SMALL, f"model.attention={attention}", "model.dtype=bfloat16")
    train(work / "run", *arguments, "train.padding_free=true")
    train(work / "single", *arguments)
    return _same_losses(work, 0.05)


def _same_losses(work: Path, tolerance: float) -> str:
    pairs = list(zip(losses(work / "run"), losses(work / "single"), strict=True))
    largest = max(abs(a - b) / b for a, b in pairs)
    if largest > tolerance:
        raise Failed(f"losses differ by up to {largest:.1%}")
    return f"losses differ by at most {largest:.2%}"


def way_check(work: Path, engine: str, arguments: tuple[str, ...]) -> str:
    train(work / "run", *SMALL, f"engine={engine}", "model.dtype=bfloat16", *arguments)
    return f"last loss {losses(work / 'run')[-1]:.3f}"


def resume_check(work: Path, arguments: tuple[str, ...]) -> str:
    """Stop a run and continue it: it must end with the bits of a run that was left alone."""
    more = (*SMALL, *arguments, "train.max_steps=300", "train.save_every=50")
    train(work / "whole", *more)
    folder = work / "stopped"
    command = _command(folder, "method=hft", *more)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    while process.poll() is None and not ((folder / "metrics.jsonl").exists() and losses(folder)):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    if process.wait(PATIENCE) == 0:
        raise Failed("the run ended before it could be stopped")
    at = len(losses(folder))
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    if any(file.read_bytes() != (folder / "model" / file.name).read_bytes() for file in _weights(work / "whole")):
        raise Failed(f"stopped at step {at} and continued, the model differs from that of a run left alone")
    return f"same bits, stopped at step {at}"


def _weights(run: Path) -> Iterator[Path]:
    return (run / "model").glob("*.safetensors")


def memory_check(work: Path, model: Path, arguments: tuple[str, ...]) -> str:
    """Train a larger model; the peak of memory must be within 5% of the plan."""
    results = train(
        work / "run", f"model.path={model}/model", f"data.path={model}/rows.jsonl", "data.name=rows", "suite=none",
        "data.loss=all", "train.max_steps=4", "train.batch_size=8", "train.micro_batch_size=8",
        *arguments,
    )  # fmt: skip
    planned = read_json(work / "run/plan.json")["costs"]["rounds"][0]["memory_bytes"]["total"]
    peak = results["rounds"][0]["peak_memory_bytes"]
    found = f"peak {peak / 1e9:.2f} GB, planned {planned / 1e9:.2f}"
    if step.device() == "cuda" and abs(peak / planned - 1) > 0.05:
        raise Failed(f"{found}: {peak / planned - 1:+.0%}")
    return found


def generation_check(work: Path) -> str:
    """Generate answers with vLLM; they must score as those of transformers."""
    scores = []
    for backend in ("transformers", "vllm"):
        results = train(work / backend, "train.max_steps=60", "suite=pocket", f"generation.backend={backend}",
                        "data.metric=exact_match")  # fmt: skip
        scores.append(results["eval"]["after"])
    if scores[0] != scores[1]:
        raise Failed(f"{scores[0]} and {scores[1]}")
    return "same scores"


def checks(model: Path) -> dict[str, tuple[str | None, Callable[[Path], str]]]:
    """Name -> (a package that it needs, what runs it in a folder)."""
    found: dict[str, tuple[str | None, Callable[[Path], str]]] = {}
    for engine in ENGINES:
        for dtype in ("float32", "bfloat16"):
            found[f"engine {engine}, {dtype}"] = None, partial(engine_check, engine=engine, dtype=dtype)
    for name, (engine, arguments) in WAYS.items():
        found[f"method {name}, {engine}"] = None, partial(way_check, engine=engine, arguments=arguments)
    for attention, package in ATTENTION.items():
        found[f"padding-free, {attention}"] = package, partial(attention_check, attention=attention)
    for engine in ("single", "zero2", "zero3"):
        found[f"resume, {engine}"] = None, partial(resume_check, arguments=(f"engine={engine}", "model.dtype=bfloat16"))
    for name, optimizer in OPTIMIZERS.items():
        arguments = ("engine=single", f"train.optimizer={name}", "train.learning_rate=1e-4")
        found[f"resume, optimizer {name}"] = optimizer.package, partial(resume_check, arguments=arguments)
    for engine in ("single", "zero2", "zero3"):
        for method in ("hft", "fft"):
            for checkpointing in ("false", "true"):
                arguments = (f"method={method}", f"engine={engine}", "model.dtype=bfloat16",
                             f"train.gradient_checkpointing={checkpointing}")  # fmt: skip
                name = f"memory, {method} on {engine}" + (", checkpointing" if checkpointing == "true" else "")
                found[name] = None, partial(memory_check, model=model, arguments=arguments)
    found["generation by vLLM"] = "vllm", generation_check
    return found


def run(name: str, package: str | None, check: Callable[[Path], str], work: Path) -> Outcome:
    if package is not None and find_spec(package) is None:
        return Outcome(name, skipped=f"{package} is not installed")
    start = time.perf_counter()
    try:
        found, fault = check(work), ""
    except (Failed, subprocess.SubprocessError, OSError) as error:
        found, fault = "", str(error)
    shutil.rmtree(work, ignore_errors=True)
    return Outcome(name, time.perf_counter() - start, found, fault)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only the checks whose names have this word")
    parser.add_argument("--size", choices=step.SIZES, default="1b", help="of the model whose memory is measured")
    parser.add_argument("--out", type=Path, help="write the outcomes to this JSON file, after each check")
    arguments = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        chosen = {name: check for name, check in checks(model).items() if arguments.only in name}
        if any(name.startswith("memory") for name in chosen):
            model.mkdir()
            step.prepare(model, arguments.size, length=512, steps=4)
        for name, (package, check) in chosen.items():
            outcomes.append(run(name, package, check, Path(folder, "work")))
            print(" | ".join(_row(outcomes[-1])), file=sys.stderr, flush=True)
            if arguments.out:
                content = {"machine": machine(), "checks": [asdict(outcome) for outcome in outcomes]}
                write_json(arguments.out, content)
    failed = [outcome for outcome in outcomes if outcome.fault]
    print(markdown_table(["check", "seconds", "outcome"], [_row(outcome) for outcome in outcomes]))
    sys.exit(1 if failed else 0)


def _row(outcome: Outcome) -> list[str]:
    says = f"FAILED: {outcome.fault}" if outcome.fault else outcome.found or f"skipped: {outcome.skipped}"
    return [outcome.name, f"{outcome.seconds:.1f}", says]


if __name__ == "__main__":
    main()
