"""Config of how a round is trained: optimiser, DPO, measures against forgetting, generated answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hft_cli.config.optimizers import DEFAULT as OPTIMIZER
from hft_cli.config.settings import BACKENDS, setting


@dataclass
class TrainConfig:
    """Keys `train`: how a round is optimised. The defaults are Tulu 2's for SFT; group `recipe` has others."""

    optimizer: str = setting(
        OPTIMIZER,
        "The optimizer, by its name in transformers. Those other than adamw_torch_fused are for engine=single. "
        "Adafactor needs the least memory of those that adapt their steps; sgd has no momentum; those of 8 bits, paged "
        "ones, Lion and AdEMAMix are from bitsandbytes.",
        choices=("hft_cli.config.optimizers:OPTIMIZERS",),
    )
    learning_rate: float = setting(2e-5, "Peak learning rate.", range="(0, inf)")
    epochs: Any = setting(
        2.0,
        "Passes over each training set. One number, or a map from task to number. train.max_steps takes precedence.",
        unit="epochs",
        range="(0, inf)",
    )
    max_steps: int | None = setting(
        None, "Optimizer steps of each round; null: as train.epochs says.", unit="steps", range="[1, inf)"
    )
    batch_size: int = setting(
        128,
        "Rows of an optimizer step, over all ranks and accumulation steps.",
        unit="rows",
        range="[1, inf)",
    )
    micro_batch_size: int = setting(
        4,
        "Rows that one rank processes at once. train.batch_size must be a multiple of micro_batch_size x ranks.",
        unit="rows",
        range="[1, inf)",
    )
    max_length: int | None = setting(
        None,
        "Longest row. Longer rows are cut, and dropped if no answer is left (both are counted). null: the model's "
        "limit, at most 2048.",
        unit="tokens",
        range="[2, inf)",
    )
    packing: bool = setting(
        False, "Pack short rows into sequences of max_length, without padding. Rows do not attend to each other."
    )
    padding_free: bool = setting(
        False,
        "Put the rows of a micro-batch one after the other, instead of padding them to one length. Rows do not attend "
        "to each other, and the batches are those with padding.",
    )
    group_by_length: bool = setting(
        False,
        "Put rows of similar lengths into a batch: less padding, and faster steps. Groups of 50 batches are drawn at "
        "random, and sorted by length.",
    )
    schedule: str = setting(
        "linear",
        "Learning-rate schedule.",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
    )
    warmup: float = setting(0.03, "Share of the steps in which the learning rate rises.", range="[0, 1)")
    weight_decay: float = setting(
        0.0,
        "Weight decay of updated matrices; decoupled, but for Adagrad and RMSprop, where it is a part of the gradient.",
        range="[0, inf)",
    )
    beta1: float = setting(0.9, "AdamW's decay rate of the first moment.", range="[0, 1)")
    beta2: float = setting(0.999, "AdamW's decay rate of the second moment.", range="[0, 1)")
    momentum_filter: float | None = setting(
        None,
        "MoFO (Chen et al. 2024): of each tensor, a step changes only this share of the elements, those with the "
        "largest first moments. With AdamW on engine=single.",
        range="(0, 1)",
    )
    max_grad_norm: float = setting(
        1.0, "Gradients are scaled down to this global norm; 0: no clipping.", range="[0, inf)"
    )
    router_aux_loss: float | None = setting(
        0.0,
        "Weight of the load-balancing loss of a mixture of experts, in SFT. 0: the loss of the answers alone. null: "
        "the weight in the model's config.json.",
        range="[0, inf)",
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, about a third more time."
    )
    save_every: int | None = setting(
        None,
        "Interval between checkpoints. null: only by save_minutes, and when the run is stopped.",
        unit="steps",
        range="[1, inf)",
    )
    save_minutes: float | None = setting(
        None, "Interval between checkpoints, in addition to save_every; null: none.", unit="minutes", range="(0, inf)"
    )
    save_limit: int = setting(1, "Checkpoints of the running round that are kept.", range="[1, inf)")
    validate_every: int | None = setting(
        None, "Interval between validations; null: a tenth of the round.", unit="steps", range="[1, inf)"
    )
    early_stopping: int | None = setting(
        None,
        "Validations without a lower loss after which a round ends; null: it never ends early.",
        unit="validations",
        range="[1, inf)",
    )
    keep_best: bool | None = setting(
        None,
        "Whether a round ends with the weights of its lowest validation loss; null: if it has train.early_stopping.",
    )
    log_every: int = setting(10, "Interval between lines of metrics.jsonl.", unit="steps", range="[1, inf)")


