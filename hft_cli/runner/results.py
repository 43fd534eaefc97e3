"""The content of results.json, from what the phases, the scores and the verification gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hft_cli.evaluation.metrics import backward_transfer, overall_performance
from hft_cli.method.rounds import Phase, phase_config
from hft_cli.runner.prepare import Prepared
from hft_cli.runner.verify import RoundProof

Scores = dict[str, Any]  # suite -> task -> metric -> value


def results(
    prepared: Prepared,
    outcomes: Sequence[dict[str, Any]],
    proofs: Sequence[RoundProof],
    before_after: Mapping[str, Scores],
    round_scores: Sequence[Scores],
) -> dict[str, Any]:
    """The content of results.json. `outcomes` and `proofs` have an item for each phase (no proofs without a model).

    `before_after` has the scores `before` and `after`, `round_scores` those after each of several rounds.
    """
    config, first = prepared.config, prepared.phases[0]
    engines = dict.fromkeys(engine["name"] for outcome in outcomes for engine in outcome.get("engines", []))
    faults = [f"round {proof.round} {proof.name}: {fault}" for proof in proofs for fault in proof.faults]
    trained = first.trains
    return {
        "method": config.method.name,
        "stage": first.stage,
        "model": config.model.name,
        "data": config.data.name,
        "engine": ", ".join(engines) or config.engine.name,
        "selection": asdict(config.selection),
        "ratio": prepared.draws[0].matrices_reached,
        "seed": config.seed,
        "learning_rate": phase_config(config, first).train.learning_rate if trained else None,
        "rounds": list(_round_results(prepared, outcomes, proofs)),
        "eval": before_after,
        "anchor": {
            "name": config.anchor.name,
            "momentum_filter": config.train.momentum_filter,
            "alpha": config.method.alpha if trained else None,
        },
        "continual": {"name": config.continual.name, **continual_measures(prepared.phases, round_scores)},
        "verification": {"passed": not faults if proofs else None, "faults": faults},
    }


def _round_results(
    prepared: Prepared, outcomes: Sequence[dict[str, Any]], proofs: Sequence[RoundProof]
) -> Iterator[dict[str, Any]]:
    records = prepared.record["rounds"]
    optional_proofs: Sequence[RoundProof | None] = proofs or [None] * len(records)
    for phase, draw, proof, outcome, record in zip(
        prepared.phases, prepared.draws, optional_proofs, outcomes, records, strict=True
    ):
        proven = {"frozen_bit_identical": proof.frozen_bit_identical, "unmoved": proof.unmoved} if proof else {}
        yield {
            "name": phase.name,
            "round": phase.round,
            "updated_fraction": draw.updated_fraction,
            **proven,
            **outcome,
            **{key: record[key] for key in ("rows_repeated", "rows_in_test", "rows_in_validation") if key in record},
        }


def continual_measures(phases: Sequence[Phase], scores: Sequence[Scores]) -> dict[str, Any]:
    """The matrix R (rows: after each round, columns: tasks), overall performance OP and backward transfer BWT.

    Empty unless there are several rounds and each has a test set of its own. A task that was not scored is None in R.
    """
    rounds = [phase for phase in phases if phase.trains and not phase.replays and phase.ends_set]
    if len(rounds) < 2 or len({phase.test for phase in rounds} - {None}) < len(rounds):
        return {}
    matrix = [[row["data"].get(phase.task, {}).get(phase.metric) for phase in rounds] for row in scores]
    return {
        "tasks": [phase.task for phase in rounds],
        "metrics": [phase.metric for phase in rounds],
        "R": matrix,
        "OP": overall_performance(matrix),
        "BWT": backward_transfer(matrix),
    }
