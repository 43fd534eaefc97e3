"""GEM, gradient episodic memory (Lopez-Paz & Ranzato 2017, arXiv 1706.08840): no step goes against a past task.

Before each optimizer step, g is the gradient of the batch and g_k that of the loss on the whole memory of past task k.
Both are of the mean loss per trained token, at the current weights, over the trainable parameters. If some
<g, g_k> < 0, the step uses the gradient g̃ nearest to g with <g̃, g_k> >= 0 for all k (their equations 8 to 11):
g̃ = g + sum_k v_k g_k. The paper takes steps of plain SGD. AdamW's moments and weight decay make another step of g̃,
for which the sign is not guaranteed.

The projection takes place after the last micro batch of a step and before the gradient is clipped, on every engine. If
it came after clipping, a step in a single process would be shorter than under DeepSpeed, which clips in its own step,
and with a margin it could be longer than train.max_grad_norm.

Cost: each step reads every memory once, forward and backward. The ranks divide the g_k, which are float32 (4 bytes x
past tasks x trainable parameters, over all ranks). While one is computed, a rank holds all of it and one more gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from hft_cli.data.phase_rows import phase_rows
from hft_cli.errors import UserError
from hft_cli.training import sft
from hft_cli.training.batches import padded
from hft_cli.training.compat import call_before_steps, gradient, put_gradient, trained_log_probs
from hft_cli.training.session import Projections, Session, SessionState, TrainerParts

if TYPE_CHECKING:
    from datasets import Dataset

# Added to the diagonal of the memories' cosines, so that the multipliers of memories that are alike or opposite stay
# finite. No constraint is missed by more than about half its root, 5e-7 of |g||g_k|.
RIDGE = 1e-12

CHUNK = 1 << 21  # elements of each gradient that are held as float64 at a time


def multipliers(gram: Sequence[Sequence[float]], products: Sequence[float], margin: float = 0.0) -> list[float]:
    """The v of g̃ = g + sum_k v_k g_k: all 0 without a conflict, otherwise argmin ½ v'Pv + p'v over v >= margin.

    This is equation 11 of the paper, with the margin of the authors' code (their memory strength): above 0 it pulls a
    step that is in conflict further towards the memories than the constraints require. The authors add 1e-3 to P's
    diagonal, which is much for small gradients; RIDGE is relative to the lengths of the gradients.

    Args:
        gram: P, with <g_j, g_k> for all past tasks j and k.
        products: p, with <g, g_k>.
        margin: at least 0.
    """
    import numpy as np
    from scipy.optimize import nnls

    p = np.asarray(products, dtype=np.float64)
    if not (p < 0).any():
        return [0.0] * len(p)
    square = np.asarray(gram, dtype=np.float64)
    # With v = margin + u the bound is u >= 0, and p becomes p + P margin. Only here do the lengths of the g_k matter:
    # from now on the unknown is u_k |g_k|, whose P holds cosines.
    lengths = np.sqrt(square.diagonal())
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    shifted = (p + margin * square.sum(axis=1)) * scale
    cosines = square * scale[:, None] * scale
    # With P = A'A and p = -A'b the problem is nonnegative least squares: argmin |Au - b|.
    values, vectors = np.linalg.eigh((cosines + cosines.T) / 2)
    root = np.sqrt(values.clip(min=0.0) + RIDGE)
    target = -(vectors.T @ shifted) / root
    size = float(np.linalg.norm(target)) or 1.0
    solution, _ = nnls(root[:, None] * vectors.T, target / size, maxiter=100 * len(p))
    v: list[float] = (margin + solution * size * scale).tolist()
    return v


@dataclass(frozen=True)
class Memory:
    """This rank's share of a past task's rows, in right-padded micro batches, and the trained tokens of all ranks."""

    batches: list[dict[str, torch.Tensor]]
    tokens: int


def read_memory(dataset: Dataset, task: int, micro_batch_size: int, rank: int, ranks: int) -> Memory:
    """Divide the memory of a past task among the ranks.

    Raises:
        UserError: if no token of it is trained on.
    """
    # Sorted by length, so that there is little padding and the shares of the ranks are alike.
    tensors = ((torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in dataset)
    rows = sorted(tensors, key=lambda row: len(row[0]))
    tokens = sum(int((labels[1:] != -100).sum()) for _, labels in rows)
    if not tokens:
        raise UserError(f"The memory of past task {task} has no token with a loss, so GEM has nothing to keep.")
    share = rows[rank::ranks]
    starts = range(0, len(share), micro_batch_size)
    return Memory([padded(share[start : start + micro_batch_size]) for start in starts], tokens)


def build_trainer(parts: TrainerParts, session: Session) -> Any:
    """TRL's SFTTrainer that projects its gradients, if the phase has past tasks."""
    trainer, job, checkpoint = sft.build_trainer(parts, session), session.job, session.checkpoint
    memories = [phase_rows("sft", [source], job.config, parts.tokenizer).dataset for source in job.phase.memories]
    if memories:
        rows, margin = job.config.train.micro_batch_size, job.config.continual.gem_margin
        projections = project_gradients(trainer, memories, micro_batch_size=rows, margin=margin)
        projections.projected = checkpoint.marker["projected"] if checkpoint else 0
        session.state.projections = projections
    return trainer


def outcome(state: SessionState) -> dict[str, Any]:
    """What the outcome of a phase says of GEM."""
    counts = state.projections
    return {"steps_projected": counts.projected, "memory_rows": list(counts.memory_rows)} if counts else {}


