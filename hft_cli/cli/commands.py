"""The sub-commands of `hft`. To add one, write its function and add a row to COMMANDS."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from hft_cli.cli import completion, file_commands, hydra_commands, model_commands
from hft_cli.cli.arguments import Parser
from hft_cli.config.help import help_text
from hft_cli.config.schema import SCHEMAS
from hft_cli.logs import LOG_HELP


@dataclass(frozen=True)
class Command:
    """A sub-command: its function, the words after it in the usage, and what it does.

    The function gets a parser without arguments and the words that were typed, and returns the exit status.
    """

    run: Callable[[Parser, list[str]], int]
    usage: str
    summary: str


def run_command(name: str, words: list[str]) -> int:
    """Run a sub-command and return its exit status."""
    if name in SCHEMAS and {"-h", "--help"} & set(words):  # Hydra has a help of its own
        print(help_text(name))
        return 0
    command = COMMANDS[name]
    return command.run(Parser(f"hft {name}", command.usage, command.summary), words)


def overview() -> str:
    """The text of `hft --help`."""
    lines = ["hft: fine-tune language models without making them forget (Half Fine-Tuning, ACL 2025)", ""]
    for name, command in COMMANDS.items():
        lines += [f"  hft {name} {command.usage}", textwrap.indent(command.summary, " " * 6)]
    examples = {
        "Try it, without a GPU or a download": "hft train method=hft suite=pocket",
        "Options and keys of a command": "hft COMMAND --help",
    }
    lines += ["", LOG_HELP, "", *(f"{what + ':':<37} {example}" for what, example in examples.items())]
    return "\n".join(lines)


TRAIN, EVAL = "method=METHOD [GROUP=OPTION …] [KEY=VALUE …]", "run=RUN|model.path=FOLDER suite=SUITE [KEY=VALUE …]"
COMMANDS: dict[str, Command] = {
    "train": Command(hydra_commands.train, TRAIN, "Fine-tune a model. With -m, KEY=a,b,c is a sweep."),
    "plan": Command(hydra_commands.plan, TRAIN, "Print what that would do, need and cost. With -m, compare."),
    "eval": Command(hydra_commands.evaluate, EVAL, "Score a run's models, or any model, on benchmarks and probes."),
    "verify": Command(
        file_commands.verify_run,
        "RUN [--base BASE] [--model FOLDER] | BASE TUNED --draw FILE|--infer",
        "Prove from files that every round of a run, or a training elsewhere, kept its frozen matrices bit-identical.",
    ),
    "draw": Command(
        model_commands.draw_matrices,
        "MODEL [--ratio R] [--seed N] [--round K] [--level LEVEL] [--format FORMAT]",
        "Print which matrices a round updates, for another trainer.",
    ),
    "gate": Command(
        file_commands.gate_run,
        "RUN [--max-loss POINTS] [--min-gain POINTS] [--suite SUITE]",
        "Check what a run's model lost and gained, for scripts: exit status 0 (ship) or 3 (do not).",
    ),
    "show": Command(
        file_commands.show,
        "draws RUN | tokens method=METHOD [KEY=VALUE …]",
        "Print which matrices each round updated, layer by layer, or rows as they will be trained on.",
    ),
    "materialize": Command(
        file_commands.materialize_model,
        "RUN|DELTA --out FOLDER [--round K] [--base BASE]",
        "Write the model that a run had after any round, or the model of a published delta.",
    ),
    "publish": Command(
        file_commands.publish_delta,
        "RUN --out FOLDER [--round K] [--push OWNER/NAME]",
        "Write what a run changed as one delta with a model card. `hft materialize` loads it.",
    ),
    "completion": Command(
        lambda parser, words: completion.complete(parser, words, COMMANDS),
        "bash|zsh|fish",
        "Print the script that completes commands, options and keys in a shell.",
    ),
    "report": Command(
        file_commands.report_runs,
        "RUN… [--out FOLDER] [--norms]",
        "Compare runs and sweeps: tables (Markdown, CSV, LaTeX, JSON), figures (PNG, SVG) and one HTML page.",
    ),
}
