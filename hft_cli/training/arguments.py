"""The trainer's arguments: the run's config in the terms of transformers and TRL."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import is_torch_tf32_available

from hft_cli.launch.jobs import PhaseJob
from hft_cli.launch.ranks import RANKS_TIMEOUT
from hft_cli.run_dir import RoundDir
from hft_cli.training.procedures import Procedure


def trainer_arguments(job: PhaseJob, folder: RoundDir, procedure: Procedure) -> Any:
    """The arguments of the phase's trainer, of the procedure's class. The ranks must have joined."""
    config, train = job.config, job.config.train
    gpu = torch.cuda.is_available()
    arguments, settings = procedure.settings(config)
    in_parts = job.phase.set_parts > 1  # the rows are in their order, over all epochs
    if in_parts or (job.phase.replays and not config.continual.replay_shuffle):
        settings["train_sampling_strategy"] = "sequential"
    return arguments(
        **settings,
        output_dir=str(folder.checkpoints),
        seed=config.seed,
        learning_rate=train.learning_rate,
        num_train_epochs=1 if in_parts else train.epochs,
        max_steps=-1 if in_parts else train.max_steps or -1,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=config.accumulation,
        lr_scheduler_type=train.schedule,
        warmup_steps=0 if train.schedule == "constant" else train.warmup,  # below 1: a share of the steps
        optim=train.optimizer,
        weight_decay=train.weight_decay,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        max_grad_norm=train.max_grad_norm,
        tf32=is_torch_tf32_available() or None,  # matrix products of float32, on Ampere or newer
        bf16=config.model.dtype == "bfloat16",
        use_cpu=not gpu,
        activation_checkpointing=train.gradient_checkpointing,
        save_strategy="steps" if train.save_every else "no",
        save_steps=train.save_every or 0.5,
        save_total_limit=None,  # the trainer would remove the old checkpoint before the new one is complete
        logging_steps=train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # otherwise a loss that is not finite is logged as a finite one
        disable_tqdm=True,
        report_to=[],
        deepspeed=job.deepspeed or None,
        ddp_timeout=int(RANKS_TIMEOUT.total_seconds()),
        dataloader_pin_memory=gpu,
    )
