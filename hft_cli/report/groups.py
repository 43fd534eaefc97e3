"""What all sections of a report share: the measures, runs on the same data, and a measure over the seeds of a group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from hft_cli.report import stats
from hft_cli.report.runs import Run, RunRow
from hft_cli.report.stats import Estimate, estimate
from hft_cli.report.tables import Value

if TYPE_CHECKING:
    from hft_cli.report.figures import Dot, Series

Measure = Callable[[RunRow], float | None]

MEASURES: dict[str, tuple[str, Measure]] = {
    "skill": ("Skill learned (%)", lambda row: row.skill),
    "retained": ("Retained (%)", lambda row: row.retained),
    "op": ("OP (%)", lambda row: row.op),
    "bwt": ("BWT (points)", lambda row: row.bwt),
}

INTERVAL = (
    "Intervals are at 95%, by Student's t over the runs' means for each pair of seeds; where every data seed meets "
    "every draw seed, by the variances of the two (t with the smaller number less one), since such runs are not "
    "independent. Those of two or three seeds are wide, and may leave the scale."
)

MOST_PANELS = 6  # of maps in one figure


@dataclass(frozen=True)
class Comparison:
    """Runs on the same data. `name` tells it from the others in titles, `suffix` in the names of files."""

    name: str
    suffix: str
    runs: Sequence[Run]

    def title(self, text: str) -> str:
        return f"{text}: {self.name}" if self.name else text

    def stem(self, text: str) -> str:
        safe = "".join(sign if sign.isalnum() else "_" for sign in self.suffix)
        return f"{text}_{safe}" if safe else text


def cells_of(group: Group, of: Measure) -> dict[tuple[int, int], float]:
    """Data seed and draw seed -> the measure; a mean, if the same was run twice."""
    cells: dict[tuple[int, int], list[float]] = {}
    for run in group.runs:
        value = of(run.row)
        if value is not None:
            cells.setdefault((run.row.seed or 0, run.draw_seed or 0), []).append(value)
    return {key: fmean(values) for key, values in cells.items()}


def over_seeds(group: Group, of: Measure) -> tuple[Estimate | None, str]:
    """The measure's mean with its interval, and how that was made."""
    cells = cells_of(group, of)
    rows, columns = sorted({r for r, _ in cells}), sorted({c for _, c in cells})
    if min(len(rows), len(columns)) > 1 and len(cells) == len(rows) * len(columns):
        return stats.crossed([[cells[r, c] for c in columns] for r in rows]), "crossed"
    found = estimate(list(cells.values()))
    return found, "" if found is None else "t" if found.n > 1 else "none, n = 1"


def _seeds(group: Group) -> dict[str, Value]:
    return {
        "runs": len(group.runs),
        "data_seeds": len({run.row.seed for run in group.runs}),
        "draw_seeds": len({run.draw_seed for run in group.runs}),
    }


def sample_note(found: Sequence[Group]) -> str:
    """How many runs and seeds are behind a figure."""
    runs = [run for group in found for run in group.runs]
    seeds = sorted({run.row.seed for run in runs if run.row.seed is not None})
    draws = sorted({run.draw_seed for run in runs if run.draw_seed is not None})
    text = f"{count_of(len(runs), 'run')}, {count_of(len(seeds), 'data seed')} ({_few(seeds)})"
    if draws != seeds:
        text += f", {count_of(len(draws), 'draw seed')} ({_few(draws)})"
    least = min(len(group.runs) for group in found)
    return text + ("; one run a setting, so that there is no interval" if max(len(g.runs) for g in found) == 1 else
                   "; some settings have one run and no interval" if least == 1 else "") + "."  # fmt: skip


