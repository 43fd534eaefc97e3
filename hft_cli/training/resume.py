"""A checkpoint within a round goes on under another ZeRO stage or number of ranks, as DeepSpeed's universal checkpoint.

DeepSpeed's tool converts it, and `_complete` adds what the tool leaves out for another stage. `mend_and_prove` undoes
what its loaders (of 0.19.8) get wrong and compares all that they loaded with the converted files, so that a fault of
theirs stops the run instead of spoiling it. They leave frozen weights alone, which come from the model's files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft_cli.checkpoint.conversion import to_stored
from hft_cli.checkpoint.folders import stored_tensors
from hft_cli.checkpoint.naming import Param
from hft_cli.errors import UserError
from hft_cli.files import read_json, write_text
from hft_cli.launch.ranks import Ranks
from hft_cli.training.lora import PREFIX

if TYPE_CHECKING:
    import torch


# What of a checkpoint's marker may differ, if DeepSpeed is on both sides. Its own settings place values too (offload,
# groups, order).
LAYOUT = ("ranks", "zero_stage", "zero_optimization")

STATES = ("fp32", "exp_avg", "exp_avg_sq")  # files of each parameter

SHARD = "zero_pp_rank_0_mp_rank_00_model_states.pt"  # under ZeRO-3; DeepSpeed looks for one of these two names

WHOLE = "mp_rank_00_model_states.pt"


def needed(marker: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this marker was laid out otherwise than the running session.

    Raises:
        UserError: if only one of the two is under DeepSpeed.
    """
    if (marker["zero_stage"] is None) != (identity["zero_stage"] is None):
        was, now = ("one process" if each["zero_stage"] is None else "DeepSpeed" for each in (marker, identity))
        fix = "engine=single" if was == "one process" else f"engine=zero{marker['zero_stage']} or another ZeRO stage"
        raise UserError(
            f"This round has a checkpoint of training in {was}, and {now} cannot read it: DeepSpeed converts only "
            f"between its own ZeRO stages and numbers of ranks. Finish the round with {fix}; the next may have another."
        )
    return any(marker.get(key) != identity.get(key) for key in LAYOUT)


