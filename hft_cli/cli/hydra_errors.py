"""Errors of Hydra and OmegaConf, which take several lines, as one line with the nearest name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hft_cli.cli.launchers import LAUNCHERS
from hft_cli.config.conf import groups
from hft_cli.config.help import config_keys, limits_text
from hft_cli.config.schema import SCHEMAS
from hft_cli.errors import UserError, choose, nearest_hint
from hft_cli.paths import group_options

NOISE = r"reference_type|object_type|See https|Available options|Config search|full_key:|Error merging override"

# Names in other trainers -> ours.
OTHER_NAMES = {
    "lr": "train.learning_rate",
    **dict.fromkeys(("num_epochs", "num_train_epochs"), "train.epochs"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), "train.schedule"),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), "train.warmup"),
    **dict.fromkeys(("global_batch_size", "gradient_accumulation_steps", "grad_accum"), "train.batch_size"),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_batch_size"), "train.micro_batch_size"),
    **dict.fromkeys(("cutoff_len", "max_seq_len", "max_seq_length", "sequence_len"), "train.max_length"),
    "optim": "train.optimizer",
    "activation_checkpointing": "train.gradient_checkpointing",
    "logging_steps": "train.log_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.save_limit",
    "eval_steps": "train.validate_every",
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "mixed_precision"), "model.dtype"),
    **dict.fromkeys(("attn_implementation", "flash_attn"), "model.attention"),
    **dict.fromkeys(("model_name_or_path", "base_model"), "model.path"),
    **dict.fromkeys(("dataset", "train_file"), "data.path"),
    **dict.fromkeys(("nproc_per_node", "num_gpus"), "engine.num_processes"),
}


def one_line(error: BaseException, argv: Sequence[str], name: str) -> str:
    """One line for an error that Hydra or OmegaConf raised while the command `name` composed its config."""
    text = "\n".join(str(part) for part in (error, error.__cause__) if part is not None)
    return (
        _unreadable(text, argv)
        or _unknown_option(text)
        or _unknown_key(text, argv, name)
        or _no_option(text, name)
        or _missing_value(text)
        or _first_lines(text, name)
    )


def _unreadable(text: str, argv: Sequence[str]) -> str | None:
    """A word that Hydra's grammar does not read."""
    if not re.search(r"LexerNoViableAlt|no viable alternative|mismatched input|extraneous input|missing EQUAL", text):
        return None
    word = next((word for word in argv if not word.startswith("-") and not _is_override(word)), "")
    if "=" not in word:
        return f"'{word}' is not KEY=VALUE."
    key, _, value = word.partition("=")
    example = f'{key}=["…"]' if value.startswith("[") else f'{key}="…"'
    return f"{word} cannot be read as a value: quote what is not plain text, for instance '{example}'."


def _is_override(word: str) -> bool:
    """Whether Hydra's grammar reads a word."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _unknown_option(text: str) -> str | None:
    """`engine=zero4`: a group of conf/ has no such option."""
    match = re.search(r"Could not find '(hydra/launcher|\w+)/([^']*)'", text)
    if match is None:
        return None
    group, option = match.groups()
    options = ["basic", *LAUNCHERS] if group == "hydra/launcher" else group_options(group)
    try:
        if options:
            choose(group, option, options)
    except UserError as unknown:
        return str(unknown)
    return None


def _unknown_key(text: str, argv: Sequence[str], name: str) -> str | None:
    """`train.learning_rat=1`: there is no such key."""
    match = re.search(r"Could not override '([^']+)'", text) or re.search(r"[Kk]ey '([^']+)' (?:is )?not in", text)
    keys = [*config_keys(SCHEMAS[name]), *groups()]
    if match is None or match[1] in keys:
        return None
    typed = [word.split("=")[0] for word in argv]
    key = next((word.lstrip("+~") for word in typed if word.endswith(match[1])), match[1])  # Hydra may cut it
    if key.startswith("hydra."):
        return None
    # The right name in the wrong group is likelier than another name.
    last = key.rpartition(".")[2]
    elsewhere = [f"'{known}'" for known in keys if known.rpartition(".")[2] == last or OTHER_NAMES.get(last) == known]
    hint = f" Did you mean {' or '.join(elsewhere)}?" if elsewhere else nearest_hint(key, keys, cutoff=0.5)
    return f"Unknown key '{key}'.{hint} All keys: hft {name} --help"


def _no_option(text: str, name: str) -> str | None:
    """A group without a default has no option."""
    match = re.search(r"You must specify '(\w+)'", text)
    if match is None:
        return None
    example = f" For instance: hft {name} +method=hft" if match[1] == "method" else ""
    return f"No {match[1]}: give {match[1]}=NAME. Available: {', '.join(group_options(match[1]))}.{example}"


def _missing_value(text: str) -> str | None:
    """A key without a default is not set."""
    match = re.search(r"Missing mandatory value: (\S+)", text)
    return f"{match[1]} is not set. Give it on the command line: {match[1]}=…" if match else None


def _first_lines(text: str, name: str) -> str:
    """The line after which OmegaConf names the key, as "KEY: line" with its limits; otherwise the first two lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    message = [line for line in lines if not re.match(NOISE, line)] or lines
    key = re.search(r"full_key: (\S+)", text)
    return f"{key[1]}: {message[0].rstrip('.')}.{limits_text(SCHEMAS[name], key[1])}" if key else " ".join(message[:2])
