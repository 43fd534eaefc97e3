"""training/validation.py: the loss of rows that are not trained on, when a phase ends, and whose weights it keeps."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import BASE, composed
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState
from trl.trainer.utils import add_fused_lm_head

from hft_cli.errors import UserError
from hft_cli.launch.jobs import PhaseJob, Progress
from hft_cli.launch.ranks import Ranks
from hft_cli.method.rounds import phases
from hft_cli.run_dir import RoundDir
from hft_cli.training import dpo, sft, validation
from hft_cli.training.resume import Identity
from hft_cli.training.session import Session, SessionState
from hft_cli.training.validation import Validation, sequence_log_probs, use_best

ROWS = [
    (torch.tensor(range(3, 3 + length)), torch.tensor([-100] * 2 + list(range(5, 3 + length))))
    for length in (9, 4, 14, 6, 11)
]


def trainer() -> Any:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    add_fused_lm_head(model)
    device = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(model=model, args=device, compute_loss_context_manager=nullcontext)


def own_log_prob(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """The same by the model's plain logits, row by row, without padding."""
    with torch.no_grad():
        log_probs = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
    trained = labels[1:] != -100
    return float(log_probs[trained].gather(1, labels[1:][trained][:, None]).sum())


@pytest.mark.parametrize("size", [1, 2, 100])
def test_each_row_has_its_own_log_probability(size):
    fake = trainer()
    fake.model.train()
    found = sequence_log_probs(fake, ROWS, size, Ranks())
    assert found == pytest.approx([own_log_prob(fake.model.eval(), *row) for row in ROWS], rel=1e-5)


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_is_off_in_validation_alone(mode):
    fake = trainer()
    fake.model.train(mode)
    seen = []
    fake.model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    sequence_log_probs(fake, ROWS, 2, Ranks())
    assert set(seen) == {False}
    assert fake.model.training is mode


def test_the_loss_of_sft_is_the_mean_over_trained_tokens():
    loss = sft.OBJECTIVE.loss([-3.0, -1.0, -8.0], [], 6, composed("+method=hft"))
    assert loss == 2.0  # and not the mean of the rows' means


@settings(deadline=None)
@given(st.lists(st.floats(-2000, 0), min_size=4, max_size=4), st.lists(st.floats(-2000, 0), min_size=4, max_size=4))
def test_the_loss_of_dpo_is_that_of_its_paper(now, start):
    found = dpo.OBJECTIVE.loss(now, start, 0, composed("+method=hft_dpo", "dpo.beta=0.3"))
    policy, reference = (torch.tensor(values, dtype=torch.float64) for values in (now, start))
    moved = policy - reference
    expected = -torch.nn.functional.logsigmoid(0.3 * (moved[::2] - moved[1::2])).mean()
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert dpo.OBJECTIVE.loss(now, now, 0, composed("+method=hft_dpo", "dpo.beta=0.3")) == pytest.approx(math.log(2))


def test_pairs_are_two_sequences_with_a_loss_on_the_answers():
    row = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    assert dpo.OBJECTIVE.sequences(row) == [([1, 2, 3], [-100, -100, 3]), ([1, 2, 4, 5], [-100, -100, 4, 5])]


class Run:
    """A phase whose validation losses are given: what the callback does at each step."""

    def __init__(self, folder: Path, losses: list[float], *overrides: str, state: SessionState | None = None) -> None:
        config = composed("+method=hft", f"output_dir={folder}", "data.validation=0.1", *overrides)
        self.job = PhaseJob(config, phases(config)[0], "model", str(folder / "metrics.jsonl"), (), ())
        self.state = state or SessionState(start=1.0)
        identity = Identity("draw", "data", 1, None, None)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokens").mkdir(exist_ok=True)
        self.session = Session(self.job, RoundDir(folder), Ranks(), {}, {}, identity, None, self.state)
        self.losses, self.written = losses, []
        progress = Progress(folder / "progress.json")
        rows = [{"input_ids": [1, 2], "labels": [-100, 2]}]
        self.callback = Validation(self.session, sft.OBJECTIVE, rows, self.write, progress)
        self.callback._log_probs = lambda: [-self.losses[len(self.state.validations)]]
        self.callback.trainer = SimpleNamespace(model="the model")

    def write(self, model: Any, session: Session) -> None:
        assert model == "the model"
        step = int(session.folder.folder.name)
        self.written.append(step)
        session.folder.delta.write_text(f"weights of step {step}")

    def train(self, first: int = 0, last: int = 100) -> int:
        """The step after which the phase ends; that it logs with each validation is checked too."""
        self.callback.on_train_begin(None, at(first), TrainerControl())
        for step in range(first + 1, last + 1):
            control, validated = TrainerControl(), len(self.state.validations)
            self.callback.on_step_end(None, at(step), control)
            assert control.should_log == (len(self.state.validations) > validated)
            if control.should_training_stop:
                return step
        return last

    def kept(self) -> set[str]:
        return {path.name for path in self.session.folder.best.glob("*")}


