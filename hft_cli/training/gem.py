"""GEM, gradient episodic memory (Lopez-Paz & Ranzato 2017, arXiv 1706.08840): no gradient goes against a past task.

Before each optimizer step, g is the batch's gradient and g_k that of the loss on all of past task k's memory, both of
the trainable parameters only, at the weights of now, and of the mean loss per trained token. If some <g, g_k> < 0, the
step is taken with the nearest g̃ to g that has <g̃, g_k> >= 0 for all k: g̃ = g + sum_k v_k g_k (their eq. 8 to 11).
The paper steps by plain SGD. AdamW's moments and weight decay make another step of g̃, for which the sign is not given.

Where: after the last micro batch of a step, before the gradient is clipped, in every engine. Clipped first and
projected then, a step would be shorter in a single process than under DeepSpeed, which clips within its own step; and
with a margin it could be longer than max_grad_norm.

Time: a step reads every memory once, forwards and backwards. Memory: each rank holds all the g_k whole, in float32 (4
bytes x past tasks x trainable parameters, whatever the ZeRO stage), and while it computes them one more gradient of
the whole model in the model's precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hft_cli.errors import UserError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


# Added to the diagonal of the memories' cosines: the multipliers of memories that are alike, or opposite, stay finite,
# and no constraint is missed by more than about half its root, 5e-7 of |g||g_k|.
RIDGE = 1e-12

CHUNK = 1 << 21  # elements of each gradient that are in float64 at once


@dataclass
class Steps:
    """What happened in the steps of this session. A resumed run may add what it had before.

    Attributes:
        steps: optimizer steps.
        projected: those whose gradient was in conflict with a memory, and was replaced.
    """

    steps: int = 0
    projected: int = 0


def multipliers(gram: Sequence[Sequence[float]], products: Sequence[float], margin: float = 0.0) -> list[float]:
    """The v of g̃ = g + sum_k v_k g_k: all 0 without a conflict, otherwise argmin ½ v'Pv + p'v over v >= margin.

    The paper's eq. 11, and the margin as in the authors' code, where it is the memory strength: above 0 it pulls a
    step that is in conflict further towards the memories than they ask for. They add 1e-3 to P's diagonal, which is
    much for small gradients; here it is RIDGE, relative to their lengths.

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
    # With v = margin + u the bound is u >= 0 and p becomes p + P margin. This is the only place where the lengths of
    # the g_k matter; from here on u_k |g_k| is sought, whose P holds cosines.
    lengths = np.sqrt(square.diagonal())
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    shifted = (p + margin * square.sum(axis=1)) * scale
    cosines = square * scale[:, None] * scale
    # With P = A'A and p = -A'b the problem is nonnegative least squares: argmin |Au - b|.
    values, vectors = np.linalg.eigh((cosines + cosines.T) / 2)
    root = np.sqrt(values.clip(min=0.0) + RIDGE)
    target = -(vectors.T @ shifted) / root
    size = float(np.linalg.norm(target)) or 1.0
    found, _ = nnls(root[:, None] * vectors.T, target / size, maxiter=100 * len(p))
    v: list[float] = (margin + found * size * scale).tolist()
    return v


@dataclass(frozen=True)
class _Memory:
    """This rank's share of a past task's rows, in right-padded micro batches, and the trained tokens of all ranks."""

    batches: list[dict[str, torch.Tensor]]
    tokens: int


def _memory(dataset: Dataset, number: int, size: int, rank: int, world: int) -> _Memory:
    # By length, so that little is padded and the ranks' shares are alike.
    rows = sorted(((row["input_ids"], row["labels"]) for row in dataset), key=lambda row: len(row[0]))
    tokens = sum(label != -100 for _, labels in rows for label in labels[1:])
    if not tokens:
        raise UserError(f"The memory of past task {number} has no token with a loss, so GEM has nothing to keep.")
    own = rows[rank::world]
    return _Memory([_padded(own[start : start + size]) for start in range(0, len(own), size)], tokens)


def _padded(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, torch.Tensor]:
    import torch

    width = max(len(ids) for ids, _ in rows)

    def column(lists: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*values, *[fill] * (width - len(values))] for values in lists])

    return {
        "input_ids": column([ids for ids, _ in rows], 0),
        "attention_mask": column([[1] * len(ids) for ids, _ in rows], 0),
        "labels": column([labels for _, labels in rows], -100),
    }


