"""Weights between memory (torch, ZeRO) and files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft_cli.checkpoint.conversion import to_stored
from hft_cli.checkpoint.folders import stored_tensors
from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.tensors import StoredTensor, Writer
from hft_cli.errors import UserError
from hft_cli.launch.jobs import PhaseJob

if TYPE_CHECKING:
    import torch


def frozen_checksum(model: Any) -> int:
    """One number over the bits of all frozen weights that this rank holds (under ZeRO-3: its shards)."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in getattr(model, "module", model).named_parameters():
        if not parameter.requires_grad:
            file_value = getattr(parameter, "ds_tensor", parameter).detach()
            digest.update(name.encode())
            digest.update(file_value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()[:6], "big")


def write_delta(
    model: Any, sealed: PhaseJob, params: Mapping[str, Param], path: Path, value: Callable[[str], torch.Tensor]
) -> None:
    """Stream what was trained into the delta, a parameter at a time, under the names and dtypes of the files."""
    base = stored_tensors(Path(sealed.model))
    announced = {stored: base[stored] for name in sealed.updated for stored in params[name].stored}
    metadata = {"format": "pt", "round": str(sealed.phase.round), "base_sha256": sealed.base_sha256}
    with Writer(path, announced, metadata) as writer:
        for name in sealed.updated:
            parts = to_stored(model, {name: value(name)}, [params[name]])
            for stored in params[name].stored:
                writer.add(stored, [_bytes(parts[stored], announced[stored].dtype)])


def restore_masters(model: Any, params: Mapping[str, Param], folder: Path) -> None:
    """Give DeepSpeed's float32 master weights the values in the files, which it has rounded to bfloat16.

    Raises:
        UserError: for a parameter that the files hold in parts (experts) and in more than bfloat16.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    files = stored_tensors(folder)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and files[params[name].stored[0]].dtype != "BF16":
            safe_set_full_fp32_param(parameter, held(params[name], files).to(parameter.device))


def held(param: Param, files: Mapping[str, StoredTensor]) -> torch.Tensor:
    """The float32 value that the files hold of a parameter.

    Raises:
        UserError: if they hold it in parts (experts).
    """
    from safetensors import safe_open

    tensor = files[param.stored[0]]
    if tensor.shape != param.shape:
        raise UserError(
            f"{param.name} is stored in parts and as {tensor.dtype}, which DeepSpeed would round to bfloat16. "
            "Convert the model to bfloat16 first, or set model.dtype=float32."
        )
    with safe_open(tensor.file, "pt") as opened:
        value: torch.Tensor = opened.get_tensor(param.stored[0])
    return value.float()


def full_value(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole float32 master value of a parameter, wherever ZeRO keeps it. Collective over the ranks."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        value: torch.Tensor = safe_get_full_fp32_param(parameter)
        return value.detach().cpu()
    return parameter.detach().cpu()


def _bytes(tensor: torch.Tensor, dtype: str) -> memoryview:
    import torch

    cast = tensor.to(getattr(torch, DTYPES[dtype])).contiguous()
    return cast.reshape(-1).view(torch.uint8).numpy().data


# The dtypes of a safetensors file that weights are trained from.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
