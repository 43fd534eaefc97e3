"""Chat templates: the built-in ones, and templates that cannot be trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
from chats import (
    CHATML,
    DROPS_REASONING,
    LLAMA2,
    ONE,
    TWO,
    chat,
    chat_of,
    history,
    rendered,
    tokenizer_of,
    trained_text,
)

from hft_cli.config.schema import ModelConfig
from hft_cli.data.model_template import stored_template, use_template
from hft_cli.data.templates import chat_template
from hft_cli.data.tokenization import tokenize
from hft_cli.errors import UserError


def test_tulu_is_written_as_tulu_v2_is() -> None:
    assert rendered(tokenizer_of(template="tulu"), TWO) == (
        "<|system|>\nBe brief.\n<|user|>\nWhy?\n<|assistant|>\nBecause.</s>\n"
        "<|user|>\nWhy so?\n<|assistant|>\n  It is so.\n</s>\n"
    )


def test_plain_is_the_text_and_the_end_tokens() -> None:
    assert rendered(tokenizer_of(template="plain"), TWO) == (
        "Be brief.\n\nWhy?\n\nBecause.</s>\nWhy so?\n\n  It is so.\n</s>\n"
    )


@pytest.mark.parametrize("name", ["tulu", "plain"])
@pytest.mark.parametrize("kind", ["bytes", "bos"])
def test_the_prompt_of_a_built_in_template_begins_the_chat(name: str, kind: str) -> None:
    tokenizer = tokenizer_of(kind, name)
    assert rendered(tokenizer, TWO).startswith(
        rendered(tokenizer, history(TWO, 2), add_generation_prompt=True) + "Because."
    )


@pytest.mark.parametrize("name", ["tulu", "plain"])
def test_a_built_in_template_has_bos_if_the_tokenizer_has(name: str) -> None:
    assert rendered(tokenizer_of("bos", name), ONE).startswith("<s>")
    assert "<s>" not in rendered(tokenizer_of("bytes", name), ONE)


def test_none_is_the_tokenizers_own_template(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }} ü", encoding="utf-8")
    tokenizer = tokenizer_of(template=CHATML)
    assert chat_template(None, tokenizer) == CHATML
    assert chat_template(str(tmp_path / "mine.jinja"), tokenizer) == "{{ messages[0].content }} ü"


LLAMA = (  # the beginning of Llama 3.2's
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
    "{%- endif %}{%- endif %}{{ '<s>Today Date: ' + date_string + '\n' }}"
)
DATED = {
    LLAMA: "<s>Today Date: 02 Mar 2025\n",
    "{{ 'Current date: ' + strftime_now( '%Y-%m-%d' ) + '\n' }}": "Current date: 2025-03-02\n",  # gpt-oss
    '{% set today = strftime_now("%B %d, %Y") %}{{ "It\'s " + today }}': "It's March 02, 2025",  # Granite
}


@pytest.mark.parametrize("beginning", DATED)
def test_a_template_writes_the_day_of_the_run(beginning: str) -> None:
    tokenizer = tokenizer_of(template=beginning + CHATML)
    today = rendered(tokenizer, ONE)
    saved = use_template(ModelConfig(date="2025-03-02"), tokenizer)
    assert saved == beginning + CHATML
    assert rendered(tokenizer, ONE).startswith(DATED[beginning])
    assert rendered(tokenizer, ONE) != today
    named = tokenizer_of(template=CHATML)
    named.chat_template = {"default": CHATML, "tool_use": beginning + CHATML}
    use_template(ModelConfig(date="2025-03-02"), named)
    assert named.chat_template["default"] == CHATML
    assert named.chat_template["tool_use"] == tokenizer.chat_template


def test_a_template_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_bytes(b"\xff{{")
    for read in (
        lambda: stored_template(ModelConfig(), tmp_path),
        lambda: stored_template(ModelConfig(chat_template=str(file)), tmp_path),
        lambda: chat_template(str(file), tokenizer_of()),
    ):
        with pytest.raises(UserError, match=r"^The chat template .*chat_template\.jinja is not UTF-8 \("):
            read()


def test_a_date_that_cannot_be_held_is_refused() -> None:
    tokenizer = tokenizer_of(template="{% set form = '%d' %}{{ strftime_now(form) }}" + CHATML)
    with pytest.raises(UserError, match=r"^The chat template writes the date by strftime_now in a format that is no"):
        use_template(ModelConfig(date="2025-03-02"), tokenizer)


def test_a_missing_template_is_answered_with_the_choices(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    with pytest.raises(UserError, match=r"has no chat template\. Set model\.chat_template=tulu\|plain\|PATH\."):
        chat_template(None, tokenizer)
    with pytest.raises(UserError, match=r"has no chat template"):
        tokenize([ONE], tokenizer, max_length=9)
    with pytest.raises(UserError, match=r"Unknown model\.chat_template 'tulo'\. Did you mean 'tulu'\? .* plain, tulu"):
        chat_template("tulo", tokenizer)
    with pytest.raises(UserError, match=r"No such chat template file: 'no/x\.jinja'\. Built in: plain, tulu\."):
        chat_template("no/x.jinja", tokenizer)


def test_a_built_in_template_needs_an_end_token() -> None:
    tokenizer = tokenizer_of()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="'tulu' ends answers with the EOS token; the tokenizer has none"):
        chat_template("tulu", tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = tokenizer_of(template=DROPS_REASONING)
    result = tokenize([ONE], tokenizer, max_length=100)
    assert trained_text(tokenizer, result.dataset[0]["labels"]) == "<think>\n\n</think>\n\nBecause.<|im_end|>"
    with pytest.raises(UserError) as caught:
        tokenize([ONE, TWO], tokenizer, max_length=100, where="train.jsonl")
    assert str(caught.value).startswith("train.jsonl, example 2: the chat template writes turn 3 differently")
    for fix in ("{% generation %}", "model.chat_template=tulu", "data.loss=all"):
        assert fix in str(caught.value)
    assert tokenize([ONE, TWO], tokenizer, max_length=100, loss="all").summary.used == 2


def test_an_error_of_the_template_names_the_example() -> None:
    twice = chat_of(ONE.turns[0], *ONE.turns)
    with pytest.raises(UserError, match=r"^the data, example 2: the chat template fails: roles must alternate$"):
        tokenize([ONE, twice], tokenizer_of(template=LLAMA2), max_length=100)


def test_marks_around_nothing_are_an_error() -> None:
    template = "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{{ eos_token }}{% endfor %}"
    with pytest.raises(UserError, match=r"^the data, example 1: the chat template leaves no token to train on"):
        tokenize([ONE], tokenizer_of(template=template), max_length=100)


def test_marks_around_some_turns_are_taken_as_they_are() -> None:
    template = (
        "{% for m in messages %}{% if loop.index == 2 %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    )
    tokenizer = tokenizer_of(template=template)
    result = tokenize([chat("q", "first", "q", "second")], tokenizer, max_length=100)
    assert trained_text(tokenizer, result.dataset[0]["labels"]) == "first</s>"


def test_a_template_that_omits_or_never_ends_answers_is_refused() -> None:
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{{ eos_token }}{% endfor %}"
    endless = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    for loss in ("assistant", "all"):
        with pytest.raises(UserError, match=r"^The chat template leaves out the assistant's turns .*=tulu\|plain"):
            tokenize([ONE], tokenizer_of(template=parts), max_length=100, loss=loss)
        with pytest.raises(UserError, match=r"^The chat template writes nothing after an answer, .* write eos_token"):
            tokenize([ONE], tokenizer_of(template=endless), max_length=100, loss=loss)
