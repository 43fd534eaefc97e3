"""Uses of undocumented parts of transformers. tests/data/test_compat.py fails when they change."""

from __future__ import annotations

from typing import Any


def render_with_marks(
    chat: list[dict[str, str]], template: str, special_tokens: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """A chat as text, and the spans between its `{% generation %}` marks, in characters.

    UPSTREAM: transformers 5.23.0: `apply_chat_template(return_assistant_tokens_mask=True)` maps the spans to tokens
    itself, and loses its place with tokenizers that trim blanks off their offsets (Llama 3, GPT-2). The spans
    themselves come from `render_jinja_template`, which is not documented. transformers 5.24.0 gives the right mask, so
    this can go when pyproject.toml requires it.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[chat], chat_template=template, return_assistant_tokens_mask=True, **special_tokens
    )
    return texts[0], [(start, end) for start, end in spans[0]]
