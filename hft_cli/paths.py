"""Where things lie: the embedded files, conf/, and models by folder or hub name."""

from __future__ import annotations

from pathlib import Path

from hft_cli.errors import UserError

PACKAGE = Path(__file__).parent


def resolve_path(path: str) -> str:
    """The file or folder behind a config's path: `pocket:x` is x among the embedded files."""
    return str(PACKAGE / "assets" / "pocket" / path.removeprefix("pocket:")) if path.startswith("pocket:") else path


ARCHITECTURES = PACKAGE / "assets" / "architectures"  # config.json files of models whose weights do not ship


def config_from_hub(path: str) -> Path:
    """config.json of a hub repository, from the cache or fetched; a few hundred bytes."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise OSError("there is no such folder")
        return Path(hf_hub_download(path, "config.json"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        shipped = ", ".join(sorted(file.stem for file in ARCHITECTURES.glob("*.json")))
        raise UserError(
            f"The shapes of model.path={path} are not known here ({reason.rstrip('.')}). Give its config.json, "
            f"model.architecture=FILE, or one that ships: model={shipped.replace(', ', '|')}."
        ) from None


NOT_WEIGHTS = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")  # what a model's folder has besides


def model_folder(path: str, key: str = "model.path") -> Path:
    """The local folder of a model: `path` itself, or a hub repository's snapshot, downloaded if need be.

    Raises:
        UserError: if it is neither.
    """
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{key}={path} is not a folder.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(path, allow_patterns=["*.safetensors", *(f"*{suffix}" for suffix in NOT_WEIGHTS)])
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{key}={path} is neither a folder nor a model that the hub gives us: {reason}") from None
    return Path(found)


def conf_dir() -> Path:
    """The config tree: beside the module in a wheel, at the top level in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "conf"


def group_options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
