"""Model folders: a local folder or a snapshot from the hub, its weight files and the tensors in them."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.tensors import THREADS, StoredTensor, read_header
from hft_cli.errors import UserError, first_line
from hft_cli.files import read_json, write_json
from hft_cli.paths import ARCHITECTURES, user_cache

# Suffixes of the files beside the weights (config, tokenizer), which go along when a model is copied or downloaded.
COMPANION_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")

# Companions without an effect on what the weights compute and on how text becomes tokens.
WITHOUT_EFFECT = re.compile(r"generation_config\.json|.*\.index\.json|(?!.*(vocab|merges)).*\.txt")

NAMED_TEMPLATES = "additional_chat_templates"  # the folder of a tokenizer's chat templates besides the default one


def model_folder(path: str, key: str = "model.path", revision: str | None = None) -> Path:
    """The local folder of a model: `path` itself, or the snapshot of a hub repository, downloaded if necessary.

    `revision` is a commit, branch or tag of the repository; None is the newest. `key` is the config key in errors.
    """
    if Path(path).is_dir():
        if revision is not None:
            raise UserError(f"{key}={path} is a folder, so it has no revision '{revision}': leave out model.revision.")
        return Path(path)
    if Path(path).exists() or _looks_local(path):
        raise UserError(f"{key}={path} is not a folder.")
    patterns = [f"*{suffix}" for suffix in (".safetensors", *COMPANION_SUFFIXES)]
    try:
        return _download("snapshot_download", path, revision=revision, allow_patterns=patterns)
    except OSError as error:
        raise UserError(f"{key}={path} is neither a folder nor a model on the hub: {error}") from None


def hub_revision(folder: Path) -> str | None:
    """The commit of a hub repository's snapshot, from its place in the cache (…/snapshots/COMMIT); None for others."""
    return folder.name if folder.parent.name == "snapshots" else None


def config_from_hub(path: str, revision: str | None = None) -> Path:
    """The config.json of a hub repository, from the cache or downloaded (a few hundred bytes)."""
    try:
        if _looks_local(path):
            raise OSError("there is no such folder")
        return _download("hf_hub_download", path, revision=revision, filename="config.json")
    except OSError as error:
        shipped = "|".join(sorted(file.stem for file in ARCHITECTURES.glob("*.json")))
        raise UserError(
            f"The architecture of model.path={path} is unknown ({str(error).rstrip('.')}). Give its config.json, "
            f"model.architecture=FILE, or choose one that ships with hft: model={shipped}."
        ) from None


def _looks_local(path: str) -> bool:
    """Whether a path cannot be a hub name, which is NAME or OWNER/NAME."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _download(function: str, repository: str, **options: Any) -> Path:
    """Call a download function of huggingface_hub; OSError with the first line of the reason if that fails."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(getattr(huggingface_hub, function)(repository, **options))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise OSError(first_line(error)) from error


def without_config(folder: Path) -> str:
    """What is wrong with a folder that has no config.json."""
    if (folder / "adapter_config.json").exists():
        return f"{folder} holds an adapter and no model: merge it into its model, and give that."
    return f"{folder} has no config.json: it must be a folder that save_pretrained() wrote."


def checkpoint_files(folder: str | Path) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint folder, by tensor name.

    Like transformers, reads `model.safetensors` if it exists, otherwise `model.safetensors.index.json`. An incomplete
    folder is a UserError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no checkpoint folder {folder}.")
    if not (folder / "config.json").is_file():
        raise UserError(without_config(folder))
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(read_header(single), single)
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise UserError(f"{index} has no weight_map. Fetch it again.")
        if elsewhere := sorted({shard for shard in shards.values() if Path(shard).name != shard}):
            raise UserError(f"{index} names {elsewhere[0]!r}. Shards must lie in the folder itself: move them there.")
        if missing := sorted({shard for shard in shards.values() if not (folder / shard).is_file()}):
            raise UserError(f"{folder} lacks {missing[0]} ({len(missing)} of its shards are missing). Fetch them.")
        return {name: folder / shard for name, shard in shards.items()}
    pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}"))
    reason = f", only {pickles[0]}. Convert it once" if pickles else "; if it has other weights, convert them"
    raise UserError(
        f"{folder} has no model.safetensors{reason}: "
        f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')."
    )


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder, by name. A broken or incomplete folder is a UserError."""
    files = checkpoint_files(folder)
    headers = {file: read_header(file) for file in sorted(set(files.values()))}
    if missing := [name for name, file in files.items() if name not in headers[file]]:
        file = files[missing[0]]
        raise UserError(f"{folder}: tensor '{missing[0]}' is not in {file.name}, where the index has it. Fetch both.")
    return {name: headers[file][name] for name, file in files.items()}


def weights_hash(folder: Path) -> str:
    """SHA-256 over the weight files of a checkpoint folder, in the order of their names."""
    return _combined(folder, _file_digest)


def known_weights_hash(folder: Path) -> str:
    """`weights_hash`, from the cache for files that have not changed since they were hashed.

    A file counts as unchanged if its device, inode, size and times of change are the same. The time of change of the
    inode cannot be set back, so this is safe but for those who can change the clock or write to the disk itself.
    """
    return _combined(folder, _known_digest)


def companion_hashes(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 (hex) of the files beside the weights of a checkpoint folder."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in COMPANION_SUFFIXES)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def effective_hashes(folder: Path) -> dict[str, str]:
    """The same of those that say what the weights compute and how text becomes tokens."""
    return {name: sha256 for name, sha256 in companion_hashes(folder).items() if not WITHOUT_EFFECT.fullmatch(name)}


def _combined(folder: Path, digest_of: Callable[[Path], bytes]) -> str:
    digest = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as pool:
        for file_digest in pool.map(digest_of, sorted(set(checkpoint_files(folder).values()))):
            digest.update(file_digest)
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").digest()


SETTLED = 2 * 10**9  # nanoseconds: a file that changed later may change again within the precision of its times


def _known_digest(path: Path) -> bytes:
    known = user_cache() / "hashes" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()}.json"
    identity = _identity(path)
    with suppress(OSError, UserError, KeyError, TypeError, ValueError):
        entry = read_json(known)
        if entry["identity"] == identity:
            return bytes.fromhex(entry["sha256"])
    digest = _file_digest(path)
    if _identity(path) == identity and time.time_ns() - max(identity[3:]) > SETTLED:
        with suppress(OSError):  # a cache that cannot be written costs time only
            known.parent.mkdir(parents=True, exist_ok=True)
            write_json(known, {"identity": identity, "sha256": digest.hex()})
    return digest


def _identity(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
