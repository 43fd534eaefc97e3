"""Cutting long prompts: only the first user turn loses tokens, and no more than needed."""

from __future__ import annotations

from typing import Any

import pytest
from chats import (
    CHATML,
    EVERY,
    KINDS,
    LLAMA2,
    MAT,
    NEWLINE_ENDS,
    ONE,
    chat,
    chat_of,
    ids_of,
    rendered,
    text_of,
    tokenizer_of,
    turn,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from hft_cli.data.chats import Chat
from hft_cli.data.prompts import make_prompts
from hft_cli.data.tokenization import tokenize
from hft_cli.errors import UserError

COLONS = "{{ bos_token }}{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
REPEATS_USER = COLONS.replace("m.content", "m.content + ('|' + m.content if m.role == 'user' else '')")


def around(tokenizer: Any, each: Chat) -> tuple[str, str]:
    """What is written before and after the user's first content, which must be there once."""
    content = next(turn["content"] for turn in each.turns if turn["role"] == "user").strip()
    before, found, after = rendered(tokenizer, each).partition(content)
    assert found
    assert content not in before + after
    return before, after


@pytest.mark.parametrize("loss", ["assistant", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EVERY)
def test_a_cut_prompt_keeps_its_header_and_the_whole_answer(name: str, kind: str, loss: str) -> None:
    tokenizer = tokenizer_of(kind, EVERY[name])
    each = chat(MAT + "?", "Because.", "Why so?", "So.", system="Be brief.")
    whole = tokenize([each], tokenizer, max_length=1000, loss=loss).dataset[0]
    most = len(whole["input_ids"]) - 30
    result = tokenize([each], tokenizer, max_length=most, loss=loss, long_prompts="cut")
    assert (
        result.summary.used,
        sum(result.summary.dropped.values()),
        result.summary.truncated,
        result.summary.cut,
    ) == (1, 0, 0, 1)
    row = result.dataset[0]
    assert len(row["input_ids"]) == result.summary.tokens == most
    before, after = around(tokenizer, each)
    text = text_of(tokenizer, row["input_ids"]).lstrip(" ")  # "pieces" puts a blank before all
    assert text.startswith(before.rstrip(" "))
    assert text.endswith(after)
    assert MAT.strip().endswith(text.removeprefix(before.rstrip(" ")).removesuffix(after).removesuffix("?").strip())
    assert row["labels"][0] == -100
    if loss == "assistant":
        assert [x for x in row["labels"] if x != -100] == [x for x in whole["labels"] if x != -100]
    else:
        assert row["labels"][1:] == row["input_ids"][1:]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([*"aé🙂\n  :>|", "the", "user", " mat", "Be", "\n\n"]), max_size=40).map("".join),
    st.sampled_from(["", "same", "user"]),
    st.sampled_from(sorted(EVERY)),
    st.sampled_from(KINDS),
    st.integers(3, 30),
)
def test_just_enough_tokens_of_the_first_user_turn_are_lost(
    content: str, system: str, name: str, kind: str, room: int
) -> None:
    tokenizer = tokenizer_of(kind, EVERY[name])
    system = content if system == "same" else system
    each, empty = (chat(text, "Because.", system=system) for text in (content, ""))
    most = room + len(ids_of(tokenizer, empty))
    whole = tokenize([each], tokenizer, max_length=1000).dataset[0]
    result = tokenize([each], tokenizer, max_length=most, long_prompts="cut")
    row, ids = result.dataset[0], whole["input_ids"]
    surplus = max(len(ids) - most, 0)
    assert (result.summary.used, result.summary.truncated, result.summary.cut) == (1, 0, surplus > 0)
    assert len(row["input_ids"]) == len(ids) - surplus
    ways = [
        start for start in range(len(row["labels"]) + 1) if row["input_ids"] == ids[:start] + ids[start + surplus :]
    ]
    assert ways
    assert any(row["labels"] == whole["labels"][:start] + whole["labels"][start + surplus :] for start in ways)
    text = text_of(tokenizer, row["input_ids"])
    before, after = rendered(tokenizer, chat("(?)", "Because.", system=system)).split("(?)")
    assert text.lstrip(" ").startswith(before.strip(" "))
    assert text.endswith(after)


@settings(max_examples=60, deadline=None)
@given(st.text(" \nab7é🙂", max_size=20), st.text("ab 7", max_size=9), st.integers(1, 40))
def test_the_prompt_is_cut_before_the_answer_is_truncated(content: str, answer: str, most: int) -> None:
    tokenizer = tokenizer_of("pocket")
    user, assistant, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])
    question, reply = tokenizer([content, "x" + answer], add_special_tokens=False)["input_ids"]
    lost = min(max(len(question) + len(reply) + 3 - most, 0), len(question))
    expected = [user, *question[lost:], assistant, *reply, end]
    row = chat(content, "x" + answer)
    if most <= 2:
        with pytest.raises(UserError, match=r"prompts, without the first user turn, are 2 to 2 tokens long"):
            tokenize([row], tokenizer, max_length=most, long_prompts="cut")
        return
    result = tokenize([row], tokenizer, max_length=most, long_prompts="cut")
    assert result.dataset[0]["input_ids"] == expected[:most]
    assert (result.summary.truncated, result.summary.cut) == (len(expected) > most, lost > 0)


