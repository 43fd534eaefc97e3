"""Prove from a run's files that each round changed the tensors of its draw and no others. No torch.

The final model must equal, tensor by tensor and bit by bit, the base with the deltas of all phases applied in order.
Each delta must hold exactly the tensors that its draw updates, and each draw must follow from its seed. The model is
laid together from the base and the deltas, so this says nothing about memory during training: for that, the hashes of
the frozen weights in memory, which the training processes wrote after the last step, must be those of the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.digests import tensor_sha256
from hft_cli.checkpoint.folders import stored_tensors, weights_hash
from hft_cli.checkpoint.interpolation import StoredModel, is_blend
from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.checkpoint.tensors import THREADS, StoredTensor, read_header, same_each
from hft_cli.config.schema import RunConfig, read_config
from hft_cli.errors import UserError
from hft_cli.files import read_json, read_record
from hft_cli.method.rounds import Phase, draws, phases
from hft_cli.method.selection import Draw
from hft_cli.run_dir import FrozenRecord, RunDir
from hft_cli.runner.base import find_base
from hft_cli.runner.importance import read_importance
from hft_cli.runner.prepare import blended_tensors
from hft_cli.text import first_of


@dataclass(frozen=True)
class RoundProof:
    """What the files say of one phase. It is proven if `faults` is empty.

    `number` counts phases, `round` draws. `updated` and `frozen` count parameters. `in_memory` counts frozen tensors
    whose hashes in memory are those of the files; None if the phase was not trained, or by a version that wrote none.
    `unmoved` names tensors that were updated but have the same bits as before.
    """

    number: int
    round: int
    name: str
    updated: int
    frozen: int
    in_memory: int | None
    unmoved: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def frozen_bit_identical(self) -> bool:
        return not self.faults


def verify(
    run: RunDir,
    model: Path | None = None,
    base: str | Path | None = None,
    tick: Callable[[str], None] = lambda name: None,
    hash_of: Callable[[Path], str] = weights_hash,
) -> tuple[RoundProof, ...]:
    """Check every phase of a run.

    Args:
        model: folder of the final model; None takes RUN/model.
        base: where the model that the run started from is now; None takes what the run recorded.
        tick: called with the name of each tensor that is read.
        hash_of: returns the hash of a folder's weights, by which the base is recognized.

    Raises:
        UserError: if the run wrote no model, or its base is missing.
    """
    config = read_config(run)
    if not config.method.save_model:
        raise UserError(f"{run.folder} wrote no model (method.save_model=false): there is nothing to verify.")
    folder = find_base(run, base, hash_of)
    params = parameters_from_folder(folder, config.model.kinds, config.model.part)
    replay = _Replay(run, config, folder, params, stored_tensors(folder), tick)
    plan = phases(config)
    ledger = _ledger(run, len(plan))
    importance = read_importance(run).scores if config.selection.level == "importance" else None
    drawn = draws(config, params, importance)
    proofs = [replay.prove(phase, draw, entry) for phase, draw, entry in zip(plan, drawn, ledger, strict=True)]
    try:
        differing = replay.compare(stored_tensors(model or run.model))
    except UserError as error:
        return tuple(replace(proof, faults=(*proof.faults, str(error))) for proof in proofs)
    return tuple(_add_final_faults(proof, differing) for proof in proofs)


@dataclass
class _Replay:
    """The model as the base and the deltas give it, phase by phase.

    `start` is the folder of the model that the run started from. `tensors` are those of the base at first, and after
    each phase those of its model. `writer` has the number of the last phase that wrote a tensor.
    """

    run: RunDir
    config: RunConfig
    start: Path
    params: Sequence[Param]
    tensors: dict[str, StoredTensor]
    tick: Callable[[str], None]
    writer: dict[str, int] = field(default_factory=dict)
    hashes: dict[tuple[StoredTensor, str], str] = field(default_factory=dict)

    def prove(self, phase: Phase, draw: Draw, entry: Any) -> RoundProof:
        """Check a phase against its draw and its `entry` in the ledger, and apply its delta."""
        faults = []
        # Through JSON, where tuples are lists: the ledger must be what the seed and the selection give, word for word.
        if entry != json.loads(json.dumps({"name": phase.name, **draw.as_dict()})):
            faults.append("draws.json is not what its seed and selection give")
        delta: dict[str, StoredTensor] = {}
        try:
            delta = read_header(self.run.round(phase.number, phase.name).delta)
        except UserError as error:
            faults.append(str(error))
        faults += self._delta_faults(phase, draw, delta)
        in_memory, differing = self._compare_memory(phase, draw)
        faults += differing
        return RoundProof(
            number=phase.number,
            round=phase.round,
            name=phase.name,
            updated=len(draw.updated),
            frozen=len(draw.frozen),
            in_memory=in_memory,
            unmoved=self._apply(phase, delta),
            faults=tuple(faults),
        )

    def _compare_memory(self, phase: Phase, draw: Draw) -> tuple[int | None, list[str]]:
        """Compare frozen tensors before the phase with their hashes in memory after it: how many agree, and faults."""
        folder = self.run.round(phase.number, phase.name)
        expected = read_json(folder.outcome).get("frozen_sha256") if folder.outcome.exists() else None
        if expected is None:
            return None, []
        try:
            recorded = read_record(folder.frozen, FrozenRecord)["tensors"]
        except UserError as error:
            return None, [str(error)]
        if hashlib.sha256(folder.frozen.read_bytes()).hexdigest() != expected:
            return None, [f"{folder.frozen.name} is not what the training process wrote"]
        stored = {param.name: param.stored for param in self.params}
        frozen = {tensor for name in draw.frozen for tensor in stored[name] if tensor in self.tensors}
        different = {name for name in frozen & recorded.keys() if self._differs(phase, name, recorded[name])}
        faults = _fault("memory during training has no hash of frozen tensors", frozen - recorded.keys())
        faults += _fault("frozen tensors differed in memory after the last step", different)
        return len(frozen & recorded.keys()) - len(different), faults

    def _differs(self, phase: Phase, name: str, entry: Mapping[str, str]) -> bool:
        self.tick(f"round {phase.number}, memory: {name}")
        key = (self.tensors[name], entry["dtype"])
        if key not in self.hashes:  # a tensor may be frozen in several phases
            self.hashes[key] = tensor_sha256(*key)
        return self.hashes[key] != entry["sha256"]

    def _delta_faults(self, phase: Phase, draw: Draw, delta: Mapping[str, StoredTensor]) -> list[str]:
        stored = {param.name: param.stored for param in self.params}
        drawn = {tensor for name in draw.updated for tensor in stored[name]}
        faults = _fault("the delta holds tensors that the draw freezes", delta.keys() - drawn)
        faults += _fault("the delta lacks tensors that the draw updates", drawn - delta.keys())
        if not phase.trains:
            return faults + self._blend_faults(draw, delta)
        misfits = {name for name, tensor in delta.items() if not self._fits(name, tensor)}
        return faults + _fault("the delta has another dtype or shape than the model for", misfits)

    def _blend_faults(self, draw: Draw, delta: Mapping[str, StoredTensor]) -> list[str]:
        """Check that the delta of a phase without training is what the model before it and the base give."""
        tuned = StoredModel(self.start, self.params, self.tensors)
        expected = blended_tensors(self.config, draw, tuned, self.start)
        names = [name for name in delta if name in expected]
        with ThreadPoolExecutor(THREADS) as pool:
            same = list(pool.map(lambda name: is_blend(delta[name], expected[name]), names))
        different = (name for name, fits in zip(names, same, strict=True) if not fits)
        return _fault("the delta differs from what the base gives in", different)

    def _fits(self, name: str, tensor: StoredTensor) -> bool:
        return name in self.tensors and self.tensors[name].layout == tensor.layout

    def _apply(self, phase: Phase, delta: Mapping[str, StoredTensor]) -> tuple[str, ...]:
        """Apply a delta; returns the tensors that it does not change."""
        unmoved = []
        pairs = {name: (self.tensors[name], tensor) for name, tensor in delta.items() if name in self.tensors}
        for name, same in zip(pairs, same_each(pairs.values()), strict=True):
            self.tick(f"round {phase.number}: {name}")
            if same:
                unmoved.append(name)
        self.tensors |= delta
        self.writer |= dict.fromkeys(delta, phase.number)
        return tuple(unmoved)

    def compare(self, model: Mapping[str, StoredTensor]) -> dict[int, set[str]]:
        """Tensors in which `model` differs, by the number of the last phase that wrote them (0: no phase did)."""
        differing: dict[int, set[str]] = {}
        for name in model.keys() - self.tensors.keys():
            differing.setdefault(self.writer.get(name, 0), set()).add(name)
        pairs = {name: (self.tensors[name], tensor) for name, tensor in model.items() if name in self.tensors}
        for name, same in zip(pairs, same_each(pairs.values()), strict=True):
            self.tick(f"model: {name}")
            if not same:
                differing.setdefault(self.writer.get(name, 0), set()).add(name)
        if missing := self.tensors.keys() - model.keys():
            differing.setdefault(0, set()).update(missing)
        return differing


def _add_final_faults(proof: RoundProof, differing: Mapping[int, set[str]]) -> RoundProof:
    """Add the faults of the final model: a tensor that differs changed in a phase after the last that wrote it."""
    frozen = set().union(*(names for number, names in differing.items() if number < proof.number))
    faults = _fault("frozen tensors differ in the final model", frozen)
    faults += _fault("the final model differs from this round's delta in", differing.get(proof.number, set()))
    return replace(proof, faults=(*proof.faults, *faults))


def _ledger(run: RunDir, count: int) -> list[Any]:
    """The entries of draws.json; None for each phase if they cannot be read or there are not `count` of them."""
    try:
        entries = read_json(run.draws).get("rounds")
    except UserError:
        entries = None
    return entries if isinstance(entries, list) and len(entries) == count else [None] * count


def _fault(what: str, names: Iterable[str]) -> list[str]:
    """One fault that names the first few tensors; none without names."""
    ordered = sorted(names)
    return [f"{what}: {first_of(ordered)}"] if ordered else []
