"""Where the files of the package are: embedded files, architectures and conf/."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def resolve_path(path: str) -> str:
    """The file or folder behind a config's path: `pocket:x` is x among the embedded files."""
    return str(PACKAGE / "assets" / "pocket" / path.removeprefix("pocket:")) if path.startswith("pocket:") else path


ARCHITECTURES = PACKAGE / "assets" / "architectures"  # config.json files of models whose weights do not ship


def conf_dir() -> Path:
    """The config tree: beside the module in a wheel, at the top level in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "conf"


def group_options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
