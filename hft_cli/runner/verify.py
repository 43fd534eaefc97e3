"""Prove from a run's files that each round changed what its draw says and nothing else. No torch.

The final model must be, tensor by tensor and bit by bit, the base with the rounds' deltas laid over it in order; each
delta must hold exactly the tensors of its round's draw; and each draw must be what the seed gives. Nothing that the
training process said of itself is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.folders import model_folder, stored_tensors, weights_hash
from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.checkpoint.tensors import StoredTensor, read_header, same_bytes
from hft_cli.config.schema import RunConfig, read_config
from hft_cli.errors import UserError
from hft_cli.files import read_json
from hft_cli.method.rounds import draws, phases
from hft_cli.paths import resolve_path
from hft_cli.run_dir import RunDir

MOST_NAMES = 5  # named in a fault


@dataclass(frozen=True)
class RoundProof:
    """What the files say of a round: proven when `faults` is empty. `unmoved`: updated, yet equal to before."""

    number: int
    round: int
    name: str
    updated: int
    frozen: int
    unmoved: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def frozen_bit_identical(self) -> bool:
        return not self.faults


def verify(
    run: RunDir, model: Path | None = None, tick: Callable[[str], None] = lambda name: None
) -> tuple[RoundProof, ...]:
    """Check every round of a run; `model` is the final model's folder (default: RUN/model), `tick` hears of progress.

    Raises:
        UserError: if a file is missing, or the base is not there any more.
    """
    config = read_config(run)
    if not config.method.save_model:
        raise UserError(f"{run.folder} wrote no model (method.save_model=false): there is nothing to verify.")
    plan = read_json(run.plan)
    base = model_folder(plan["base"])
    if weights_hash(base) != plan["base_sha256"]:
        raise UserError(f"The weights in {base} are not those that the run started from, so it cannot be verified.")
    params = parameters_from_folder(base, config.model.kinds)
    stored = {p.name: p.stored for p in params}

    now = stored_tensors(base)  # where each tensor's value stands after the rounds so far
    last: dict[str, int] = {}  # the round that wrote it
    proofs: list[RoundProof] = []
    plan_steps = phases(config)
    entries = _entries(run)
    for step, made in zip(plan_steps, draws(config, params), strict=True):
        entry = {"name": step.name, **made.as_dict()}
        # Through JSON, where tuples are lists: the ledger must say what the seed and the selection give, word for word.
        agrees = len(entries) == len(plan_steps) and entries[step.number - 1] == json.loads(json.dumps(entry))
        faults = [] if agrees else ["draws.json is not what its seed and selection give"]
        delta = run.round(step.number, step.name).delta
        try:
            held = read_header(delta)
        except UserError as error:
            held, faults = {}, [*faults, str(error)]
        drawn = {tensor for param in made.updated for tensor in stored[param]}
        faults += _named("its delta holds tensors that the draw freezes", held.keys() - drawn)
        faults += _named("its delta lacks tensors that the draw updates", drawn - held.keys())
        if step.stage == "half_reset":
            faults += _reset_faults(held, params, config, now)
        else:
            odd = {tensor for tensor in held if not _fits(now.get(tensor), held[tensor])}
            faults += _named("its delta has another dtype or shape for", odd)
        unmoved = []
        for tensor, info in held.items():
            tick(f"round {step.number}: {tensor}")
            if tensor in now and same_bytes(now[tensor], info):
                unmoved.append(tensor)
            now[tensor], last[tensor] = info, step.number
        proofs.append(
            RoundProof(
                number=step.number,
                round=step.round,
                name=step.name,
                updated=len(made.updated),
                frozen=len(made.frozen),
                unmoved=tuple(unmoved),
                faults=tuple(faults),
            )
        )

    try:
        final = stored_tensors(model or run.model)
    except UserError as error:
        return tuple(replace(proof, faults=(*proof.faults, str(error))) for proof in proofs)
    wrong: dict[int, set[str]] = {}
    for tensor, place in final.items():
        tick(f"model: {tensor}")
        if tensor not in now or not same_bytes(now[tensor], place):
            wrong.setdefault(last.get(tensor, 0), set()).add(tensor)
    if missing := now.keys() - final.keys():
        wrong.setdefault(0, set()).update(missing)
    return tuple(_with_final(proof, wrong) for proof in proofs)


def _with_final(proof: RoundProof, wrong: dict[int, set[str]]) -> RoundProof:
    """A tensor that differs in the final model changed in some round after the last that may have written it."""
    frozen = set().union(*(names for number, names in wrong.items() if number < proof.number))
    faults = _named("frozen tensors differ in the final model", frozen)
    faults += _named("the final model does not hold what this round's delta holds", wrong.get(proof.number, set()))
    return replace(proof, faults=(*proof.faults, *faults))


def _entries(run: RunDir) -> list[Any]:
    ledger = read_json(run.draws)
    entries = ledger.get("rounds") if isinstance(ledger, dict) else None
    return entries if isinstance(entries, list) else []


def _reset_faults(
    held: dict[str, StoredTensor], params: tuple[Param, ...], config: RunConfig, tuned: dict[str, StoredTensor]
) -> list[str]:
    """A Half-Reset's delta must hold the base's tensors; further rows, if it has any, must be the tuned ones."""
    folder = model_folder(resolve_path(str(config.model.base)))
    theirs = {p.name: p.stored for p in parameters_from_folder(folder, config.model.kinds)}
    source = {at: there for p in params for at, there in zip(p.stored, theirs.get(p.name, ()), strict=False)}
    base = stored_tensors(folder)
    wrong = set()
    for name, info in held.items():
        if name not in source or name not in tuned:  # said already: the draw freezes it
            continue
        place = base[source[name]]
        if info.extends(place) and info.layout == tuned[name].layout:
            shared, rows = place.shape[0], info.shape[0]
            rest = tuned[name].rows(shared, rows)
            same = same_bytes(info.rows(0, shared), place) and same_bytes(info.rows(shared, rows), rest)
        else:
            same = same_bytes(info, place)
        if not same:
            wrong.add(name)
    return _named("its delta is not the base's for", wrong)


def _fits(one: StoredTensor | None, info: StoredTensor) -> bool:
    return one is not None and one.layout == info.layout


def _named(what: str, names: set[str]) -> list[str]:
    if not names:
        return []
    some = sorted(names)[:MOST_NAMES]
    more = f" and {len(names) - len(some)} more" if len(names) > len(some) else ""
    return [f"{what}: {', '.join(some)}{more}"]
