"""Between the parameters of a transformers model and the tensors of its checkpoint files."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft_cli.checkpoint.architectures import Shapes
from hft_cli.checkpoint.compat import NameMapping, file_tensors
from hft_cli.checkpoint.naming import Param, parameter_order
from hft_cli.checkpoint.tensors import StoredTensor
from hft_cli.checkpoint.text_part import text_config
from hft_cli.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor


def meta_model(config_or_path: Any, part: str | None = None) -> Any:
    """Build a causal language model without weights from a transformers config, a config.json or a folder with one.

    With part="text" it is the text model of a model for more than text.

    Raises:
        UserError: if transformers cannot build it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_or_path
    try:
        if isinstance(config, (str, Path)):
            if not Path(config).exists():
                raise UserError(f"There is no {config}.")
            config = text_config(config) if part else AutoConfig.from_pretrained(config, trust_remote_code=False)
        with torch.device("meta"):
            # A copy, because transformers writes its choice of attention kernel into the config.
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # a faulty config fails in many ways in the code of the model
        where = config_or_path if isinstance(config_or_path, (str, Path)) else type(config).__name__
        raise UserError(
            f"transformers cannot build a causal language model from {where}: {first_line(error)}"
        ) from error


def shapes_of(model: Any) -> Shapes:
    """Parameter name -> shape. Tied weights are listed once."""
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


@dataclass(frozen=True)
class Layout:
    """How checkpoint files hold the parameters of a model.

    Attributes:
        shapes: parameter name -> shape in the module.
        stored: parameter name -> the file tensors that hold it.
        copies: pairs of file tensors that must be equal, because the model ties their weights.
    """

    shapes: Shapes
    stored: dict[str, list[str]]
    copies: list[tuple[str, str]]


def read_layout(model: Any, tensors: Mapping[str, StoredTensor], folder: Path) -> Layout:
    """The layout of a folder's files, by the renamings and mergers of transformers. Reads no weights.

    Raises:
        UserError: if the files do not fit the model, or a tensor holds several parameters.
    """
    shapes, mapping = shapes_of(model), NameMapping(model)
    stored: dict[str, list[str]] = {name: [] for name in shapes}
    tied: dict[str, list[str]] = {}
    unknown = []
    for tensor in sorted(tensors, key=parameter_order):
        target, is_split = mapping.target(tensor)
        if is_split and target in shapes:
            raise UserError(f"{folder}: tensor '{tensor}' holds several parameters at once, which is not supported.")
        if target in mapping.tied:
            tied.setdefault(mapping.tied[target], []).append(tensor)
        elif target in shapes:
            stored[target].append(tensor)
        elif not mapping.is_ignored(target):
            unknown.append(tensor)
    misshapen = [
        name
        for name, parts in stored.items()
        if parts and sum(math.prod(tensors[part].shape) for part in parts) != math.prod(shapes[name])
    ]
    copies = []
    for name, aliases in tied.items():
        stored[name] += aliases
        copies += [(stored[name][0], alias) for alias in stored[name][1:]]
    for fault, names in (
        ("no file tensor holds parameter", [name for name, parts in stored.items() if not parts]),
        ("no parameter of the model takes file tensor", unknown),
        ("the files and config.json disagree on the shape of", misshapen),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if names[1:] else ""
            raise UserError(f"{folder}: {fault} '{names[0]}'{more}. Are config.json and the weights of one model?")
    return Layout(shapes, stored, copies)


def to_stored(model: Any, named: Mapping[str, Tensor], params: Iterable[Param]) -> dict[str, Tensor]:
    """Convert tensors of the module to the names and shapes of the files, for example 3-D experts to 2-D matrices.

    Args:
        model: the transformers model. Its weights are not read; it may be on the meta device.
        named: tensors by parameter name, in the shapes of the module.
        params: their parameters, from `parameters_from_folder`.

    Returns:
        Tensors by file name. They may share memory with the input.

    Raises:
        UserError: if transformers cannot write the layout of the folder.
    """
    stored_names = {param.name: param.stored for param in params}
    tied = set(model.all_tied_weights_keys.values())
    result: dict[str, Tensor] = {}
    for name, tensor in named.items():
        written, stored = file_tensors(model, {name: tensor}), stored_names[name]
        if stored[0] == name and name not in written:  # the folder has the layout of the module
            written = {name: tensor}
        # One tensor, under the prefix of the folder, or several times for a tied head.
        if len(written) == 1 and (len(stored) == 1 or name in tied):
            result.update(dict.fromkeys(stored, next(iter(written.values()))))
            continue
        # The names differ at most in the prefix, so sorting both in natural order pairs them.
        pairs = list(zip(sorted(written, key=parameter_order), sorted(stored, key=parameter_order), strict=False))
        if len(written) != len(stored) or any(a.split(".")[-3:] != b.split(".")[-3:] for a, b in pairs):
            raise UserError(
                f"Cannot write '{name}' as '{stored[0]}', as in the files of the base model: transformers writes it as "
                f"'{pairs[0][0]}'. Save the base model once with save_pretrained() and start from that."
            )
        result.update((target, written[source]) for source, target in pairs)
    return result
