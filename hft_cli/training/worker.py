"""The training worker's entry point, which loads the libraries; the training itself is in phase.py."""

from __future__ import annotations

import os

from hft_cli.launch.jobs import PhaseJob, Progress
from hft_cli.run_dir import RoundDir
from hft_cli.training.resume import record_signals


def train(job: PhaseJob, folder: RoundDir, progress: Progress) -> None:
    """Train one phase of a run; see `train_phase`."""
    record_signals()  # before the libraries load, which takes seconds
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # a checkpoint is data: loading it runs no code
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
    progress.activity("loading transformers and TRL")
    from hft_cli.training.phase import train_phase

    train_phase(job, folder, progress)
