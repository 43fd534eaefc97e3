"""`model.part=text`: the text model of a model for images is trained, and everything else stays as it is."""

# ruff: noqa: C408

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import changed, composed, hft, in_this_process, save_model
from model_types import tiny_config
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.checkpoint.text_part import text_name
from hft_cli.errors import UserError
from hft_cli.plan.model import read_model
from hft_cli.runner import phase, training
from hft_cli.runner.verify import verify

VISION = dict(
    hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
# model type -> the type of its text model, the config of its other part
MODELS = {
    "gemma3": ("gemma3_text", VISION),
    "llava": ("llama", VISION | dict(model_type="clip_vision_model")),
    "llama4": (
        "llama4_text", VISION | dict(vision_output_dim=16, projector_input_dim=16, projector_output_dim=16)
    ),
    "mistral3": ("mistral", VISION | dict(model_type="pixtral", head_dim=8)),
    "qwen3_5": (
        "qwen3_5_text", dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32)
    ),
}  # fmt: skip


def random_model(model_type: str, folder: Path) -> Path:
    text_type, vision = MODELS[model_type]
    text = tiny_config(text_type, vocabulary=512).to_dict()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](text_config=text, vision_config=vision)
    return save_model(AutoModelForImageTextToText.from_config(config), folder)


def trained(model: Path, rows: Path, out: Path, method: str) -> Path:
    config = composed(
        f"method={method}", f"model.path={model}", "model.part=text", f"data.path={rows}", "train.max_steps=2",
        "train.batch_size=4", "train.max_length=64", "train.learning_rate=0.01", f"output_dir={out}",
    )  # fmt: skip
    run = training.run(config, [])
    (proof,) = verify(run)
    assert proof.frozen_bit_identical
    return out


@pytest.mark.parametrize("model_type", MODELS)
def test_full_fine_tuning_changes_the_text_model_alone(model_type, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(phase, "run_worker", in_this_process)
    base = random_model(model_type, tmp_path / "base")
    tuned = trained(base, rows, tmp_path / "fft", "fft") / "model"
    moved, names = changed(base, tuned), set(load_file(base / "model.safetensors"))
    assert {text_name(name) is not None for name in moved} == {True}
    assert len(moved) > 0.8 * sum(text_name(name) is not None for name in names)
    whole, report = AutoModelForImageTextToText.from_pretrained(tuned, output_loading_info=True)
    assert type(whole).__name__.endswith("ForConditionalGeneration")
    assert not any(report.values())


def test_half_of_the_text_model_is_drawn_and_can_be_set_back(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(phase, "run_worker", in_this_process)
    base = random_model("gemma3", tmp_path / "base")
    params = parameters_from_folder(base, part="text")
    assert {param.name.split(".")[0] for param in params} == {"model"}  # the names of the text model
    assert {stored.split(".")[0] for param in params for stored in param.stored} == {"language_model"}
    tuned = trained(base, rows, tmp_path / "hft", "hft") / "model"
    assert 0 < len(changed(base, tuned)) < 0.6 * len(params)
    done = hft(
        "train", "method=half_reset", f"model.path={tuned}", f"model.base={base}", "model.part=text",
        f"output_dir={tmp_path}/reset",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert changed(base, tmp_path / "reset/model") < changed(base, tuned)


def test_the_plan_says_what_is_not_trained(tmp_path):
    base = random_model("llava", tmp_path / "base")
    model = read_model(composed("method=hft", f"model.path={base}", "model.part=text", "data.path=x").model)
    assert "(text model only; 43 tensors with" in model.source
    assert {param.kind for param in model.params} == {"attention", "feed_forward", "norm", "embedding", "head"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama"}, r"has no text_config in its config\.json\. Leave model\.part out"),
        ({"model_type": "bert", "text_config": {}}, "no text_config"),
        (
            {"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}},
            r"qwen2_vl_text, is no causal language model",
        ),
    ],
)
def test_a_model_without_a_text_model_is_refused(config, said, tmp_path):
    base = random_model("gemma3", tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        parameters_from_folder(base, part="text")
