"""Section: which parameters each round updated, from draws.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from hft_cli.checkpoint.naming import layer_and_matrix
from hft_cli.report.figures.heatmaps import Heatmap, draw_maps, heatmaps, layer_map
from hft_cli.report.groups import Comparison, grouped
from hft_cli.report.runs import Draw, Run
from hft_cli.report.tables import Plot, Record, Section, Table, columns, formatted, percent, plain
from hft_cli.text import plural

MOST_SINGLE_ROUNDS, MOST_SEQUENCES = 8, 2  # with a map of their draws


def section(comparison: Comparison) -> Section | None:
    runs = [run for run in comparison.runs if run.row.level not in ("all", "lora")]
    runs = [run for run in runs if any(draw.frozen for draw in run.draws)]
    by_draw = list(grouped(runs, lambda run: run.updated_by_round).values())
    if not by_draw:
        return None
    shown = [
        ("draw of run", plain("run")), ("runs with it", plain("runs")), *columns("draw_seed", "level"),
        ("ratio", formatted("ratio")), *columns("round"), ("data", plain("name")),
        ("tensors updated", plain("updated")), ("tensors frozen", plain("frozen")),
        ("updated in the layers (%)", percent("share")),
    ]  # fmt: skip
    records = [_record(same, draw) for same in by_draw for draw in same[0].draws]
    parts: list[Table | Plot] = [
        Table("draws", f"The different draws, as recorded in draws.json: {len(by_draw)}.", shown, records),
        *_map_plots(by_draw),
    ]
    if len(by_draw) > 1:
        caption = f"How often each matrix was updated (% of rounds), over the {len(by_draw)} different draws."
        maps = _frequency_maps([same[0] for same in by_draw])
        parts.append(Plot("draws_often", caption, partial(heatmaps, maps, "Updated (% of rounds)", ".0f", 0, 100)))
    return Section("What was updated", (), parts)


def _record(runs: Sequence[Run], draw: Draw) -> Record:
    """A round of runs with the same draws."""
    run = runs[0]
    in_layers = [name in draw.updated for name in draw.updated | draw.frozen if layer_and_matrix(name)]
    return {
        "run": run.row.run, "runs": len(runs), "round": draw.round, "name": draw.name, "level": draw.level,
        "ratio": run.row.ratio, "draw_seed": run.draw_seed, "updated": len(draw.updated), "frozen": len(draw.frozen),
        "share": sum(in_layers) / len(in_layers),
    }  # fmt: skip


def _map_plots(by_draw: Sequence[Sequence[Run]]) -> list[Plot]:
    """One figure for runs of a single round, and one for each run of several rounds."""
    plots = []
    single = [same for same in by_draw if len(same[0].draws) == 1][:MOST_SINGLE_ROUNDS]
    if single:
        sources = "; ".join(f"{same[0].row.run} ({plural(len(same), 'run')})" for same in single)
        caption = f"Matrices that were updated (dark, with a dot) and frozen (light) by runs of one round: {sources}."
        titles = [f"{same[0].row.selection}, draw {same[0].draw_seed}" for same in single]
        if len(single) == 1:
            titles = [_round_title(single[0][0].draws[0])]
        maps = [_draw_map(title, same[0].draws[0]) for title, same in zip(titles, single, strict=True)]
        plots.append(Plot("draws", caption, partial(draw_maps, maps)))
    for i, same in enumerate([same for same in by_draw if len(same[0].draws) > 1][:MOST_SEQUENCES]):
        run = same[0]
        caption = (
            f"Matrices that each round updated (dark, with a dot) and froze (light) in {run.row.run}: {run.row.label}, "
            f"{run.row.selection}, draw seed {run.draw_seed}; {plural(len(same), 'run')} with this draw."
        )
        maps = [_draw_map(_round_title(draw), draw) for draw in run.draws]
        plots.append(Plot(f"draws_{i + 1}", caption, partial(draw_maps, maps)))
    return plots


def _round_title(draw: Draw) -> str:
    return f"round {draw.round}: {draw.name}"


def _draw_map(title: str, draw: Draw) -> Heatmap:
    return layer_map(title, {name: float(name in draw.updated) for name in draw.updated | draw.frozen})


def _frequency_maps(runs: Sequence[Run]) -> list[Heatmap]:
    """How often each matrix was updated, a map for each level, ratio and model."""
    by_kind = grouped(runs, lambda run: (run.row.level, f"{run.row.ratio:g}", run.setting.get("model.name", "")))
    models = {model for _, _, model in by_kind}
    maps = []
    for (level, ratio, model), members in by_kind.items():
        draws = [draw for run in members for draw in run.draws]
        updated = Counter(name for draw in draws for name in draw.updated)
        drawn = Counter(name for draw in draws for name in draw.updated | draw.frozen)
        title = f"{model}: " if len(models) > 1 else ""
        title += f"{level} {ratio}, {plural(len(draws), 'round')}"
        maps.append(layer_map(title, {name: 100 * updated[name] / rounds for name, rounds in drawn.items()}))
    return maps
