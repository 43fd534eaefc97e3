"""files.py: whole files and folders, or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from hft_cli.errors import Stopped
from hft_cli.files import new_folder


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Stopped(15), KeyboardInterrupt()])
def test_a_folder_that_is_not_complete_is_removed(error, tmp_path):
    def fill(part: Path) -> None:
        (part / "inner").mkdir()
        (part / "inner/file").write_text("half")
        raise error

    with pytest.raises(type(error)), new_folder(tmp_path / "out") as part:
        fill(part)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_gets_its_name_when_it_is_complete(tmp_path):
    (tmp_path / "out.part").mkdir()  # of a command that was killed
    (tmp_path / "out.part/old").touch()
    with new_folder(tmp_path / "out") as part:
        (part / "file").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/file"]
