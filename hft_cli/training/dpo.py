"""The DPO stage's own pieces: rows ready for TRL's DPOTrainer, the reference, and a check that it is the right one.

TRL renders and tokenizes the rows. What it leaves out and cuts without a word is counted here beforehand, by its
rules: a row goes if its prompt alone fills max_length; otherwise each of prompt + answer is cut on the right. The
answer begins where the prompt (with the generation prompt) and the prompt with the answer part, and all that follows
has a loss.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hft_cli.data.encoding import BATCH
from hft_cli.data.preferences import ANSWERS, Preference, preferences_hash
from hft_cli.data.rows import Chat
from hft_cli.data.templates import apply_template, check_template
from hft_cli.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import DPOConfig


REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's names for what it precomputes

# What TRL logs of a step's pairs that is worth a line of metrics.jsonl. A reward is beta x (log p - log p_reference).
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)

# How far the first loss may be from ln 2. In bfloat16 the same pair gives other sums in another batch.
TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Prepared:
    """Rows for TRL's DPOTrainer, and what will happen to them. All counts are of rows or of tokens.

    Attributes:
        dataset: a `datasets.Dataset` with `prompt`, `chosen` and `rejected`; TRL will keep every row of it.
        rows: rows in `dataset`.
        dropped: rows left out because their prompt alone fills max_length.
        alike: rows left out because the tokens of both answers, as far as max_length lets them, are the same.
        truncated: rows in `dataset` of which at least one answer will lose tokens at its end.
        trained_tokens: tokens of answers, of both.
        total_tokens: tokens of answers and prompts; a prompt counts twice, as it is read twice.
    """

    dataset: Any
    rows: int
    dropped: int
    alike: int
    truncated: int
    trained_tokens: int
    total_tokens: int


def prepare(
    rows: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    start: str,
    where: str = "the data",
) -> Prepared:
    """Leave out the rows that DPO cannot learn from, count, and make the data set that all ranks will load from files.

    Args:
        rows: as `read_preferences` gives them.
        tokenizer: with its `chat_template` set.
        max_length: tokens kept of a prompt with an answer, from its start.
        start: what tells the weights that training starts from, from `weights_hash`. It goes into the data set's
            fingerprint, which names the file of precomputed log-probabilities: under ZeRO-3 TRL cannot tell one model
            from another, and would take those of another start.
        where: what errors call the data.

    Raises:
        UserError: the template fails on a row, leaves answers out or without an end; every row would be left out.
    """
    import datasets

    check_template(rows[0]["prompt"] + rows[0]["chosen"], f"{where}, example 1", tokenizer)

    def ids(chats: list[Chat], first: int, **options: Any) -> list[list[int]]:
        texts = [
            apply_template(chat, f"{where}, example {first + number}", tokenizer, **options)
            for number, chat in enumerate(chats)
        ]
        encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return encoded

    kept: list[Preference] = []
    dropped = alike = truncated = trained = total = 0
    for begin in range(0, len(rows), BATCH):
        batch = rows[begin : begin + BATCH]
        prompts = ids([row["prompt"] for row in batch], begin + 1, add_generation_prompt=True)
        both = (ids([row["prompt"] + row[key] for row in batch], begin + 1) for key in ANSWERS)
        for row, prompt, chosen, rejected in zip(batch, prompts, *both, strict=True):
            at = min(_common(prompt, chosen), _common(prompt, rejected))
            if at >= max_length:
                dropped += 1
                continue
            if chosen[:max_length] == rejected[:max_length]:
                alike += 1
                continue
            kept.append(row)
            truncated += max(len(chosen), len(rejected)) > max_length
            sizes = [min(len(whole), max_length) for whole in (chosen, rejected)]
            trained += sum(sizes) - 2 * at
            total += sum(sizes)
    if not kept:
        raise UserError(
            f"Nothing to learn from the {len(rows)} rows of {where} at train.max_length={max_length}: {dropped} have "
            f"prompts that fill it, {alike} have the same tokens left of both answers. Raise train.max_length."
        )
    dataset = datasets.Dataset.from_list(kept)
    salted = hashlib.sha256(f"{preferences_hash(kept)} {start}".encode()).hexdigest()
    dataset = dataset.select(range(len(kept)), new_fingerprint=salted)
    return Prepared(dataset, len(kept), dropped, alike, truncated, trained, total)


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def settings(kind: str, beta: float) -> dict[str, Any]:
    """What a DPOConfig says besides the training arguments; max_length is the same key as SFTConfig's."""
    return {
        "beta": beta,
        "loss_type": ["sigmoid"],
        "precompute_ref_log_probs": kind == "precomputed",
        "router_aux_loss_coef": 0.0,  # the loss is DPO's alone, also of a mixture of experts
    }


