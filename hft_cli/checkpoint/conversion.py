"""Between parameters as a class names them and tensors as files store them: transformers' conversions."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft_cli.checkpoint.naming import BUFFERS, Param, parameter_order
from hft_cli.checkpoint.tensors import StoredTensor
from hft_cli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def meta_model(config_or_path: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_or_path
    try:
        if isinstance(config, (str, Path)):
            if not Path(config).exists():
                raise UserError(f"There is no {config}.")
            config = AutoConfig.from_pretrained(config, trust_remote_code=False)
        with torch.device("meta"):
            # a copy, because transformers notes its choice of attention kernel in the config it is given
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # a faulty config fails in many ways inside the model's own code
        text = str(error).strip().splitlines() or [type(error).__name__]
        where = config_or_path if isinstance(config_or_path, (str, Path)) else type(config).__name__
        raise UserError(f"transformers cannot build a causal language model from {where}: {text[0]}") from error


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(param.shape) for name, param in model.named_parameters()}  # lists a tied weight once


# Shapes and file tensors by parameter, and pairs of file tensors that tied weights require to be equal.
Layout = tuple[dict[str, tuple[int, ...]], dict[str, list[str]], list[tuple[str, str]]]


def converted(model: Any, infos: Mapping[str, StoredTensor], folder: Path) -> Layout:
    """The layout by transformers' own renamings and mergers, the steps of its loader on names alone."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    shapes, state = shapes_of(model), model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    split = {source for entry in converters if len(entry.target_patterns) > 1 for source in entry.source_patterns}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *BUFFERS]
    stored: dict[str, list[str]] = {name: [] for name in shapes}
    aliases: dict[str, list[str]] = {}
    strange = []
    for name in sorted(infos, key=parameter_order):
        target, source = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:  # the loader's own fallback
            target, source = name, None
        if source in split and target in shapes:
            raise UserError(f"{folder}: tensor '{name}' holds several parameters at once, which is not supported.")
        if target in model.all_tied_weights_keys:
            aliases.setdefault(model.all_tied_weights_keys[target], []).append(name)
        elif target in shapes:
            stored[target].append(name)
        elif target not in state and not any(re.search(pattern, target) for pattern in ignored):
            strange.append(name)
    wrong = [
        name
        for name, tensors in stored.items()
        if tensors and sum(math.prod(infos[tensor].shape) for tensor in tensors) != math.prod(shapes[name])
    ]
    twins = []
    for name, others in aliases.items():
        stored[name] += others
        twins += [(stored[name][0], other) for other in stored[name][1:]]
    for what, names in (
        ("no file tensor holds parameter", [name for name in shapes if not stored[name]]),
        ("no parameter of the model takes file tensor", strange),
        ("the files and config.json disagree on the shape of", wrong),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if names[1:] else ""
            raise UserError(f"{folder}: {what} '{names[0]}'{more}. Are config.json and the weights of one model?")
    return shapes, stored, twins


def to_stored(model: Any, named: Mapping[str, Tensor], params: Iterable[Param] = ()) -> dict[str, Tensor]:
    """Module tensors under the names and in the layout of the files, for example 3-D experts cut to 2-D matrices.

    Args:
        model: the transformers model (weights are not read; a model on the meta device will do).
        named: tensors by parameter name, in the module's shapes; any subset of the model's parameters.
        params: the `from_folder` result of the folder whose layout is wanted. Without it the layout is the one that
            `model.save_pretrained` writes.

    Returns:
        Tensors by file name. They may share memory with the given ones.

    Raises:
        UserError: transformers cannot write the folder's layout.
    """
    from transformers.core_model_loading import revert_weight_conversion

    wanted = {param.name: param.stored for param in params}
    if not wanted:
        return dict(revert_weight_conversion(model, dict(named)))
    tied = set(model.all_tied_weights_keys.values())
    result: dict[str, Tensor] = {}
    for name, tensor in named.items():
        written: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
        stored = wanted[name]
        if stored[0] == name and name not in written:  # the folder already has the module's layout
            written = {name: tensor}
        # One tensor under the folder's own prefix, or repeated as a tied head.
        if len(written) == 1 and (len(stored) == 1 or name in tied):
            result.update(dict.fromkeys(stored, next(iter(written.values()))))
            continue
        # The names may differ by the prefix alone, so both in natural order pair up.
        pairs = list(zip(sorted(written, key=parameter_order), sorted(stored, key=parameter_order), strict=False))
        if len(written) != len(stored) or any(a.split(".")[-3:] != b.split(".")[-3:] for a, b in pairs):
            raise UserError(f"Cannot write '{name}' as '{stored[0]}': transformers writes it as '{pairs[0][0]}'.")
        result.update((target, written[own]) for own, target in pairs)
    return result
