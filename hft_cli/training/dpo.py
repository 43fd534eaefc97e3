"""DPO, direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290): rows, reference, first loss.

The rows are rendered, checked and tokenized as for SFT; TRL gets tokens. A row is dropped if its prompt alone fills
train.max_length; otherwise the prompt with each answer is cut at its end. All tokens of an answer have a loss, through
what ends it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trl
from transformers import PreTrainedConfig, TrainerCallback

from hft_cli.checkpoint.folders import weights_hash
from hft_cli.config.schema import RunConfig
from hft_cli.data.phase_rows import PhaseRows, phase_rows
from hft_cli.data.preferences import ANSWERS
from hft_cli.data.preparation import tokenizer_key
from hft_cli.data.tokenization import TokenOptions
from hft_cli.launch.jobs import PhaseJob
from hft_cli.training import compat
from hft_cli.training.session import Session, TrainerParts
from hft_cli.training.validation import Objective
from hft_cli.training.weights import at_rest, copy_of_start, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# What TRL logs of a step's pairs, for metrics.jsonl. A reward is beta x (log p - log p of the reference).
METRICS = (*(f"rewards/{name}" for name in (*ANSWERS, "margins", "accuracies")), *(f"logps/{name}" for name in ANSWERS))


def pair_rows(job: PhaseJob, tokenizer: PreTrainedTokenizerBase) -> tuple[PhaseRows, dict[str, Any]]:
    """The rows of a DPO phase, and counts for the outcome.

    Raises:
        UserError: for a bad row, or if no row is left.
    """
    rows = phase_rows("dpo", job.phase.sources, job.config, tokenizer, job.phase.validation)
    counts = {**rows.counts(), "rows_left_out": rows.summary.dropped}
    longest = TokenOptions.of(job.config).max_length
    key = reference_key(counts["sha256"], tokenizer, longest, weights_hash(Path(job.model)))
    return replace(rows, dataset=compat.salted(rows.dataset, key)), counts


def _sequences(row: Mapping[str, list[int]]) -> list[tuple[list[int], list[int]]]:
    prompt = row["prompt_ids"]
    return [(prompt + row[f"{name}_ids"], [-100] * len(prompt) + row[f"{name}_ids"]) for name in ANSWERS]


def _loss(log_probs: Sequence[float], start: Sequence[float], tokens: int, config: RunConfig) -> float:
    """The mean of -log sigmoid(beta x margin); the reference is the model before the first step."""
    moved = [now - before for now, before in zip(log_probs, start, strict=True)]
    margins = [config.dpo.beta * (chosen - rejected) for chosen, rejected in zip(moved[::2], moved[1::2], strict=True)]
    # log(1 + exp(-x)), which must not overflow
    return math.fsum(max(-x, 0.0) + math.log1p(math.exp(-abs(x))) for x in margins) / len(margins)


OBJECTIVE = Objective(_sequences, _loss)


def reference_key(rows: str, tokenizer: PreTrainedTokenizerBase, max_length: int, weights: str) -> str:
    """What a precomputed reference depends on, as a fingerprint: that of other weights is never read.

    Args:
        rows, weights: hashes of the pairs and of the weights that training starts from.
    """
    return hashlib.sha256(repr((rows, tokenizer_key(tokenizer), max_length, weights)).encode()).hexdigest()


def settings(config: RunConfig) -> tuple[type, dict[str, Any]]:
    """The class of the trainer's arguments, and what DPO sets in them."""
    return trl.DPOConfig, {
        "max_length": config.train.max_length,
        "beta": config.dpo.beta,
        "loss_type": ["sigmoid"],
        "precompute_ref_log_probs": config.dpo.reference == "precomputed",
        "router_aux_loss_coef": 0.0,  # the loss is that of DPO alone, also for a mixture of experts
    }


