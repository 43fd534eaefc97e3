"""The sub-commands about models that are trained elsewhere: draw, and verify of two models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.naming import Param
from hft_cli.cli.arguments import Parser, number, round_number
from hft_cli.config.conf import options_of
from hft_cli.config.schema import ModelConfig, SelectionConfig
from hft_cli.errors import choose
from hft_cli.method.fitting import Fit, fits
from hft_cli.method.formats import FORMATS
from hft_cli.method.standalone import draw_alone
from hft_cli.paths import resolve_path
from hft_cli.plan.model import read_model
from hft_cli.runner.model_proof import Changes, DrawnProof, compare_models, prove_draws, read_draws
from hft_cli.text import first_of, plural, text_table

# Options that are fields of SelectionConfig.
SETTINGS = ("ratio", "names", "level", "balance", "redraw", "embeddings", "head", "final_norm")


def draw_matrices(parser: Parser, words: list[str]) -> int:
    """`hft draw`: print a draw for another trainer."""
    defaults = SelectionConfig()
    parser.add_argument("model", metavar="MODEL", help="folder, config.json, hub name, or option of group model")
    parser.add_argument("--ratio", type=number, default=defaults.ratio, help="share of the matrices (default: 0.5)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the draw (default: 42)")
    parser.add_argument("--round", type=round_number, default=1, metavar="K", help="number of the round (default: 1)")
    for name in SETTINGS[2:]:
        option, value = f"--{name.replace('_', '-')}", getattr(defaults, name)
        parser.add_argument(
            option, dest=name, default=value, metavar="VALUE", help=f"selection.{name} (default: {value})"
        )
    parser.add_argument("--names", type=lambda text: text.split(","), default=[], help="selection.names, with commas")
    parser.add_argument("--format", default="names", help=f"one of {', '.join(FORMATS)} (default: names)")
    options = parser.parse(words)
    choose("format", options.format, FORMATS)
    selection = SelectionConfig(**{key: getattr(options, key) for key in SETTINGS})
    params = _parameters(options.model)
    print(FORMATS[options.format](draw_alone(params, selection, options.round, options.seed), params))
    return 0


def _parameters(model: str) -> tuple[Param, ...]:
    known = options_of("model")
    if model in known and not Path(model).exists():
        values = {key: value for key, value in known[model].items() if key in ("path", "architecture", "part", "kinds")}
        return read_model(ModelConfig(name=model, **values)).params
    if model.endswith(".json"):
        return read_model(ModelConfig(name=model, path=model, architecture=model)).params
    return read_model(ModelConfig(name=model, path=resolve_path(model))).params


def verify_models(base: str, tuned: str, drawn: Path | None, bar: Any) -> int:
    """`hft verify BASE TUNED`: exit status 1 if the draws of a file, or without one any single draw, do not fit.

    Args:
        bar: of tqdm, which counts parameters.
    """
    rounds = read_draws(drawn) if drawn else None  # before the weights are read
    with bar:
        changes = compare_models(base, tuned, tick=bar.update)
    print(changes_text(changes))
    if rounds is not None:
        proof = prove_draws(changes, rounds)
        print(proof_text(proof))
        return 1 if proof.faults else 0
    found = fits(changes.params, changes.moved)
    print(infer_text(changes, found))
    return 0 if not changes.faults and (not changes.moved or found) else 1


def changes_text(changes: Changes) -> str:
    """What moved, by category, and how the two checkpoints differ otherwise."""
    rows = []
    for kind in dict.fromkeys((param.kind, param.layer is None) for param in changes.params):
        names = [param.name for param in changes.params if (param.kind, param.layer is None) == kind]
        label = kind[0].replace("_", " ") + " outside of the layers" * (kind == ("norm", True))
        moved = len(changes.moved.intersection(names))
        rows.append([label, str(moved), str(len(names) - moved), str(len(names))])
    lines = [text_table(["parameters", "moved", "same bits", "all"], rows)]
    for (first, second), count in changes.converted.items():
        lines.append(f"{plural(count, 'parameter')} compared as {second} (TUNED), from {first} (BASE)")
    if changes.renamed:
        lines.append(f"The names in TUNED were read {changes.renamed}.")
    return "\n".join(lines)


def proof_text(proof: DrawnProof) -> str:
    """Whether the draws are proven, and what they leave open."""
    lines = []
    if proof.unmoved:
        lines.append(f"updated, but with the same bits: {first_of(proof.unmoved)}")
    if not proof.from_seed:
        lines.append("The draw is not that of its seed with the default settings, so only its names were checked.")
    counts = f"{plural(len(proof.updated), 'parameter')} drawn, {len(proof.frozen)} frozen"
    if proof.faults:
        return "\n".join([*lines, *proof.faults, f"NOT VERIFIED: {counts}"])
    return "\n".join([*lines, f"verified: {counts}: frozen ones bit-identical"])


def infer_text(changes: Changes, found: Sequence[Fit]) -> str:
    """Which draws explain what moved."""
    lines = list(changes.faults)
    if not changes.moved:
        return "\n".join([*lines, "Nothing moved."])
    for fit in found:
        still = f", if {plural(fit.unmoved, 'drawn norm')} did not move" if fit.unmoved else ""
        if fit.level == "all":
            lines.append(f"full fine-tuning, or several rounds that together updated every matrix{still}")
        else:
            others = f" (of {min(fit.ratios):g} to {max(fit.ratios):g})" if len(fit.ratios) > 1 else ""
            lines.append(f"fits one draw of level {fit.level}, ratio {fit.ratios[0]:g}{others}{still}")
    if not found:
        lines.append("No single draw fits: what moved is no share of layers, categories or the model.")
    return "\n".join(lines)
