"""Interpolation: each matrix of a tuned model keeps a share of its change, exactly as it is defined."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import QUICK, composed, hft, ledger, results, train
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hft_cli.checkpoint.folders import stored_tensors
from hft_cli.checkpoint.interpolation import Blend, StoredModel, blends, is_blend, write_blends
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.checkpoint.tensors import read_header
from hft_cli.config.schema import MethodConfig
from hft_cli.config.validate import check
from hft_cli.errors import UserError
from hft_cli.method.interpolation import kept_changes
from hft_cli.paths import resolve_path

BASE = Path(resolve_path("pocket:model"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """The embedded model with every weight changed."""
    folder = Path(shutil.copytree(BASE, tmp_path_factory.mktemp("tuned") / "model"))
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: value + 0.02 * torch.randn(value.shape, generator=generator)
        for name, value in load_file(BASE / "model.safetensors").items()
    }
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def blended(tmp_path: Path, tuned: torch.Tensor, base: torch.Tensor, share: float) -> torch.Tensor:
    for name, value in (("tuned", tuned), ("base", base)):
        save_file({"w": value}, tmp_path / name)
    blend = Blend(read_header(tmp_path / "tuned")["w"], read_header(tmp_path / "base")["w"], share)
    write_blends({"w": blend}, tmp_path / "out", {})
    assert is_blend(read_header(tmp_path / "out")["w"], blend)
    return load_file(tmp_path / "out")["w"]


def random_values(dtype: torch.dtype, seed: int, count: int = 300) -> torch.Tensor:
    """Numbers of all sizes that the dtype has, zeros and subnormal numbers too."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-30, 15, (count,), generator=generator)
    values = torch.randn(count, generator=generator, dtype=torch.float64) * 2.0**exponents
    values[:3] = torch.tensor([0.0, -0.0, 2.0**-24])
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@given(share=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_blend_has_the_bits_that_torch_computes(tmp_path_factory, dtype, share, seed):
    tuned, base = random_values(dtype, seed), random_values(dtype, seed + 1)
    computed = torch.float32 if dtype.itemsize == 2 else torch.float64
    expected = base.to(computed) * (1 - share) + tuned.to(computed) * share
    made = blended(tmp_path_factory.mktemp("blend"), tuned, base, share)
    assert made.dtype == dtype
    assert torch.equal(made, expected.to(dtype))


@pytest.mark.parametrize(("share", "which"), [(0.0, "base"), (1.0, "tuned")])
def test_the_ends_are_the_two_models_bit_for_bit(tmp_path, share, which):
    values = {"tuned": random_values(torch.bfloat16, 1), "base": random_values(torch.bfloat16, 2)}
    values["base"][5], values["tuned"][6] = float("inf"), float("nan")  # no sum may turn 0 x inf into NaN
    made = blended(tmp_path, values["tuned"], values["base"], share)
    assert made.view(torch.int16).equal(values[which].view(torch.int16))


def test_tensors_larger_than_a_chunk_and_of_two_dtypes(tmp_path):
    tuned, base = random_values(torch.bfloat16, 1, 700_001), random_values(torch.float32, 2, 700_001)
    made = blended(tmp_path, tuned, base, 0.25)
    expected = base.double() * 0.75 + tuned.double() * 0.25
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, expected.float().bfloat16())


def test_one_changed_bit_is_no_blend(tmp_path):
    made = blended(tmp_path, random_values(torch.float32, 1), random_values(torch.float32, 2), 0.5)
    made.view(torch.int32)[-1] ^= 1
    save_file({"w": made}, tmp_path / "out")
    tensors = [read_header(tmp_path / name)["w"] for name in ("out", "tuned", "base")]
    assert not is_blend(tensors[0], Blend(tensors[1], tensors[2], 0.5))


def test_numbers_that_cannot_be_computed_with_are_refused(tmp_path, tuned):
    folder = Path(shutil.copytree(tuned, tmp_path / "float8"))
    name = "model.norm.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    models = (StoredModel(each, parameters_from_folder(each), stored_tensors(each)) for each in (folder, BASE))
    with pytest.raises(UserError, match="F8_E4M3, which cannot be interpolated"):
        blends(*models, {name: 0.5}, False)


def test_by_depth_the_shares_of_layers_are_on_a_line():
    params = parameters_from_folder(BASE)
    method = MethodConfig("interpolate", alpha=0.2, alpha_last=0.8)
    kept = kept_changes(params, [p.name for p in params], method)
    layers = sorted({p.layer for p in params if p.layer is not None})
    expected = dict(zip(layers, np.linspace(0.2, 0.8, len(layers)), strict=True))
    for param in params:
        share = expected.get(param.layer, 0.2 if param.kind == "embedding" else 0.8)
        assert kept[param.name] == pytest.approx(share)
    assert set(kept_changes(params, kept, MethodConfig("interpolate", alpha=0.3)).values()) == {0.3}
    assert set(kept_changes(params, kept, MethodConfig("half_reset")).values()) == {0.0}