def at(step: int) -> TrainerState:
    return TrainerState(global_step=step, max_steps=100)


def test_a_round_is_validated_in_tenths_at_its_start_and_end(tmp_path):
    run = Run(tmp_path / "a", [1.0] * 20)
    run.train()
    assert [step for step, _ in run.state.validations] == [*range(0, 101, 10)]
    run = Run(tmp_path / "b", [1.0] * 20, "train.validate_every=30")
    run.train()
    assert [step for step, _ in run.state.validations] == [0, 30, 60, 90, 100]
    assert run.written == []  # nothing is kept of a run that is only watched


def test_a_round_ends_when_its_loss_does_not_fall(tmp_path):
    losses = [5.0, 3.0, 4.0, 2.0, 2.0, 2.5, 1.0, 9.0]
    run = Run(tmp_path, losses, "train.early_stopping=2")
    assert run.train() == 50
    assert run.state.best_step() == 30
    assert run.written == [0, 10, 30]
    assert run.kept() == {"30"}
    use_best(run.session)
    assert run.session.folder.delta.read_text() == "weights of step 30"


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 5), min_size=11, max_size=11), st.integers(1, 4), st.integers(1, 9))
def test_a_resumed_round_ends_where_the_whole_one_does(tmp_path_factory, losses, patience, cut):
    folder = tmp_path_factory.mktemp("runs")
    asked = f"train.early_stopping={patience}"
    whole = Run(folder / "whole", losses, asked)
    end = whole.train()
    if 10 * cut >= end:
        return
    first = Run(folder / "cut", losses, asked)
    first.train(last=10 * cut)
    marker = json.loads(json.dumps(first.state.marker(first.session.identity)))
    first.state.marked_best = first.state.best_step()  # as Checkpoints does
    first.train(first=10 * cut, last=min(10 * cut + 20, 100))  # steps that the checkpoint does not have
    again = Run(folder / "cut", losses, asked, state=SessionState.resumed(marker))
    assert again.train(first=10 * cut) == end
    assert again.state.validations == whole.state.validations
    use_best(again.session)
    use_best(whole.session)
    assert again.session.folder.delta.read_text() == whole.session.folder.delta.read_text()


def test_the_best_weights_of_a_checkpoint_outlive_later_ones(tmp_path):
    first = Run(tmp_path, [5.0, 2.0, 3.0, 1.0, 1.0], "train.keep_best=true")
    first.train(last=20)
    marker = json.loads(json.dumps(first.state.marker(first.session.identity)))
    first.state.marked_best = first.state.best_step()  # as Checkpoints does
    first.train(first=20, last=30)  # better than the checkpoint's best, and lost with the session
    # On another engine, which rounds otherwise, the step is no better.
    again = Run(tmp_path, [5.0, 2.0, 3.0, 2.0, 4.0], "train.keep_best=true", state=SessionState.resumed(marker))
    again.train(first=20, last=40)
    use_best(again.session)
    assert again.session.folder.delta.read_text() == "weights of step 10"


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    run = Run(tmp_path, [1.0, math.nan], "train.early_stopping=3")
    with pytest.raises(UserError, match=r"The validation loss is nan at step 10: training has diverged\. Lower train"):
        run.train()


def test_best_weights_that_were_removed_are_named(tmp_path):
    run = Run(tmp_path, [1.0, 2.0, 3.0], "train.early_stopping=1")
    run.train()
    validation.best_folder(run.session.folder, 0).delta.unlink()
    with pytest.raises(
        UserError, match=r"best/0/delta\.safetensors, the weights of the lowest validation loss, is miss"
    ):
        use_best(run.session)
