"""Special tokens of the chat template in the texts of a row, where nothing tells them from those of the template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from hft_cli.data.chats import Chat
from hft_cli.data.pieces import Piece, Span, leaves, shown
from hft_cli.data.templates import REASONING_TAG
from hft_cli.errors import UserError

SPECIAL_TOKENS = ("refuse", "text", "keep")


def literal_spans(
    chat: Chat, place: str, text: str, pieces: Sequence[Piece], tokens: Mapping[str, bool], policy: str
) -> tuple[Span, ...]:
    """The spans of special tokens that are to be tokenized as other text, in order.

    Args:
        text: the rendered chat.
        pieces: the texts of the chat, with their places in it.
        tokens: see `Template.tokens`.
        policy: a value of SPECIAL_TOKENS.

    Raises:
        UserError: if a text holds one and the policy is "refuse", or if it is "text" and one is not in a piece, or is
            no special token, which the tokenizer cannot split.
    """
    if policy == "keep":
        return ()
    any_token = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
    turns = {f"turn {number}, the {turn['role']}'s,": list(turn.values()) for number, turn in enumerate(chat.turns, 1)}
    all_found: list[str] = []
    for what, value in {**turns, "'tools'": list(chat.tools)}.items():
        found = [token for leaf in leaves(value) for token in any_token.findall(REASONING_TAG.sub("", leaf))]
        if found and policy == "refuse":
            raise UserError(
                f"{place}: {what} holds the text '{shown(found[0])}', which the model reads as the token that ends or "
                "begins a turn. Take it out, leave such rows out (data.bad_rows=skip), tokenize it as other text "
                "(data.special_tokens=text), or keep it as this token (data.special_tokens=keep)."
            )
        all_found += found
    if not all_found:
        return ()
    in_pieces = [token for piece in pieces if piece.spans for token in any_token.findall(piece.text)]
    if len(all_found) != len(in_pieces) or not all(tokens[token] for token in all_found):
        raise UserError(
            f"{place}: '{all_found[0]}' cannot be tokenized as other text: it is in reasoning, a call "
            "or 'tools', or is no special token of the tokenizer. Take it out, leave such rows out "
            "(data.bad_rows=skip), or keep it as this token (data.special_tokens=keep)."
        )
    places = (place for piece in pieces for place in piece.spans)
    return tuple(sorted({token.span() for place in places for token in any_token.finditer(text, *place)}))
