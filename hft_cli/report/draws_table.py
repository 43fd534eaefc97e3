"""What `hft show draws` prints: the ledger as layers by matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hft_cli.checkpoint.naming import layer_and_matrix
from hft_cli.files import read_record
from hft_cli.run_dir import Ledger, RunDir
from hft_cli.text import first_of, plural, text_table

UPDATED, FROZEN = "●", "○"


def draws_table(run: RunDir) -> str:
    """A row for each layer, a column for each matrix, and in each cell a mark for each round."""
    draws = {
        entry["round"]: entry for entry in reversed(read_record(run.draws, Ledger)["rounds"])
    }  # a replay shares its round's
    rounds = list(draws.values())[::-1]
    marks: dict[str, str] = {}
    for entry in rounds:
        for mark, names in ((UPDATED, entry["updated"]), (FROZEN, entry["frozen"])):
            for name in names:
                marks[name] = marks.get(name, "") + mark
    in_layers = {place: mark for name, mark in marks.items() if (place := _place(name))}
    outside = [f"{mark}  {name.removesuffix('.weight')}" for name, mark in marks.items() if not _place(name)]
    times = [mark.count(UPDATED) for mark in in_layers.values()]
    counts = [f"{plural(number, 'round')}: {times.count(number)}" for number in range(len(rounds) + 1)]
    never = sorted(name for name, mark in marks.items() if UPDATED not in mark) if len(rounds) > 1 else []
    lines = [
        *(_heading(entry) for entry in rounds),
        "",
        f"{UPDATED} updated   {FROZEN} frozen   one mark for each round",
        "",
        _grid(in_layers),
        "",
        *outside,
        "",
        f"updated in {', '.join(counts)}",
    ]
    if never:
        lines.append(f"never updated: {first_of(never)}")
    return "\n".join(lines)


def _place(name: str) -> tuple[int, str] | None:
    """Layer and matrix of a tensor, with biases apart; None outside the layers."""
    place = layer_and_matrix(name)
    return (place[0], place[1] + ".bias" * name.endswith(".bias")) if place else None


def _heading(entry: Mapping[str, Any]) -> str:
    return (
        f"round {entry['round']} {entry['name']}: {entry['level']}, ratio {entry['ratio']:g}, seed {entry['seed']}; "
        f"reached {entry['matrices_reached']:.1%} of the layers' matrices, {entry['elements_reached']:.1%} of their "
        f"elements; sha256 {entry['sha256'][:12]}"
    )


def _grid(marks: Mapping[tuple[int, str], str]) -> str:
    """Layers by matrices, with the last part of a matrix's name as heading where it is unique."""
    layers, matrices = sorted({layer for layer, _ in marks}), sorted({matrix for _, matrix in marks})
    ends = [matrix.rsplit(".", 1)[-1] for matrix in matrices]
    headings = [end if ends.count(end) == 1 else matrix for end, matrix in zip(ends, matrices, strict=True)]
    rows = [[str(layer), *(marks.get((layer, matrix), "") for matrix in matrices)] for layer in layers]
    return text_table(["layer", *headings], rows)
