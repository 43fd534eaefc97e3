"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hft_cli.checkpoint.naming import KINDS
from hft_cli.method.units import Unit, group_units
from hft_cli.plan import costs
from hft_cli.plan.costs import PARTS
from hft_cli.plan.planner import ENGINES, Plan, trained
from hft_cli.text import format_bytes, format_count, format_ranges, markdown_table, plural


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
        line = [
            name,
            *(format_bytes(getattr(memory, part)) for part in parts),
            format_bytes(memory.total),
            format_bytes(worst),
        ]
        line += ["fits" if worst <= limit * 2**30 else "too much"] if limit else []
        ratio = found.flops.total / found.full_flops.total if found.full_flops.total else 0.0
        body.append(
            [*line, f"{ratio:.1%}", format_bytes(found.network.total), format_bytes(made.disk.total), _hours(made)]
        )
    return f"{markdown_table(heads, body)}\n\nBytes of one GPU; network: sent by one GPU in a step. {BOUND}"


BOUND = "In all: the parts, but of activations with buffers, and the optimizer's step, only the larger."


def _head(made: Plan) -> str:
    config, model = made.config, made.model
    whole = sum(p.elements for p in model.params)
    setup = made.rounds[0].setup
    lines = [
        f"model   {config.model.name}: {format_count(whole)} parameters in {len(model.params)} tensors, "
        f"{model.shape.layers} layers; shapes from {model.source}; stored as {model.dtype}",
    ]
    if made.fits:
        spread = (
            "one process" if setup.zero_stage is None else f"ZeRO-{setup.zero_stage} on {plural(setup.ranks, 'GPU')}"
        )
        lines += [
            f"engine  {spread}, {config.model.dtype}{' by autocast' * setup.autocast}, attention {setup.attention}",
            f"step    {config.train.batch_size:,} rows = {plural(setup.ranks, 'GPU')} x {plural(setup.rows, 'row')} "
            f"x {plural(setup.accumulation, 'micro batch', 'es')}; a row has {setup.length:,} tokens"
            + (f", {config.row_tokens:,} on average" if config.row_tokens and not config.train.packing else ""),
        ]
    return "\n".join(lines)


def _rounds(made: Plan) -> str:
    heads = ["round", "name", "stage", "tensors updated", "of the layers' matrices", "of all elements", "rows", "steps"]
    body = [
        [
            str(found.phase.round),
            found.phase.name,
            found.phase.stage,
            f"{len(found.draw.updated)} of {len(found.draw.updated) + len(found.draw.frozen)}",
            f"{found.draw.matrices_reached:.1%}",
            f"{found.draw.updated_fraction:.1%}",
            "" if found.rows is None else f"{found.rows:,}",
            "?" if found.steps is None else f"{found.steps:,}",
        ]
        for found in made.rounds
    ]
    lines = [markdown_table(heads, body)]
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
            own = [u for u in group_units(made.model.params) if u.kind == kind and (u.layer is not None) == inside]
            if not own:
                continue
            elements = sum(u.elements for u in own)
            ours = sum(params[name].elements for u in own for name in u.params if name in names)
            label = kind.replace("_", " ") + ("" if inside or kind != "norm" else " (final)")
            updated = sum(u.params[0] in names for u in own)
            share = f"{ours / elements:.1%}"
            body.append(
                [label, str(updated), str(len(own) - updated), format_count(ours), format_count(elements - ours), share]
            )
    heads = ["category", "matrices updated", "frozen", "elements updated", "frozen", "updated"]
    title = f"Round {made.rounds[0].phase.round}, {chosen.level}" + (
        f" {chosen.ratio:g}, draw of seed {chosen.seed}" if chosen.level not in ("all", "lora") else ""
    )
    return f"{title}\n\n{markdown_table(heads, body)}"


