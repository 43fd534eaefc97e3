"""A model without its weights: parameters, sizes and bytes in the files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.folders import config_from_hub, stored_tensors
from hft_cli.checkpoint.model_config import read_model_config
from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.parameters import parameters_from_config, parameters_from_fields, parameters_from_folder
from hft_cli.checkpoint.tensors import StoredTensor
from hft_cli.checkpoint.text_part import text_fields
from hft_cli.config.schema import ModelConfig
from hft_cli.errors import choose
from hft_cli.paths import ARCHITECTURES, expanded, resolve_path
from hft_cli.plan.workload import Shape, model_shape
from hft_cli.text import format_count, plural

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Model:
    """What is known of a model without its weights.

    Attributes:
        config: its config.json.
        source: where its shapes come from.
        dtype: the dtype of its files.
        stored: parameter name -> bytes in the files.
    """

    config: Mapping[str, Any]
    source: str
    params: tuple[Param, ...]
    shape: Shape
    dtype: str
    stored: Mapping[str, int]


def read_model(config: ModelConfig) -> Model:
    """Read the model's shapes from its folder, from model.architecture, or from the config.json on the hub."""
    path, architecture, kinds = config.path, config.architecture, config.kinds
    folder = Path(resolve_path(path))
    if folder.is_dir() and (list(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").exists()):
        return _model_from_folder(folder, config)
    if architecture is None:
        file = folder / "config.json" if folder.is_dir() else config_from_hub(path, config.revision)
    elif Path(architecture).suffix == ".json" or "/" in architecture:
        file = expanded(architecture)
    else:
        choose("model.architecture", architecture, sorted(path.stem for path in ARCHITECTURES.glob("*.json")))
        file = ARCHITECTURES / f"{architecture}.json"
    fields = read_model_config(file, config.part)
    text = text_fields(fields, file) if config.part else fields
    params = parameters_from_fields(text, kinds) or parameters_from_config(file, kinds, config.part)
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or config.dtype)
    stored = {p.name: p.elements * DTYPE_BYTES.get(dtype, 4) for p in params}
    return Model(fields, f"{file.name} (no weights)", params, model_shape(_text_config(fields), params), dtype, stored)


def _model_from_folder(folder: Path, config: ModelConfig) -> Model:
    fields, files = read_model_config(folder / "config.json", config.part), stored_tensors(folder)
    params = parameters_from_folder(folder, config.kinds, config.part)
    tensors = {p.name: [files[name] for name in p.stored] for p in params}
    dtypes = {tensor.dtype for parts in tensors.values() for tensor in parts}
    dtype = "mixed dtypes" if len(dtypes) > 1 else dtypes.pop()
    stored = {name: sum(tensor.size for tensor in parts) for name, parts in tensors.items()}
    return Model(
        fields,
        f"the files in {config.path}{_outside(params, files) if config.part else ''}",
        params,
        model_shape(_text_config(fields), params),
        dtype,
        stored,
    )


def _outside(params: Iterable[Param], files: Mapping[str, StoredTensor]) -> str:
    """How much of the files is no part of the text model, and stays as it is."""
    inside = {name for param in params for name in param.stored}
    outside = [math.prod(tensor.shape) for name, tensor in files.items() if name not in inside]
    tensors = plural(len(outside), "tensor")
    return f" (text model only; {tensors} with {format_count(sum(outside))} elements are not trained)"


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the text model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config