def _gradient(trainer: Any, memory: _Memory, parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    """g_k: of the mean loss over the trained tokens of all ranks, a float32 tensor for each of `parameters`."""
    import torch

    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for batch in memory.batches:
        inputs = {key: value.to(trainer.args.device) for key, value in batch.items()}
        # The plain model, not DeepSpeed's engine around it, with the head that TRL's loss is computed by: of the
        # logits there is never more than a part. In a single process its forward is under autocast already.
        with trainer.compute_loss_context_manager():
            found = trainer.model(**inputs, use_cache=False, fused_lm_head=True)
            loss = -found.log_probs.sum() / memory.tokens
        # grad, not backward: nothing is added to .grad, and ZeRO's hooks, which wait for that, do not fire.
        for sum_, part in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if part is not None:
                sum_.add_(part)
    if trainer.accelerator.num_processes > 1:
        for sum_ in total:
            torch.distributed.all_reduce(sum_)
    return total


def attach(trainer: Any, memories: Sequence[Dataset], *, micro_batch_size: int, margin: float = 0.0) -> Steps:
    """Have `trainer` project its gradients; to be called before its train(), on every rank.

    Args:
        trainer: TRL's SFTTrainer, in a single process or with DeepSpeed's ZeRO stage 1 or 2. What requires a gradient
            is settled by now.
        memories: one set of rows for each past task, with `input_ids` and `labels` as `data.tokenize` makes them.
            Without any, the trainer is left as it is.
        micro_batch_size: rows of memory that a rank computes at once.
        margin: see `multipliers`.

    Raises:
        UserError: under ZeRO-3; for a memory without a trained token; and, from train(), for a gradient that is not
            finite.
    """
    from transformers import TrainerCallback

    deepspeed = trainer.accelerator.state.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise UserError(
            "continual=gem cannot be with engine=zero3, where no rank has a whole layer to compute a memory's gradient "
            "by itself: use engine=single, zero1 or zero2."
        )
    counted = Steps()
    if not memories:
        return counted
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    held = [_memory(dataset, number, micro_batch_size, rank, world) for number, dataset in enumerate(memories, start=1)]

    if deepspeed is None:
        training_step = trainer.training_step

        def project_after(*args: Any, **kwargs: Any) -> Any:
            loss = training_step(*args, **kwargs)
            if trainer.accelerator.sync_gradients:  # the step's last micro batch
                _project(trainer, held, margin, counted, _get, _set)
            return loss

        trainer.training_step = project_after
        return counted

    class Wrap(TrainerCallback):  # type: ignore[misc]
        """The engine exists from the beginning of training on; its step is called right after a backward."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            engine = trainer.model_wrapped
            engine_step = engine.step

            def project_before(*args: Any, **kwargs: Any) -> Any:
                if engine.is_gradient_accumulation_boundary():
                    _project(trainer, held, margin, counted, _get_full, _set_full)
                return engine_step(*args, **kwargs)

            engine.step = project_before

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            del trainer.model_wrapped.step  # the class's own is back

    trainer.add_callback(Wrap())
    return counted


def _project(
    trainer: Any,
    memories: Sequence[_Memory],
    margin: float,
    counted: Steps,
    get: Callable[[torch.nn.Parameter], torch.Tensor],
    put: Callable[[torch.nn.Parameter, torch.Tensor], None],
) -> None:
    """Replace the gradient if it is in conflict with a memory; otherwise leave its bits alone. Collective."""
    import torch

    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    device = trainer.args.device
    # The random numbers (dropout) that the memories use up are given back: training's own stay what they were.
    with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
        kept = [_gradient(trainer, memory, parameters) for memory in memories]

    with torch.no_grad():
        inner = torch.zeros(len(kept) + 1, len(kept) + 1, dtype=torch.float64, device=device)  # g first, then all g_k
        for parameter, *parts in zip(parameters, *kept, strict=True):
            for _, rows in _chunks([get(parameter), *parts]):
                inner += rows @ rows.T
        if trainer.accelerator.num_processes > 1:
            torch.distributed.broadcast(inner, 0)  # each rank writes its part of g̃: all with the same multipliers
        (_, *products), *others = inner.tolist()
        if not all(map(math.isfinite, [*products, *(value for row in others for value in row)])):
            raise UserError(
                f"A gradient, of the data or of a memory, is not finite at step {trainer.state.global_step + 1}: "
                "training has diverged. Lower train.learning_rate, or raise train.warmup."
            )
        counted.steps += 1
        if min(products) >= 0:
            return
        counted.projected += 1
        v = inner.new_tensor([1.0, *multipliers([row[1:] for row in others], products, margin)])
        for parameter, *parts in zip(parameters, *kept, strict=True):
            # Read a second time rather than kept: under ZeRO each rank holds no more than its part of g.
            made = torch.empty(parameter.numel(), dtype=torch.float32, device=device)
            for place, rows in _chunks([get(parameter), *parts]):
                made[place] = (v @ rows).float()  # summed in float64: multipliers of near opposites are large
            put(parameter, made.view_as(parameter))


def _chunks(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor]]:
    """The tensors, flattened, as rows of a matrix in float64: some columns at a time, and their place."""
    import torch

    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, len(flat[0]), CHUNK):
        place = slice(start, start + CHUNK)
        yield place, torch.stack([tensor[place].double() for tensor in flat])


def _get(parameter: torch.nn.Parameter) -> torch.Tensor:
    import torch

    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _set(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = value.to(parameter.dtype)
    else:
        parameter.grad.copy_(value)


def _get_full(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The batch's gradient, averaged over the ranks, put together from ZeRO's parts. Collective."""
    from deepspeed.utils import safe_get_full_grad

    # Between backward and step ZeRO-1 and 2 keep it in flat buffers that only _hp_mapping leads to. A .grad would be
    # read and written in their place, without an effect on the step; a _hp_grad is that of another optimizer.
    if parameter.grad is not None or getattr(parameter, "_hp_grad", None) is not None:
        raise RuntimeError("DeepSpeed has left a gradient where it is not expected: GEM would not act on the step.")
    value: torch.Tensor = safe_get_full_grad(parameter)
    return value


def _set_full(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Each rank writes the part that it owns, in the precision of the buffer."""
    from deepspeed.utils import safe_set_full_grad

    safe_set_full_grad(parameter, value)