def reference(kind: str, model: PreTrainedModel, load: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
    """The model that DPO compares with: the weights that training starts from, which must be those of `model` now.

    Args:
        kind: "full" is a second model in memory. "shared" is one whose frozen parameters are the very ones of `model`,
            and only the others are copies. "precomputed" is None: TRL then lets `model` itself say its log-
            probabilities of all rows before the first step, and stores them beside the data set.
        model: after `freeze`, before a trainer or an engine has seen it.
        load: loads the start's model once more.
    """
    if kind == "precomputed":
        return None
    if kind == "full":
        made = load()
    else:
        # deepcopy takes what is in the memo as it is. The same Parameter, not another over the same storage: moved to
        # a GPU or cast, it stays one.
        made = copy.deepcopy(model, {id(own): own for own in model.parameters() if not own.requires_grad})
    made.requires_grad_(False)
    made.eval()
    return made


def dpo_trainer(
    model: PreTrainedModel,
    compared_with: PreTrainedModel | None,
    arguments: DPOConfig,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[Any],
) -> Any:
    """TRL's DPOTrainer over rows that `prepare` made, with the reference that `reference` made.

    With a precomputed reference this is where it is computed, or read if this run has done so before: `model` must
    hold the start's weights, also when training then resumes from a checkpoint. Collective over the ranks.

    Raises:
        RuntimeError: TRL left out rows that were counted as used: it has changed its rules.
        ValueError: no reference, and none to be precomputed: TRL would load one from wherever the model came from.
    """
    from trl import DPOTrainer

    if (compared_with is None) != arguments.precompute_ref_log_probs:
        raise ValueError("pass a reference, or None with precompute_ref_log_probs=True")

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
            # Under DeepSpeed in bfloat16 all inputs are cast to it, these sums too: -1710.2 would become -1712.
            exact = {key: inputs[key].to(self.args.device) for key in REFERENCE_COLUMNS if key in inputs}
            return {**super()._prepare_inputs(inputs), **exact}

    trainer = Trainer(
        model=model,
        ref_model=compared_with,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[*callbacks, first_loss("bfloat16" if arguments.bf16 else "float32")],
    )
    if len(trainer.train_dataset) != len(dataset):
        raise RuntimeError(f"TRL left out {len(dataset) - len(trainer.train_dataset)} of {len(dataset)} rows.")
    if (engine := getattr(trainer, "_precompute_engine", None)) is not None:
        # It has served. Under ZeRO-3 its hooks would go on gathering and releasing weights beside those of training.
        engine.destroy()
        trainer._precompute_engine = None
    return trainer


def first_loss(dtype: str) -> Any:
    """A callback that stops a run whose first loss is not ln 2: before the first update policy and reference agree.

    It needs logging_first_step. A resumed run has its first step behind it and is not checked again.
    """
    from transformers import TrainerCallback

    class FirstLoss(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if state.global_step != 1 or "loss" not in logs:
                return
            if not abs(logs["loss"] - math.log(2)) <= TOLERANCES[dtype]:  # a NaN, too
                raise RuntimeError(
                    f"the reference is wrong: the first DPO loss is {logs['loss']:.4f}, and must be ln 2 = 0.6931 "
                    f"within {TOLERANCES[dtype]} in {dtype}, as the policy and the reference are still the same model."
                )

    return FirstLoss()
