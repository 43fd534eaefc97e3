"""Section: what the runs say, in five lines, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from hft_cli.report import mixed
from hft_cli.report.groups import Comparison, Group
from hft_cli.report.measures import MEASURES, differences
from hft_cli.report.sections.frontier import Gap, frontier_plot, gaps, named_paths, resolution, sweeps_of_rates
from hft_cli.report.stats import LEVEL, Estimate, holm
from hft_cli.report.tables import Section
from hft_cli.text import plural

POWER = 1.43  # (1.96 + 0.84) / 1.96: what is seen with 80% power, as a multiple of the half-width of a 95% interval

UNKNOWN = "cannot tell"


@dataclass(frozen=True)
class Verdict:
    """What a comparison says of methods against a baseline.

    Attributes:
        lines: five sentences, for people.
        at_equal_skill: method -> better, worse or cannot tell.
    """

    lines: tuple[str, ...]
    at_equal_skill: dict[str, str]


def section(comparison: Comparison) -> Section | None:
    verdict = judge(comparison)
    if verdict is None:
        return None
    plot = frontier_plot(comparison)
    return Section(comparison.title("Verdict"), verdict.lines, [plot] if plot else [])


def judge(comparison: Comparison) -> Verdict | None:
    """The verdict on all methods; None if there is one method only, or nothing that is learned and retained."""
    groups = [g for g in comparison.groups if g.row.skill is not None and g.row.retained is not None]
    if len({_method(group) for group in groups}) < 2:
        return None
    sweeps = sweeps_of_rates(comparison)
    paths = named_paths(sweeps)
    found = gaps(paths) if len(sweeps) > 1 else []
    note = ""
    if found and (grid := resolution(paths)).coarse:
        note = (
            f" The grid of learning rates is coarse, with steps of up to {100 * grid.step:.0f} points of skill: a "
            "method whose skill rises within a step looks worse than it is."
        )
    judged = dict(zip((gap.method for gap in found), _judgements(found), strict=True))
    lines = (_at_one_rate(groups), _at_equal_skill(found) + note, _size(groups), _power(found), _summary(judged))
    return Verdict(lines, judged)


def _method(group: Group) -> str:
    return group.label_without_rate


def _judgements(found: Sequence[Gap]) -> list[str]:
    """Better, worse or cannot tell, of each gap at equal skill; the level holds for all of them together (Holm)."""
    adjusted = holm([gap.estimate.p for gap in found])
    return [
        UNKNOWN if p is None or p > 1 - LEVEL else "better" if gap.estimate.mean > 0 else "worse"
        for gap, p in zip(found, adjusted, strict=True)
    ]


def _at_one_rate(groups: Sequence[Group]) -> str:
    """The differences at the rate at which the first method learns most."""
    first = _method(groups[0])
    own = [group for group in groups if _method(group) == first]
    best = max(own, key=lambda group: fmean(run.row.skill or 0 for run in group.runs))
    rate = best.row.learning_rate
    parts = []
    for group in groups:
        if _method(group) == first or (group.row.learning_rate != rate and group.row.learning_rate is not None):
            continue
        ends = []
        for key, verb in (("retained", "retains"), ("skill", "learns")):
            estimate, _ = mixed.over_seeds(differences(group, best, MEASURES[key].score))
            ends.append(f"{verb} {_points(estimate)}")
        parts.append(f"{_method(group)} {' and '.join(ends)}")
    where = f"At one learning rate ({rate:g}, at which {first} learns most)" if rate else "With these settings"
    return f"{where}, against {first}: {'; '.join(parts) or 'no other method was run'}."


def _at_equal_skill(found: Sequence[Gap]) -> str:
    if not found:
        return (
            "At equal skill: not known. Run several learning rates of each method, so that the skills that both reach "
            "span 5 points or more."
        )
    parts = [
        f"{gap.method} retains {_points(gap.estimate)}, more in {gap.wins} of {plural(gap.estimate.n, 'seed')}"
        for gap in found
    ]
    return f"At equal skill, against {found[0].other}: {'; '.join(parts)}."


def _size(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    draws = {run.draw_seed for run in runs if run.row.level not in ("all", "lora", "names", "importance")}
    items = max((run.items for run in runs), default=0)
    seeds = plural(len({run.row.seed for run in runs}), "data seed")
    return f"This rests on {plural(len(runs), 'run')}: {seeds}, {plural(len(draws), 'draw')}" + (
        f", {plural(items, 'item')} of what was known." if items else "."
    )


def _power(found: Sequence[Gap]) -> str:
    """The smallest difference that the design shows in four of five experiments."""
    widths = [
        POWER * (gap.estimate.high - gap.estimate.low) / 2
        for gap in found
        if gap.estimate.high is not None and gap.estimate.low is not None
    ]
    if not widths:
        why = "there is one seed" if found else "no two methods were compared at equal skill"
        return f"The smallest difference that this design could have seen is not known: {why}."
    least, most = (f"{100 * width:.1f}" for width in (min(widths), max(widths)))
    size = f"{least} points" if least == most else f"{least} to {most} points, depending on the method,"
    return f"A difference at equal skill of {size} would have been seen in four of five experiments of this size."


def _summary(judged: dict[str, str]) -> str:
    if not judged:
        return f"Verdict: {UNKNOWN}."
    by_word = {word: [name for name, found in judged.items() if found == word] for word in ("better", "worse", UNKNOWN)}
    return (
        "Verdict at equal skill: "
        + "; ".join(f"{word}: {', '.join(names)}" for word, names in by_word.items() if names)
        + "."
    )


def _points(estimate: Estimate | None) -> str:
    if estimate is None:
        return "an unknown number of points"
    text = f"{100 * estimate.mean:+.1f}"
    if estimate.low is not None and estimate.high is not None:
        text += f" [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"
    return f"{text} points"
