"""LoRA as a baseline of continual learning, by PEFT: adapters in, adapters and merged matrices out (Hu et al. 2021).

The adapters go on from round to round beside the base (TRACE's LoRASeqFT); what a round's delta holds is the base's
matrices with the adapters merged into them, so that a run's model is one like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft_cli.config.training import ContinualConfig
from hft_cli.errors import UserError

if TYPE_CHECKING:
    import torch


PREFIX = "base_model.model."  # that PEFT puts before a module's own name

WEIGHTS = "adapter_model.safetensors"


def adapt(model: Any, names: Iterable[str], continual: ContinualConfig, adapter: str | None) -> Any:
    """The model with trainable adapters beside the named weights, all else frozen; those in `adapter` go on."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    targets = {name.removesuffix(".weight") for name in names}
    adapted = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=continual.lora_rank,
            lora_alpha=continual.lora_alpha,  # type: ignore[arg-type]  # an int by its annotation, any number in its sums
            lora_dropout=continual.lora_dropout,
            target_modules=sorted(targets),
        ),
    )
    made = {name.removeprefix(PREFIX).split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    if made != targets:  # PEFT takes some names of dense matrices for those of experts
        raise UserError(
            f"continual=lora cannot be with this model: PEFT adapts other matrices than were asked for, such as "
            f"{min(made ^ targets)}. Use continual=seqft, replay or gem."
        )
    return adapted


def save(model: Any, whole: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the adapters, whose whole values (name -> tensor, float32) were put together, in PEFT's layout."""
    model.save_pretrained(folder, state_dict=dict(whole), save_embedding_layers=False)


def restore_masters(model: Any, adapter: str) -> None:
    """Give DeepSpeed's float32 master weights the values of the saved adapters, which it has rounded to bfloat16."""
    from deepspeed.utils import safe_set_full_fp32_param
    from safetensors.torch import load_file

    saved = load_file(Path(adapter) / WEIGHTS)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, saved[name.replace(".default.", ".")].to(parameter.device))


def merged(model: Any, name: str, whole: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """`weight` (float32, the base's value of parameter `name`) with its adapter merged: W + (alpha / rank) B A."""
    layer = model.get_submodule(PREFIX + name.removesuffix(".weight"))
    a, b = (whole[f"{PREFIX}{name.removesuffix('.weight')}.lora_{part}.default.weight"].float() for part in "AB")
    product = b @ a
    change: torch.Tensor = product.T if layer.fan_in_fan_out else product
    return weight + float(layer.scaling["default"]) * change
