"""Section: how far each matrix moved. It reads all weights, and is made only with --norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean

from hft_cli.checkpoint.folders import weights_hash
from hft_cli.checkpoint.naming import category, layer_and_matrix
from hft_cli.errors import UserError
from hft_cli.report.figures.heatmaps import Heatmap, heatmaps, layer_map
from hft_cli.report.groups import Comparison, Group, batches
from hft_cli.report.measures import sample_note
from hft_cli.report.runs import Run
from hft_cli.report.tables import Plot, Record, Section, Table, Value, columns, formatted
from hft_cli.report.weight_change import TensorChange, tensor_changes
from hft_cli.run_dir import RunDir

TITLE = "Size of the change"
CATEGORIES = ("attention", "mixer", "feed-forward", "norm", "outside the layers")
Changes = Mapping[Path, Sequence[TensorChange]]  # by the run's folder


def section(comparison: Comparison) -> Section | None:
    changes, text = _measure([run for group in comparison.groups for run in group.runs])
    groups = [group for group in comparison.groups if any(run.folder in changes for run in group.runs)]
    if not groups:
        return Section(TITLE, text) if text else None
    parts: list[Table | Plot] = []
    for stem, batch in batches("norms", groups):
        caption = (
            "Size of the change of each matrix, ‖θ_T − θ_0‖ / ‖θ_0‖ (%), mean over seeds. Matrices that stayed frozen "
            f"count as 0. {sample_note(batch)}"
        )
        parts.append(_plot(stem, caption, [_mean_map(group, changes) for group in batch]))
    caption = "‖θ_T − θ_0‖ / ‖θ_0‖ (%) of all tensors of a category taken together, over all runs of a setting."
    records = [_category_record(group, changes) for group in groups]
    present = [name for name in CATEGORIES if any(record[name] is not None for record in records)]
    shown = [*columns("setting", "runs"), *((f"{name} (%)", formatted(name, ".2f", 100)) for name in present)]
    parts.append(Table("norms_by_category", caption, shown, records))
    caption = "Every tensor of every run: the Frobenius norms of its start and of its change."
    shown = [*columns("run", "tensor"),
             *((key, formatted(key, ".4g")) for key in ("norm_start", "norm_change", "relative"))]  # fmt: skip
    of_tensors = [_tensor_record(group, run, change) for group in groups for run in group.runs
               for change in changes.get(run.folder, ())]  # fmt: skip
    parts.append(Table("norms", caption, shown, of_tensors, csv_only=True))
    return Section(TITLE, text, parts)


def _measure(runs: Sequence[Run]) -> tuple[Changes, list[str]]:
    """The changes of each run that can be measured, and why the others cannot."""
    hash_of = cache(weights_hash)
    changes: dict[Path, Sequence[TensorChange]] = {}
    text = []
    for run in runs:
        if run.row.status == "no model written":
            text.append(f"Not measured: the run in {run.row.run} wrote no model.")
            continue
        try:
            changes[run.folder] = tensor_changes(RunDir(run.folder), hash_of)
        except UserError as reason:
            text.append(f"Not measured: {reason}")
    return changes, text


def _tensor_record(group: Group, run: Run, change: TensorChange) -> Record:
    layer, matrix = layer_and_matrix(change.tensor) or (None, change.tensor.removesuffix(".weight"))
    return {
        "run": run.row.run, "setting": group.label, "seed": run.row.seed, "draw_seed": run.draw_seed,
        "tensor": change.tensor, "layer": layer, "matrix": matrix, "norm_start": change.start,
        "norm_change": change.change, "relative": change.relative,
    }  # fmt: skip


def _category_record(group: Group, changes: Changes) -> Record:
    """The relative change of each category; None if the model has no tensor of it."""
    measured = [changes[run.folder] for run in group.runs if run.folder in changes]
    squares = {name: [0.0, 0.0] for name in CATEGORIES}  # of change and start
    for change in (change for run_changes in measured for change in run_changes):
        name = _category(change.tensor)
        if name in squares and change.relative is not None:
            squares[name][0] += change.change**2
            squares[name][1] += change.start**2
    record: dict[str, Value] = {"setting": group.label, "runs": len(measured)}
    return record | {name: (moved / start) ** 0.5 if start else None for name, (moved, start) in squares.items()}


def _category(tensor: str) -> str:
    place = layer_and_matrix(tensor)
    return category(place[1]) if place else "outside the layers"


def _mean_map(group: Group, changes: Changes) -> Heatmap:
    """The relative change of each tensor in percent, mean over the group's runs."""
    runs = [{change.tensor: change.relative for change in changes[run.folder] if change.relative is not None}
            for run in group.runs if run.folder in changes]  # fmt: skip
    return layer_map(group.label, {name: 100 * fmean(run[name] for run in runs) for name in runs[0]})


def _plot(stem: str, caption: str, maps: Sequence[Heatmap]) -> Plot:
    largest = max(value for entry in maps for row in entry.cells for value in row if value is not None)
    form = ".0f" if largest >= 20 else ".1f" if largest >= 2 else ".2f"
    return Plot(stem, caption, partial(heatmaps, maps, "Change (% of the start)", form, 0))