def test_cut_and_dropped_rows_are_counted_apart() -> None:
    tokenizer = tokenizer_of(template="tulu")
    system = chat("Why?", "Because.", system=MAT)
    rows = [ONE, chat(MAT, "no"), chat("cat", MAT), chat(MAT, MAT), system, ONE]
    result = tokenize(rows, tokenizer, max_length=40, long_prompts="cut")
    assert (
        result.summary.used,
        sum(result.summary.dropped.values()),
        result.summary.truncated,
        result.summary.cut,
    ) == (5, 1, 2, 3)
    assert max(len(row) for row in result.dataset["input_ids"]) == 40
    assert result.summary.tokens == sum(len(row) for row in result.dataset["input_ids"])
    assert result.summary.trained_tokens == sum(label != -100 for row in result.dataset["labels"] for label in row)
    dropping, default = (tokenize(rows, tokenizer, max_length=40, **o) for o in ({"long_prompts": "drop"}, {}))
    assert (
        dropping.summary.used,
        sum(dropping.summary.dropped.values()),
        dropping.summary.truncated,
        dropping.summary.cut,
    ) == (3, 3, 1, 0)
    assert dropping.dataset[:] == default.dataset[:]


def test_rows_that_fit_are_never_cut() -> None:
    tokenizer = tokenizer_of(template=REPEATS_USER)
    one, other = (tokenize([ONE], tokenizer, max_length=100, loss="all", long_prompts=long) for long in ("cut", "drop"))
    assert one.dataset[:] == other.dataset[:]
    assert one.summary.cut == other.summary.cut == 0


@pytest.mark.parametrize("content", ["s", "user", "<|user|>", "Be brief.", "mat"])
def test_the_same_text_in_header_or_system_turn_stays(content: str) -> None:
    tokenizer = tokenizer_of(template="tulu")
    each = chat(content * 9, "Because.", system=content * 9)
    header, after = f"<|system|>\n{content * 9}\n<|user|>\n", "\n<|assistant|>\nBecause.</s>\n"
    longest = len(ids_of(tokenizer, each))
    result = tokenize([each], tokenizer, max_length=longest - 5, long_prompts="cut")
    text = text_of(tokenizer, result.dataset[0]["input_ids"])
    assert text.startswith(header)
    assert text.endswith(after)
    assert (content * 9).endswith(text.removeprefix(header).removesuffix(after))


@pytest.mark.parametrize("kind", ["bytes", "trimming"])
def test_a_token_with_more_of_the_header_than_a_blank_stays(kind: str) -> None:
    tokenizer = tokenizer_of(kind, NEWLINE_ENDS)
    each = chat("\n " + MAT, "Because.")
    two = tokenizer.convert_tokens_to_ids("ĊĊ")
    assert two in ids_of(tokenizer, each)  # one newline is the header's, the other the user's
    result = tokenize([each], tokenizer, max_length=30, long_prompts="cut")
    assert text_of(tokenizer, result.dataset[0]["input_ids"]).startswith("user:\n\n")


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_with_the_blank_of_the_header_is_cut(kind: str) -> None:
    tokenizer = tokenizer_of(kind, LLAMA2)
    result = tokenize([chat("cat " + MAT, "no")], tokenizer, max_length=60, long_prompts="cut")
    text = text_of(tokenizer, result.dataset[0]["input_ids"])
    assert "[INST]" in text
    assert "cat" not in text


def test_a_row_without_a_user_is_cut_at_its_end_only() -> None:
    row = chat_of(turn("system", "Be brief."), turn("assistant", MAT))
    result = tokenize([row], tokenizer_of(template="tulu"), max_length=40, long_prompts="cut")
    assert (result.summary.truncated, result.summary.cut) == (1, 0)


def test_the_first_token_has_no_loss_after_cutting() -> None:
    result = tokenize([chat(MAT, "no")], tokenizer_of(template="plain"), max_length=9, loss="all", long_prompts="cut")
    row = result.dataset[0]
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert (result.summary.trained_tokens, result.summary.tokens) == (8, 9)


def test_text_that_a_template_repeats_is_not_cut() -> None:
    tokenizer = tokenizer_of(template=REPEATS_USER)
    with pytest.raises(UserError, match=r"^the data, example 2: too long, and its first user turn cannot be cut"):
        tokenize([ONE, chat(MAT, "no")], tokenizer, max_length=30, long_prompts="cut", loss="all")


def test_cutting_needs_a_fast_tokenizer() -> None:
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer(chat_template=CHATML)
    with pytest.raises(UserError, match=r"^Cutting long prompts needs a fast tokenizer, .* data\.long_prompts=drop\.$"):
        tokenize([ONE], slow, max_length=100, loss="all", long_prompts="cut")
    with pytest.raises(
        UserError, match=r"^Asking for answers needs a fast tokenizer, .* Convert it to tokenizer\.json\.$"
    ):
        make_prompts([ONE], slow, max_length=100, where="the data")
    with pytest.raises(UserError, match=r"Unknown data\.long_prompts 'cutt'\. Did you mean 'cut'\?"):
        tokenize([ONE], slow, max_length=100, long_prompts="cutt")