@dataclass
class DpoConfig:
    """Keys `dpo`: DPO rounds (Rafailov et al. 2023). null: the value in `train`. The defaults are Tulu 2's for DPO."""

    beta: float = setting(0.1, "Strength of the penalty for moving away from the reference model.", range="(0, inf)")
    reference: str = setting(
        "precomputed",
        "precomputed: log-probabilities computed once, no second model in memory; shared: frozen weights are shared "
        "with the model (not on ZeRO-3); full: a second model.",
        choices=("precomputed", "shared", "full"),
    )
    ties: str = setting(
        "keep", "Rows whose two answers have the same score.", choices=("hft_cli.data.preferences:TIES",)
    )
    learning_rate: float | None = setting(5e-7, "Peak learning rate of DPO rounds.", range="(0, inf)")
    epochs: float | None = setting(3.0, "Passes over the training set in DPO rounds.", unit="epochs", range="(0, inf)")
    max_steps: int | None = setting(None, "Optimizer steps of DPO rounds.", unit="steps", range="[1, inf)")
    warmup: float | None = setting(
        0.1, "Share of the steps of DPO rounds in which the learning rate rises.", range="[0, 1)"
    )


@dataclass
class ContinualConfig:
    """Group `continual`: what is done against forgetting in a sequence of tasks, besides the selection."""

    name: str = setting(
        "seqft",
        "seqft: nothing; replay: rows of past tasks are trained on again after each task; mixed_replay: they are in "
        "the same batches as the task's; gem (Lopez-Paz & Ranzato 2017): not on ZeRO-3.",
        choices=("seqft", "replay", "mixed_replay", "gem"),
    )
    score_unseen: bool = setting(
        False, "After each round, score the tasks that are still to come too, not only those seen so far."
    )
    replay_ratio: float = setting(
        0.1, "Replay: share of the rows of each past task that is trained on again after a task.", range="(0, 1]"
    )
    replay_share: float = setting(
        0.01,
        "Mixed replay: share of a round's rows that are replayed, in equal parts from each past task and the general "
        "set.",
        range="(0, 1)",
    )
    replay_epochs: float = setting(1.0, "Replay: passes over those rows.", unit="epochs", range="(0, inf)")
    replay_general: str | None = setting(
        None, "Replays: rows of general instructions (TRACE: LIMA), as in data.path. replay trains on all of them."
    )
    replay_shuffle: bool = setting(
        True, "Replay: mix the rows of all past tasks. false trains task by task, in the order of the files."
    )
    gem_memory: int = setting(
        64, "GEM: rows of each past task whose loss must not rise in a step.", unit="rows", range="[1, inf)"
    )
    gem_margin: float = setting(
        0.0,
        "GEM: memory strength, the smallest weight of a past task's gradient in a corrected step.",
        range="[0, inf)",
    )


@dataclass
class AnchorConfig:
    """Group `anchor`: what holds the trained weights, or the predictions, near those that a round starts from."""

    name: str = setting(
        "none",
        "l2_sp: each step pulls the weights back to their start (Li et al. 2018). kl: the loss has the divergence of "
        "the predictions on the training rows from those at the start (learning without forgetting); not on ZeRO-3.",
        choices=("none", "l2_sp", "kl"),
    )
    weight: float = setting(
        0.0,
        "l2_sp: a step takes the share learning rate x weight of the way back. kl: weight of the divergence, in "
        "nats per trained token, in the loss.",
        range="[0, inf)",
    )


@dataclass
class LoraConfig:
    """Keys `lora`: the adapters of method=lora (Hu et al. 2021), beside all matrices of attention and feed-forward."""

    rank: int = setting(8, "Rank of the adapters.", range="[1, inf)")
    alpha: float = setting(16.0, "The adapters' product is scaled by alpha / rank.", range="(0, inf)")
    dropout: float = setting(0.0, "Dropout before the adapters.", range="[0, 1)")
    dora: bool = setting(False, "DoRA (Liu et al. 2024): the length of each row of a matrix is trained by itself.")


@dataclass
class GenerationConfig:
    """Keys `generation`: how answers are generated, for the metrics that need them."""

    max_new_tokens: int = setting(
        512,
        "Longest answer. The start of a prompt is cut if it leaves no room for the answer.",
        unit="tokens",
        range="[1, inf)",
    )
    max_prompt_length: int | None = setting(
        None,
        "Longest prompt; longer ones are cut at their start. null: the model's positions minus max_new_tokens.",
        unit="tokens",
        range="[1, inf)",
    )
    batch_size: int = setting(
        16,
        "Prompts answered at once. Their key-value cache takes memory for prompt and answer together.",
        unit="prompts",
        range="[1, inf)",
    )
    temperature: float = setting(0.0, "0: greedy decoding. Above 0: sampling, with the seed `seed`.", range="[0, inf)")
    backend: str = setting(
        "transformers",
        "The program that generates the answers. vllm, which must be installed, is faster for many prompts.",
        choices=BACKENDS,
    )
