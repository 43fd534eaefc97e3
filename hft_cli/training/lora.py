"""LoRA by PEFT (Hu et al. 2021, arXiv 2106.09685), and DoRA (Liu et al. 2024, arXiv 2402.09353).

The adapters continue from phase to phase beside the unchanged base model (LoRASeqFT of TRACE). A phase's delta holds
the base's matrices with the adapters merged into them, so that the run's model is a model like any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hft_cli.checkpoint.folders import stored_tensors
from hft_cli.errors import UserError
from hft_cli.files import sync_tree
from hft_cli.launch.jobs import PhaseJob
from hft_cli.live.compat import master_value
from hft_cli.training.compat import base_name, load_adapter, merged_value
from hft_cli.training.session import Session
from hft_cli.training.weights import file_value, write_delta


def adapt(model: Any, job: PhaseJob) -> Any:
    """Return the model with trainable adapters beside the updated matrices, and all else frozen.

    The adapters are those of the phase before (`job.adapter`), or new ones.

    Raises:
        UserError: if PEFT adapts other matrices than those.
    """
    import peft

    if job.adapter is not None:
        return peft.PeftModel.from_pretrained(model, job.adapter, is_trainable=True)
    modules = {name.removesuffix(".weight") for name in job.updated}
    lora = job.config.lora
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated as int, used as any number
            lora_dropout=lora.dropout,
            use_dora=lora.dora,
            target_modules=sorted(modules),
        ),
    )
    trainable = (name for name, parameter in adapted.named_parameters() if parameter.requires_grad)
    actual = {base_name(name).split(".lora_")[0] for name in trainable}
    if actual != modules:  # PEFT takes the names of some dense matrices for those of experts
        raise UserError(
            f"method=lora does not work with this model: PEFT adapts other matrices than requested, such as "
            f"{min(actual ^ modules)}. Use another method."
        )
    return adapted


def restore_masters(model: Any, session: Session) -> None:
    """Give DeepSpeed's float32 master weights the values of the adapters' file, which it has rounded to bfloat16."""
    from deepspeed.utils import safe_set_full_fp32_param

    if session.job.adapter is None:  # new adapters have no other values
        return
    saved = load_adapter(Path(session.job.adapter))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, saved[name].to(parameter.device))


def write_merged(model: Any, session: Session) -> None:
    """Write the adapters, and a delta of the matrices with the adapters merged. Collective over the ranks."""
    adapters = {name: master_value(value) for name, value in model.named_parameters() if value.requires_grad}
    if not session.ranks.first:
        return
    model.save_pretrained(session.folder.adapter, state_dict=adapters, save_embedding_layers=False)
    sync_tree(session.folder.adapter)
    files = stored_tensors(Path(session.job.model))

    def merged(name: str) -> torch.Tensor:
        return merged_value(model, name, file_value(session.params[name], files), adapters)

    write_delta(model.get_base_model(), session, merged)
