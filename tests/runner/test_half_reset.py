"""Half-Reset: the drawn half of a tuned model goes back to its base, bit for bit, and nothing else does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import hft, results
from safetensors.torch import load_file, save_file

from hft_cli.checkpoint.deltas import apply_deltas
from hft_cli.checkpoint.folders import stored_tensors
from hft_cli.checkpoint.interpolation import StoredModel, blends, write_blends
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.config.schema import SelectionConfig
from hft_cli.errors import UserError
from hft_cli.method.selection import draw
from hft_cli.paths import resolve_path

BASE = Path(resolve_path("pocket:model"))
EVERYTHING = ("selection.embeddings=update", "selection.head=update", "selection.final_norm=update")


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """The embedded model with every weight changed."""
    folder = Path(shutil.copytree(BASE, tmp_path_factory.mktemp("tuned") / "model"))
    moved = {name: value + 0.01 for name, value in load_file(BASE / "model.safetensors").items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reset(tuned: Path, base: Path, out: Path, config: SelectionConfig, seed: int = 0, join: bool = False) -> set[str]:
    """Write the reset model to `out` and return the parameters that were drawn."""
    own, theirs = parameters_from_folder(tuned), parameters_from_folder(base)
    names = draw(own, config, 1, seed).updated
    delta = out.with_name("delta.safetensors")
    models = (StoredModel(tuned, own, stored_tensors(tuned)), StoredModel(base, theirs, stored_tensors(base)))
    write_blends(blends(*models, dict.fromkeys(names, 0.0), join), delta, {})
    apply_deltas(tuned, [delta], out)
    return set(names)


@pytest.mark.parametrize("seed", range(10))
def test_the_draw_says_which_tensors_are_the_base_s(tuned, tmp_path, seed):
    level = ("category", "layer", "model")[seed % 3]
    config = SelectionConfig(level=level, ratio=0.1 * seed, embeddings="freeze")
    drawn = reset(tuned, BASE, tmp_path / "out", config, seed)
    made, own, base = everything(tmp_path / "out"), everything(tuned), everything(BASE)
    assert made.keys() == own.keys()
    assert all(same(made[name], (base if name in drawn else own)[name]) for name in made)


def test_ratio_0_is_the_tuned_model_and_ratio_1_the_base(tuned, tmp_path):
    frozen = {"embeddings": "freeze", "head": "freeze", "final_norm": "freeze"}
    reset(tuned, BASE, tmp_path / "none", SelectionConfig(ratio=0, **frozen))
    reset(tuned, BASE, tmp_path / "all", SelectionConfig(ratio=1))
    assert (tmp_path / "none/model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    made, base = everything(tmp_path / "all"), everything(BASE)
    assert all(same(made[name], base[name]) for name in base)


def test_shards_mixed_dtypes_and_tied_embeddings_keep_their_bits(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    for name, dtype, shard in (("base", torch.float16, "8KB"), ("tuned", torch.bfloat16, "20KB")):
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(tmp_path / name, max_shard_size=shard)
    norm = "model.layers.0.input_layernorm.weight"
    file = next(f for f in (tmp_path / "tuned").glob("*.safetensors") if norm in load_file(f))
    save_file(load_file(file) | {norm: torch.rand(16)}, file, metadata={"format": "pt"})  # one norm in float32

    drawn = reset(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", SelectionConfig())
    made, own, base = everything(tmp_path / "out"), everything(tmp_path / "tuned"), everything(tmp_path / "base")
    assert made.keys() == own.keys()
    assert all(same(made[name], (base if name in drawn else own)[name]) for name in made)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.fixture
def longer(tuned, tmp_path) -> Path:
    """The tuned model with eight more tokens in its vocabulary."""
    folder = Path(shutil.copytree(tuned, tmp_path / "longer"))
    held = load_file(tuned / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = torch.cat([held[name], torch.rand(8, held[name].shape[1])])
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    return folder


def test_a_longer_vocabulary_is_reset_in_the_shared_rows_only(longer, tmp_path):
    with pytest.raises(UserError, match=r"\[520, 96\], in the base \[512, 96\].*method\.shared_rows=true"):
        reset(longer, BASE, tmp_path / "refused", SelectionConfig())
    assert not (tmp_path / "refused").exists()
    reset(longer, BASE, tmp_path / "out", SelectionConfig(ratio=1), join=True)
    made, own, base = everything(tmp_path / "out"), everything(longer), everything(BASE)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(made[name][:512], base[name])
        assert torch.equal(made[name][512:], own[name][512:])


def test_models_that_do_not_fit_are_refused_naming_the_first_few(tuned, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    other = LlamaConfig(vocab_size=512, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4)  # fmt: skip
    AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"cannot be set back to .* and \d+ more"):
        reset(tuned, tmp_path / "other", tmp_path / "out", SelectionConfig())


@pytest.fixture(scope="module")
def run(tuned, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "reset"
    ended = hft("train", "method=half_reset", f"model.tuned={tuned}", "model.base=pocket:model",
                "data=pocket_capitals", f"output_dir={out}")  # fmt: skip
    assert ended.status == 0, ended.err
    return out


def test_the_command_verifies_and_scores_before_and_after(run, tuned):
    assert hft("verify", run).out.endswith("verified: 1 round\n")
    (entry,) = json.loads((run / "draws.json").read_text())["rounds"]
    made, own, base = everything(run / "model"), everything(tuned), everything(BASE)
    assert all(same(made[name], (base if name in entry["updated"] else own)[name]) for name in made)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= set(entry["frozen"])
    found = results(run)
    assert found["stage"] == "half_reset"
    assert found["eval"]["after"].keys() == {"pocket", "data"}


def test_verify_fails_a_reset_to_something_other_than_the_base(run, tmp_path):
    broken = Path(shutil.copytree(run, tmp_path / "run"))
    delta = broken / "rounds/01-half_reset/delta.safetensors"
    held = load_file(delta)
    name = sorted(held)[0]
    held[name] += 1
    save_file(held, delta)
    save_file(everything(broken / "model") | held, broken / "model/model.safetensors", metadata={"format": "pt"})
    ended = hft("verify", broken)
    assert ended.status == 1
    assert f"the delta differs from what the base gives in: {name}" in ended.out


def test_a_draw_is_scored_without_a_model_as_its_model_would_be(run, tuned, tmp_path):
    ended = hft("train", "method=half_reset", f"model.tuned={tuned}", "model.base=pocket:model",
                "data=pocket_capitals", "method.save_model=false", f"output_dir={tmp_path}/run")  # fmt: skip
    assert ended.status == 0, ended.err
    assert results(tmp_path / "run")["eval"] == results(run)["eval"]
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    assert "wrote no model" in hft("verify", tmp_path / "run").err


def test_the_base_is_scored_for_the_gate(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    ended = hft("eval", f"run={copy}", "suite=text", "models=[base,after]")
    assert ended.status == 0, ended.err
    gate = hft("gate", copy, "--max-loss", "100", "--suite", "text")
    assert "text/public_domain" in gate.out, gate.err
    assert "cannot tell" not in gate.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("method=half_reset",), r"model\.path is not set"),
        (("method=half_reset", "model.tuned=pocket:model"), r"needs model\.base=…"),
        (
            ("method=half_reset", "model.tuned=pocket:model", "model.base=./none"),
            r"model\.base=\./none is not a folder",
        ),
        (("method=hft", "model.base=pocket:model"), r"model\.base is for method=half_reset and"),
        (
            ("method=half_reset", "model.tuned=pocket:model", "model.base=pocket:model", "engine=zero2"),
            r"needs no ranks",
        ),
    ],
)
def test_what_cannot_be_reset_is_refused_in_one_line(tmp_path, arguments, said):
    ended = hft("train", *arguments, cwd=tmp_path)
    assert ended.status == 2
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert re.search(said, ended.err), ended.err
    assert list(tmp_path.iterdir()) == []
