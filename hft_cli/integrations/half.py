"""HFT for a model in memory, for trainers of one's own."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from hft_cli.checkpoint.naming import make_params
from hft_cli.config.schema import SelectionConfig
from hft_cli.errors import UserError, choose
from hft_cli.live.compat import whole_shape
from hft_cli.method.selection import Draw
from hft_cli.method.standalone import draw_alone

SETTINGS = ("balance", "embeddings", "head", "final_norm", "redraw", "names")  # of SelectionConfig
WRAPPERS = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)


@dataclass(frozen=True)
class Drawn:
    """The last draw of a model, and the arguments of `half_finetune` that made it, without the round."""

    draw: Draw
    settings: Mapping[str, Any]


DRAWN: WeakKeyDictionary[Any, Drawn] = WeakKeyDictionary()  # model -> its last draw


def half_finetune(
    model: Any,
    *,
    ratio: float = 0.5,
    level: str = "category",
    seed: int = 42,
    round: int = 1,
    kinds: Mapping[str, str] = {},
    **selection: Any,
) -> Draw:
    """Set `requires_grad` of a model's parameters for one round of half fine-tuning (HFT, section 3).

    Call it before an optimizer, a trainer or an engine is made: they ignore later changes without a message. The same
    seed, round and settings give the same draw as `hft train` and `hft draw`, whatever the device or the precision.

    >>> from transformers import AutoModelForCausalLM
    >>> from hft_cli import half_finetune
    >>> from hft_cli.paths import resolve_path
    >>> model = AutoModelForCausalLM.from_pretrained(resolve_path("pocket:model"))
    >>> draw = half_finetune(model, ratio=0.5, seed=42)
    >>> len(draw.updated), len(draw.frozen), f"{draw.updated_fraction:.1%}"
    (21, 18, '59.1%')
    >>> model.model.layers[0].self_attn.q_proj.weight.requires_grad
    False

    Args:
        model: a causal language model of transformers: on a CPU, a GPU or the meta device, made under ZeRO-3, or
            sharded by FSDP2.
        ratio: share of the matrices in the transformer layers that is updated, in [0, 1].
        level: what they are drawn from: category (the paper's), layer or model; all, or names.
        seed: of the draw.
        round: its number, from 1; see `next_round`.
        kinds: as `model.kinds`, for names of parameters that hft does not know.
        selection: other settings of group `selection` with their names there: balance, embeddings, head, final_norm,
            redraw, names.

    Returns:
        The draw: names, counts and hash.

    Raises:
        UserError: for an unknown setting, one of a wrong type, something that is no model, a model whose optimizer or
            engine exists already, with adapters, quantized, compiled, wrapped, or that has nothing to select from.
    """
    for name in selection:
        choose("setting", name, [*SETTINGS, "ratio", "level", "seed", "round", "kinds"])
    config = SelectionConfig(level=level, ratio=ratio, **selection)
    _require_bare(model, kinds)
    parameters = dict(model.named_parameters())
    shapes = {name: whole_shape(parameter) for name, parameter in parameters.items()}
    drawn = draw_alone(make_params(shapes, {name: (name,) for name in shapes}, kinds), config, round, seed)
    updated = set(drawn.updated)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in updated)
        parameter.grad = None
    DRAWN[model] = Drawn(drawn, {"ratio": ratio, "level": level, "seed": seed, "kinds": kinds, **selection})
    return drawn


def _require_bare(model: Any, kinds: Any) -> None:
    """Raise UserError for what is no model, or a model that has something around it already."""
    if not isinstance(kinds, Mapping):
        raise UserError(
            f"kinds={kinds!r} is not a dict. Write {{NAME: CATEGORY}}, for instance {{'mix': 'attention'}}."
        )
    if not isinstance(model, torch.nn.Module):
        raise UserError(
            f"The model is a {type(model).__name__}. Load it first: AutoModelForCausalLM.from_pretrained(…)."
        )
    own = list(model.parameters())
    if hasattr(model, "peft_config"):
        raise UserError("The model has adapters of PEFT, which HFT is an alternative to: give the model without them.")
    if hasattr(model, "_orig_mod"):
        raise UserError("The model is compiled: call half_finetune on the model that you give to torch.compile.")
    if isinstance(model, WRAPPERS) or type(model).__name__ == "DeepSpeedEngine":
        raise UserError(f"The model is in a {type(model).__name__}: call half_finetune before that is made.")
    if any(type(parameter).__name__ == "FlatParameter" for parameter in own):
        raise UserError("The model is wrapped by FSDP1, which flattens parameters: use FSDP2 (fully_shard).")
    if not all(parameter.is_floating_point() for parameter in own):
        raise UserError("The model is quantized, and integers cannot be trained: load it in bfloat16 or float32.")
    if optimizer := optimizer_of(own):
        raise UserError(
            f"The model has an optimizer already ({optimizer}), which holds the parameters of another draw. Call "
            "half_finetune before it is made; between rounds give the trainer to next_round, or delete the optimizer."
        )


def optimizer_of(parameters: Iterable[torch.nn.Parameter]) -> str | None:
    """The class of a living optimizer that holds one of the parameters; None if there is none."""
    own = {id(parameter) for parameter in parameters}
    gc.collect()
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.optim.Optimizer):
            held = (parameter for group in getattr(thing, "param_groups", ()) for parameter in group["params"])
            if any(id(parameter) in own for parameter in held):
                return type(thing).__name__
    return None
