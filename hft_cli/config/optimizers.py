"""The optimizers of `train.optimizer`, by the names of transformers, with what the plan must know of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Optimizer:
    """What differs between optimizers.

    Attributes:
        state_bytes: of the state of a parameter of a shape, on the device.
        has_betas: whether train.beta1 and beta2 have an effect.
        package: that it comes from, besides torch and transformers.
        needs_gpu: whether it has no implementation for the CPU.
    """

    state_bytes: Callable[[tuple[int, ...]], float]
    has_betas: bool = False
    package: str | None = None
    needs_gpu: bool = False


def _factored(shape: tuple[int, ...]) -> float:
    """Adafactor's second moment: float32 sums over the rows and over the columns of a matrix, and all of a vector."""
    if len(shape) < 2:
        return 4.0 * prod(shape)
    return 4.0 * (prod(shape[:-1]) + prod(shape[:-2]) * shape[-1])


def _eight_bits(shape: tuple[int, ...]) -> float:
    """Two moments of 8 bits and a scale for each block of 256; bitsandbytes keeps small parameters in float32."""
    elements = prod(shape)
    return 8.0 * elements if elements < 4096 else elements * (2 + 8 / 256)


# Name of transformers -> the optimizer.
OPTIMIZERS = {
    "adamw_torch_fused": Optimizer(lambda shape: 8.0 * prod(shape), has_betas=True),
    "adamw_bnb_8bit": Optimizer(_eight_bits, has_betas=True, package="bitsandbytes", needs_gpu=True),
    "adafactor": Optimizer(_factored),
    "sgd": Optimizer(lambda shape: 0.0),
}
DEFAULT = "adamw_torch_fused"
