"""Every parameter of a causal language model: shape, layer, kind, and the file tensors that hold it.

Importing this module imports only the standard library. A folder whose files hold the module's own names is read from
the safetensors headers alone. Any other folder is read with a model without weights and the name mapping of
transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.architectures import SAME_NAMES, shapes_from_fields
from hft_cli.checkpoint.conversion import Layout, meta_model, read_layout, shapes_of
from hft_cli.checkpoint.folders import stored_tensors
from hft_cli.checkpoint.known_layouts import known_layout
from hft_cli.checkpoint.model_config import read_model_config
from hft_cli.checkpoint.naming import BUFFERS, Param, classify, make_params
from hft_cli.checkpoint.tensors import StoredTensor, same_bytes
from hft_cli.checkpoint.text_part import text_fields, text_tensors
from hft_cli.errors import UserError
from hft_cli.files import read_json

TRAINABLE = ("F64", "F32", "F16", "BF16")  # dtypes of a file in which weights can be trained and written back

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def parameters_from_config(
    config_or_path: Any, kinds: Mapping[str, str] = {}, part: str | None = None
) -> tuple[Param, ...]:
    """The parameters of a model from a transformers config, a config.json or a folder with one; no file tensors.

    Raises:
        UserError: if transformers cannot build the model, or a parameter cannot be placed.
    """

    def read() -> Layout:
        return Layout(shapes_of(meta_model(config_or_path, part)), {}, [])

    is_file = isinstance(config_or_path, (str, Path)) and Path(config_or_path).is_file()
    shapes = (known_layout(read_json(Path(config_or_path)), {}, part, read) if is_file else read()).shapes
    return make_params(shapes, {name: (name,) for name in shapes}, kinds)


def parameters_from_fields(config: Mapping[str, Any], kinds: Mapping[str, str] = {}) -> tuple[Param, ...] | None:
    """As `parameters_from_config`, without torch; None if the shapes do not follow from the fields of config.json."""
    shapes = shapes_from_fields(config)
    return None if shapes is None else make_params(shapes, {name: (name,) for name in shapes}, kinds)


def require_trainable(params: Iterable[Param], folder: Path) -> None:
    """Raise UserError if parameters of the checkpoint in a folder are stored in a dtype that is not trained in."""
    tensors = stored_tensors(folder)
    for param in params:
        for name in param.stored:
            if (dtype := tensors[name].dtype) not in TRAINABLE:
                raise UserError(
                    f"{folder} holds {name} as {dtype}. Weights are trained as {', '.join(TRAINABLE)}: convert the "
                    "model, for example to bfloat16."
                )


def parameters_from_folder(
    path: str | Path, kinds: Mapping[str, str] = {}, part: str | None = None
) -> tuple[Param, ...]:
    """The parameters of the checkpoint in a folder, in natural name order, with the file tensors that hold them.

    With part="text" they are those of the text model of a model for more than text, under its own names.

    File tensors in no parameter's `stored` are buffers: constants that the module computes itself or ignores.

    Raises:
        UserError: if the folder or a file is broken, the weights are quantized, the files do not fit the model, a tied
            head differs from the embedding, or a parameter cannot be placed.
    """
    folder = Path(path)
    tensors = stored_tensors(folder)
    config = read_model_config(folder / "config.json", part)
    if config.get("quantization_config"):
        raise UserError(f"{folder} holds quantized weights, which cannot be trained. Use the unquantized checkpoint.")
    fields = config
    names = dict(zip(tensors, tensors, strict=True))  # in the model -> in the files
    if part:
        config, names = text_fields(config, folder), text_tensors(tensors)
        if not names:
            raise UserError(f"model.part=text: no tensor in {folder} has a name that begins with language_model.")
    known = {name: tensors[stored] for name, stored in names.items()}
    layout = _layout_from_names(config, known) or known_layout(
        fields, known, part, lambda: read_layout(meta_model(folder, part), known, folder)
    )
    expected = shapes_from_fields(config) or {}
    if wrong := [name for name, shape in layout.shapes.items() if expected.get(name, shape) != shape]:
        raise UserError(
            f"{folder}: config.json gives {wrong[0]} the shape {list(expected[wrong[0]])}, the files "
            f"{list(layout.shapes[wrong[0]])} ({len(wrong)} parameters differ). Are they of one model?"
        )
    for first, second in layout.copies:
        if not same_bytes(known[first], known[second]):
            raise UserError(
                f"{folder}: the config ties '{second}' to '{first}', but the files hold different values. "
                "Set tie_word_embeddings to false in its config.json to keep both."
            )
    stored = {name: [names[tensor] for tensor in parts] for name, parts in layout.stored.items()}
    return make_params(layout.shapes, stored, kinds)


def _layout_from_names(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Layout | None:
    """The layout by tensor names alone; None unless the model type is in SAME_NAMES and the names leave no doubt."""
    if config.get("model_type") not in SAME_NAMES:
        return None
    shapes = {name: tensor.shape for name, tensor in tensors.items() if not re.search(BUFFERS[0], name)}
    layers: dict[int, set[tuple[str, tuple[int, ...]]]] = {}
    outside = set()
    for name, shape in shapes.items():
        placed = classify(name, shape)
        if placed is None or not name.startswith(("model.", "lm_head.")):
            return None
        kind, layer = placed
        if layer is None:
            outside.add(kind)
        else:
            layers.setdefault(layer, set()).add((name.split(".", 3)[3], shape))
    same_layers = len({frozenset(layer) for layer in layers.values()}) == 1
    if not same_layers or sorted(layers) != list(range(config.get("num_hidden_layers", 0))):
        return None
    tied = config.get("tie_word_embeddings", SAME_NAMES[config["model_type"]])
    if EMBEDDING not in shapes or "norm" not in outside or (not tied and HEAD not in shapes):
        return None
    stored = {name: [name] for name in shapes}
    if not tied or HEAD not in shapes:
        return Layout(shapes, stored, [])
    del shapes[HEAD], stored[HEAD]
    stored[EMBEDDING].append(HEAD)
    return Layout(shapes, stored, [(EMBEDDING, HEAD)])
