"""The optimizers of `train.optimizer`, by the names of transformers, with what the plan must know of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod


@dataclass(frozen=True)
class Optimizer:
    """What differs between optimizers.

    Attributes:
        state_bytes: of the state of a parameter of a shape, on the device, and whether that is an embedding.
        has_betas: whether train.beta1 and beta2 have an effect.
        package: that it comes from, besides torch and transformers.
        cpu_since: the version of the package since which it has an implementation for the CPU.
    """

    state_bytes: Callable[[tuple[int, ...], bool], float]
    has_betas: bool = False
    package: str | None = None
    cpu_since: str | None = None


def _factored(shape: tuple[int, ...], _: bool) -> float:
    """Adafactor's second moment: float32 sums over the rows and over the columns of a matrix, and all of a vector."""
    if len(shape) < 2:
        return 4.0 * prod(shape)
    return 4.0 * (prod(shape[:-1]) + prod(shape[:-2]) * shape[-1])


def _eight_bits(shape: tuple[int, ...], is_embedding: bool) -> float:
    """Two moments of 8 bits, each with a float32 scale for a block of 256 elements.

    bitsandbytes keeps those of small parameters in float32, and transformers has it do so for embeddings.
    """
    elements = prod(shape)
    return 8.0 * elements if is_embedding or elements < 4096 else 2.0 * elements + 8 * ceil(elements / 256)


# Name of transformers -> the optimizer.
OPTIMIZERS = {
    "adamw_torch_fused": Optimizer(lambda shape, _: 8.0 * prod(shape), has_betas=True),
    "adamw_bnb_8bit": Optimizer(_eight_bits, has_betas=True, package="bitsandbytes", cpu_since="0.50"),
    "adafactor": Optimizer(_factored),
    "sgd": Optimizer(lambda *_: 0.0),
}
DEFAULT = "adamw_torch_fused"
