"""The files beside the weights that a trained model does not take from its base: its template, and what ends an answer.

A base model that is tuned on a template with another end than its EOS token would generate on and on, because
generation stops at the tokens that generation_config.json names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.folders import NAMED_TEMPLATES
from hft_cli.files import read_json
from hft_cli.run_dir import RoundDir


def companions(folder: RoundDir, base: Path, new_template: bool) -> dict[str, str]:
    """File name -> text of the files that differ from those of the model in `base`.

    Args:
        folder: of the phase that was trained last, or of a published delta.
        base: the model whose other files are copied.
        new_template: whether the phase's template is another than the base's own.
    """
    original = _read(base / "tokenizer_config.json")
    settings = dict(original)
    files: dict[str, Any] = {}
    if new_template and folder.template.exists():
        files[folder.template.name] = folder.template.read_text(encoding="utf-8")
        # transformers prefers the file; other programs may read the old template in the settings.
        named = settings.pop("chat_template", None)
        for entry in named if isinstance(named, list) else []:
            if entry["name"] != "default":
                files[f"{NAMED_TEMPLATES}/{entry['name']}.jinja"] = entry["template"]
    if folder.answer_end.exists():
        end = read_json(folder.answer_end)
        generation, special = (_read(base / name) for name in ("generation_config.json", "special_tokens_map.json"))
        known = generation.get("eos_token_id", _read(base / "config.json").get("eos_token_id"))
        ids = known if isinstance(known, list) else [] if known is None else [known]
        if end["id"] not in ids:
            files["generation_config.json"] = {**generation, "eos_token_id": [*ids, end["id"]]}
        if special and _text(special.get("eos_token")) != end["token"]:
            files["special_tokens_map.json"] = {**special, "eos_token": end["token"]}
        if settings and _text(settings.get("eos_token")) != end["token"]:
            settings["eos_token"] = end["token"]
    if settings != original:
        files["tokenizer_config.json"] = settings
    return {
        name: value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        for name, value in files.items()
    }


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _text(token: Any) -> Any:
    """The text of a token that may be written as an object."""
    return token.get("content") if isinstance(token, dict) else token
