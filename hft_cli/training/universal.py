"""Resume within a phase under another ZeRO stage or number of ranks, by DeepSpeed's universal checkpoints.

DeepSpeed's tool converts a checkpoint, and compat.py repairs what the tool and the loaders get wrong. Before the first
step, all that was loaded is compared with the converted files, bit by bit. The loaders skip frozen weights, which come
from the model's files and are compared with those (proof.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hft_cli.errors import UserError
from hft_cli.files import write_text
from hft_cli.launch.ranks import Ranks
from hft_cli.live.compat import master_value
from hft_cli.training import compat
from hft_cli.training.resume import LAYOUT, Identity

LATEST = "latest_universal"  # the file in which DeepSpeed looks for the name of the converted folder


def needs_conversion(marker: Mapping[str, Any], identity: Identity) -> bool:
    """Whether a checkpoint with this marker has another layout than the session needs.

    Raises:
        UserError: if only one of the two is DeepSpeed's.
    """
    if (marker["zero_stage"] is None) != (identity.zero_stage is None):
        before, now = "a single process", "DeepSpeed"
        fix = "engine=single"
        if marker["zero_stage"] is not None:
            before, now, fix = now, before, f"engine=zero{marker['zero_stage']} or another ZeRO stage"
        raise UserError(
            f"This round has a checkpoint of {before}, which {now} cannot read: DeepSpeed converts only between its "
            f"own ZeRO stages and numbers of ranks. Finish the round with {fix}; the next round may use another engine."
        )
    session = asdict(identity)
    return any(marker.get(key) != session[key] for key in LAYOUT)


def convert(checkpoint: Path, identity: Identity, ranks: Ranks) -> None:
    """Write `universal_zeroSTAGE` into a checkpoint, which any number of ranks can load. Collective over the ranks."""
    if ranks.first:
        assert identity.zero_stage is not None
        _convert(checkpoint, identity.zero_stage)
    ranks.barrier()


def _convert(checkpoint: Path, stage: int) -> None:
    folder = checkpoint / f"universal_zero{stage}"
    if not folder.exists():
        for other in checkpoint.glob("universal_zero*"):  # for another stage, or not complete
            shutil.rmtree(other)
        part = folder.with_suffix(f".{os.getpid()}.part")
        tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
        # Relative names, because the tool takes its paths for patterns; a process of its own, because it forks.
        tool = [sys.executable, "-P", "-m", "hft_cli.training.universal_tool", "--inject_missing_state"]
        subprocess.run([*tool, "--input_folder", tag, "--output_folder", part.name], cwd=checkpoint, check=True)
        compat.complete_universal(part, stage)
        part.rename(folder)
    write_text(checkpoint / LATEST, folder.name)


def prove_updated(model: Any, optimizer: Any, checkpoint: Path, step: int, ranks: Ranks) -> None:
    """Compare updated weights, moments and steps in memory with the converted files. Collective over the ranks.

    Raises:
        RuntimeError: if a bit differs.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    compat.repair_step_counts(optimizer, step)
    folder = checkpoint / (checkpoint / LATEST).read_text(encoding="utf-8")
    for name, parameter in model.named_parameters():
        for state in compat.OPTIMIZER_STATES if parameter.requires_grad else ():
            if state == "fp32":
                value = master_value(parameter)
            else:
                value = safe_get_full_optimizer_state(parameter, state).detach().cpu()
            if ranks.first and not torch.equal(value.reshape(-1), compat.universal_value(folder, name, state)):
                raise RuntimeError(f"DeepSpeed did not restore {state} of {name} from {checkpoint}.")
