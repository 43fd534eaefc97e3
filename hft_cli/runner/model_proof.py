"""Prove from two model folders which parameters a training moved, wherever it ran. No torch for common models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.digests import tensor_sha256
from hft_cli.checkpoint.folders import model_folder, stored_tensors
from hft_cli.checkpoint.naming import BUFFERS, Param, classify
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.checkpoint.tensors import THREADS, StoredTensor, same_bytes
from hft_cli.config.schema import SelectionConfig
from hft_cli.errors import UserError
from hft_cli.files import read_record
from hft_cli.method.selection import Draw
from hft_cli.method.selection import draw as draw_parameters
from hft_cli.paths import resolve_path
from hft_cli.run_dir import Ledger
from hft_cli.text import first_of

# What wrappers and model classes put before the names of parameters.
PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "model.", "language_model.", "transformer.")

Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Changes:
    """What two checkpoints of one model say of its parameters.

    Attributes:
        params: of the base.
        moved: names of the parameters that differ.
        converted: (dtype of the base, of the tuned model) -> number of parameters that were compared in the latter.
        renamed: what the names of the tuned model have more or less than those of the base; empty if nothing.
        faults: why the two cannot be compared in full.
    """

    params: tuple[Param, ...]
    moved: frozenset[str]
    converted: Mapping[tuple[str, str], int]
    renamed: str
    faults: tuple[str, ...]


def compare_models(
    base: str | Path, tuned: str | Path, kinds: Mapping[str, str] = {}, tick: Callable[[], object] = lambda: None
) -> Changes:
    """Compare the weights of two models, parameter by parameter and bit by bit.

    Where the tuned model has another dtype, the values of the base are converted to it first: they are rounded to
    nearest, or stay what they are in a wider dtype. Of a head that is tied to the embedding, a folder may have a copy.

    Args:
        base, tuned: folders in Hugging Face layout with safetensors weights, or hub names.
        kinds: as `model.kinds`.
        tick: called for each parameter, by several threads.

    Raises:
        UserError: if a folder holds no model, or the two have no name in common.
    """
    folders = [model_folder(resolve_path(str(path)), key) for path, key in ((base, "BASE"), (tuned, "TUNED"))]
    params, (files, others) = parameters_from_folder(folders[0], kinds), map(stored_tensors, folders)
    renaming = _renaming({name for param in params for name in param.stored}, others)
    if renaming is None:
        raise UserError(f"{tuned} has no parameter of {base}: are they of one model?")
    less, more = renaming
    renamed = {more + name.removeprefix(less): tensor for name, tensor in others.items()}
    pairs = {param.name: [(files[name], renamed[name]) for name in param.stored if name in renamed] for param in params}

    def has_same_bits(each: list[tuple[StoredTensor, StoredTensor]]) -> bool:
        same = all(_same(*pair) for pair in each)
        tick()
        return same

    with ThreadPoolExecutor(THREADS) as pool:
        same = dict(zip(pairs, pool.map(has_same_bits, pairs.values()), strict=True))
    faults = {
        "TUNED lacks": [param.name for param in params if _is_incomplete(param, files, renamed)],
        "TUNED has another shape of": [
            name for name, each in pairs.items() if any(a.shape != b.shape for a, b in each)
        ],
        "BASE lacks": sorted(name for name in renamed.keys() - files.keys() if not _is_known(name, renamed)),
    }
    dtypes = [{(a.dtype, b.dtype) for a, b in each if a.dtype != b.dtype} for each in pairs.values()]
    return Changes(
        params=params,
        moved=frozenset(name for name in pairs if not same[name]),
        converted=Counter(pair for each in dtypes for pair in each),
        renamed=f"without {less}" if less else f"with {more}" if more else "",
        faults=tuple(f"{what} {first_of(names)}" for what, names in faults.items() if names),
    )


@dataclass(frozen=True)
class DrawnProof:
    """What two checkpoints say of draws. They are proven if `faults` is empty.

    Attributes:
        updated, frozen: names that any of the draws updates, and that all freeze.
        unmoved: updated parameters with the same bits.
        from_seed: whether each draw is that of its seed, level and ratio with the other settings at their defaults.
    """

    updated: frozenset[str]
    frozen: frozenset[str]
    unmoved: tuple[str, ...]
    from_seed: bool
    faults: tuple[str, ...]

    @property
    def verified(self) -> bool:
        return not self.faults


def verify(base: str | Path, tuned: str | Path, draw: Draw | str | Path) -> DrawnProof:
    """Whether a model that was trained anywhere differs from its base in what a draw updates, and in nothing else.

    Args:
        base, tuned: as in `compare_models`.
        draw: what `half_finetune` returned, or the draws.json of a run, of `HalfFinetuneCallback` or of
            `hft draw --format json`.

    Raises:
        UserError: if a folder holds no model, the two are not of one model, or the file has no draws.
    """
    rounds = read_draws(Path(draw)) if isinstance(draw, str | Path) else [draw.as_dict()]
    return prove_draws(compare_models(base, tuned), rounds)


def read_draws(file: Path) -> list[dict[str, Any]]:
    """The entries of a draws.json.

    Raises:
        UserError: if the file is none.
    """
    rounds: list[dict[str, Any]] = read_record(file, Ledger)["rounds"]
    if not rounds:
        raise UserError(f"{file} has no draw.")
    return rounds


def prove_draws(changes: Changes, rounds: Sequence[Mapping[str, Any]]) -> DrawnProof:
    """Check that a tuned model differs from its base in what draws update, and in nothing else.

    Args:
        rounds: entries of a draws.json.
    """
    names = {param.name for param in changes.params}
    updated = frozenset(name for entry in rounds for name in entry["updated"])
    frozen = frozenset(names - updated)
    others = {name for entry in rounds for name in {*entry["updated"], *entry["frozen"]} ^ names}
    faults = {
        "the draw and BASE are of two models, by": sorted(others),
        "frozen parameters moved:": sorted(changes.moved & frozen),
    }
    return DrawnProof(
        updated,
        frozen,
        tuple(sorted(updated - changes.moved)),
        all(_follows_from_seed(entry, changes.params) for entry in rounds),
        (*changes.faults, *(f"{what} {first_of(found)}" for what, found in faults.items() if found)),
    )


def _follows_from_seed(entry: Mapping[str, Any], params: Sequence[Param]) -> bool:
    selection = SelectionConfig(level=entry["level"], ratio=entry["ratio"])
    try:
        expected = draw_parameters(params, selection, entry["round"], entry["seed"])
    except UserError:
        return False
    return set(expected.updated) == set(entry["updated"])


def _renaming(names: set[str], others: Tensors) -> tuple[str, str] | None:
    """What to take from the start of the other names and to put there, so that most are those of the base."""
    renamings = [("", ""), *((prefix, "") for prefix in PREFIXES), *(("", prefix) for prefix in PREFIXES)]
    found = {pair: sum(pair[1] + name.removeprefix(pair[0]) in names for name in others) for pair in renamings}
    best = max(renamings, key=lambda pair: found[pair])
    return best if found[best] else None


def _same(base: StoredTensor, tuned: StoredTensor) -> bool:
    if base.dtype == tuned.dtype or base.shape != tuned.shape:
        return same_bytes(base, tuned)
    return tensor_sha256(base, tuned.dtype) == tensor_sha256(tuned)


def _is_incomplete(param: Param, files: Tensors, renamed: Tensors) -> bool:
    """Whether a part of the parameter is missing, other than one of several copies."""
    present = [name for name in param.stored if name in renamed]
    copies = sum(files[name].shape == param.shape for name in param.stored) == len(param.stored)
    return not present if copies else len(present) < len(param.stored)


def _is_known(name: str, tensors: Tensors) -> bool:
    """Whether a tensor that the base lacks adds nothing: a constant, or a copy of the embedding as a tied head."""
    if any(re.search(pattern, name) for pattern in BUFFERS):
        return True
    tensor, placed = tensors[name], classify(name, tensors[name].shape)
    others = (other for key, other in tensors.items() if key != name and other.layout == tensor.layout)
    return (
        placed is not None and placed[0] in ("head", "embedding") and any(same_bytes(tensor, each) for each in others)
    )