@pytest.fixture(scope="module")
def run(tuned, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "interpolated"
    ended = hft("train", "+method=interpolate", f"model.tuned={tuned}", "model.base=pocket:model", "method.alpha=0.3",
                "method.alpha_last=0.6", "selection=category", "data=pocket_capitals", f"output_dir={out}")  # fmt: skip
    assert ended.status == 0, ended.err
    return out


def test_the_command_verifies_and_leaves_undrawn_matrices_tuned(run, tuned):
    assert hft("verify", run).out.endswith("verified: 1 round\n")
    (entry,) = json.loads((run / "draws.json").read_text())["rounds"]
    made, own, base = (load_file(folder / "model.safetensors") for folder in (run / "model", tuned, BASE))
    assert 0 < len(entry["updated"]) < len(made)
    for name, value in made.items():
        assert torch.equal(value, own[name]) == (name in entry["frozen"])
    name = next(name for name in entry["updated"] if ".layers.0." in name)
    assert torch.equal(made[name], (base[name].double() * 0.7 + own[name].double() * 0.3).float())
    assert results(run)["stage"] == "interpolate"


def test_verify_fails_another_share(run, tmp_path):
    broken = Path(shutil.copytree(run, tmp_path / "run"))
    config = broken / "config.yaml"
    config.write_text(config.read_text().replace("alpha: 0.3", "alpha: 0.31"))
    ended = hft("verify", broken)
    assert ended.status == 1
    assert "the delta differs from what the base gives in" in ended.out


def test_a_share_is_scored_without_a_model_as_its_model_would_be(run, tuned, tmp_path):
    ended = hft("train", "+method=interpolate", f"model.tuned={tuned}", "model.base=pocket:model", "method.alpha=0.3",
                "method.alpha_last=0.6", "selection=category", "data=pocket_capitals", "method.save_model=false",
                f"output_dir={tmp_path}/run")  # fmt: skip
    assert ended.status == 0, ended.err
    assert results(tmp_path / "run")["eval"] == results(run)["eval"]
    assert not list((tmp_path / "run").rglob("*.safetensors"))


ROUNDS = {  # after one round and after two, for draws that differ, and for adapters
    "fft": ("+method=wise_ft", "data=pocket_capitals"),
    "two rounds of hft": ("+method=hft", "data=pocket_two_tasks", "method.alpha=0.4", "method.alpha_last=0.8"),
    "lora": ("+method=lora", "data=pocket_capitals", "method.alpha=0.4", "model.chat_template=plain"),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_what_was_trained_goes_back_to_where_it_began(name, tmp_path):
    run, whole = (
        train(tmp_path / kind, *ROUNDS[name], "train.learning_rate=1e-3", *more)
        for kind, more in (("run", ()), ("whole", ("method.alpha=1", "method.alpha_last=null")))
    )
    assert hft("verify", run).out.endswith(f"verified: {len(ledger(run))} rounds\n")
    base, made, tuned = (load_file(f / "model.safetensors") for f in (BASE, run / "model", whole / "model"))
    plain = apply_rounds(whole, len(ledger(whole)) - 1)
    updated = {each for entry in ledger(run)[:-1] for each in entry["updated"]}
    assert updated == {each for each in made if not torch.equal(made[each], base[each])}
    assert set(ledger(run)[-1]["updated"]) == updated
    assert all(torch.equal(tuned[each], value) for each, value in plain.items())  # a share of 1 changes nothing
    first = next(each for each in sorted(updated) if ".layers.0." in each)
    share = 0.5 if name == "fft" else 0.4
    expected = (base[first].double() * (1 - share) + plain[first].double() * share).float()
    assert torch.equal(made[first], expected)
    assert (run / "model/chat_template.jinja").read_text() == (whole / "model/chat_template.jinja").read_text()
    assert results(run)["eval"]["after"].keys() == results(whole)["eval"]["after"].keys()


def apply_rounds(run: Path, count: int) -> dict[str, torch.Tensor]:
    """The model after the first rounds of a run, from the base and the deltas."""
    model = load_file(BASE / "model.safetensors")
    for folder in sorted((run / "rounds").iterdir())[:count]:
        model |= load_file(folder / "delta.safetensors")
    return model


def test_a_sequence_keeps_its_matrix_of_scores(tmp_path):
    tests = "data.test_path=[pocket:skills/backwards/test.jsonl,pocket:skills/larger/test.jsonl]"
    run = train(tmp_path / "run", "+method=fft", "data=pocket_two_tasks", tests, "method.alpha=0.5")
    matrix = results(run)["continual"]["R"]
    assert [len(row) for row in matrix] == [2, 2]
    text = hft("report", run, "--out", tmp_path / "report").out
    assert "fft + WiSE-FT" in text


def test_a_run_stopped_before_the_interpolation_continues(tmp_path):
    run = train(tmp_path / "run", *ROUNDS["fft"])
    model = (run / "model/model.safetensors").read_bytes()
    shutil.rmtree(run / "rounds/02-interpolate")
    shutil.move(run / "model", run / "rounds/01-capitals/model")
    tensors = load_file(BASE / "model.safetensors") | load_file(run / "rounds/01-capitals/delta.safetensors")
    save_file(tensors, run / "rounds/01-capitals/model/model.safetensors", metadata={"format": "pt"})
    for file in (run / "DONE", run / "results.json"):
        file.unlink()
    assert hft("train", *QUICK, *ROUNDS["fft"], f"output_dir={run}").status == 0
    assert (run / "model/model.safetensors").read_bytes() == model


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("+method=half_reset", "model.base=x", "model.path=y", "method.alpha=0.5"), "half_reset keeps nothing"),
        (("+method=fft", "method.alpha_last=0.5"), r"method=fft needs method\.alpha="),
        (("+method=interpolate", "model.base=x", "model.path=y", "method.alpha=null"), r"needs method\.alpha="),
        (("+method=fft", "method.alpha=2"), r"method\.alpha"),
    ],
)
def test_a_share_that_cannot_be_kept_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        check(composed(*words))
