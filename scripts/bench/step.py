"""Time an optimizer step of `hft train` beside a hand-written loop, transformers' Trainer, TRL and LoRA by PEFT.

    python scripts/bench/step.py --size 20m --repeats 3 --folder /tmp/bench

All contenders train the same random Llama on the same rows in batches of the same size, with fused AdamW, clipping and
a linear schedule; those named HFT freeze the matrices that `hft train` freezes. Each runs as a process of its own, one
after the other, in every repeat. The table has medians over all steps but the first three of each process.

The limit of HFT / FFT is the share of floating-point operations, from shapes and draw (`hft plan`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from table import Row, markdown

from hft_cli.files import read_json, write_json
from hft_cli.paths import resolve_path

SIZES: dict[str, dict[str, int]] = {
    "20m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20, "num_attention_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY = {"20m": 8192, "1b": 32_000, "7b": 32_000}  # of which the rows have only the embedded tokenizer's 512
SKIPPED = 3  # steps of each process in which caches are filled
ROWS = 8  # of a batch
CONTENDERS = ("loop", "trainer", "trl", "hft")  # each for FFT and HFT; beside them LoRA by TRL and PEFT


def prepare(work: Path, size: str, length: int, steps: int) -> None:
    """Write a random Llama with the embedded tokenizer, and rows of 3/4 to 4/4 of `length` tokens."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(resolve_path("pocket:model"))
    config = LlamaConfig(
        **SIZES[size], vocab_size=VOCABULARY[size], max_position_embeddings=length, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    draw = random.Random(0)
    with (work / "rows.jsonl").open("w") as file:
        for _ in range(ROWS * steps):
            tokens = draw.randint(3 * length // 4, length - 1)  # one more is the end of the row
            text = ""
            while len(tokenizer(text)["input_ids"]) < tokens:
                text += draw.choice("abcdefghijklmnopqrstuvwxyz ")
            file.write(json.dumps({"text": text}) + "\n")


class Batches:
    """The rows of the work folder in batches, in their order."""

    def __init__(self, work: Path, tokenizer: Any) -> None:
        rows = [json.loads(line)["text"] for line in (work / "rows.jsonl").read_text().splitlines()]
        end = tokenizer.eos_token_id
        self.rows = [[*tokenizer(text)["input_ids"], end] for text in rows]
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.rows), ROWS):
            yield self.collate([{"input_ids": ids} for ids in self.rows[start : start + ROWS]])

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        ids = [torch.tensor(row["input_ids"]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad(ids, batch_first=True, padding_value=-100),
        }


def load(work: Path, method: str, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer, with the matrices frozen that `hft train` freezes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    model.config.use_cache = False
    if method == "hft":
        frozen = set(read_json(work / "draw.json")["frozen"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
    return model.to(device()), AutoTokenizer.from_pretrained(work / "model")


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def loop(work: Path, method: str, dtype: str, steps: int) -> list[float]:
    """Seconds of each step of a loop as one writes it by hand."""
    import torch

    model, tokenizer = load(work, method, dtype)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    times = [time.perf_counter()]
    for batch in Batches(work, tokenizer):
        inputs = {name: value.to(device()) for name, value in batch.items()}
        with torch.autocast(device(), torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        times.append(time.perf_counter())
    return [end - start for start, end in pairwise(times)]


def trainer(work: Path, method: str, dtype: str, steps: int) -> list[float]:
    """Seconds of each step of transformers' Trainer."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    model, tokenizer = load(work, method, dtype)
    batches = Batches(work, tokenizer)
    arguments = TrainingArguments(**common(work, dtype, steps), remove_unused_columns=False)
    data = Dataset.from_list([{"input_ids": ids} for ids in batches.rows])
    return timed(Trainer(model, arguments, train_dataset=data, data_collator=batches.collate))


def trl(work: Path, method: str, dtype: str, steps: int) -> list[float]:
    """Seconds of each step of TRL's SFTTrainer; method "lora" adapts all matrices of the layers by PEFT."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(work, method, dtype)
    rows = [{"input_ids": ids, "labels": ids} for ids in Batches(work, tokenizer).rows]
    options = {"skip_prepare_dataset": True}
    checkpointing = {"activation_checkpointing": False}
    arguments = SFTConfig(**common(work, dtype, steps), **checkpointing, dataset_kwargs=options, max_length=None)
    adapter = LoraConfig(r=8, target_modules="all-linear") if method == "lora" else None
    return timed(SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                            peft_config=adapter))  # fmt: skip


def common(work: Path, dtype: str, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(work / "peer"), "per_device_train_batch_size": ROWS, "max_steps": steps,
        "learning_rate": 1e-5, "optim": "adamw_torch_fused", "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": device() == "cpu", "bf16": dtype == "bfloat16",
        "dataloader_pin_memory": device() == "cuda",
    }  # fmt: skip


def timed(peer: Any) -> list[float]:
    """Train, and return the seconds between the logs of the steps."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_log(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    peer.add_callback(Clock())
    peer.train()
    return [end - start for start, end in pairwise(times[:-1])]  # the last log is the summary


def hft(work: Path, method: str, dtype: str, steps: int, *more: str) -> list[float]:
    """Seconds of each step of `hft train`; leaves its draw and plan in the work folder."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = [
        sys.executable, "-m", "hft_cli", "train", f"method={method}", f"model.path={work}/model",
        f"model.dtype={dtype}",
        f"data.path={work}/rows.jsonl", "data.name=bench", "data.loss=all", "suite=none", f"train.max_steps={steps}",
        f"train.batch_size={ROWS}", f"train.micro_batch_size={ROWS}", "train.log_every=1", "train.learning_rate=1e-5",
        "engine.device=auto", f"output_dir={run}", *more,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if method == "hft":
        write_json(work / "draw.json", read_json(run / "draws.json")["rounds"][0])
        write_json(work / "plan.json", read_json(run / "plan.json")["costs"]["rounds"][0])
    logs = [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [end - start for start, end in pairwise(logs)]


RUNNERS: dict[str, Callable[..., list[float]]] = {"loop": loop, "trainer": trainer, "trl": trl, "hft": hft}


def measure(work: Path, dtype: str, steps: int, repeats: int) -> dict[str, list[float]]:
    """`contender method` -> seconds of all its counted steps."""
    times: dict[str, list[float]] = {}
    pairs = [(name, method) for name in reversed(CONTENDERS) for method in ("hft", "fft")] + [("trl", "lora")]
    for repeat in range(repeats):
        first = repeat * len(pairs) // repeats  # the machine's speed drifts: nobody is always first
        order = [*pairs[first:], *pairs[:first]]
        for name, method in order:
            print(f"repeat {repeat + 1} of {repeats}: {name} {method}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--one", name, method, "--folder", str(work)]
            command += ["--dtype", dtype, "--steps", str(steps)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
            times.setdefault(f"{name} {method}", []).extend(json.loads(done.stdout.splitlines()[-1])[SKIPPED:])
    return times


def rows(work: Path, size: str, dtype: str, length: int = 128, steps: int = 13, repeats: int = 3) -> list[Row]:
    """The measurements, with bars: hft at most 3% over the loop, HFT's share of FFT's time 5% over the limit."""
    prepare(work, size, length, steps)
    times = measure(work, dtype, steps, repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    found = []
    for name in (f"{contender} {method}" for method in ("fft", "hft") for contender in CONTENDERS):
        bar = 1.03 * medians[name.replace("hft ", "loop ", 1)] if name.startswith("hft ") else None
        found.append(Row(f"step, {LABELS[name.split()[0]]}, {name.split()[1].upper()}", tuple(times[name]), bar=bar))
    found.append(Row("step, TRL, LoRA of rank 8", tuple(times["trl lora"])))
    planned = read_json(work / "plan.json")
    limit = planned["flops_of_a_step"] / planned["flops_of_a_step_fft"]
    for name in ("loop", "hft"):
        share = medians[f"{name} hft"] / medians[f"{name} fft"]
        bar = 1.05 * limit if name == "hft" else None
        found.append(Row(f"step, {LABELS[name]}, HFT / FFT (limit {limit:.3f})", (share,), "", bar))
    if device() == "cuda":
        peak = read_json(work / "run/results.json")["rounds"][0]["peak_memory_bytes"]
        found.append(Row("peak memory / plan", (peak / planned["memory_bytes"]["total"],), "", 1.05))
    return found


LABELS = {"loop": "a loop by hand", "trainer": "transformers' Trainer", "trl": "TRL's SFTTrainer", "hft": "hft train"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="20m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest row")
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where models are written; a temporary folder if left out")
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, method = arguments.one
        times = RUNNERS[name](arguments.folder, method, arguments.dtype, arguments.steps)
        print("\n" + json.dumps(times))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        options = (arguments.size, arguments.dtype, arguments.length, arguments.steps, arguments.repeats)
        print(markdown(rows(Path(folder), *options)))


if __name__ == "__main__":
    main()
