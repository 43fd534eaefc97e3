"""Deltas: files with only the tensors that a round changed, and the models that they make of a base. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hft_cli.checkpoint.folders import COMPANION_SUFFIXES, NAMED_TEMPLATES, stored_tensors
from hft_cli.checkpoint.tensors import WRITERS, StoredTensor, Writer, read_header
from hft_cli.errors import UserError
from hft_cli.files import new_folder


def write_delta_file(tensors: Mapping[str, StoredTensor], out: Path, metadata: Mapping[str, str]) -> None:
    """Write a delta from tensors of other files."""
    with Writer(out, tensors, {"format": "pt", **metadata}) as writer:
        for name, tensor in tensors.items():
            writer.copy(name, [tensor])


def apply_deltas(base: Path, deltas: Sequence[Path], out: Path, extra: Mapping[str, str] | None = None) -> None:
    """Write the model that a base and the deltas of its rounds make, file by file.

    A tensor comes from the last delta that has it, in the dtype of that delta, or else from the base. The other files
    of the base (config, tokenizer) are copied; `extra` (file name -> text) replaces or adds some. The folder gets its
    name only when it is complete.

    Raises:
        UserError: if the base has no tensor of the same name and shape for a tensor of a delta.
    """
    changes = {name: tensor for delta in deltas for name, tensor in read_header(delta).items()}
    tensors = stored_tensors(base)
    for name, tensor in changes.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise UserError(
                f"{tensor.file} has {name} with shape {list(tensor.shape)}, which {base} does not have. Give the base "
                "that the delta was made from."
            )
    with new_folder(out) as part:
        for file in sorted(base.iterdir()):
            if file.is_file() and file.suffix in COMPANION_SUFFIXES:
                shutil.copyfile(file, part / file.name)
        if (base / NAMED_TEMPLATES).is_dir():
            shutil.copytree(base / NAMED_TEMPLATES, part / NAMED_TEMPLATES)
        for name, text in (extra or {}).items():
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_text(text, encoding="utf-8")
        contents: dict[Path, dict[str, StoredTensor]] = {}
        for name, tensor in tensors.items():
            contents.setdefault(tensor.file, {})[name] = changes.get(name, tensor)
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(lambda file: _write_shard(file, contents[file], part / file.name), sorted(contents)))


def _write_shard(file: Path, content: Mapping[str, StoredTensor], out: Path) -> None:
    """Write a weight file with the tensors of `content`, which come from `file` itself or from deltas."""
    if all(tensor.file == file for tensor in content.values()):
        shutil.copyfile(file, out)
        return
    with Writer(out, content, {"format": "pt"}) as writer:
        for name, tensor in content.items():
            writer.copy(name, [tensor])