def _layers(made: Plan) -> str:
    """By layer, of the first round; layers with the same numbers stand in one line."""
    names = set(made.rounds[0].draw.updated)
    layers: dict[int, list[Unit]] = {}
    for unit in group_units(made.model.params):
        if unit.layer is not None:
            layers.setdefault(unit.layer, []).append(unit)
    used = [kind for kind in KINDS if any(unit.kind == kind for own in layers.values() for unit in own)]
    alike: dict[tuple[str, ...], list[int]] = {}
    for layer, own in layers.items():
        ours = [unit for unit in own if unit.params[0] in names]
        row = [f"{sum(u.kind == kind for u in ours)} of {sum(u.kind == kind for u in own)}" for kind in used]
        updated, whole = (sum(unit.elements for unit in group) for group in (ours, own))
        row += [format_count(updated), format_count(whole - updated), f"{updated / whole:.1%}"]
        alike.setdefault(tuple(row), []).append(layer)
    heads = ["layers", *(kind.replace("_", " ") for kind in used), "elements updated", "frozen", "updated"]
    return markdown_table(heads, [[format_ranges(own), *row] for row, own in alike.items()])


LABELS = {
    "optimizer": "AdamW's moments",
    "masters": "master weights",
    "reference": "DPO's reference",
    "step": "optimizer's step *",
}


def _memory(made: Plan) -> str:
    found = made.heaviest
    params, names = trained(made.config, made.model, found.draw.updated)
    columns = {"this draw": found.memory, "worst draw": found.worst, "FFT": found.full}
    if not made.draws:
        columns = {made.config.method.name: found.memory}
    body = [
        [LABELS.get(part, part), *(format_bytes(getattr(memory, part)) for memory in columns.values())]
        for part in PARTS
        if any(getattr(memory, part) for memory in columns.values())
    ]
    body.append(["in all", *(format_bytes(memory.total) for memory in columns.values())])
    on, off = "with activation checkpointing", "without activation checkpointing"
    other = replace(found.setup, checkpointing=not found.setup.checkpointing)
    shown = format_bytes(costs.activations(params, names, made.model.shape, other))
    lines = [
        f"Memory of each GPU, round {found.phase.number} {found.phase.name}, "
        f"{on if found.setup.checkpointing else off}",
        "",
        markdown_table(["part", *columns], body),
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
            f"In the host's memory, for each rank: {format_bytes(found.host)}; for the {found.setup.ranks} in all "
            f"{format_bytes(found.host * found.setup.ranks)}."
        )
    if made.config.continual.name == "lora":
        lines.append(
            f"Trained are adapters with {format_count(sum(p.elements for p in params if p.name in names))} elements."
        )
    return "\n".join(lines)


def _engines(made: Plan) -> str:
    limit = made.config.gpu_memory
    cells: dict[str, list[str]] = {}
    for fit in made.fits:
        word = "refused" if fit.bytes is None else format_bytes(fit.bytes)
        if fit.bytes is not None and limit is not None:
            word += ", fits" if fit.bytes <= limit * 2**30 else ", too much"
        cells.setdefault(fit.engine, []).append(word)
    body = [[name + ("" if ENGINES[name][0] else " (1 GPU)"), *own] for name, own in cells.items()]
    asked = "; gpu_memory=N (GiB) says what fits" if limit is None else f", against {limit:g} GiB"
    title = f"Engines on {plural(made.config.engine.ranks, 'GPU')}{', worst draw' * made.draws}{asked}"
    return f"{title}\n\n{markdown_table(['engine', 'in all', 'with checkpointing'], body)}"


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
        f"One step, round {found.phase.number} {found.phase.name}, over all GPUs",
        "",
        markdown_table(["PFLOP", "this draw", "FFT", "ratio"], body),
        "",
        "Network: nothing."
        if found.setup.shards == 1
        else f"Network: each GPU sends {format_bytes(sent.total)} a step ({format_bytes(sent.gradients)} of gradients, "
        f"{format_bytes(sent.weights)} of weights), and receives as much.",
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
    kept = (
        f"{format_bytes(disk.checkpoints)} of checkpoints" if disk.checkpoints else "no checkpoints (train.save_every)"
    )
    deltas, models = format_bytes(disk.deltas), format_bytes(disk.models)
    return f"Disk: {format_bytes(disk.total)}: {deltas} of deltas, {models} of models, {kept}."
