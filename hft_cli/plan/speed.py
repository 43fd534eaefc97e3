"""A rough time of a step, to put engines in order. It is no prediction. Pure, standard library only."""

from __future__ import annotations

from hft_cli.plan.flops import flops
from hft_cli.plan.memory import host_memory
from hft_cli.plan.traffic import network
from hft_cli.plan.workload import Workload

# Assumed of a rank, and only their ratios matter: an A100 at half of its peak, its links within a node, and the way to
# the host's memory and through AdamW there.
RATE = 150e12  # operations a second
LINK = 50e9  # bytes a second that it sends
HOST = 10e9  # bytes a second


def step_seconds(work: Workload, rows: int) -> float:
    """Seconds of a step on `rows` rows (pairs, in DPO) of full length, over all ranks, if nothing overlaps."""
    operations = flops(work, rows, work.setup.length).total / work.setup.ranks
    return operations / RATE + network(work).total / LINK + host_memory(work) / HOST