def project_gradients(
    trainer: Any, memories: Sequence[Dataset], *, micro_batch_size: int, margin: float = 0.0
) -> Projections:
    """Have `trainer` project its gradients. Every rank must call this before train().

    Args:
        trainer: TRL's SFTTrainer, in a single process or under DeepSpeed's ZeRO-1 or 2. Its model must have its final
            `requires_grad`.
        memories: the rows of each past task, with `input_ids` and `labels` as `tokenize` makes them; at least one.
        micro_batch_size: rows of memory that a rank computes at a time.
        margin: see `multipliers`.

    Returns:
        Counts that training updates.

    Raises:
        UserError: under ZeRO-3; for a memory without a trained token; and, from train(), for a gradient that is not
            finite.
    """
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise UserError(
            "continual=gem does not work with engine=zero3, where no rank has a whole layer to compute a memory's "
            "gradient with: use engine=single, zero1 or zero2."
        )
    rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
    counts = Projections(memory_rows=tuple(map(len, memories)))
    shares = [read_memory(dataset, task, micro_batch_size, rank, ranks) for task, dataset in enumerate(memories, 1)]
    call_before_steps(trainer, _Projector(trainer, shares, margin, counts))
    return counts


@dataclass(frozen=True)
class _Projector:
    """Replaces the gradient if it is in conflict with a memory, and leaves its bits alone otherwise. Collective."""

    trainer: Any
    memories: Sequence[Memory]
    margin: float
    counts: Projections

    def __call__(self) -> None:
        parameters = [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]
        device = self.trainer.args.device
        # The random numbers (dropout) that the memories use are given back: those of training do not change.
        with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
            memories = [self._gradient(memory, parameters) for memory in self.memories]
        with torch.no_grad():
            inner = self._inner_products(parameters, memories)
            (_, *products), *others = inner.tolist()
            self.counts.steps += 1
            if min(products) >= 0:
                return
            self.counts.projected += 1
            v = inner.new_tensor([1.0, *multipliers([row[1:] for row in others], products, self.margin)])
            for parameter, *parts in zip(parameters, *memories, strict=True):
                # g is read a second time, because under ZeRO each rank holds only its part of it.
                own = self._own(gradient(parameter))
                projected = torch.empty(len(own), dtype=torch.float32, device=device)
                for place, rows in _chunks([own, *parts]):
                    projected[place] = (v @ rows).float()  # float64 until here: near opposites have large multipliers
                put_gradient(parameter, self._whole(projected, parameter.numel()).view_as(parameter))

    @property
    def _ranks(self) -> int:
        return int(self.trainer.accelerator.num_processes)

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor that belongs to this rank, flat. The last ranks may have less than the others."""
        size, rank = ceil(tensor.numel() / self._ranks), self.trainer.accelerator.process_index
        return tensor.reshape(-1)[rank * size : (rank + 1) * size]

    def _whole(self, own: torch.Tensor, elements: int) -> torch.Tensor:
        """The flat tensor with that number of elements whose parts the ranks hold. Collective."""
        if self._ranks == 1:
            return own
        size = ceil(elements / self._ranks)
        whole = own.new_empty(size * self._ranks)
        torch.distributed.all_gather_into_tensor(whole, torch.nn.functional.pad(own, (0, size - len(own))))
        return whole[:elements]

    def _gradient(self, memory: Memory, parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
        """This rank's part of g_k, of the mean loss over the trained tokens of all ranks.

        Returns:
            A flat float32 tensor for each of `parameters`.
        """
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for batch in memory.batches:
            loss = -trained_log_probs(self.trainer, batch).sum() / memory.tokens
            # grad, not backward: nothing is added to .grad, and ZeRO's hooks, which wait for that, are not called.
            for total, part in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if part is not None:
                    total.add_(part)
        if self._ranks == 1:
            return [total.reshape(-1) for total in sums]
        for total in sums:
            torch.distributed.all_reduce(total)
        return [self._own(total).clone() for total in sums]

    def _inner_products(
        self, parameters: Sequence[torch.nn.Parameter], memories: Sequence[list[torch.Tensor]]
    ) -> torch.Tensor:
        """The inner products of g and all g_k, in this order: a float64 matrix, the same on all ranks.

        Raises:
            UserError: if one is not finite.
        """
        size = len(memories) + 1
        inner = torch.zeros(size, size, dtype=torch.float64, device=self.trainer.args.device)
        for parameter, *parts in zip(parameters, *memories, strict=True):
            for _, rows in _chunks([self._own(gradient(parameter)), *parts]):
                inner += rows @ rows.T
        if self._ranks > 1:
            torch.distributed.all_reduce(inner)
            torch.distributed.broadcast(inner, 0)  # each rank writes its part of g̃, by the same multipliers
        if not all(map(math.isfinite, inner[:, 1:].flatten().tolist())):
            raise UserError(
                f"A gradient of the data or of a memory is not finite at step {self.trainer.state.global_step + 1}: "
                "training has diverged. Lower train.learning_rate, or raise train.warmup."
            )
        return inner


def _chunks(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some columns at a time of the matrix whose rows are the flattened tensors, as float64, and their place."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, len(flat[0]), CHUNK):
        place = slice(start, start + CHUNK)
        yield place, torch.stack([tensor[place].double() for tensor in flat])
