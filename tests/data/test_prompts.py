"""Prompts are what training has seen before an answer, and the end of an answer is known."""

from __future__ import annotations

from typing import Any

import pytest
from chats import (
    BODY,
    CHATML,
    CHATS,
    DROPS_REASONING,
    EVERY,
    KINDS,
    LLAMA2,
    MAT,
    NEWLINE_ENDS,
    ONE,
    TWO,
    chat,
    chat_of,
    history,
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

MARKED_HEADER = (  # as SmolLM3's
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ "
    + BODY
    + " + m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ "
    + BODY
    + " + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLANK_ENDS_PROMPT = NEWLINE_ENDS.replace(":\n", ": ")
ASKED = [
    *((kind, template) for kind in KINDS for template in (*EVERY.values(), BLANK_ENDS_PROMPT)),
    ("pocket", None),
    *(("pocket", template) for template in ("tulu", "plain")),
]


def asked_as_trained(each: Chat, tokenizer: Any) -> None:
    """The prompt is what the row begins with, and the loss on its last answer begins right after it."""
    result = make_prompts([each], tokenizer, max_length=1000, where="the data")
    row = tokenize([each], tokenizer, max_length=1000).dataset[0]
    asked = result.ids[0]
    assert row["input_ids"][: len(asked)] == asked
    assert row["labels"][len(asked) - 1] == -100
    assert -100 not in row["labels"][len(asked) : len(asked) + 2]
    if len(each.turns) == 2:
        assert set(row["labels"][: len(asked)]) == {-100}
    assert (result.texts, result.answers, result.cut) == ([each.turns[-2]["content"]], [each.turns[-1]["content"]], 0)


@pytest.mark.parametrize(("kind", "template"), ASKED)
def test_a_prompt_is_the_row_up_to_its_first_trained_token(kind: str, template: str | None) -> None:
    for each in CHATS:
        asked_as_trained(each, tokenizer_of(kind, template))


@settings(max_examples=60, deadline=None)
@given(
    st.text(" \nab7é🙂]", max_size=12),
    st.text(" \nab7é🙂]", max_size=12),
    st.sampled_from(ASKED),
)
def test_any_prompt_is_the_row_up_to_its_first_trained_token(
    question: str, answer: str, made_of: tuple[str, str | None]
) -> None:
    asked_as_trained(chat("q" + question, answer + "x"), tokenizer_of(*made_of))


def test_the_first_answers_of_a_chat_are_part_of_the_prompt() -> None:
    tokenizer = tokenizer_of("bos", "tulu")
    result = make_prompts([TWO], tokenizer, max_length=100, where="the data")
    assert text_of(tokenizer, result.ids[0]) == rendered(tokenizer, history(TWO), add_generation_prompt=True)
    assert (result.texts, result.answers) == (["Why so?"], ["  It is so.\n"])


def test_newlines_before_an_answer_are_tokens_as_in_training() -> None:
    tokenizer = tokenizer_of("bytes", "plain")
    text = rendered(tokenizer, history(ONE), add_generation_prompt=True)
    alone = tokenizer(text)["input_ids"]
    asked = make_prompts([ONE], tokenizer, max_length=100, where="the data").ids[0]
    assert text_of(tokenizer, asked) == text_of(tokenizer, alone) == "Why?\n\n"
    assert len(asked) == len(alone) + 1


def test_a_header_that_is_trained_on_belongs_to_the_prompt() -> None:
    tokenizer = tokenizer_of("bytes", MARKED_HEADER)
    result = make_prompts([ONE], tokenizer, max_length=100, where="the data")
    assert text_of(tokenizer, result.ids[0]).endswith("<|im_start|>assistant\n")
    assert ids_of(tokenizer, ONE)[: len(result.ids[0])] == result.ids[0]


def test_a_template_that_rewrites_earlier_turns_gives_prompts() -> None:
    tokenizer = tokenizer_of("bytes", DROPS_REASONING)
    result = make_prompts([TWO], tokenizer, max_length=100, where="the data")
    assert text_of(tokenizer, result.ids[0]) == rendered(tokenizer, history(TWO), add_generation_prompt=True)


def test_a_prompt_in_another_form_than_in_training_is_refused() -> None:
    template = NEWLINE_ENDS.replace("'assistant:\n'", "'assistant:\n<think>'")
    with pytest.raises(
        UserError, match=r"^x, example 1: the chat template writes the prompt for an answer differently"
    ):
        make_prompts([ONE], tokenizer_of(template=template), max_length=100, where="x")
    wordless = "{% for m in messages if m.role == 'assistant' %}{{ m.content + eos_token }}{% endfor %}"
    with pytest.raises(UserError, match=r"^x, example 1: the chat template leaves out turn 1, the user's"):
        make_prompts([ONE], tokenizer_of(template=wordless), max_length=100, where="x")
    with pytest.raises(UserError, match=r"^No rows in x\.$"):
        make_prompts([], tokenizer_of(template="tulu"), max_length=100, where="x")


def test_a_chat_without_a_user_has_a_prompt_without_text() -> None:
    row = chat_of(turn("system", "Be brief."), turn("assistant", "Yes."))
    result = make_prompts([row], tokenizer_of(template="tulu"), max_length=100, where="x")
    assert (result.texts, result.answers) == ([""], ["Yes."])


@pytest.mark.parametrize(("kind", "template"), [("pocket", None), ("bos", "tulu"), ("trimming", LLAMA2)])
def test_a_long_prompt_loses_its_start_and_is_counted(kind: str, template: str | None) -> None:
    tokenizer = tokenizer_of(kind, template)
    result = make_prompts([ONE, chat(MAT, MAT), ONE], tokenizer, max_length=30, where="x")
    assert (result.cut, result.texts[1], result.answers[1]) == (1, MAT, MAT)
    assert len(result.ids[1]) == 30
    assert max(len(result.ids[0]), len(result.ids[2])) < 30
    before, after = rendered(tokenizer, history(chat("(?)", "Because.")), add_generation_prompt=True).split("(?)")
    text = text_of(tokenizer, result.ids[1])
    assert text.startswith(before.strip(" "))
    assert text.endswith(after)
    assert MAT.strip().endswith(text.removeprefix(before.strip(" ")).removesuffix(after).strip())
    longest = len(ids_of(tokenizer, chat(MAT, MAT)))
    with pytest.raises(
        UserError, match=r"^x, example 2: the prompt is \d+ tokens long even without its first user turn, more than the"
    ):
        make_prompts([chat("", "b"), chat("a" + MAT, "b", MAT, "b")], tokenizer, max_length=longest // 2, where="x")


def test_prompts_of_several_batches_are_in_order() -> None:
    tokenizer = tokenizer_of("pocket")
    result = make_prompts([chat(f"q{n}", f"a{n}") for n in range(1100)], tokenizer, max_length=50, where="x")
    assert [text_of(tokenizer, ids) for ids in result.ids] == [f"<|user|>q{n}<|assistant|>" for n in range(1100)]
    assert (result.texts, result.answers) == ([f"q{n}" for n in range(1100)], [f"a{n}" for n in range(1100)])


ENDS: dict[str, tuple[str, str | None, list[str], str | None]] = {
    "pocket": ("pocket", None, ["<|end|>"], None),
    "tulu": ("bytes", "tulu", ["</s>"], None),
    "plain": ("pieces", "plain", ["</s>"], None),
    "a blank before": ("bytes", LLAMA2, ["</s>"], None),
    "not the EOS token": ("bytes", CHATML, ["</s>", "<|im_end|>"], None),
    "no special token": ("pocket", CHATML, ["<|end|>"], "<|im_end|>"),
    "text before it": ("bytes", CHATML.replace("<|im_end|>", "\n###<|im_end|>"), ["</s>"], "###"),
    "newlines": ("bytes", NEWLINE_ENDS, ["</s>"], "\n"),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_an_answer_follows_from_the_template(name: str) -> None:
    kind, template, ends, stop = ENDS[name]
    tokenizer = tokenizer_of(kind, template)
    result = make_prompts([ONE], tokenizer, max_length=100, where="x")
    assert result.ends == tuple(sorted(tokenizer.convert_tokens_to_ids(ends)))
    assert result.stop == stop


def test_the_longer_of_two_special_tokens_ends_an_answer() -> None:
    tokenizer = tokenizer_of(template=CHATML)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end"]})
    ends = make_prompts([ONE], tokenizer, max_length=100, where="x").ends
    assert ends == tuple(sorted(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])))


def test_without_eos_the_token_of_the_template_ends_an_answer() -> None:
    tokenizer = tokenizer_of(template=CHATML)
    tokenizer.eos_token = None
    result = make_prompts([ONE], tokenizer, max_length=100, where="x")
    assert (result.ends, result.stop) == ((tokenizer.convert_tokens_to_ids("<|im_end|>"),), None)
    tokenizer.chat_template = NEWLINE_ENDS
    result = make_prompts([ONE], tokenizer, max_length=100, where="x")
    assert (result.ends, result.stop) == ((), "\n")