def reference_model(kind: str, model: PreTrainedModel, load: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
    """The model that DPO compares with: it has the weights that training starts from, which `model` has now.

    Args:
        kind: "full" is a second model in memory, "shared" shares the frozen parameters of `model`. "precomputed" is
            None: TRL then lets `model` compute its log-probabilities of all rows before the first step, and stores
            them beside the data set.
        model: with its final `requires_grad`, before a trainer or an engine is built on it.
        load: loads the weights that training starts from once more.
    """
    if kind == "precomputed":
        return None
    return at_rest(load()) if kind == "full" else copy_of_start(model)


def build_trainer(parts: TrainerParts, session: Session) -> Any:
    """TRL's DPOTrainer for a phase, with its reference and the check of its first step."""
    config, counts = session.job.config, session.counts
    reference = reference_model(config.dpo.reference, parts.model, lambda: load_model(session.job.model, config))
    check = FirstStep(config.dpo.beta, counts["tokens_trained_on"] / (2 * counts["rows"]), config.model.dtype)
    return dpo_trainer(replace(parts, callbacks=[*parts.callbacks, check]), reference)


RANDOM = re.compile(r"drop|jitter")  # names such as attention_dropout, resid_pdrop, layerdrop, router_jitter_noise


def without_dropout(model: PreTrainedModel) -> None:
    """Turn off what is random in training, as DPO does: a policy with dropout differs from its reference at the start.

    TRL turns off modules of dropout. This sets numbers in modules and their configs to 0, which some types read instead
    (OPT, GPT-NeoX, Qwen2). The model's files keep theirs.
    """
    modules = list(model.modules())
    configs = [config for module in modules if isinstance(config := getattr(module, "config", None), PreTrainedConfig)]
    for owner in (*modules, *configs):
        for name, value in list(vars(owner).items()):
            if RANDOM.search(name) and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(owner, name, type(value)(0))


def dpo_trainer(parts: TrainerParts, reference: PreTrainedModel | None) -> Any:
    """TRL's DPOTrainer over the data set of `prepare`, with the reference of `reference_model`.

    A precomputed reference is computed here, or read if this run has computed it before: the model must hold the
    weights that training starts from, also when training then resumes from a checkpoint. Collective over the ranks.

    Raises:
        RuntimeError: if TRL drops rows that were counted as used, because its rules have changed.
        ValueError: without a reference that is not to be precomputed: TRL would load one from the model's own path.
    """
    if (reference is None) != parts.arguments.precompute_ref_log_probs:
        raise ValueError("pass a reference, or None with precompute_ref_log_probs=True")
    for model in (parts.model, reference):
        if model is not None:
            without_dropout(model)
    trainer = compat.ExactReferenceTrainer(
        model=parts.model,
        ref_model=reference,
        args=parts.arguments,
        train_dataset=parts.dataset,
        processing_class=parts.tokenizer,
        callbacks=list(parts.callbacks),
    )
    if len(trainer.train_dataset) != len(parts.dataset):
        dropped = len(parts.dataset) - len(trainer.train_dataset)
        raise RuntimeError(f"TRL dropped {dropped} of {len(parts.dataset)} rows that hft had counted as used.")
    compat.release_precompute_engine(trainer)
    return trainer


# How far two computations of the same log-probability may be apart, relative to its size, because they add in another
# order (another batch, another processor). bfloat16 rounds to 2^-8, each of the two. float32 rounds to 2^-24; a value
# comes from sums of thousands of products, whose rounding adds up to about 2^8 times that.
PRECISION = {"bfloat16": 2 * 2.0**-8, "float32": 2 * 2.0**-16}


def first_step_tolerances(logs: Mapping[str, float], beta: float, answer_tokens: float, dtype: str) -> dict[str, float]:
    """How far the first step's loss may be from ln 2 and its rewards from 0, if the reference is the right one.

    Policy and reference are then the same model, and differ by rounding. A token's log-probability is a logit minus
    the logarithm of a sum. It is precise to `PRECISION` x (1 + |log p|), so that of an answer to `PRECISION` x
    (number of tokens + |log p|). A reward is beta x the difference of two log-probabilities, and the loss
    log(1 + exp(-x)), with x the difference of two rewards, is ln 2 - x/2 + x²/8 near 0.

    Args:
        logs: what TRL has logged of the first step, with the mean log-probability of each kind of answer.
        answer_tokens: mean number of tokens of an answer.
        dtype: "bfloat16" or "float32", of the computation.
    """
    rewards = {
        f"rewards/{answer}": beta * PRECISION[dtype] * (answer_tokens + abs(logs[f"logps/{answer}"]))
        for answer in ANSWERS
    }
    x = sum(rewards.values())
    return {"loss": x / 2 + x**2 / 8, **rewards}


class FirstStep(TrainerCallback):  # type: ignore[misc]
    """Stop a run whose first loss is not ln 2: before the first update, the policy and the reference are equal.

    Needs `logging_first_step`. A resumed phase has its first step behind it and is not checked again.
    """

    def __init__(self, beta: float, answer_tokens: float, dtype: str) -> None:
        self.beta, self.answer_tokens, self.dtype = beta, answer_tokens, dtype

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.global_step != 1 or "loss" not in logs:
            return
        tolerances = first_step_tolerances(logs, self.beta, self.answer_tokens, self.dtype)
        expected = {"loss": math.log(2)}
        if not all(abs(logs[key] - expected.get(key, 0.0)) <= bound for key, bound in tolerances.items()):  # or NaN
            found = ", ".join(f"{key} {logs[key]:.4f} ± {bound:.1g}" for key, bound in tolerances.items())
            raise RuntimeError(
                f"The DPO reference is wrong. At the first step it must equal the policy, with loss ln 2 = 0.6931 and "
                f"rewards 0 up to rounding in {self.dtype}, but these are: {found}."
            )
