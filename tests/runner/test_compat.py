"""What the runner relies on beyond the documented interfaces of other packages."""

from __future__ import annotations

import pytest

from hft_cli.runner.compat import trackio_last_step


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
