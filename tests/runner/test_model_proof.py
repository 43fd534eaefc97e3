"""Two checkpoints of one model, wherever the second was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BASE
from model_types import tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hft_cli import half_finetune, verify
from hft_cli.errors import UserError
from hft_cli.runner.model_proof import compare_models, prove_draws, read_draws

Tensors = dict[str, torch.Tensor]


def copy_of(base: Path, out: Path, change: Any) -> Path:
    """A copy of a model's folder with changed tensors: `change` gets them and returns others."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = change(load_file(base / "model.safetensors"))
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, out / "model.safetensors")
    return out


def trained(tensors: Tensors) -> Tensors:
    draw = half_finetune(AutoModelForCausalLM.from_pretrained(BASE))
    return {name: value + 0.25 if name in draw.updated else value for name, value in tensors.items()}


@pytest.fixture(scope="module")
def draw() -> Any:
    return half_finetune(AutoModelForCausalLM.from_pretrained(BASE))


@pytest.fixture(scope="module")
def low(tmp_path_factory) -> Path:
    """The embedded model in bfloat16."""
    out = tmp_path_factory.mktemp("low") / "model"
    return copy_of(BASE, out, lambda tensors: {name: value.bfloat16() for name, value in tensors.items()})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_prefixes_of_wrappers_are_taken_off(prefix, draw, tmp_path):
    tuned = copy_of(BASE, tmp_path / "t", lambda t: {prefix + name: value for name, value in trained(t).items()})
    assert compare_models(BASE, tuned).renamed == f"without {prefix}"
    assert verify(BASE, tuned, draw).verified


def test_the_backbone_without_its_prefix_is_read(tmp_path):
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tuned = copy_of(
        tmp_path / "base", tmp_path / "t", lambda t: {name.removeprefix("model."): value for name, value in t.items()}
    )
    changes = compare_models(tmp_path / "base", tuned)
    assert (changes.renamed, changes.moved, changes.faults) == ("with model.", frozenset(), ())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_converted_and_said(dtype, draw, tmp_path):
    if dtype == torch.bfloat16:
        tuned = copy_of(BASE, tmp_path / "t", lambda t: {name: value.to(dtype) for name, value in trained(t).items()})
        changes = compare_models(BASE, tuned)
        assert changes.converted == {("F32", "BF16"): 39}
        assert verify(BASE, tuned, draw).verified
        return
    tuned = copy_of(BASE, tmp_path / "t", lambda t: {name: value.to(dtype) for name, value in trained(t).items()})
    with pytest.raises(UserError, match="cannot be compared"):
        compare_models(BASE, tuned)


def test_a_wider_dtype_must_hold_the_same_values(low, draw, tmp_path):
    tuned = copy_of(low, tmp_path / "t", lambda t: trained({name: value.float() for name, value in t.items()}))
    assert compare_models(low, tuned).converted == {("BF16", "F32"): 39}
    assert verify(low, tuned, draw).verified

    def nudged(tensors: Tensors) -> Tensors:
        wide = trained({name: value.float() for name, value in tensors.items()})
        wide[draw.frozen[0]].view(torch.int32).view(-1)[0] += 1  # rounds to the same bfloat16
        return wide

    assert verify(low, copy_of(low, tmp_path / "n", nudged), draw).faults == (
        f"frozen parameters moved: {draw.frozen[0]}",
    )


def tied(tmp_path: Path) -> Path:
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def with_head(tensors: Tensors, head: float = 0.0) -> Tensors:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + head}


def test_a_copy_of_a_tied_head_is_no_difference(tmp_path):
    base = tied(tmp_path)
    copied = copy_of(base, tmp_path / "copied", with_head)
    for one, other in ((base, copied), (copied, base), (copied, copied)):
        changes = compare_models(one, other)
        assert (changes.moved, changes.faults) == (frozenset(), ())
    moved = copy_of(base, tmp_path / "moved", lambda t: with_head({n: v + ("embed" in n) for n, v in t.items()}))
    assert compare_models(copied, moved).moved == {"model.embed_tokens.weight"}


def test_a_head_that_is_no_longer_tied_is_a_fault(tmp_path):
    base = tied(tmp_path)
    untied = copy_of(base, tmp_path / "untied", lambda t: with_head(t, 1.0))
    assert compare_models(base, untied).faults == ("BASE lacks lm_head.weight",)


def test_shards_are_read_and_constants_ignored(tmp_path, draw):
    tuned = tmp_path / "sharded"
    shutil.copytree(BASE, tuned, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = trained(load_file(BASE / "model.safetensors"))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(tensors)
    files = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, tuned / file)
    (tuned / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert verify(BASE, tuned, draw).verified


def test_missing_added_and_resized_parameters_are_faults(tmp_path, draw):
    def changed(tensors: Tensors) -> Tensors:
        tensors = trained(tensors)
        del tensors["model.norm.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([tensors["model.embed_tokens.weight"]] * 2)
        return {**tensors, "model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}

    proof = verify(BASE, copy_of(BASE, tmp_path / "t", changed), draw)
    assert proof.faults == (
        "TUNED lacks model.norm.weight",
        "TUNED has another shape of model.embed_tokens.weight",
        "BASE lacks model.layers.9.mlp.up_proj.weight",
    )


def test_another_model_is_refused(tmp_path):
    other = tmp_path / "gpt2"
    AutoModelForCausalLM.from_config(tiny_config("gpt2")).save_pretrained(other)
    with pytest.raises(UserError, match="are they of one model"):
        compare_models(BASE, other)


def test_a_draw_of_another_model_is_a_fault(draw):
    rounds = [draw.as_dict() | {"updated": [*draw.updated[1:], "other.weight"]}]
    proof = prove_draws(compare_models(BASE, BASE), rounds)
    assert proof.faults == (f"the draw and BASE are of two models, by {draw.updated[0]}, other.weight",)


def test_a_draw_that_its_seed_does_not_give_is_said(draw):
    changes = compare_models(BASE, BASE)
    assert prove_draws(changes, [draw.as_dict()]).from_seed
    assert not prove_draws(changes, [draw.as_dict() | {"seed": 7}]).from_seed
    assert prove_draws(changes, [draw.as_dict()]).unmoved == tuple(sorted(draw.updated))


@pytest.mark.parametrize(("text", "message"), [("[]", "object"), ('{"rounds": []}', "has no draw"), ("{", "JSON")])
def test_a_file_without_draws_is_refused(text, message, tmp_path):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_draws(tmp_path / "d.json")
