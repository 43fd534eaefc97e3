"""Parameters of the module go back to the tensors of the files, bit for bit and under the names of the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, bare, config_of, random_model, same_bits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hft_cli.checkpoint.conversion import to_stored
from hft_cli.checkpoint.parameters import parameters_from_config, parameters_from_folder
from hft_cli.errors import UserError

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_each_parameter_goes_back_to_its_file_tensors(name: str, saved: Callable[[str], Path]) -> None:
    files = load_file(saved(name) / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(saved(name))
    params = parameters_from_folder(saved(name))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config_of(name))
    for param in params:
        tensor = loaded.get_parameter(param.name)
        assert same_bits(tensor, random_model(name).get_parameter(param.name))  # the folder loads
        for model in (loaded, empty):
            written = to_stored(model, {param.name: tensor}, params)
            assert set(written) == set(param.stored)
            assert all(same_bits(written[key], files[key]) for key in written), param.name


def test_gpt2_files_of_the_hub_keep_their_names(
    edited: Callable[..., Path],
) -> None:
    def as_on_the_hub(tensors: dict[str, Any]) -> dict[str, Any]:
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in range(3)}
        return {key.removeprefix("transformer."): value for key, value in tensors.items()} | masks

    folder = edited("gpt2", as_on_the_hub)
    params = parameters_from_folder(folder)
    assert bare(params) == bare(parameters_from_config(config_of("gpt2")))
    assert all(param.stored == (param.name.removeprefix("transformer."),) for param in params)
    files = load_file(folder / "model.safetensors")
    for model in (AutoModelForCausalLM.from_pretrained(folder), random_model("gpt2")):
        written = to_stored(model, dict(model.named_parameters()), params)
        assert set(files) - set(written) == {f"h.{layer}.attn.bias" for layer in range(3)}
        assert all(same_bits(written[key], files[key]) for key in written)


def test_experts_are_split_under_the_names_of_the_folder(edited: Callable[..., Path]) -> None:
    folder = edited("mixtral", lambda tensors: {key.removeprefix("model."): value for key, value in tensors.items()})
    params = parameters_from_folder(folder)
    files = load_file(folder / "model.safetensors")
    written = to_stored(random_model("mixtral"), dict(random_model("mixtral").named_parameters()), params)
    assert set(written) == set(files)
    assert all(same_bits(written[key], files[key]) for key in files)


def test_experts_saved_merged_stay_merged(tmp_path: Path) -> None:
    random_model("mixtral").save_pretrained(tmp_path, save_original_format=False)
    params = parameters_from_folder(tmp_path)
    assert all(param.stored == (param.name,) for param in params)
    files = load_file(tmp_path / "model.safetensors")
    for model in (random_model("mixtral"), AutoModelForCausalLM.from_pretrained(tmp_path)):
        written = to_stored(model, dict(model.named_parameters()), params)
        assert set(written) == set(files)
        assert all(same_bits(written[key], files[key]) for key in files)


def test_a_layout_that_cannot_be_written_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    random_model("mixtral").save_pretrained(tmp_path, save_original_format=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="Cannot write"):
        to_stored(merged, dict(merged.named_parameters()), parameters_from_folder(saved("mixtral")))
