"""Where the files of the package are: embedded files, architectures and conf/."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).parent
ARCHITECTURES = PACKAGE / "assets" / "architectures"  # config.json files of models whose weights are not included


def resolve_path(path: str) -> str:
    """The file or folder that a path in a config means: `pocket:x` is x among the embedded files."""
    return str(PACKAGE / "assets" / "pocket" / path.removeprefix("pocket:")) if path.startswith("pocket:") else path


def user_cache() -> Path:
    """The folder of what is kept for other runs of this user: $XDG_CACHE_HOME/hft, or ~/.cache/hft."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hft"


def conf_dir() -> Path:
    """The config tree: in the package if it was installed from a wheel, beside the package in a checkout."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parent / "conf"


def group_options(group: str) -> list[str]:
    """The options of a group of conf/, sorted; empty if there is no such group."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
