"""`hft plan`: what `hft train` would do under a configuration and what that costs, without weights or a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from hft_cli import costs
from hft_cli.continual import read_sources
from hft_cli.costs import PARTS, Disk, Flops, Memory, Network, Setup, Shape
from hft_cli.engines import deepspeed_settings
from hft_cli.layout import KINDS, Param, from_config, from_fields, from_folder
from hft_cli.methods import Source, Step, draws, settled, step_config, steps
from hft_cli.preferences import read_preferences
from hft_cli.schema import PACKAGE, PlanConfig, UserError, check, choose, locate
from hft_cli.selection import Draw, Unit, heaviest, units
from hft_cli.tables import grid
from hft_cli.weights import tensors

# What the engines are: their ZeRO stage, and whether the optimizer and the weights lie in the host's memory.
ENGINES: dict[str, tuple[int | None, bool, bool]] = {
    "single": (None, False, False),
    "zero1": (1, False, False),
    "zero2": (2, False, False),
    "zero2_offload": (2, True, False),
    "zero3": (3, False, False),
    "zero3_offload": (3, True, True),
}
ARCHITECTURES = PACKAGE / "architectures"  # config.json files of models whose weights do not ship
WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # bytes


@dataclass(frozen=True)
class Model:
    """What is known of a model without its weights.

    Attributes:
        config: its config.json.
        source: where its shapes were read.
        dtype: of its files, as far as they have one.
        stored: bytes of each parameter in the files.
    """

    config: Mapping[str, Any]
    source: str
    params: tuple[Param, ...]
    shape: Shape
    dtype: str
    stored: Mapping[str, int]


@dataclass(frozen=True)
class Round:
    """One step of the plan. `worst` is the memory under the heaviest draw, `full` that of full fine-tuning,
    `host` what offload takes of the host's.

    `steps` is None where neither the data nor rows=… says; `once` are the FLOPs that a round has before its first step.
    """

    step: Step
    draw: Draw
    setup: Setup
    rows: int | None
    steps: int | None
    memory: Memory
    worst: Memory
    full: Memory
    host: float
    flops: Flops
    full_flops: Flops
    once: float
    network: Network
    hours: float | None


@dataclass(frozen=True)
class Fit:
    """The most memory that a GPU needs under the worst draw, with an engine; None where the engine is refused."""

    engine: str
    checkpointing: bool
    bytes: float | None


@dataclass(frozen=True)
class Plan:
    config: PlanConfig
    model: Model
    rounds: tuple[Round, ...]
    worst_elements: int
    disk: Disk
    fits: tuple[Fit, ...]

    @property
    def draws(self) -> bool:
        """Whether there is anything to draw."""
        return self.config.selection.level != "all" and self.config.continual.name != "lora"

    @property
    def heaviest(self) -> Round:
        """The round that needs most memory."""
        return max(self.rounds, key=lambda found: found.worst.total)

    def expected(self) -> dict[str, Any]:
        """The costs for plan.json: bytes of one GPU (without one: of one rank) and of the disk, and FLOPs of a step."""
        return {
            "disk_bytes": {**asdict(self.disk), "total": self.disk.total},
            "rounds": [
                {
                    "name": found.step.name,
                    "steps": found.steps,
                    "memory_bytes": {**asdict(found.memory), "total": found.memory.total},
                    "memory_bytes_worst_draw": found.worst.total,
                    "memory_bytes_fft": found.full.total,
                    "host_memory_bytes": found.host,
                    "flops_of_a_step": found.flops.total,
                    "flops_of_a_step_fft": found.full_flops.total,
                    "network_bytes_of_a_step": found.network.total,
                }
                for found in self.rounds
            ],
        }


# --------------------------------------------------------------------------------------------------------- planning


def plan(config: PlanConfig, counted: Mapping[int, int] | None = None) -> Plan:
    """What the configuration would train, and what that costs. `counted` has the rows of steps that are known already.

    Raises:
        UserError: for a mistake that `hft train` would refuse too, a model whose shapes are not known here, or a number
            out of its range.
    """
    check(config)
    _check_own(config)
    model = _model(config)
    config = settled(config, dict(model.config), config.model.name)
    drawn = draws(config, model.params)
    planned = steps(config)
    trains = planned[0].stage != "half_reset"
    if trains and not drawn[0].updated:
        raise UserError("Nothing would be trained: selection.ratio=0 with embeddings, head and final_norm frozen.")
    rows = {step.number: _rows(step, config) for step in planned if trains} if counted is None else counted
    rounds = tuple(
        _round(config, model, step, chosen, rows.get(step.number)) for step, chosen in zip(planned, drawn, strict=True)
    )
    worst = _worst(config, model, drawn[0]) if trains else drawn[0].updated
    deltas = sum(model.stored[name] for chosen in drawn for name in chosen.updated) * config.method.save_model
    whole = sum(model.stored.values()) * config.method.save_model
    kept = 0.0
    if trains and (config.train.save_every or config.train.save_minutes):
        kept = max(
            costs.checkpoint(*_trained(config, model, chosen.updated), found.setup)
            for chosen, found in zip(drawn, rounds, strict=True)
        )
    return Plan(
        config=config,
        model=model,
        rounds=rounds,
        worst_elements=sum(p.elements for p in model.params if p.name in set(worst)),
        # The oldest checkpoint goes when the newest is whole, and the model of the round before when the next one is.
        disk=Disk(deltas, whole * min(len(rounds), 2), kept * (config.train.save_limit + 1)),
        fits=tuple(_fits(config, model, planned)) if trains else (),
    )


def _check_own(config: PlanConfig) -> None:
    """Refuse what `hft plan` cannot reckon with."""
    for key, value in (
        ("gpu_memory", config.gpu_memory),
        ("tflops", config.tflops),
        ("utilization", config.utilization),
        ("rows", config.rows),
        ("row_tokens", config.row_tokens),
    ):
        if value is not None and not value > 0:
            raise UserError(f"{key}={value} must be above 0.")
    if config.utilization > 1:
        raise UserError(f"utilization={config.utilization} is a share: it must be in (0, 1].")


def _model(config: PlanConfig) -> Model:
    """The model's shapes: of its folder if it is here, else of model.architecture, else of the hub's config.json.

    Raises:
        UserError: if none of them is there.
    """
    path, asked, kinds = config.model.path, config.model.architecture, config.model.kinds
    folder = Path(locate(path))
    if folder.is_dir() and list(folder.glob("*.safetensors")):
        read = _read(folder / "config.json")
        files = tensors(folder)
        params = from_folder(folder, kinds)
        infos = {p.name: [files[name][1] for name in p.stored] for p in params}
        dtypes = {info.dtype for own in infos.values() for info in own}
        named = "mixed dtypes" if len(dtypes) > 1 else dtypes.pop()
        stored = {name: sum(info.stop - info.start for info in own) for name, own in infos.items()}
        return Model(read, f"the files in {path}", params, costs.shape(_text(read), params), named, stored)
    if asked is None:
        file = folder / "config.json" if folder.is_dir() else _from_hub(path)
    elif Path(asked).suffix == ".json" or "/" in asked:
        file = Path(asked).expanduser()
    else:
        choose("model.architecture", asked, sorted(path.stem for path in ARCHITECTURES.glob("*.json")))
        file = ARCHITECTURES / f"{asked}.json"
    read = _read(file)
    found = from_fields(read, kinds)
    params = from_config(file, kinds) if found is None else found
    dtype = str(read.get("dtype") or read.get("torch_dtype") or config.model.dtype)
    stored = {p.name: p.elements * WIDTHS.get(dtype, 4) for p in params}
    return Model(read, f"{file.name} (no weights)", params, costs.shape(_text(read), params), dtype, stored)


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {file}: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} does not hold a JSON object.")
    return value


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that is the text model's."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _from_hub(path: str) -> Path:
    """config.json of a hub repository, from the cache or fetched; a few hundred bytes."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise OSError("there is no such folder")
        return Path(hf_hub_download(path, "config.json"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        shipped = ", ".join(sorted(file.stem for file in ARCHITECTURES.glob("*.json")))
        raise UserError(
            f"The shapes of model.path={path} are not known here ({reason.rstrip('.')}). Give its config.json, "
            f"model.architecture=FILE, or one that ships: model={shipped.replace(', ', '|')}."
        ) from None


def _setup(config: PlanConfig, step: Step, width: int) -> Setup:
    """How a step trains. `config` is the step's own, `width` the model's hidden size."""
    train, engine = config.train, config.engine
    # What transformers takes where nothing is asked for.
    attention = config.model.attention or "sdpa"
    zero = deepspeed_settings(config).get("zero_optimization", {})
    return Setup(
        zero_stage=engine.zero_stage,
        ranks=engine.ranks,
        dtype=config.model.dtype,
        rows=train.micro_batch_size,
        length=int(train.max_length or 0),
        accumulation=train.batch_size // (train.micro_batch_size * engine.ranks),
        attention=attention,
        checkpointing=train.gradient_checkpointing,
        stage=step.stage,
        reference=config.dpo.reference,
        tasks=len(step.memories),
        memory_rows=config.continual.gem_memory,
        offload_optimizer=engine.offload_optimizer,
        offload_parameters=engine.offload_parameters,
        bucket=_elements(zero, "reduce_bucket_size", costs.BUCKET, width**2),
        live=_elements(zero, "stage3_max_live_parameters", costs.LIVE, costs.LIVE),
        sub_group=_elements(zero, "sub_group_size", costs.SUB_GROUP, costs.SUB_GROUP),
        persistent=_elements(zero, "stage3_param_persistence_threshold", costs.PERSISTENT, 10 * width),
    )


def _elements(zero: Mapping[str, Any], key: str, default: int, auto: int) -> int:
    """A setting of DeepSpeed's; for "auto" transformers takes the hidden size times ten, or squared."""
    value = zero.get(key, default)
    return auto if value == "auto" else int(value)


def _trained(config: PlanConfig, model: Model, updated: Iterable[str]) -> tuple[tuple[Param, ...], frozenset[str]]:
    """All parameters in memory, and the names of those that are trained: of LoRA the adapters."""
    names = frozenset(updated)
    if config.continual.name != "lora":
        return model.params, names
    added = costs.adapters(model.params, names, config.continual.lora_rank)
    return model.params + added, frozenset(p.name for p in added)


def _worst(config: PlanConfig, model: Model, chosen: Draw) -> tuple[str, ...]:
    """Names of the heaviest draw; LoRA has one only."""
    return chosen.updated if config.continual.name == "lora" else heaviest(model.params, config.selection)


def _worst_memory(config: PlanConfig, model: Model, chosen: Draw, setup: Setup) -> Memory:
    """Part by part at least what any draw needs: most elements, and all inputs of matrices saved."""
    params, names = _trained(config, model, _worst(config, model, chosen))
    most = costs.memory(params, names, model.shape, setup)
    # Which inputs are saved hangs on more than the number of elements, so all that are trained in some draw count.
    every = names if config.continual.name == "lora" else frozenset(p.name for p in params)
    bound = replace(most, activations=costs.activations(params, every, model.shape, setup))
    return bound.at_least(costs.memory(*_trained(config, model, chosen.updated), model.shape, setup))


def _round(config: PlanConfig, model: Model, step: Step, chosen: Draw, rows: int | None) -> Round:
    own: PlanConfig = step_config(config, step)
    setup = _setup(own, step, model.shape.hidden)
    params, names = _trained(config, model, chosen.updated)
    everything = frozenset(p.name for p in model.params)
    if step.stage == "half_reset":
        none = Memory()
        return Round(
            step, chosen, setup, rows, 0, none, none, none, 0, Flops(0, 0, 0), Flops(0, 0, 0), 0, Network(), None
        )
    tokens = setup.length if own.train.packing else min(config.row_tokens or setup.length, setup.length)
    needed = costs.flops(params, names, model.shape, setup, own.train.batch_size, tokens)
    count = _steps(own, rows, config.row_tokens)
    once = 0.0
    if step.stage == "dpo" and config.dpo.reference == "precomputed" and rows is not None:
        once = costs.flops(params, names, model.shape, setup, rows, tokens).forward
    time = None
    if config.tflops is not None and count is not None:
        time = costs.hours(needed.total * count + once, setup.ranks, config.tflops, config.utilization)
    return Round(
        step=step,
        draw=chosen,
        setup=setup,
        rows=rows,
        steps=count,
        memory=costs.memory(params, names, model.shape, setup),
        worst=_worst_memory(config, model, chosen, setup),
        full=costs.memory(model.params, everything, model.shape, setup),
        host=costs.host(params, names, setup),
        flops=needed,
        full_flops=costs.flops(model.params, everything, model.shape, setup, own.train.batch_size, tokens),
        once=once,
        network=costs.network(params, names, model.shape, setup),
        hours=time,
    )


def _rows(step: Step, config: PlanConfig) -> int | None:
    """Rows that a step trains on: counted where the data are here, else from rows=…; None if neither says."""
    total = 0
    for source in step.sources:
        here = Path(locate(source.path)).exists()
        if here and step.stage == "dpo":
            read = read_preferences(
                locate(source.path), split=source.split, max_rows=config.data.max_rows, ties=config.dpo.ties
            )
            total += len(read.rows)
        elif here:
            total += len(read_sources([source], config.data, config.seed))
        elif config.rows is None or source.general:
            return None
        else:
            total += _share(source, min(config.rows, config.data.max_rows or config.rows))
    return total


def _share(source: Source, rows: int) -> int:
    """As read_sources takes them."""
    return min(max(round(source.share * rows) if source.rows is None else source.rows, 1), rows)


def _steps(config: PlanConfig, rows: int | None, row_tokens: int | None) -> int | None:
    """Optimizer steps of a round, as the trainer counts them. Packed rows are taken as full unless row_tokens says."""
    train = config.train
    if train.max_steps:
        return train.max_steps
    if rows is None:
        return None
    if train.packing and row_tokens and train.max_length:
        rows = ceil(rows * min(row_tokens, train.max_length) / train.max_length)
    processes = config.engine.ranks
    batches = ceil(rows / (train.micro_batch_size * processes))
    a_pass = max(ceil(batches * train.micro_batch_size * processes / train.batch_size), 1)
    return ceil(float(train.epochs) * a_pass)


def _fits(config: PlanConfig, model: Model, planned: Sequence[Step]) -> Iterable[Fit]:
    """What each engine needs, with and without checkpointing, in the heaviest round under the worst draw."""
    drawn = draws(config, model.params)
    for name, (stage, optimizer, parameters) in ENGINES.items():
        engine = replace(
            config.engine,
            name=name,
            zero_stage=stage,
            offload_optimizer=optimizer,
            offload_parameters=parameters,
            deepspeed=None,
        )
        engine = replace(engine, num_processes=1, num_nodes=1, node_rank=None) if stage is None else engine
        for checkpointing in (False, True):
            train = replace(config.train, gradient_checkpointing=checkpointing)
            other = replace(config, engine=engine, train=train)
            try:
                check(other)
            except UserError:
                yield Fit(name, checkpointing, None)
                continue
            setups = [_setup(step_config(other, step), step, model.shape.hidden) for step in planned]
            found = [
                _worst_memory(other, model, chosen, setup).total for chosen, setup in zip(drawn, setups, strict=True)
            ]
            yield Fit(name, checkpointing, max(found))


# ---------------------------------------------------------------------------------------------------------- printing


def text(made: Plan) -> str:
    """The plan as sections of text and tables."""
    parts = [_head(made), _rounds(made), _categories(made), _layers(made)]
    if made.fits:
        parts += [_memory(made), _engines(made), _work(made)]
    return "\n\n".join([*parts, _disk(made)])


def comparison(plans: Sequence[tuple[str, Plan]]) -> str:
    """Plans side by side, each under what was swept: of the round that needs most memory, and the whole run's disk."""
    limit = plans[0][1].config.gpu_memory
    rounds = [(name, made, made.heaviest) for name, made in plans]
    parts = [part for part in PARTS if any(getattr(found.worst, part) for _, _, found in rounds)]
    heads = ["plan", *parts, "in all", "worst draw", *([f"{limit:g} GiB"] if limit else [])]
    heads += ["FLOPs / FFT", "network", "disk", "hours"]
    body = []
    for name, made, found in rounds:
        memory, worst = found.memory, found.worst.total
        line = [name, *(size(getattr(memory, part)) for part in parts), size(memory.total), size(worst)]
        line += ["fits" if worst <= limit * 2**30 else "too much"] if limit else []
        ratio = found.flops.total / found.full_flops.total if found.full_flops.total else 0.0
        body.append([*line, f"{ratio:.1%}", size(found.network.total), size(made.disk.total), _hours(made)])
    return f"{grid(heads, body)}\n\nBytes of one GPU; network: sent by one GPU in a step. {BOUND}"


BOUND = "In all: the parts, but of activations with buffers, and the optimizer's step, only the larger."


def _head(made: Plan) -> str:
    config, model = made.config, made.model
    whole = sum(p.elements for p in model.params)
    setup = made.rounds[0].setup
    lines = [
        f"model   {config.model.name}: {count(whole)} parameters in {len(model.params)} tensors, {model.shape.layers} "
        f"layers; shapes from {model.source}; stored as {model.dtype}",
    ]
    if made.fits:
        spread = (
            "one process" if setup.zero_stage is None else f"ZeRO-{setup.zero_stage} on {several(setup.ranks, 'GPU')}"
        )
        lines += [
            f"engine  {spread}, {config.model.dtype}{' by autocast' * setup.autocast}, attention {setup.attention}",
            f"step    {config.train.batch_size:,} rows = {several(setup.ranks, 'GPU')} x {several(setup.rows, 'row')} "
            f"x {several(setup.accumulation, 'micro batch', 'es')}; a row has {setup.length:,} tokens"
            + (f", {config.row_tokens:,} on average" if config.row_tokens and not config.train.packing else ""),
        ]
    return "\n".join(lines)


def _rounds(made: Plan) -> str:
    heads = ["round", "name", "stage", "tensors updated", "of the layers' matrices", "of all elements", "rows", "steps"]
    body = [
        [
            str(found.step.round),
            found.step.name,
            found.step.stage,
            f"{len(found.draw.updated)} of {len(found.draw.updated) + len(found.draw.frozen)}",
            f"{found.draw.matrices_reached:.1%}",
            f"{found.draw.updated_fraction:.1%}",
            "" if found.rows is None else f"{found.rows:,}",
            "?" if found.steps is None else f"{found.steps:,}",
        ]
        for found in made.rounds
    ]
    lines = [grid(heads, body)]
    if made.fits and any(found.steps is None for found in made.rounds):
        lines.append("steps ?: the data are not on this machine; rows=N or train.max_steps=N says.")
    return "\n\n".join(lines)


def _categories(made: Plan) -> str:
    """By category, of the first round."""
    chosen = made.rounds[0].draw
    names, params = set(chosen.updated), {p.name: p for p in made.model.params}
    body = []
    for kind in KINDS:
        for inside in (True, False):
            own = [u for u in units(made.model.params) if u.kind == kind and (u.layer is not None) == inside]
            if not own:
                continue
            elements = sum(u.elements for u in own)
            ours = sum(params[name].elements for u in own for name in u.params if name in names)
            label = kind.replace("_", " ") + ("" if inside or kind != "norm" else " (final)")
            updated = sum(u.params[0] in names for u in own)
            share = f"{ours / elements:.1%}"
            body.append([label, str(updated), str(len(own) - updated), count(ours), count(elements - ours), share])
    heads = ["category", "matrices updated", "frozen", "elements updated", "frozen", "updated"]
    title = f"Round {made.rounds[0].step.round}, {chosen.level}" + (
        f" {chosen.ratio:g}, draw of seed {chosen.seed}" if chosen.level not in ("all", "lora") else ""
    )
    return f"{title}\n\n{grid(heads, body)}"


def _layers(made: Plan) -> str:
    """By layer, of the first round; layers with the same numbers stand in one line."""
    names = set(made.rounds[0].draw.updated)
    layers: dict[int, list[Unit]] = {}
    for unit in units(made.model.params):
        if unit.layer is not None:
            layers.setdefault(unit.layer, []).append(unit)
    used = [kind for kind in KINDS if any(unit.kind == kind for own in layers.values() for unit in own)]
    alike: dict[tuple[str, ...], list[int]] = {}
    for layer, own in layers.items():
        ours = [unit for unit in own if unit.params[0] in names]
        row = [f"{sum(u.kind == kind for u in ours)} of {sum(u.kind == kind for u in own)}" for kind in used]
        updated, whole = (sum(unit.elements for unit in group) for group in (ours, own))
        row += [count(updated), count(whole - updated), f"{updated / whole:.1%}"]
        alike.setdefault(tuple(row), []).append(layer)
    heads = ["layers", *(kind.replace("_", " ") for kind in used), "elements updated", "frozen", "updated"]
    return grid(heads, [[spans(own), *row] for row, own in alike.items()])


LABELS = {
    "optimizer": "AdamW's moments",
    "masters": "master weights",
    "reference": "DPO's reference",
    "step": "optimizer's step *",
}


def _memory(made: Plan) -> str:
    found = made.heaviest
    params, names = _trained(made.config, made.model, found.draw.updated)
    columns = {"this draw": found.memory, "worst draw": found.worst, "FFT": found.full}
    if not made.draws:
        columns = {made.config.method.name: found.memory}
    body = [
        [LABELS.get(part, part), *(size(getattr(memory, part)) for memory in columns.values())]
        for part in PARTS
        if any(getattr(memory, part) for memory in columns.values())
    ]
    body.append(["in all", *(size(memory.total) for memory in columns.values())])
    on, off = "with activation checkpointing", "without activation checkpointing"
    other = replace(found.setup, checkpointing=not found.setup.checkpointing)
    shown = size(costs.activations(params, names, made.model.shape, other))
    lines = [
        f"Memory of each GPU, round {found.step.number} {found.step.name}, {on if found.setup.checkpointing else off}",
        "",
        grid(["part", *columns], body),
        "",
        f"Activations {on if other.checkpointing else off}: {shown}. Not counted: CUDA's context, fragmentation.",
    ]
    if any(memory.step for memory in columns.values()):
        lines.append("* held when activations and buffers are not: the larger of the two is what counts.")
    if made.draws:
        worst = made.worst_elements / sum(p.elements for p in made.model.params)
        lines.append(f"The worst draw updates {worst:.1%} of all elements.")
    if found.host:
        lines.append(
            f"In the host's memory, for each rank: {size(found.host)}; for the {found.setup.ranks} in all "
            f"{size(found.host * found.setup.ranks)}."
        )
    if made.config.continual.name == "lora":
        lines.append(f"Trained are adapters with {count(sum(p.elements for p in params if p.name in names))} elements.")
    return "\n".join(lines)


def _engines(made: Plan) -> str:
    limit = made.config.gpu_memory
    cells: dict[str, list[str]] = {}
    for fit in made.fits:
        word = "refused" if fit.bytes is None else size(fit.bytes)
        if fit.bytes is not None and limit is not None:
            word += ", fits" if fit.bytes <= limit * 2**30 else ", too much"
        cells.setdefault(fit.engine, []).append(word)
    body = [[name + ("" if ENGINES[name][0] else " (1 GPU)"), *own] for name, own in cells.items()]
    asked = "; gpu_memory=N (GiB) says what fits" if limit is None else f", against {limit:g} GiB"
    title = f"Engines on {several(made.config.engine.ranks, 'GPU')}{', worst draw' * made.draws}{asked}"
    return f"{title}\n\n{grid(['engine', 'in all', 'with checkpointing'], body)}"


def _work(made: Plan) -> str:
    """FLOPs, network and hours."""
    found, config = made.heaviest, made.config
    rows = [
        ("forward", found.flops.forward, found.full_flops.forward),
        ("backward, for inputs", found.flops.inputs, found.full_flops.inputs),
        ("backward, for weights", found.flops.weights, found.full_flops.weights),
        ("recomputed", found.flops.recompute, found.full_flops.recompute),
        ("DPO's reference", found.flops.reference, found.full_flops.reference),
        ("GEM's memories", found.flops.memories, found.full_flops.memories),
        ("in all", found.flops.total, found.full_flops.total),
    ]
    body = [
        [name, f"{own / 1e15:,.4g}", f"{full / 1e15:,.4g}", f"{own / full:.1%}" if full else ""]
        for name, own, full in rows
        if own or full
    ]
    sent = found.network
    lines = [
        f"One step, round {found.step.number} {found.step.name}, over all GPUs",
        "",
        grid(["PFLOP", "this draw", "FFT", "ratio"], body),
        "",
        "Network: nothing."
        if found.setup.shards == 1
        else f"Network: each GPU sends {size(sent.total)} a step ({size(sent.gradients)} of gradients, "
        f"{size(sent.weights)} of weights), and receives as much.",
    ]
    if config.tflops is None:
        lines.append("Hours: tflops=N states the peak rate of a GPU.")
    else:
        rate = f"{config.tflops:g} TFLOP/s a GPU and an assumed utilization of {config.utilization:.0%}"
        lines.append(f"Hours of training: {_hours(made)} at {rate}; waiting for the network is not in it.")
    return "\n".join(lines)


def _hours(made: Plan) -> str:
    known = [found.hours for found in made.rounds if found.hours is not None]
    if made.config.tflops is None or len(known) < len(made.rounds):
        return "?"
    return f"{sum(known):,.1f}" if sum(known) >= 0.1 else f"{sum(known):.2g}"


def _disk(made: Plan) -> str:
    disk = made.disk
    kept = f"{size(disk.checkpoints)} of checkpoints" if disk.checkpoints else "no checkpoints (train.save_every)"
    return f"Disk: {size(disk.total)}: {size(disk.deltas)} of deltas, {size(disk.models)} of models, {kept}."


def size(value: float) -> str:
    """Bytes for people, in powers of 1,024."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" or value >= 100 else f"{value:,.1f} {unit}"


def several(number: int, what: str, ending: str = "s") -> str:
    """1 GPU, 64 GPUs."""
    return f"{number:,} {what}{ending * (number != 1)}"


def count(elements: float) -> str:
    """Elements for people: 68.98B, 0.54M, 4,096."""
    for width, unit in ((1e9, "B"), (1e6, "M")):
        if elements >= width / 10:
            return f"{elements / width:,.2f}{unit}"
    return f"{elements:,.0f}"


def spans(numbers: Sequence[int]) -> str:
    """Numbers as ranges: 0-3, 7, 9-11."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
