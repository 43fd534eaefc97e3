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
        step_values: numbers of 32 bits for each trained element that exist within a step on a GPU, without and with
            weight decay: torch computes the step of all parameters at once.
    """

    state_bytes: Callable[[tuple[int, ...], bool], float]
    has_betas: bool = False
    package: str | None = None
    cpu_since: str | None = None
    step_values: tuple[int, int] = (0, 0)


def _factored(shape: tuple[int, ...], _: bool) -> float:
    """Adafactor's second moment: float32 sums over the rows and over the columns of a matrix, and all of a vector."""
    if len(shape) < 2:
        return 4.0 * prod(shape)
    return 4.0 * (prod(shape[:-1]) + prod(shape[:-2]) * shape[-1])


def _float32(states: int) -> Callable[[tuple[int, ...], bool], float]:
    """States of 32 bits for each element."""
    return lambda shape, _: 4.0 * states * prod(shape)


def _eight_bits(states: int) -> Callable[[tuple[int, ...], bool], float]:
    """States of 8 bits, each with a float32 scale for a block of 256 elements.

    bitsandbytes keeps those of small parameters in float32, and transformers has it do so for embeddings.
    """

    def state_bytes(shape: tuple[int, ...], is_embedding: bool) -> float:
        elements = prod(shape)
        if is_embedding or elements < 4096:
            return 4.0 * states * elements
        return states * (elements + 4.0 * ceil(elements / 256))

    return state_bytes


def _of_bitsandbytes(state_bytes: Callable[[tuple[int, ...], bool], float], has_betas: bool = True) -> Optimizer:
    return Optimizer(state_bytes, has_betas, package="bitsandbytes", cpu_since="0.50")


# Name of transformers -> the optimizer. Paged ones are planned as if all of their state were on the GPU.
OPTIMIZERS = {
    "adamw_torch_fused": Optimizer(_float32(2), has_betas=True),
    "adamw_torch": Optimizer(_float32(2), has_betas=True, step_values=(1, 1)),
    "adamw_bnb_8bit": _of_bitsandbytes(_eight_bits(2)),
    "adamw_8bit": _of_bitsandbytes(_eight_bits(2)),
    "paged_adamw_8bit": _of_bitsandbytes(_eight_bits(2)),
    "paged_adamw_32bit": _of_bitsandbytes(_float32(2)),
    "lion_8bit": _of_bitsandbytes(_eight_bits(1)),
    "lion_32bit": _of_bitsandbytes(_float32(1)),
    "paged_lion_8bit": _of_bitsandbytes(_eight_bits(1)),
    "paged_lion_32bit": _of_bitsandbytes(_float32(1)),
    "ademamix": _of_bitsandbytes(_float32(3)),
    "ademamix_8bit": _of_bitsandbytes(_eight_bits(3)),
    "paged_ademamix_8bit": _of_bitsandbytes(_eight_bits(3)),
    "paged_ademamix_32bit": _of_bitsandbytes(_float32(3)),
    "rmsprop_bnb": _of_bitsandbytes(_float32(1), has_betas=False),
    "rmsprop_bnb_8bit": _of_bitsandbytes(_eight_bits(1), has_betas=False),
    "rmsprop_bnb_32bit": _of_bitsandbytes(_float32(1), has_betas=False),
    "adafactor": Optimizer(_factored),
    "adagrad": Optimizer(_float32(1), step_values=(2, 2)),
    "rmsprop": Optimizer(_float32(1), step_values=(1, 2)),
    "sgd": Optimizer(lambda *_: 0.0, step_values=(0, 1)),
}
DEFAULT = "adamw_torch_fused"
