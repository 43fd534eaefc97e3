"""Steps in which nothing is logged wait for other ranks and for the device only where the libraries do.

Run as a program, this file is one of two ranks: `torchrun … test_synchronisation.py OUT ENGINE`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import phase_job, torchrun
from transformers import TrainerCallback

from hft_cli.launch.jobs import Progress
from hft_cli.paths import resolve_path
from hft_cli.run_dir import RoundDir
from hft_cli.training import phase
from hft_cli.training.callbacks import phase_callbacks

STEPS, MICRO_BATCHES = 6, 4
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce", "broadcast", "barrier",
    "reduce_scatter_tensor", "gather",
)  # fmt: skip
# Of tensors: each waits for the device of the tensor.
WAITS = ("item", "tolist", "__int__", "__float__", "__bool__")


def caller() -> str:
    """The package whose code makes a call, of those that train: the innermost frame of one of them."""
    packages = ("deepspeed", "accelerate", "trl", "hft_cli", "transformers")
    frames = reversed(traceback.extract_stack())
    return next((name for frame in frames for name in packages if f"/{name}/" in frame.filename), "torch")


class Counts(TrainerCallback):
    """Counts calls between the ends of two steps in the middle of the phase."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.counting = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.counting = state.global_step == STEPS // 2

    def count(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            if self.counting:
                asynchronous = " (async, CPU)" if options.get("async_op") and options.get("group") else ""
                self.counts[f"{caller()} {name}{asynchronous}"] += 1
            return original(*arguments, **options)

        setattr(owner, name, counted)


def rank_of_a_phase(out: Path, engine: str) -> None:
    job = phase_job(
        out / engine, Path(resolve_path("pocket:model")), f"engine={engine}", "engine.num_processes=2",
        "data=pocket_order", "data.max_rows=64", f"train.max_steps={STEPS}", f"train.batch_size={4 * MICRO_BATCHES}",
        "train.micro_batch_size=2", "train.max_length=64", "train.log_every=100",
    )  # fmt: skip
    counts = Counts()
    for name in COLLECTIVES:
        counts.count(dist, name)
    for name in WAITS:
        counts.count(torch.Tensor, name)
    phase.phase_callbacks = lambda *arguments: [*phase_callbacks(*arguments), counts]
    folder = RoundDir(out / engine)
    folder.folder.mkdir(exist_ok=True)

    def leave(*_: Any) -> None:
        if os.environ["RANK"] == "0":
            (out / f"{engine}.json").write_text(json.dumps(counts.counts))

    write = phase.write_outcome
    phase.write_outcome = lambda *arguments: (write(*arguments), leave())
    phase.train_phase(job, folder, Progress(folder.progress, rank=int(os.environ["RANK"])))


@pytest.mark.end_to_end
def test_a_step_waits_only_for_the_libraries(tmp_path):
    torchrun(2, __file__, tmp_path, "zero2")
    counts = json.loads((tmp_path / "zero2.json").read_text())
    packages = {name.split()[0] for name in counts}
    assert {name: number for name, number in counts.items() if name.startswith(("hft_cli", "trl"))} == {
        "hft_cli all_reduce (async, CPU)": 1, "hft_cli __int__": 1,  # whether to stop, of the step before
    }  # fmt: skip
    assert counts["accelerate all_gather"] == 1  # the number of trained tokens of the step
    assert "deepspeed" in packages


if __name__ == "__main__":
    rank_of_a_phase(Path(sys.argv[1]), sys.argv[2])
