"""Reasoning before an answer: the switch of chat templates, and what is left of a generated text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hft_cli.config.schema import ModelConfig
from hft_cli.data.model_template import use_template
from hft_cli.data.reasoning import decode_answer, has_reasoning, split_reasoning
from hft_cli.errors import UserError
from hft_cli.paths import resolve_path

TURNS = [{"role": "user", "content": "q"}]
TEXTS = st.text(st.characters(exclude_characters="<[◁|", exclude_categories=["Cs"]), max_size=20)

# As Qwen3's: an empty place for reasoning before the last answer, and a switch that puts it into the prompt.
QWEN = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As DeepSeek-V3.1's: the variable has a default within the template.
DEEPSEEK = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}\n"
    "A:{{ '<think>' if thinking else '</think>' }}"
)


def tokenizer(template: str):
    loaded = AutoTokenizer.from_pretrained(resolve_path("pocket:model"))
    loaded.chat_template = template
    return loaded


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\n\n</think>\n\n42", "\n\n", "42"),
        ("<think>six\nby seven</think>42", "six\nby seven", "42"),
        ("\n<thinking>a</thinking> 42 </thinking>", "a", "42 </thinking>"),
        ("[THINK]a[/THINK]42", "a", "42"),
        ("<think>\n\n</think>\n\n<think>\n</think>\n\n42", "\n\n\n", "42"),
        ("<think>a</think><think>too long", "atoo long", ""),
        ("◁think▷a◁/think▷42", "a", "42"),
        ("a</think>\n42", "a", "42"),  # the prompt has opened it
        ("<think>too long", "too long", ""),
        ("42", None, "42"),
        ("", None, ""),
        ("I think <think> is a tag", None, "I think <think> is a tag"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>42", "a", "42"),
        ("<|channel|>final<|message|>42", "", "42"),
        ("<|channel|>analysis<|message|>too long", "<|channel|>analysis<|message|>too long", ""),
    ],
)
def test_the_answer_is_what_follows_the_reasoning(text, reasoning, answer):
    assert split_reasoning(text) == (reasoning, answer)


def test_reasoning_that_does_not_end_is_no_answer():
    assert split_reasoning("six by", "A: <think>\n") == ("six by", "")
    assert split_reasoning("42", "A: <think>\n\n</think>\n\n") == (None, "42")


@given(TEXTS, TEXTS)
def test_any_reasoning_is_left_out(reasoning, answer):
    assert split_reasoning(f"<think>{reasoning}</think>{answer}") == (reasoning, answer.lstrip())
    assert split_reasoning(answer) == (None, answer)


def test_special_tokens_are_no_part_of_an_answer():
    pocket = tokenizer(QWEN)
    for text in ("<think>a</think>42", "42"):
        tokens = [*pocket.encode(text, add_special_tokens=False), pocket.eos_token_id]
        assert decode_answer(tokens, pocket)[1] == "42"


@pytest.mark.parametrize(
    ("template", "thinking", "prompt"),
    [
        (QWEN, None, "qA:"), (QWEN, True, "qA:"), (QWEN, False, "qA:<think>\n\n</think>\n\n"),
        (DEEPSEEK, None, "A:</think>"), (DEEPSEEK, True, "A:<think>"), (DEEPSEEK, False, "A:</think>"),
        ("\nA:{{ thinking }}", True, "\nA:True"),
    ],
)  # fmt: skip
def test_the_switch_of_a_template_is_set_by_its_default(template, thinking, prompt):
    used = tokenizer(template)
    assert use_template(ModelConfig(thinking=thinking), used) == used.chat_template
    rendered = used.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert rendered == prompt
    assert has_reasoning(used) == ("<think>" in template)


def test_a_caller_can_still_use_the_switch():
    used = tokenizer(QWEN)
    use_template(ModelConfig(thinking=False), used)
    options = {"tokenize": False, "add_generation_prompt": True}
    assert used.apply_chat_template(TURNS, enable_thinking=True, **options) == "qA:"


def test_a_template_without_a_switch_is_refused():
    with pytest.raises(UserError, match=r"model\.thinking=false: the chat template has no switch .*enable_thinking or"):
        use_template(ModelConfig(thinking=False), tokenizer("A: thinking {{ messages[0].content }}"))
