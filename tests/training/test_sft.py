"""training/sft.py: the loss of SFT is that of the answers alone, also for a mixture of experts."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from helpers import BASE, QUICK, hft, metrics, phase_job

from hft_cli.config.schema import RunConfig
from hft_cli.errors import UserError
from hft_cli.launch.jobs import PhaseJob, Progress
from hft_cli.run_dir import RoundDir
from hft_cli.training.compat import LossOnlyTrainer
from hft_cli.training.phase import train_phase
from hft_cli.training.sft import _check_router, settings


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """A random Mixtral with the embedded model's tokenizer, whose experts are used unevenly."""
    folder = Path(shutil.copytree(BASE, tmp_path_factory.mktemp("mixture") / "model"))
    config = transformers.MixtralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def trained(job: PhaseJob, folder: Path) -> list[dict]:
    """The log of a phase that is trained in this process."""
    folder.mkdir()
    train_phase(job, RoundDir(folder), Progress(RoundDir(folder).progress))
    return metrics(folder)


def test_the_router_is_balanced_only_if_it_is_asked_for(mixture, tmp_path):
    losses = {}
    for weight in ("0", "0.5", "null"):
        job = phase_job(
            tmp_path / weight, mixture, *QUICK, "method=fft", "train.log_every=1", f"train.router_aux_loss={weight}"
        )
        losses[weight] = trained(job, tmp_path / weight)[0]["loss"]
    assert losses["0"] < losses["0.5"] - 0.1
    assert losses["null"] == losses["0.5"]  # that of its config.json
    assert settings(RunConfig())[1]["router_aux_loss_coef"] == 0.0


@pytest.mark.parametrize("more", [(), ("anchor=kl",), ("train.group_by_length=true",)], ids=str)
def test_rows_without_padding_are_trained_on_as_with_it(more, tmp_path, monkeypatch):
    compute, shapes = LossOnlyTrainer.compute_loss, []

    def watched(self, model, inputs, *arguments, **options):
        shapes.append(inputs["input_ids"].shape)
        return compute(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(LossOnlyTrainer, "compute_loss", watched)
    texts = ["a b c", "what do you want from me and from all of us here", "d", "e f g h i j k l m n o p q r s t u v"]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{text} {i}"}}\n' for i in range(8) for text in texts))
    own = ("method=fft", f"data.path={tmp_path}/rows.jsonl", "train.learning_rate=1e-2", *more)
    logs, sizes = {}, {}
    for free in ("false", "true"):
        shapes.clear()
        job = phase_job(tmp_path / free, BASE, *QUICK, *own, f"train.padding_free={free}")
        logs[free], sizes[free] = trained(job, tmp_path / free), list(shapes)
    assert {rows for rows, _ in sizes["false"]} == {4}
    assert {rows for rows, _ in sizes["true"]} == {1}
    assert sum(length for _, length in sizes["true"]) < 4 * sum(length for _, length in sizes["false"])
    for padded, free in zip(logs["false"], logs["true"], strict=True):
        assert free["loss"] == pytest.approx(padded["loss"], rel=1e-4)


def test_a_model_without_a_router_has_no_weight_for_it(tmp_path):
    ended = hft("train", *QUICK, "+method=hft", "train.router_aux_loss=0.1", f"output_dir={tmp_path}/run")
    assert ended.status == 2
    assert "is for mixtures of experts; model has no router_aux_loss_coef" in ended.err


def test_a_router_whose_loss_trl_cannot_compute_is_refused():
    granite = SimpleNamespace(router_aux_loss_coef=0.01, model_type="granitemoe")
    _check_router(granite, 0.0)
    _check_router(SimpleNamespace(), None)
    with pytest.raises(UserError, match=r"granitemoe model cannot be computed.*Set train\.router_aux_loss=0"):
        _check_router(granite, None)
