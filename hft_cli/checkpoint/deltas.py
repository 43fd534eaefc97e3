"""Deltas: files with only the tensors that a round changed, and the models that they make of a base. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from hft_cli.checkpoint.folders import COMPANION_SUFFIXES, NAMED_TEMPLATES, stored_tensors
from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.tensors import THREADS, StoredTensor, Writer, read_header
from hft_cli.errors import UserError
from hft_cli.files import new_folder
from hft_cli.text import plural


def write_delta_file(pieces: Mapping[str, Sequence[StoredTensor]], out: Path, metadata: Mapping[str, str]) -> None:
    """Write a delta from tensors of other files; the pieces of a tensor are joined along its rows."""
    header = {}
    for name, parts in pieces.items():
        shape = parts[0].shape if len(parts) == 1 else (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        header[name] = replace(parts[0], shape=shape, start=0, stop=sum(part.size for part in parts))
    with Writer(out, header, {"format": "pt", **metadata}) as writer:
        for name, parts in pieces.items():
            writer.copy(name, parts)


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
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda file: _write_shard(file, contents[file], part / file.name), sorted(contents)))


def _write_shard(file: Path, content: Mapping[str, StoredTensor], out: Path) -> None:
    """Write a weight file with the tensors of `content`, which come from `file` itself or from deltas."""
    if all(tensor.file == file for tensor in content.values()):
        shutil.copyfile(file, out)
        return
    with Writer(out, content, {"format": "pt"}) as writer:
        for name, tensor in content.items():
            writer.copy(name, [tensor])


def reset_tensors(
    tuned: Sequence[Param], base: Sequence[Param], folders: tuple[Path, Path], names: Iterable[str], shared_rows: bool
) -> dict[str, list[StoredTensor]]:
    """The pieces of a delta that sets parameters of a tuned model back to its base (Half-Reset, HFT section 2).

    Args:
        tuned, base: parameters of the two models, whose `folders` are in this order.
        names: parameters to set back. They get the bits and the dtype of the base.
        shared_rows: whether to set back only the rows that both models have, if the tuned one has more (a longer
            vocabulary).

    Returns:
        Tensor name in the files of the tuned model -> its pieces, for `write_delta_file`.

    Raises:
        UserError: if names or shapes do not fit.
    """
    tuned_tensors, base_tensors = stored_tensors(folders[0]), stored_tensors(folders[1])
    tuned_names, base_names = ({p.name: p.stored for p in params} for params in (tuned, base))
    pieces: dict[str, list[StoredTensor]] = {}
    mismatches: list[str] = []
    for name in names:
        here, there = len(tuned_names[name]), len(base_names.get(name, ()))
        if here != there:
            mismatches.append(f"{name} ({plural(here, 'tensor')} here, {plural(there, 'tensor')} in the base)")
            continue
        for target, source in zip(tuned_names[name], base_names[name], strict=True):
            old, new = tuned_tensors[target], base_tensors[source]
            if old.shape == new.shape:
                pieces[target] = [new]
            elif shared_rows and old.extends(new):
                pieces[target] = [new, old.rows(new.shape[0], old.shape[0])]
            else:
                mismatches.append(f"{target} ({list(old.shape)}, in the base {list(new.shape)})")
    if mismatches:
        more = f" and {len(mismatches) - 3} more" if len(mismatches) > 3 else ""
        raise UserError(
            f"{folders[0]} cannot be set back to {folders[1]}: {', '.join(mismatches[:3])}{more}. Keep "
            "embeddings and head tuned (selection.embeddings=freeze selection.head=freeze) or, if only the vocabulary "
            "is longer, set back the rows that both models have (method.shared_rows=true)."
        )
    return pieces
