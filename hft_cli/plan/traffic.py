"""Bytes over the network and on the disk, from shapes alone. Pure, standard library only.

Source for the network: ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), section 7, and the code of DeepSpeed.
"""

from __future__ import annotations

from dataclasses import dataclass

from hft_cli.plan.workload import Workload


@dataclass(frozen=True)
class Network:
    """Bytes that one rank sends in an optimizer step, in rings, by what they are; it receives as many."""

    gradients: float = 0.0
    weights: float = 0.0

    @property
    def total(self) -> float:
        return self.gradients + self.weights


def network(work: Workload) -> Network:
    """The traffic of a step.

    DeepSpeed's stages 1 and 2 all-reduce gradients, which is twice the bytes of the paper's reduce-scatter; stages 2
    and 3 do so after each micro-batch. Stage 3 gathers weights in the forward and in the backward pass.
    """
    setup, size, stage = work.setup, work.setup.weight_bytes, work.setup.zero_stage
    if stage is None:
        return Network()
    share = (setup.shards - 1) / setup.shards  # of the bytes of a ring that leave a rank
    updated = size * work.updated_elements * share
    if stage < 3:
        return Network(gradients=2 * updated * (setup.accumulation if stage == 2 else 1), weights=updated)
    large = [p for p in work.params if p.elements > setup.persistent]
    forward = sum(p.elements for p in large) * (1 + (setup.stage == "dpo" and setup.reference == "full"))
    backward = sum(p.elements for p in large if work.place(p)[0] >= work.lowest[0] and p.kind != "embedding")
    gathered = size * share * (forward + backward) * setup.accumulation
    return Network(gradients=updated * setup.accumulation, weights=gathered)


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk: deltas of all rounds, models (the last, and the one before it while it is written), and
    checkpoints."""

    deltas: float
    models: float
    checkpoints: float

    @property
    def total(self) -> float:
        return self.deltas + self.models + self.checkpoints


def checkpoint_bytes(work: Workload) -> float:
    """Bytes of one checkpoint within a round: of what is trained, the float32 weights and the optimizer's state.

    DeepSpeed's stages 1 and 2 add those weights in the dtype in which they compute.
    """
    stage, size, start = work.setup.zero_stage, work.setup.weight_bytes, 4.0 * (work.setup.anchor == "l2_sp")
    if stage is None:
        return (4.0 + start) * work.updated_elements + work.optimizer_state
    return float((12 + start + (size if stage in (1, 2) else 0)) * work.updated_elements)
