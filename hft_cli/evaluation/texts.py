"""Bits per byte of plain text: how well a model predicts text that it is not trained on.

A document is read in windows of at most WINDOW tokens, each of which scores its second half with the first half as
context, so that every token is scored once. The first token follows the model's BOS token, or its EOS token if it has
none. Bits per byte do not depend on the tokenizer, so that models can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hft_cli.data.files import Hub
from hft_cli.data.rows import read_chats
from hft_cli.errors import UserError
from hft_cli.evaluation.workers import LoadedModel, current_ranks, pad_rows, share_items
from hft_cli.launch.jobs import Progress
from hft_cli.paths import expanded

METRIC = "bits_per_byte"

WINDOW = 1024  # tokens, if the model has as many positions

HELD_LOGITS = 2**27  # elements of a batch

Item = dict[str, Any]


@dataclass(frozen=True)
class Window:
    """A part of a document: its tokens, and how many at its end are scored."""

    document: int
    tokens: tuple[int, ...]
    scored: int


def read_texts(path: str, hub: Hub) -> list[str]:
    """The documents of a .txt file, which is one, or of rows with a `text`.

    Raises:
        UserError: if the file is missing or no text, or a row has no text.
    """
    if path.endswith(".txt"):
        try:
            texts = [expanded(path).read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as text in UTF-8: {error}.") from None
    else:
        texts = [chat.text or "" for chat in read_chats(path, format="text", split="test", hub=hub)]
    if not all(text.strip() for text in texts):
        raise UserError(f"{path} has an empty text.")
    return texts


def windows(document: int, tokens: Sequence[int], prefix: int, length: int) -> Iterator[Window]:
    """The windows of a document, each of at most `length` tokens with its context (at least 2)."""
    every = (prefix, *tokens)
    done = 1  # tokens that are scored or have nothing before them
    while done < len(every):
        context = done if done == 1 else min(length // 2, done)
        scored = min(length - context, len(every) - done)
        yield Window(document, every[done - context : done + scored], scored)
        done += scored


def score_texts(loaded: LoadedModel, texts: Sequence[str], progress: Progress) -> tuple[dict[str, float], list[Item]]:
    """The mean of the documents' bits per byte, and an item for each document.

    Raises:
        UserError: if the tokenizer has neither a BOS nor an EOS token.
    """
    tokenizer = loaded.tokenizer
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise UserError("The tokenizer has neither a BOS nor an EOS token for the first token of a text to follow.")
    length = min(loaded.max_length, WINDOW)
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    parts = [part for number, ids in enumerate(encoded) for part in windows(number, ids, prefix, length)]
    nats = [0.0] * len(texts)
    for part, value in zip(parts, share_items(current_ranks(), _score, parts, loaded=loaded), strict=True):
        nats[part.document] += value
    items = [
        {"row": number, METRIC: value / math.log(2) / len(text.encode()), "nats": value, "bytes": len(text.encode())}
        for number, (text, value) in enumerate(zip(texts, nats, strict=True))
    ]
    progress.advance(len(texts), sum(map(len, encoded)))
    values = [float(item[METRIC]) for item in items]
    size = sum(len(text.encode()) for text in texts)
    return {METRIC: math.fsum(values) / len(values), "items": len(values), "bytes": size}, items


def _score(parts: Sequence[Window], loaded: LoadedModel) -> list[float]:
    """The negative log-likelihood of the scored tokens of each window, in nats."""
    import torch

    vocabulary = int(loaded.model.config.get_text_config().vocab_size)
    values: list[float] = []
    start = 0
    while start < len(parts):
        rows = max(1, HELD_LOGITS // (vocabulary * max(len(part.tokens) for part in parts[start:])))
        batch = parts[start : start + rows]
        ids = pad_rows([part.tokens for part in batch], 0, loaded.device)
        with torch.inference_mode():
            logits = loaded.model(ids).logits
            for part, row, tokens in zip(batch, logits, ids, strict=True):
                end = len(part.tokens)
                predicted, labels = row[end - part.scored - 1 : end - 1].float(), tokens[end - part.scored : end]
                values.append(float(torch.nn.functional.cross_entropy(predicted, labels, reduction="sum")))
        start += rows
    return values
