"""What the package config relies on in Hydra without documentation."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hft_cli.config.compat import use_in_defaults_lists


@pytest.fixture
def options(tmp_path):
    """A config with two groups of which `data` has a computed default; the options that its computation was given."""
    seen = []

    def choose_option(group: str, *, _root_) -> str:
        seen.append((group, {name: _root_.get(name) for name in ("model", "data")}))
        return "y"

    for group in ("model", "data"):
        (tmp_path / group).mkdir()
        for option in ("x", "y"):
            (tmp_path / group / f"{option}.yaml").write_text(f"name: {option}\n")
    (tmp_path / "top.yaml").write_text("defaults:\n  - data: ${computed:data}\n  - model: x\n  - _self_\n")
    use_in_defaults_lists("computed", choose_option)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        yield seen
    OmegaConf.clear_resolver("computed")


def test_a_computed_option_knows_the_other_options(options):
    assert compose("top").data.name == "y"
    assert compose("top", ["model=y"]).data.name == "y"
    assert options == [("data", {"model": "x", "data": None}), ("data", {"model": "y", "data": None})]


def test_a_typed_option_replaces_the_computation(options):
    assert compose("top", ["data=x"]).data.name == "x"
    assert options == []
