"""A plan as text and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hft_cli.checkpoint.naming import KINDS
from hft_cli.method.selection import UNDRAWN
from hft_cli.method.units import Unit, count_elements, group_units
from hft_cli.plan.memory import PARTS, activations
from hft_cli.plan.planner import Plan, slow_packing, workload
from hft_cli.text import format_bytes, format_count, format_ranges, markdown_table, plural

LABELS = {
    "optimizer": "optimizer state",
    "masters": "master weights",
    "reference": "reference",
    "step": "optimizer step",
}


def plan_text(plan: Plan) -> str:
    """The plan as sections of text and tables."""
    sections = [_head(plan), _rounds(plan), _categories(plan), _layers(plan)]
    if plan.fits:
        sections += [_memory(plan), _engines(plan), _work(plan)]
    return "\n\n".join([*sections, _disk(plan)])


def comparison_text(plans: Sequence[tuple[str, Plan]]) -> str:
    """One table of several plans: the phase that needs most memory, and the disk space of the whole run."""
    limit = plans[0][1].config.gpu_memory
    rows = [(name, plan, plan.heaviest) for name, plan in plans]
    parts = [part for part in PARTS if any(getattr(phase.worst, part) for _, _, phase in rows)]
    heads = ["plan", *parts, "total", "worst draw", *([f"{limit:g} GiB"] if limit else [])]
    heads += ["FLOPs / FFT", "network", "disk", "hours"]
    body = []
    for name, plan, phase in rows:
        sizes = [getattr(phase.memory, part) for part in parts]
        cells = [name, *map(format_bytes, [*sizes, phase.memory.total, phase.worst.total])]
        cells += [_fits(phase.worst.total, limit)] if limit else []
        ratio = phase.flops.total / phase.full_flops.total if phase.full_flops.total else 0.0
        cells += [f"{ratio:.1%}", format_bytes(phase.network.total), format_bytes(plan.disk.total), _hours(plan)]
        body.append(cells)
    return (
        f"{markdown_table(heads, body)}\n\nMemory: bytes on one GPU; the total is the peak, at which not all parts "
        "exist. Network: bytes that one GPU sends in a step."
    )


def _fits(size: float, limit: float) -> str:
    return "fits" if size <= limit * 2**30 else "too much"


def _head(plan: Plan) -> str:
    config, model, setup = plan.config, plan.model, plan.rounds[0].setup
    lines = [
        f"model   {config.model.name}: {format_count(sum(p.elements for p in model.params))} parameters in "
        f"{len(model.params)} tensors, {model.shape.layers} layers; shapes from {model.source}; dtype {model.dtype}",
    ]
    if plan.fits:
        gpus = plural(setup.ranks, "GPU")
        engine = "one process" if setup.zero_stage is None else f"ZeRO-{setup.zero_stage} on {gpus}"
        mean = f", {config.row_tokens:,} on average" if config.row_tokens and not config.train.packing else ""
        lines += [
            f"engine  {engine}, {config.model.dtype}{' by autocast' * setup.autocast}, attention {setup.attention}",
            f"step    {config.train.batch_size:,} rows = {gpus} x {plural(setup.rows, 'row')} x "
            f"{plural(setup.accumulation, 'micro batch', 'es')}; a row has {setup.length:,} tokens{mean}",
        ]
        if hint := slow_packing(config):
            lines.append(f"note    {hint}")
    return "\n".join(lines)


def _rounds(plan: Plan) -> str:
    heads = ["round", "name", "stage", "tensors updated", "of the layers' matrices", "of all elements", "rows", "steps"]
    body = [
        [
            str(planned.phase.round),
            planned.phase.name,
            planned.phase.stage,
            f"{len(planned.draw.updated)} of {len(planned.draw.updated) + len(planned.draw.frozen)}",
            f"{planned.draw.matrices_reached:.1%}",
            f"{planned.draw.updated_fraction:.1%}",
            "" if planned.rows is None else f"{planned.rows:,}",
            "?" if planned.steps is None else f"{planned.steps:,}",
        ]
        for planned in plan.rounds
    ]
    lines = [markdown_table(heads, body)]
    if plan.fits and any(planned.steps is None for planned in plan.rounds):
        lines.append("steps ?: the data are not on this machine. Give rows=N or train.max_steps=N.")
    return "\n\n".join(lines)


def _categories(plan: Plan) -> str:
    """What the first round updates, by category."""
    draw = plan.rounds[0].draw
    names, sizes = set(draw.updated), {p.name: p.elements for p in plan.model.params}
    groups: dict[tuple[int, bool], list[Unit]] = {}
    for unit in group_units(plan.model.params):
        groups.setdefault((KINDS.index(unit.kind), unit.layer is None), []).append(unit)
    body = []
    for (kind, outside), units in sorted(groups.items()):
        total = count_elements(units)
        elements = sum(sizes[name] for unit in units for name in unit.params if name in names)
        updated = sum(unit.params[0] in names for unit in units)
        label = KINDS[kind].replace("_", " ") + " (final)" * (outside and KINDS[kind] == "norm")
        counts = [str(updated), str(len(units) - updated), format_count(elements), format_count(total - elements)]
        body.append([label, *counts, f"{elements / total:.1%}"])
    heads = ["category", "matrices updated", "frozen", "elements updated", "frozen", "updated"]
    title = f"Round {plan.rounds[0].phase.round}, {draw.level}"
    if draw.level not in (*UNDRAWN, "lora", "importance"):
        title += f" {draw.ratio:g}, draw of seed {draw.seed}"
    return f"{title}\n\n{markdown_table(heads, body)}"


def _layers(plan: Plan) -> str:
    """What the first round updates, by layer; layers with the same numbers share a line."""
    names = set(plan.rounds[0].draw.updated)
    layers: dict[int, list[Unit]] = {}
    for unit in group_units(plan.model.params):
        if unit.layer is not None:
            layers.setdefault(unit.layer, []).append(unit)
    kinds = [kind for kind in KINDS if any(unit.kind == kind for units in layers.values() for unit in units)]
    lines: dict[tuple[str, ...], list[int]] = {}
    for layer, units in layers.items():
        updated = [unit for unit in units if unit.params[0] in names]
        cells = [f"{sum(u.kind == kind for u in updated)} of {sum(u.kind == kind for u in units)}" for kind in kinds]
        elements, total = count_elements(updated), count_elements(units)
        cells += [format_count(elements), format_count(total - elements), f"{elements / total:.1%}"]
        lines.setdefault(tuple(cells), []).append(layer)
    heads = ["layers", *(kind.replace("_", " ") for kind in kinds), "elements updated", "frozen", "updated"]
    return markdown_table(heads, [[format_ranges(indices), *cells] for cells, indices in lines.items()])


def _memory(plan: Plan) -> str:
    planned = plan.heaviest
    setup, work = planned.setup, workload(plan.config, plan.model, planned.draw.updated, planned.setup)
    columns = {"this draw": planned.memory, "worst draw": planned.worst, "FFT": planned.full}
    if not plan.has_draws:
        columns = {plan.config.method.name: planned.memory}
    body = [
        [LABELS.get(part, part), *(format_bytes(getattr(memory, part)) for memory in columns.values())]
        for part in PARTS
        if any(getattr(memory, part) for memory in columns.values())
    ]
    body.append(["total", *(format_bytes(memory.total) for memory in columns.values())])
    state, other_state = ("with", "without") if setup.checkpointing else ("without", "with")
    other = activations(replace(work, setup=replace(setup, checkpointing=not setup.checkpointing)))
    lines = [
        f"Memory of each GPU, round {planned.phase.number} {planned.phase.name}, {state} activation checkpointing",
        "",
        markdown_table(["part", *columns], body),
        "",
        f"Activations {other_state} activation checkpointing: {format_bytes(other)}. Not counted: CUDA's context and "
        "fragmentation.",
    ]
    if any(p.kind == "mixer" for p in plan.model.params):
        lines.append("Nor what the kernels of state-space and linear-attention layers keep for the backward pass.")
    lines.append("The total is the peak. Not all parts exist at once.")
    if plan.has_draws:
        worst = plan.worst_elements / sum(p.elements for p in plan.model.params)
        lines.append(f"The worst draw updates {worst:.1%} of all elements.")
    if planned.host:
        every = format_bytes(planned.host * setup.ranks)
        lines.append(f"Host memory: {format_bytes(planned.host)} for each rank, {every} for all {setup.ranks}.")
    if plan.config.selection.level == "importance":
        lines.append("Importance is measured when the run starts; here the largest matrices are updated.")
    if plan.config.method.name == "lora":
        lines.append(f"LoRA trains adapters with {format_count(work.updated_elements)} elements.")
    return "\n".join(lines)


def _engines(plan: Plan) -> str:
    limit = plan.config.gpu_memory
    cells: dict[str, list[str]] = {}
    for fit in plan.fits:
        cell = "refused" if fit.bytes is None else format_bytes(fit.bytes)
        if fit.bytes is not None and limit is not None:
            cell += f", {_fits(fit.bytes, limit)}"
        cells.setdefault(fit.engine, []).append(cell)
    body = [[name + (" (1 GPU)" * (name == "single")), *row] for name, row in cells.items()]
    memory = "; give gpu_memory=N (GiB) to see what fits" if limit is None else f", against {limit:g} GiB"
    title = f"Engines on {plural(plan.config.engine.ranks, 'GPU')}{', worst draw' * plan.has_draws}{memory}"
    return f"{title}\n\n{markdown_table(['engine', 'total', 'with checkpointing'], body)}"


def _work(plan: Plan) -> str:
    """Operations, network and hours."""
    planned, config = plan.heaviest, plan.config
    labels = {
        "forward": "forward",
        "inputs": "backward, for inputs",
        "weights": "backward, for weights",
        "recompute": "recomputed",
        "reference": "reference",
        "memories": "GEM's memories",
        "total": "total",
    }
    pairs = [(label, getattr(planned.flops, part), getattr(planned.full_flops, part)) for part, label in labels.items()]
    body = [
        [label, f"{draw / 1e15:,.4g}", f"{full / 1e15:,.4g}", f"{draw / full:.1%}" if full else ""]
        for label, draw, full in pairs
        if draw or full
    ]
    sent = planned.network
    network = (
        "Network: no traffic."
        if planned.setup.shards == 1
        else f"Network: each GPU sends {format_bytes(sent.total)} a step ({format_bytes(sent.gradients)} of gradients, "
        f"{format_bytes(sent.weights)} of weights), and receives as much."
    )
    duration = (
        "Hours: unknown. Give the peak rate of a GPU: tflops=N."
        if config.tflops is None
        else f"Hours of training: {_hours(plan)} at {config.tflops:g} TFLOP/s a GPU and an assumed utilization of "
        f"{config.utilization:.0%}, without waiting for the network."
    )
    return "\n".join(
        [
            f"One step, round {planned.phase.number} {planned.phase.name}, over all GPUs",
            "",
            markdown_table(["PFLOP", "this draw", "FFT", "ratio"], body),
            "",
            network,
            duration,
        ]
    )


def _hours(plan: Plan) -> str:
    hours = [planned.hours for planned in plan.rounds if planned.hours is not None]
    if plan.config.tflops is None or len(hours) < len(plan.rounds):
        return "?"
    return f"{sum(hours):,.1f}" if sum(hours) >= 0.1 else f"{sum(hours):.2g}"


def _disk(plan: Plan) -> str:
    disk = plan.disk
    checkpoints = "no checkpoints (train.save_every)"
    if disk.checkpoints:
        checkpoints = f"{format_bytes(disk.checkpoints)} of checkpoints"
    deltas, models = format_bytes(disk.deltas), format_bytes(disk.models)
    return f"Disk: {format_bytes(disk.total)}: {deltas} of deltas, {models} of models, {checkpoints}."
