"""What we rely on in transformers although it is not documented."""

from __future__ import annotations

import transformers
from chats import MARKED, ONE, TWO, tokenizer_of
from packaging.version import Version

from hft_cli.data.compat import render_with_marks


def test_marked_spans_are_characters_of_the_text() -> None:
    tokenizer = tokenizer_of(template=MARKED)
    text, spans = render_with_marks(TWO, MARKED, tokenizer.special_tokens_map)
    assert text == tokenizer.apply_chat_template(TWO, tokenize=False)
    assert [text[start:end] for start, end in spans] == ["Because.<|im_end|>", "  It is so.\n<|im_end|>"]


def test_the_mask_of_transformers_is_wrong_before_5_24() -> None:
    """When pyproject.toml requires 5.24, the mask of transformers can replace ours: see hft_cli/data/compat.py."""
    tokenizer = tokenizer_of("trimming", MARKED)
    encoded = tokenizer.apply_chat_template(TWO, return_dict=True, return_assistant_tokens_mask=True)
    masked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    is_right = tokenizer.decode(masked) == "Because.<|im_end|>  It is so.\n<|im_end|>"
    assert is_right == (Version(transformers.__version__) >= Version("5.24"))


def test_a_mask_needs_marks() -> None:
    assert render_with_marks(ONE, "{{ messages[0].content }}", {})[1] == []
