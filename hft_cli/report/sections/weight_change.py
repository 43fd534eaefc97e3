"""How far each tensor of a run's model is from where it began: ‖θ_T − θ_0‖ / ‖θ_0‖, streamed from files. No torch.

The final value of a tensor is that of the last round whose delta holds it; what no delta holds did not move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hft_cli.checkpoint.folders import stored_tensors, weights_hash
from hft_cli.checkpoint.naming import category, layer_and_matrix
from hft_cli.checkpoint.tensors import StoredTensor, read_header
from hft_cli.errors import UserError
from hft_cli.files import read_json
from hft_cli.report.groups import Group, comparisons, groups, sample_note
from hft_cli.report.runs import Run
from hft_cli.report.sections.draws import layers_by_matrices
from hft_cli.report.tables import Plot, Record, Section, Table, Value, plain, short
from hft_cli.run_dir import RunDir
from hft_cli.runner.base import find_base

if TYPE_CHECKING:
    from matplotlib.figure import Figure


CHUNK = 1 << 20  # elements handled at once

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Change:
    """Frobenius norms of a tensor at the start and of its change; `relative` is None where it began as zeros."""

    tensor: str
    start: float
    change: float

    @property
    def relative(self) -> float | None:
        return self.change / self.start if self.start > 0 else None


def changes(run: RunDir, hash_of: Callable[[Path], str] = weights_hash) -> list[Change]:
    """The change of every tensor of the model that a run started from.

    `hash_of` returns the hash of a folder's weights; a caller with many runs can pass a cached one.

    Raises:
        UserError: why they cannot be told: the base is gone or is not the same any more, a delta is missing.
    """
    plan = read_json(run.plan)
    try:
        deltas = [run.round(entry["number"], entry["name"]).delta for entry in plan["rounds"]]
        base = find_base(run, hash_of=hash_of, fix="Restore it.")
    except (KeyError, TypeError):
        raise UserError("plan.json is broken") from None
    if missing := [delta for delta in deltas if not delta.exists()]:
        raise UserError(f"{missing[0].relative_to(run.folder)} is missing")
    last = {name: tensor for delta in deltas for name, tensor in read_header(delta).items()}  # of the last delta
    return [_change(name, start, last.get(name)) for name, start in stored_tensors(base).items()]


def _change(name: str, start: StoredTensor, end: StoredTensor | None) -> Change:
    if end is not None and start.shape != end.shape:
        raise UserError(f"{name} has another shape in {end.file.name}")
    of_start = of_change = 0.0
    if end is None:
        of_start = sum(float(values @ values) for values in numbers(start))
    else:
        for old, new in zip(numbers(start), numbers(end), strict=True):
            difference = new - old
            of_start += float(old @ old)
            of_change += float(difference @ difference)
    return Change(name, math.sqrt(of_start), math.sqrt(of_change))


def numbers(tensor: StoredTensor) -> Iterator[NDArray[np.float64]]:
    """A stored tensor's numbers in order, a chunk at a time. bfloat16 is the upper half of a float32.

    Raises:
        UserError: if it holds no floating-point numbers, or the file ends early.
    """
    if tensor.dtype not in TYPES:
        raise UserError(f"{tensor.file.name} has tensors of type {tensor.dtype}, which are not measured")
    kind = np.dtype(TYPES[tensor.dtype])
    left = tensor.size // kind.itemsize
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        while left:
            values = np.fromfile(file, kind, min(CHUNK, left))
            if not len(values):
                raise UserError(f"{tensor.file} ends early")
            left -= len(values)
            if tensor.dtype == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            yield values.astype(np.float64)


def norms_section(runs: Sequence[Run]) -> Section | None:
    """How far the weights moved. Reads them all, so only when asked."""
    hash_of = cache(weights_hash)
    measured: dict[Path, dict[str, float]] = {}
    records: list[Record] = []
    text = []
    found = groups(runs)
    for group in found:
        for run in group.runs:
            if run.row.status == "no model written":
                text.append(f"{run.row.run}: not measured, because it wrote no model.")
                continue
            try:
                own = changes(RunDir(run.folder), hash_of)
            except UserError as reason:
                text.append(f"{run.row.run}: not measured. {str(reason).rstrip('.')}.")
                continue
            measured[run.folder] = {moved.tensor: moved.relative for moved in own if moved.relative is not None}
            for moved in own:
                where = layer_and_matrix(moved.tensor)
                records.append({
                    "run": run.row.run, "setting": group.label, "seed": run.row.seed, "draw_seed": run.draw_seed,
                    "tensor": moved.tensor, "layer": where[0] if where else None,
                    "matrix": where[1] if where else moved.tensor.removesuffix(".weight"), "norm_start": moved.start,
                    "norm_change": moved.change, "relative": moved.relative,
                })  # fmt: skip
    if not records:
        return Section("Size of the change", text) if text else None
    shown = [group for group in found if any(run.folder in measured for run in group.runs)]
    summary: list[Record] = []
    for group in shown:
        inside = [r for r in records if r["setting"] == group.label and isinstance(r["relative"], float)]
        of = {name: [r for r in inside if r["layer"] is not None and category(str(r["matrix"])) == name]
              for name in ("attention", "feed-forward", "norm")}  # fmt: skip
        of["outside the layers"] = [r for r in inside if r["layer"] is None]
        made: dict[str, Value] = {"setting": group.label, "runs": sum(run.folder in measured for run in group.runs)}
        for name, some in of.items():
            change, start = (sum(float(r[key] or 0) ** 2 for r in some) for key in ("norm_change", "norm_start"))
            made[name] = (change / start) ** 0.5 if start else None
        summary.append(made)
    columns = [("setting", plain("setting")), ("runs", plain("runs")),
               *((f"{name} (%)", _fine(name)) for name in of)]  # fmt: skip
    parts: list[Table | Plot] = [
        Table("norms_by_category", "‖θ_T − θ_0‖ / ‖θ_0‖ (%) over all tensors of a category and runs of a setting, taken"
              " together.", columns, summary),
        Table("norms", "Every tensor of every run: Frobenius norms of its start and its change.",
              [(key, plain(key)) for key in ("run", "tensor")]
              + [(key, short(key, ".4g")) for key in ("norm_start", "norm_change", "relative")], records, data=True),
    ]  # fmt: skip
    for part, lot in enumerate(comparisons(shown)):
        caption = (
            "Size of the change of each matrix, ‖θ_T − θ_0‖ / ‖θ_0‖ (%); means over seeds, frozen ones counted as 0. "
            f"{sample_note(lot)}"
        )
        plot = Plot("norms" if part == 0 else f"norms_{part + 1}", caption, partial(_norm_maps, lot, measured))
        parts.insert(part, plot)
    return Section("Size of the change", text, parts)


def _fine(key: str) -> Callable[[Record], str]:
    return lambda record: "" if not isinstance(value := record.get(key), float) else f"{100 * value:.2f}"


def _norm_maps(found: Sequence[Group], measured: Mapping[Path, Mapping[str, float]]) -> Figure:
    from hft_cli.report import figures
    from hft_cli.report.figures import Map

    panels = []
    for group in found:
        own = [measured[run.folder] for run in group.runs if run.folder in measured]
        mean = {name: 100 * fmean(values[name] for values in own) for name in own[0]}
        panels.append(Map(group.label, *layers_by_matrices(mean)))
    largest = max(v for panel in panels for row in panel.cells for v in row if v is not None)
    form = ".0f" if largest >= 20 else ".1f" if largest >= 2 else ".2f"
    return figures.maps(panels, "Change (% of the start)", form, 0)
