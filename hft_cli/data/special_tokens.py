"""Special tokens of the chat template in the texts of a row, where nothing tells them from those of the template."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hft_cli.data.chats import Chat
from hft_cli.data.pieces import Piece, Span, leaves
from hft_cli.data.templates import REASONING_TAG
from hft_cli.errors import UserError

SPECIAL_TOKENS = ("refuse", "text", "keep")


def literal_spans(
    chat: Chat, place: str, text: str, pieces: Sequence[Piece], special: Sequence[str], policy: str
) -> tuple[Span, ...]:
    """The spans of special tokens that are to be tokenized as other text, in order.

    Args:
        text: the rendered chat.
        pieces: the texts of the chat, with their places in it.
        special: the tokens that the chat template writes around turns.
        policy: a value of SPECIAL_TOKENS.

    Raises:
        UserError: if a text holds one and the policy is "refuse", or if it is "text" and one is not in a piece.
    """
    if policy == "keep":
        return ()
    tokens = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
    turns = {f"turn {number}, the {turn['role']}'s,": list(turn.values()) for number, turn in enumerate(chat.turns, 1)}
    count = 0
    for what, value in {**turns, "'tools'": list(chat.tools)}.items():
        found = [token for leaf in leaves(value) for token in tokens.findall(REASONING_TAG.sub("", leaf))]
        if found and policy == "refuse":
            shown = found[0].replace("\n", "\\n")
            raise UserError(
                f"{place}: {what} holds the text '{shown}', which the model reads as the token that ends or begins a "
                "turn. Take it out, leave such rows out (data.bad_rows=skip), tokenize it as other text "
                "(data.special_tokens=text), or keep it as this token (data.special_tokens=keep)."
            )
        count += len(found)
    if count != sum(len(tokens.findall(piece.text)) for piece in pieces if piece.spans):
        raise UserError(
            f"{place}: a special token in reasoning, a call or 'tools' cannot be tokenized as other text. Take it out, "
            "leave such rows out (data.bad_rows=skip), or keep it as this token (data.special_tokens=keep)."
        )
    places = (place for piece in pieces for place in piece.spans)
    return tuple(sorted({token.span() for place in places for token in tokens.finditer(text, *place)}))