def count_of(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _few(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", …" if len(values) > 8 else "")


def setting_of(group: Group) -> dict[str, Value]:
    row = group.first
    return {
        "setting": group.label,
        "method": row.method,
        "continual": row.continual or None,
        "level": row.level,
        "ratio": row.ratio,
        "learning_rate": row.learning_rate,
        **_seeds(group),
    }


def measured_in(found: Sequence[Group]) -> list[str]:
    """The measures that any of the groups has; a sequence's skill is its OP, and is not shown twice."""
    keys = [key for key, (_, of) in MEASURES.items() if any(of(run.row) is not None for g in found for run in g.runs)]
    if "op" in keys and all(run.row.op is not None for group in found for run in group.runs):
        keys = [key for key in keys if key != "skill"]
    return keys


def dot_of(group: Group, key: str, x: float) -> Dot | None:
    """A measure over the seeds in percent or points, for a figure."""
    from hft_cli.report.figures import Dot

    of = MEASURES[key][1]
    found, _ = over_seeds(group, of)
    if found is None:
        return None
    low, high = (None if end is None else 100 * end for end in (found.low, found.high))
    return Dot(x, 100 * found.mean, low, high, tuple(100 * value for value in cells_of(group, of).values()))


def series_of(
    label: str, style: str, found: Iterable[tuple[float, Group]], keys: Iterable[str], joined: bool
) -> Series:
    from hft_cli.report.figures import Series

    pairs = list(found)
    panels = {key: tuple(dot for x, group in pairs if (dot := dot_of(group, key, x)) is not None) for key in keys}
    return Series(label, style, panels, joined)


def comparisons(found: Sequence[Group]) -> list[list[Group]]:
    return [list(found[i : i + MOST_PANELS]) for i in range(0, len(found), MOST_PANELS)]


@dataclass(frozen=True)
class Group:
    """The counted runs of one setting, which differ in their seeds alone. `label` tells it from the other groups."""

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> RunRow:
        return self.runs[0].row


def groups(runs: Sequence[Run]) -> list[Group]:
    """Counted runs by setting, in the order of label, selection and learning rate, with labels as short as can be."""
    by: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        if run.counted:
            by.setdefault(run.key, []).append(run)
    made = list(by.values())
    texts: list[list[str]] = [[own[0].row.label] for own in made]

    def told_apart(parts: Sequence[Sequence[str]]) -> int:
        return len({tuple(part) for part in parts})

    keys = ["selection.level", "selection.ratio", "train.learning_rate", "model.name", "data.name", "continual.name"]
    every = {key for own in made for key in own[0].setting} - set(keys)
    # what only some versions write comes last
    common = {key for key in every if all(key in own[0].setting for own in made)}
    keys += ["engine.name", "suite.name", *sorted(common), *sorted(every - common)]
    shown = dict.fromkeys((key for key in keys if key.endswith(".name")), "{}")
    shown |= {"selection.level": "{}", "selection.ratio": "{}", "train.learning_rate": "lr {}"}
    for key in keys:
        values = [own[0].setting.get(key, "") for own in made]
        if key == "selection.level":  # FFT says it already
            values = ["" if own[0].row.method in ("fft", "dpo") else own[0].row.level for own in made]
        more = [
            [*text, shown.get(key, key.rsplit(".", 1)[-1] + " {}").format(value) if value not in ("", "None") else ""]
            for text, value in zip(texts, values, strict=True)
        ]
        if told_apart(more) > told_apart(texts):
            texts = more
    found = [
        Group(" ".join(part if len(part) < 60 else part[:57] + "…" for part in text if part),
              tuple(sorted(own, key=lambda run: (run.row.seed or 0, run.draw_seed or 0))))
        for text, own in zip(texts, made, strict=True)
    ]  # fmt: skip
    return sorted(found, key=lambda g: (order(g.first.label), g.first.selection, g.first.learning_rate or 0, g.label))


def order(label: str) -> tuple[int, str]:
    """FFT first, then HFT, then Half-Reset, then the rest."""
    known = ("FFT", "HFT", "Half-Reset", "DPO", "HFT-DPO", "LoRA")
    return known.index(label.split(" + ")[0]) if label.split(" + ")[0] in known else len(known), label


def less_rate(group: Group) -> str:
    return group.label.replace(f" lr {group.runs[0].setting.get('train.learning_rate')}", "")
