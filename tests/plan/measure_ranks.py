"""One rank of DeepSpeed that trains phases as `hft train` does, and writes down what its engine holds at most.

Started by test_memory.py: torchrun … measure_ranks.py STEP.json…
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from hft_cli.launch.compat import exit_rank
from hft_cli.launch.jobs import Progress, read_job
from hft_cli.launch.ranks import Ranks
from hft_cli.run_dir import RoundDir
from hft_cli.training.worker import train

held: dict[str, int] = {}  # part -> bytes
in_buckets: set[int] = set()  # storages of buckets that gradients are sent in


def note(part: str, size: int) -> None:
    held[part] = max(held.get(part, 0), size)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def storages_of(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)


def bytes_of(*values: Any, without: frozenset[int] = frozenset()) -> int:
    """Bytes of the storages behind all tensors in nested values, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(values) if t.numel()}
    return sum(size for place, size in storages.items() if place not in without)


def note_gradients(zero: Any) -> None:
    """Gradients of stages 1 and 2: in .grad, summed over micro-batches, averaged; not those in a bucket to be sent."""
    if not hasattr(zero, "bit16_groups"):  # stage 3
        return
    for bucket in zero.ipg_buckets.values():
        in_buckets.update(storages_of(bucket.buffer))  # sums of stage 1 stay in a bucket after it was sent
    gradients = [[p.grad, getattr(p, "grad_accum", None)] for group in zero.bit16_groups for p in group]
    parts = (gradients, zero.all_grad_tensors)
    if zero.partition_gradients:
        note("gradients", bytes_of(*parts, zero.averaged_gradients, without=frozenset(in_buckets)))
    else:  # averages arise while the sums are sent, bucket by bucket: no moment between steps shows both
        note("sums", bytes_of(*parts, without=frozenset(in_buckets)))
        note("averages", bytes_of(zero.averaged_gradients, without=frozenset(in_buckets)))
        held["gradients"] = held["sums"] + held["averages"]


def note_state(engine: Any) -> None:
    """Weights, moments and masters, and the gradients of stage 3, after a step."""
    zero = engine.optimizer
    weights = [[parameter.data, getattr(parameter, "ds_tensor", None)] for parameter in engine.module.parameters()]
    note("weights", bytes_of(weights))
    note("optimizer", bytes_of([dict(state) for state in zero.optimizer.state.values()]))
    masters = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat
    note("masters", bytes_of(masters, without=storages_of(tensors_in(weights))))
    if engine.zero_optimization_stage() == 3:
        note("gradients", bytes_of(zero.grad_partitions_flat_buffer))


def wrap(cls: type, name: str, before: Any = None, after: Any = None) -> None:
    """Call `before` or `after` with the object around its method."""
    method = getattr(cls, name)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before:
            before(self)
        result = method(self, *args, **kwargs)
        if after:
            after(self)
        return result

    setattr(cls, name, wrapped)


def main(files: list[Path]) -> None:
    Ranks.leave = lambda self: None  # it would end the process
    wrap(DeepSpeedZeroOptimizer, "reduce_gradients", before=note_gradients)  # stage 1, before any is given away
    wrap(DeepSpeedZeroOptimizer, "get_all_grad_tensors", before=note_gradients)  # stage 2, when the newest are added
    wrap(DeepSpeedEngine, "step", before=lambda engine: note_gradients(engine.optimizer), after=note_state)
    for file in files:
        held.clear()
        in_buckets.clear()
        folder = RoundDir(file.parent)
        progress = Progress(folder.progress, rank=int(os.environ["RANK"]))
        train(read_job("PhaseJob", file), folder, progress)
        gloo = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        held["timeout"] = gloo.options._timeout.total_seconds()
        (file.parent / f"held.{os.environ['RANK']}").write_text(json.dumps(held))
    dist.barrier()
    exit_rank()


if __name__ == "__main__":
    main([Path(file) for file in sys.argv[1:]])
