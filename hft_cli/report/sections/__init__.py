"""The sections of a report. A section is one file here and one row of SECTIONS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from itertools import groupby

from hft_cli.report.groups import Comparison, compare
from hft_cli.report.runs import Run
from hft_cli.report.sections import (
    before_after,
    benchmarks,
    cost,
    draws,
    frontier,
    levels,
    losses,
    methods,
    overview,
    ratio,
    sequences,
    variance,
    verdict,
    weight_change,
)
from hft_cli.report.tables import Section, Table


class Scope(Enum):
    """The runs that a section is made from. What is not about one comparison is in the appendix."""

    EVERY_RUN = "all runs, also those that are not counted"
    COUNTED = "all counted runs"
    COMPARISON = "counted runs on the same data; the section is repeated for each comparison"
    WEIGHTS = "all counted runs, only with --norms, because it reads their weights"


# In the order in which they are read. A section is None if the runs do not have what it needs.
SECTIONS: tuple[tuple[Callable[[Comparison], Section | None], Scope], ...] = (
    (verdict.section, Scope.COMPARISON),
    (methods.section, Scope.COMPARISON),
    (benchmarks.section, Scope.COMPARISON),
    (ratio.section, Scope.COMPARISON),
    (levels.section, Scope.COMPARISON),
    (frontier.section, Scope.COMPARISON),
    (sequences.section, Scope.COMPARISON),
    (variance.section, Scope.COMPARISON),
    (losses.section, Scope.COMPARISON),
    (overview.section, Scope.EVERY_RUN),
    (draws.section, Scope.COUNTED),
    (weight_change.section, Scope.WEIGHTS),
    (before_after.section, Scope.COUNTED),
    (cost.section, Scope.COUNTED),
)


def build_sections(runs: Sequence[Run], norms: bool = False) -> list[Section]:
    """The sections that these runs have the data for. With `norms`, their weights are read.

    Each of the paper's tables is only in the first section that has it.
    """
    counted = Comparison([run for run in runs if run.counted])
    comparisons = {
        Scope.EVERY_RUN: [Comparison(runs)],
        Scope.COUNTED: [counted],
        Scope.COMPARISON: compare(counted.runs),
        Scope.WEIGHTS: [counted] if norms else [],
    }
    sections: list[Section] = []
    papers_tables: list[Table] = []
    for scope, rows in groupby(SECTIONS, key=lambda row: row[1]):
        builders = [build for build, _ in rows]
        for section in (build(comparison) for comparison in comparisons[scope] for build in builders):
            if section is not None:
                parts = [part for part in section.parts if part not in papers_tables]
                sections.append(replace(section, parts=parts, appendix=scope is not Scope.COMPARISON))
                papers_tables += [part for part in section.parts if isinstance(part, Table) and part.paper]
    return sections
