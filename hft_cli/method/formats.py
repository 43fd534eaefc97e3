"""A draw in the terms of other programs, so that they train the same matrices. Standard library only.

To add a format, write one function and add one row to FORMATS at the foot of this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product

from hft_cli.checkpoint.naming import Param
from hft_cli.errors import UserError
from hft_cli.method.selection import Draw
from hft_cli.text import natural_order

# The number of a layer within a name, and what stands before and after it.
_LAYER = re.compile(r"(?P<before>^|.*?\.)(?P<number>\d+)(?P<after>\..*)")


def _names(draw: Draw, params: Sequence[Param]) -> str:
    """The names of the updated parameters, one on each line."""
    return "\n".join(sorted(draw.updated, key=natural_order))


def _json(draw: Draw, params: Sequence[Param]) -> str:
    """The record of a ledger, which `hft verify BASE TUNED --draw` reads."""
    return json.dumps({"rounds": [{"name": "draw", **draw.as_dict()}]}, indent=2)


def _axolotl(draw: Draw, params: Sequence[Param]) -> str:
    """axolotl: `unfrozen_parameters`, regular expressions whose periods are periods. They match from the start."""
    patterns = [f"^{pattern}$" for pattern in _patterns(draw.updated)]
    return "\n".join(["unfrozen_parameters:", *(f"  - {pattern}" for pattern in patterns)])


def _swift(draw: Draw, params: Sequence[Param]) -> str:
    """ms-swift: everything is frozen, and one regular expression, which is searched for, is trained."""
    pattern = "|".join(pattern.replace(".", r"\.") for pattern in _patterns(draw.updated))
    return f"--tuner_type full --freeze_parameters_ratio 1.0 --trainable_parameters_regex '^({pattern})$'"


def _patterns(names: Iterable[str]) -> list[str]:
    """Names as patterns with the layers as alternatives: model.layers.(0|3).mlp.up_proj.weight. Periods stand for
    themselves.
    """
    layers: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names, key=natural_order):
        match = _LAYER.match(name)
        key = (match["before"], match["after"]) if match else (name, "")
        layers.setdefault(key, []).extend([match["number"]] if match else [])
    return [
        f"{before}({'|'.join(numbers)}){after}" if len(numbers) > 1 else f"{before}{''.join(numbers)}{after}"
        for (before, after), numbers in layers.items()
    ]


def _llamafactory(draw: Draw, params: Sequence[Param]) -> str:
    """LLaMA-Factory: `finetuning_type: freeze` trains whole blocks of the first or the last layers.

    Its settings are texts, and what has one of them in its name is trained. So all settings are tried.
    """
    names, updated = [param.name for param in params], set(draw.updated)
    count = 1 + max((param.layer for param in params if param.layer is not None), default=-1)
    blocks = sorted({name.split(".0.")[-1].split(".")[0] for name in names if ".0." in name})
    outside = sorted({name.split(".")[-2] for name in names if not re.search(r"\.\d+\.", name)})
    in_updated = [block for block in blocks if any(f".{block}." in name for name in updated)]
    extra = [module for module in outside if any(module == name.split(".")[-2] for name in updated)]
    for layers, with_extra in product([*range(count, 0, -1), *range(-1, -count, -1)], (True, False)):
        numbers = range(count - layers, count) if layers > 0 else range(-layers)
        texts = [f".{number}.{block}" for number in numbers for block in in_updated] + extra * with_extra
        if {name for name in names if any(text in name for text in texts)} == updated:
            lines = [
                "finetuning_type: freeze",
                f"freeze_trainable_layers: {layers}",
                f"freeze_trainable_modules: {'all' if in_updated == blocks else ','.join(in_updated)}",
            ]
            return "\n".join([*lines, *([f"freeze_extra_modules: {','.join(extra)}"] if with_extra and extra else [])])
    raise UserError(
        "LLaMA-Factory cannot train this draw: its freeze tuning takes the same whole blocks (self_attn, mlp) of the "
        "first or the last layers. Its trainer can, with hft_cli.half_finetune(model)."
    )


def _peft(draw: Draw, params: Sequence[Param]) -> str:
    """PEFT trains adapters, and copies of whole modules."""
    raise UserError(
        "PEFT cannot train this draw: it trains adapters, or copies of whole modules (modules_to_save) beside at least "
        "one adapter. Without PEFT, hft_cli.half_finetune(model) sets what trains."
    )


def _deepspeed(draw: Draw, params: Sequence[Param]) -> str:
    """DeepSpeed has no such setting."""
    raise UserError(
        "DeepSpeed's JSON has no list of parameters to train: it leaves out those that require no gradient. Call "
        "hft_cli.half_finetune(model) before deepspeed.initialize."
    )


FORMATS: Mapping[str, Callable[[Draw, Sequence[Param]], str]] = {
    "names": _names,
    "json": _json,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "swift": _swift,
    "peft": _peft,
    "deepspeed": _deepspeed,
}