def convert(checkpoint: Path, stage: int) -> None:
    """Make a checkpoint loadable at ZeRO `stage` by any number of ranks: `universal_zeroN` in it, whole or absent."""
    folder = checkpoint / f"universal_zero{stage}"
    if not folder.exists():
        for other in checkpoint.glob("universal_zero*"):  # for another stage, or cut off by a kill
            shutil.rmtree(other)
        part = folder.with_suffix(f".{os.getpid()}.part")
        tag = (checkpoint / "latest").read_text().strip()
        # Relative names, because the tool takes its paths for patterns; a process of its own, because it forks.
        tool = [sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        subprocess.run([*tool, "--input_folder", tag, "--output_folder", part.name], cwd=checkpoint, check=True)
        _complete(part, stage)
        part.rename(folder)
    write_text(checkpoint / "latest_universal", folder.name)


def _complete(folder: Path, stage: int) -> None:
    """Add what the loader of ZeRO `stage` wants and the tool does not write; lighten what every rank would read."""
    import torch

    file = folder / "zero" / "optimizer_state.pt"
    state = torch.load(file, map_location="cpu", weights_only=False)
    own = [path.parent for path in sorted((folder / "zero").rglob("exp_avg.pt"))]
    if "optimizer_state_dict" in state:  # from ZeRO-3: its first rank's whole share, tensors without a name, no steps
        step = state["optimizer_state_dict"]["state"][0]["step"]
        state = {key: value for key, value in state.items() if key not in ("optimizer_state_dict", "fp32_flat_groups")}
        if stage < 3:
            for place in own:
                for name in STATES:
                    value = torch.load(place / f"{name}.pt", weights_only=False)
                    torch.save({"param": value}, place / f"{name}.pt")
                torch.save(step, place / "step.pt")
            (folder / SHARD).rename(folder / WHOLE)
    else:
        step = torch.load(own[0] / "step.pt", weights_only=False)
        if stage == 3:
            (folder / WHOLE).rename(folder / SHARD)
    if stage == 3:
        # The loader gives the first group's settings to all groups, so that norms would get weight decay.
        first = {key: value for key, value in state["param_groups"][0].items() if key != "weight_decay"}
        state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": [first]}
    else:
        from deepspeed import __version__

        state.setdefault("ds_version", __version__)
    torch.save(state, file)


def mend_and_prove(model: Any, optimizer: Any, checkpoint: Path, step: int, rank: int) -> None:
    """Compare updated weights, moments and steps in memory with the converted files: the same bits. A collective.

    Raises:
        RuntimeError: if they differ.
    """
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    for parameter, state in optimizer.optimizer.optimizer.state.items():  # accelerate's, DeepSpeed's and then torch's
        # The loaders leave it on the CPU; that of ZeRO-3 gives all groups one tensor, which each would then count up.
        state["step"] = torch.as_tensor(state["step"]).to(parameter.device, copy=True)
        if state["step"] != step:
            raise RuntimeError(
                f"DeepSpeed restored optimizer step {int(state['step'])} of a checkpoint at step {step}."
            )
    folder = checkpoint / (checkpoint / "latest_universal").read_text() / "zero"
    for name, parameter in model.named_parameters():
        for key in STATES if parameter.requires_grad else ():
            own = (
                safe_get_full_fp32_param(parameter) if key == "fp32" else safe_get_full_optimizer_state(parameter, key)
            )
            if rank == 0:
                held = torch.load(folder / name / f"{key}.pt", map_location="cpu", weights_only=False)
                held = held["param"] if isinstance(held, dict) else held
                if not torch.equal(own.detach().cpu().reshape(-1), held.reshape(-1)):
                    raise RuntimeError(f"DeepSpeed did not restore {key} of {name} from {checkpoint}.")


def prove_frozen(model: Any, params: Mapping[str, Param], folder: Path) -> None:
    """Compare the frozen weights in memory, of every rank, with the files that they come from. A collective.

    Raises:
        RuntimeError: if they differ.
    """
    import torch
    from deepspeed.runtime.zero import GatheredParameters
    from safetensors import safe_open

    files = stored_tensors(folder)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for long, parameter in model.named_parameters():
        name = long.removeprefix(PREFIX).replace(".base_layer.", ".")
        if parameter.requires_grad:
            continue
        with GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else nullcontext():
            parts = to_stored(base, {name: parameter.detach().cpu()}, [params[name]])
            for stored, part in parts.items():
                with safe_open(files[stored].file, "pt") as opened:
                    held: torch.Tensor = opened.get_tensor(stored)
                if not torch.equal(held.to(part.dtype), part):
                    raise RuntimeError(f"The frozen weight {name} in memory is not that of {files[stored].file}.")


MARKER = "hft.json"  # written last into a checkpoint: without it the checkpoint is not whole


def newest_checkpoint(folder: Path, identity: Mapping[str, Any], ranks: Ranks) -> tuple[str | None, dict[str, Any]]:
    """The newest whole checkpoint and its marker; what a kill left half written is removed.

    Raises:
        UserError: if it was made under another draw or data.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    whole = [path for path in found if (path / MARKER).exists()]
    if ranks.first:
        for path in set(found) - set(whole):
            shutil.rmtree(path)
    ranks.barrier()
    if not whole:
        return None, {}
    marker = read_json(whole[0] / MARKER)
    for key in identity.keys() - LAYOUT:
        if marker[key] != identity[key]:
            raise UserError(
                f"{whole[0]} was made under another {key} ({marker[key]}, now {identity[key]}); resuming it "
                "would go wrong silently. Use the same configuration and data, or another output_dir."
            )
    return str(whole[0]), marker
