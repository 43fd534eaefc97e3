"""Floating-point operations, from shapes alone. Pure, standard library only.

Source: Kaplan et al. 2020, arXiv 2001.08361: 2 operations for each parameter and token in the forward pass, 4 in the
backward pass. Of the 4, 2 are for the gradient of the input, and 2 for that of the weight, which a frozen matrix does
not need.
"""

from __future__ import annotations

from dataclasses import dataclass

from hft_cli.plan.workload import Workload


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one optimizer step, over all ranks.

    Attributes:
        forward: forward pass of the model.
        inputs: backward pass, gradients of inputs, above the lowest trained parameter.
        weights: backward pass, gradients of trained weights.
        recompute: the second forward pass of activation checkpointing.
        reference: forward pass of DPO's reference, unless it is precomputed.
        memories: GEM's passes over the rows of past tasks.
    """

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0
    recompute: float = 0.0
    reference: float = 0.0
    memories: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.inputs + self.weights + self.recompute + self.reference + self.memories


def flops(work: Workload, rows: int, row_tokens: int) -> Flops:
    """The operations of a step on `rows` rows (pairs, in DPO) of `row_tokens` tokens.

    Norms, activation functions and the optimizer are left out: below 1% for a hidden size of thousands. Attention is
    counted where the causal mask allows it, which is half; eager computes all of it.
    """
    shape, setup, lowest = work.shape, work.setup, work.lowest
    forward = inputs = weights = recompute = 0.0
    for p in work.params:
        is_head = work.head is not None and p.name == work.head.name
        if len(p.shape) < 2 or (p.kind == "embedding" and not is_head):
            continue
        used = 2.0 * p.elements * (shape.experts_used / shape.experts if p.is_experts else 1)
        place = (shape.layers + 1, 0) if is_head else work.place(p)
        forward += used
        inputs += used * (lowest < place)
        weights += used * (p.name in work.trained)
        recompute += used * (place[0] >= lowest[0] and p.layer is not None)
    scores = 4.0 * shape.heads * shape.head_width * row_tokens * (1.0 if setup.attention == "eager" else 0.5)
    attention = {p.layer for p in work.params if p.layer is not None and p.kind == "attention"}
    forward += scores * len(attention)
    inputs += 2 * scores * sum(lowest <= (layer, 1) for layer in attention)
    recompute += scores * sum(layer >= lowest[0] for layer in attention)
    recompute *= setup.checkpointing
    tokens = float(rows * row_tokens * setup.answers)
    memory_tokens = float(setup.tasks * setup.memory_rows * setup.length)
    has_reference = setup.anchor == "kl" or (setup.stage == "dpo" and setup.reference != "precomputed")
    return Flops(
        forward=forward * tokens,
        inputs=inputs * tokens,
        weights=weights * tokens,
        recompute=recompute * tokens,
        reference=forward * tokens * has_reference,
        memories=(forward + inputs + weights + recompute) * memory_tokens,
    )


def hours(operations: float, ranks: int, tflops: float, utilization: float) -> float:
    """Hours of `ranks` GPUs with a peak rate of `tflops` TFLOP/s, of which they reach the share `utilization`."""
    return operations / (ranks * tflops * 1e12 * utilization) / 3600
