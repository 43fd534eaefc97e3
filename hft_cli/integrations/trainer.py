"""HFT in transformers' Trainer and in trainers that are made from it, such as those of TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import TrainerCallback

from hft_cli.errors import UserError
from hft_cli.files import read_record, write_json
from hft_cli.integrations.half import DRAWN, half_finetune
from hft_cli.live.checksum import frozen_checksum, of_all_ranks, trained_checksum
from hft_cli.live.compat import forget_optimizer, unwrapped, whole_value
from hft_cli.method.selection import Draw
from hft_cli.run_dir import Ledger
from hft_cli.text import first_of

LEDGER = "draws.json"
RECORD = "half_finetune"  # key of `stateful_callbacks` in trainer_state.json, which every checkpoint has


class HalfFinetuneCallback(TrainerCallback):  # type: ignore[misc]
    """Keep the ledger of a draw, prove that frozen weights keep their bits, and save what was trained.

    In the trainer's `output_dir` it writes `draws.json` when the training begins, and `delta-ROUND.safetensors` when it
    ends: the updated parameters under their names in the model, in its dtype. Each checkpoint records the draw and the
    checksums at the start (in its trainer_state.json): a training that is resumed from it must have that draw and those
    frozen weights.

    >>> trainer = Trainer(model, arguments, callbacks=[HalfFinetuneCallback(draw)], …)  # doctest: +SKIP

    Args:
        draw: what `half_finetune` returned for the trainer's model.
        save_delta: whether to write the delta, which the first process holds whole on its CPU.
    """

    def __init__(self, draw: Draw, save_delta: bool = True) -> None:
        self.draw = draw
        self.save_delta = save_delta
        self.frozen_sum = 0  # of this rank, at the start
        self.began: Any = None  # what checkpoints record

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Raises UserError for a model that does not train what was drawn, and for a resumed one with another draw."""
        model = unwrapped(model)
        training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if differing := sorted(training ^ set(self.draw.updated)):
            raise UserError(
                f"The model does not train what was drawn: {first_of(differing)}. Call half_finetune on the model that "
                "the trainer gets, and change no requires_grad after it."
            )
        self.frozen_sum = frozen_checksum(model)
        frozen = of_all_ranks(self.frozen_sum)
        self.began = state.stateful_callbacks.get(RECORD) if state.global_step else self._record(model, frozen)
        if state.global_step:
            self._require_same_draw()
            self._require_same_weights(self.began["frozen_checksums"], frozen)
        state.stateful_callbacks[RECORD] = self.began
        if state.is_world_process_zero:
            ledger = Path(args.output_dir) / LEDGER
            entries = read_record(ledger, Ledger)["rounds"] if ledger.exists() else []
            earlier = [entry for entry in entries if entry["round"] < self.draw.round]
            name, sums = f"round {self.draw.round}", self.began["frozen_checksums"]
            write_json(ledger, {"rounds": [*earlier, {"name": name, **self.draw.as_dict(), "frozen_checksums": sums}]})

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Raises RuntimeError if a frozen weight changed, or if no other weight did."""
        model = unwrapped(model)
        if frozen_checksum(model) != self.frozen_sum:
            raise RuntimeError("A frozen weight changed in memory during training: what sets or decays weights?")
        if state.global_step and of_all_ranks(trained_checksum(model)) == self.began["trained_checksums"]:
            raise RuntimeError(
                "No weight moved that was drawn. Is the learning rate 0, or so small that weights in bfloat16 keep "
                "their values? Train in float32, or with bf16=True, which has master weights in float32."
            )
        if self.save_delta:
            parameters = dict(model.named_parameters())
            values = {}
            for name in self.draw.updated:  # collective over the ranks where they hold shards
                value = whole_value(parameters[name])
                if state.is_world_process_zero:
                    values[name] = value.to(parameters[name].dtype).contiguous()
            if state.is_world_process_zero:
                metadata = {"format": "pt", "round": str(self.draw.round), "names_sha256": self.draw.sha256}
                save_file(values, Path(args.output_dir) / f"delta-{self.draw.round}.safetensors", metadata)

    def _record(self, model: Any, frozen: list[int]) -> dict[str, Any]:
        trained = of_all_ranks(trained_checksum(model))
        drawn = {"round": self.draw.round, "seed": self.draw.seed, "sha256": self.draw.sha256}
        return {**drawn, "frozen_checksums": frozen, "trained_checksums": trained}

    def _require_same_draw(self) -> None:
        began = self.began
        if began is None or (began["round"], began["sha256"]) != (self.draw.round, self.draw.sha256):
            other = f"round {began['round']}, seed {began['seed']}" if began else "no draw"
            raise UserError(
                f"The resumed checkpoint has another draw ({other}) than the model (round {self.draw.round}, "
                f"seed {self.draw.seed}). Give half_finetune the seed, the round and the settings of "
                "then, or begin this round without resume_from_checkpoint."
            )

    def _require_same_weights(self, began: list[int], now: list[int]) -> None:
        """Compare the frozen weights of each rank. Shards of other numbers of ranks cannot be compared."""
        whole = len(set(began)) == len(set(now)) == 1  # each rank holds all weights
        if (len(began) == len(now) and began != now) or (whole and began[0] != now[0]):
            raise UserError(
                "The frozen weights of the checkpoint are not those with which the training began. Resume from another "
                "one, or begin this round without resume_from_checkpoint."
            )


def next_round(model: Any, trainer: Any = None) -> Draw:
    """Draw again for the next round of a model, with the settings of its last draw.

    Args:
        model: it was given to `half_finetune` before.
        trainer: a Trainer of this model that has finished a training. Its optimizer and schedule are dropped, so that
            the next `train()` makes new ones, and its `HalfFinetuneCallback` gets the draw. Under DeepSpeed or FSDP
            make a new trainer instead.

    Raises:
        UserError: if the model was not drawn for, or its optimizer is alive.
    """
    if model not in DRAWN:
        raise UserError("The model has no draw yet: call half_finetune first.")
    last = DRAWN[model]
    if trainer is not None:
        forget_optimizer(trainer)
    draw = half_finetune(model, round=last.draw.round + 1, **last.settings)
    for callback in trainer.callback_handler.callbacks if trainer is not None else ():
        if isinstance(callback, HalfFinetuneCallback):
            callback.draw = draw
    return draw
