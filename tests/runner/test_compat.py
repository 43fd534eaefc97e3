"""What the runner relies on beyond the documented interfaces of other packages."""

from __future__ import annotations

import pytest

from hft_cli.runner.compat import parse_overrides, split_sweep, trackio_last_step


def test_hydra_tells_swept_overrides_from_others():
    swept, plain = parse_overrides(["+method=fft,hft", "data.path=[a,b]"])
    assert (swept.key_or_group, swept.is_sweep_override()) == ("method", True)
    assert (plain.key_or_group, plain.is_sweep_override()) == ("data.path", False)


def test_hydra_splits_a_sweep_and_a_later_override_wins():
    assert split_sweep(["seed=1,2", "+method=fft,hft", "model=pocket", "seed=3"]) == [
        ["seed=3", "+method=fft", "model=pocket"],
        ["seed=3", "+method=hft", "model=pocket"],
    ]


def test_trackio_knows_the_last_step_it_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # trackio reads it when it is imported
    trackio = pytest.importorskip("trackio")
    first = trackio.init(project="p", name="run", resume="never")
    first.log({"loss": 1.0}, step=6)
    trackio.finish()
    again = trackio.init(project="p", name="run", resume="allow")
    assert again.id == first.id
    assert trackio_last_step(again) == 6
    trackio.finish()
