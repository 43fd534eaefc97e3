"""Where the files of the package are: embedded files, architectures and conf/."""

from __future__ import annotations

import os
from pathlib import Path

from hft_cli.errors import UserError

PACKAGE = Path(__file__).parent
ARCHITECTURES = PACKAGE / "assets" / "architectures"  # config.json files of models whose weights are not included


def resolve_path(path: str) -> str:
    """The file or folder that a path in a config means: `pocket:x` is x among the embedded files."""
    return str(PACKAGE / "assets" / "pocket" / path.removeprefix("pocket:")) if path.startswith("pocket:") else path


def expand_home(path: str) -> str:
    """A path with ~ replaced by the user's home, and ~NAME by that of another; UserError if there is no such user."""
    found = os.path.expanduser(path)
    if found.startswith("~"):  # libraries would raise later
        user = found.partition("/")[0][1:]
        raise UserError(f"{path}: there is no user {user!r}. Give a whole path, or ./{path} for that name.")
    return found


def expanded(path: str | Path) -> Path:
    """The same as a Path."""
    return Path(expand_home(str(path)))


def home() -> Path:
    """The user's home. A user that the system does not know, as in some containers, has / instead, as with docker."""
    found = Path(os.path.expanduser("~"))
    return found if found.is_absolute() else Path("/")


def user_cache() -> Path:
    """The folder of what is kept for other runs of this user: $XDG_CACHE_HOME/hft, or ~/.cache/hft."""
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "hft"


def conf_dir() -> Path:
    """The config tree: in the package if it was installed from a wheel, beside the package in a checkout."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parent / "conf"


def group_options(group: str) -> list[str]:
    """The options of a group of conf/, sorted; empty if there is no such group."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
