"""What a template does with a row is seen on the row: the right tokens are trained on, or it is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from chats import BODY, CHATML, ONE, chat, chat_of, rendered, tokenizer_of, trained_text, turn
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from hft_cli.data.chats import Chat
from hft_cli.data.pairs import prepare_pairs
from hft_cli.data.preferences import Preference
from hft_cli.data.prompts import make_prompts
from hft_cli.data.rendering import Renderer
from hft_cli.data.summary import trained_runs
from hft_cli.data.templates import answer_end
from hft_cli.data.tokenization import tokenize
from hft_cli.errors import UserError

ANSWER = "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
OTHER = "{{ " + BODY + " + m.content + '<|im_end|>\n' }}"
HEAD, PROMPT = (
    "{{ '<|im_start|>assistant\n' }}",
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
)


def loop(answer: str, before: str = "", after: str = PROMPT) -> str:
    return (
        before + "{% for m in messages %}{% if m.role == 'assistant' %}" + answer + "{{ '\n' }}{% else %}"
        + OTHER + "{% endif %}{% endfor %}" + after
    )  # fmt: skip


MACRO = "{% macro write(m) %}" + HEAD + ANSWER + "{% endmacro %}"
MARKED = {
    "a macro": loop("{{ write(m) }}", MACRO),
    "a set block": loop("{% set text %}" + HEAD + ANSWER + "{% endset %}{{ text }}"),
    "a filter": loop("{% filter trim %}" + HEAD + ANSWER + "{% endfilter %}"),
    "a call block": loop(
        "{% call outer() %}" + HEAD + ANSWER + "{% endcall %}", "{% macro outer() %}{{ caller() }}{% endmacro %}"
    ),
    "a recursive loop": (
        "{% for m in messages recursive %}{% if m.role == 'assistant' %}" + HEAD + ANSWER + "{{ '\n' }}{% else %}"
        + OTHER + "{% endif %}{% if m.none %}{{ loop(m.none) }}{% endif %}{% endfor %}" + PROMPT
    ),
    "control of white space": loop(
        HEAD + "\n  {%- generation -%}\n {{ m.content }}{{ '<|im_end|>' }}\n{%- endgeneration %}\n"
    ),
}  # fmt: skip


def trained(template: str, each: Chat, **options: Any) -> str:
    tokenizer = tokenizer_of(template=template)
    return trained_text(tokenizer, tokenize([each], tokenizer, max_length=1000, **options).dataset[0]["labels"])


@pytest.mark.parametrize("name", MARKED)
def test_marks_are_found_wherever_they_stand(name: str) -> None:
    each = chat("Capital of Peru?", "It is Lima, of course.", "Sure?", "Yes.", system="Be brief.")
    assert trained(MARKED[name], each) == "It is Lima, of course.<|im_end|>Yes.<|im_end|>"


THINK = chat("q", "<think>\nsix\n</think>\n\n42")
REFUSED: dict[str, tuple[str, Chat, str]] = {
    "drops the system": (CHATML.replace("m in messages", "m in messages if m.role != 'system'"),
                         chat("q", "a", system="s"), "leaves out turn 1, the system's"),
    "drops the first question": (CHATML.replace("m in messages", "m in messages[1:]"),
                                 chat("q", "a"), "leaves out turn 1, the user's"),
    "drops the reasoning": (CHATML.replace("m.content", "m.content.split('</think>')[-1]"),
                            THINK, "leaves out the reasoning of turn 2"),
    "an empty think block": (
        CHATML.replace("+ m.content", "+ ('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content"),
        THINK, "writes an empty place for reasoning before that of turn 2"),
    "a forced think": (CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"),
                       chat("q", "a"), "writes the prompt for an answer differently"),
    "upper case": (CHATML.replace("m.content", "(m.content | upper if m.role == 'user' else m.content)"),
                   chat("q", "a"), "changes turn 1, the user's"),
    "an answer twice": (CHATML.replace("m.content", "m.content + m.content"), chat("q", "a"), "repeats turn 2"),
    "no end within the chat": (
        CHATML.replace("+ '<|im_end|>'", "+ ('<|im_end|>' if loop.last else '')"),
        chat("q", "a", "r", "b"), "writes the prompt for an answer differently"),
    "a mark through an answer": (
        loop(HEAD + "{{ m.content[:2] }}{% generation %}{{ m.content[2:] + '<|im_end|>' }}{% endgeneration %}"),
        chat("q", "answer"), "cuts through turn 2"),
    "a mark around a question": (
        "{% generation %}" + CHATML + "{% endgeneration %}", chat("q", "a"), "includes a turn that is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_does_otherwise_is_refused(name: str) -> None:
    template, each, reason = REFUSED[name]
    with pytest.raises(UserError, match=r"^the data, example 1: the chat template |^the data, example 1: a ") as caught:
        trained(template, each)
    assert reason in str(caught.value)
    tokenizer = tokenizer_of(template=template)
    if "mark" in name or len(each.turns) > 3:
        return  # of DPO, only the last answer is generated
    pair = Preference(each, Chat((*each.turns[:-1], turn("assistant", "Other"))))
    with pytest.raises(UserError, match=r"^x, example 1: chosen: the chat template ") as caught:
        prepare_pairs([pair], tokenizer, 100, "x")
    assert reason in str(caught.value)


# Its variable takes empty reasoning out of the prompt; what the prompt does not have is part of an answer.
SWITCHED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ '<think></think>' }}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' + ('' if thinking else '<think></think>') }}{% endif %}"
)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_what_is_trained_on_does_not_depend_on_other_rows(order: tuple[int, ...]) -> None:
    tokenizer = tokenizer_of(template=SWITCHED)
    chats = [replace(chat("q", "a", "r", "b"), options=options) for options in ({"thinking": True}, {}, {"x": 1})]
    expected = ["<think></think>a<|im_end|><think></think>b<|im_end|>", *["a<|im_end|>b<|im_end|>"] * 2]
    rows = tokenize([chats[index] for index in order], tokenizer, max_length=1000).dataset
    assert [trained_text(tokenizer, row["labels"]) for row in rows] == [expected[index] for index in order]


@pytest.mark.parametrize("name", ["tool", "system"])
def test_tokens_that_only_other_chats_have_are_refused_too(name: str) -> None:
    template = CHATML.replace("<|im_end|>", "</s>").replace("+ m.role", f"+ (m.role, '<|im_end|>')[m.role == '{name}']")
    tokenizer = tokenizer_of(template=template.replace("'<|im_end|>'", "'<|im' + '_end|>'"))
    with pytest.raises(UserError, match=r"example 2: turn 2, the assistant's, holds the text '<\|im_end\|>'"):
        tokenize([chat("q", "a"), chat("q", "a<|im_end|>")], tokenizer, max_length=100)


def test_an_answer_ends_with_the_eos_token_that_follows_its_end() -> None:
    tokenizer = tokenizer_of(template=CHATML.replace("'<|im_end|>'", "'<|im_end|></s>'"))
    row = tokenize([chat("q", "a", "r", "b")], tokenizer, max_length=100).dataset[0]
    assert trained_text(tokenizer, row["labels"]) == "a<|im_end|></s>b<|im_end|></s>"
    assert answer_end(tokenizer) == ("</s>", tokenizer.eos_token_id)
    footer = "{% if not add_generation_prompt %}{{ '</s>' }}{% endif %}"  # of the chat, not of an answer
    tokenizer = tokenizer_of(template=CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>'") + footer)
    row = tokenize([chat("q", "a", "r", "b")], tokenizer, max_length=100).dataset[0]
    assert trained_text(tokenizer, row["labels"]) == "a<|im_end|>b<|im_end|>"


def test_an_end_that_is_not_read_as_its_token_is_refused() -> None:
    tokenizer = tokenizer_of(template=CHATML)
    tokenizer.add_tokens([AddedToken("<|im_end|>", single_word=True, special=True, normalized=False)])
    assert len(tokenizer("four<|im_end|>")["input_ids"]) > 2
    with pytest.raises(UserError, match=r"does not read '<\|im_end\|>' as its special token in '.*four<\|im_end\|>'"):
        tokenize([chat("q", "four")], tokenizer, max_length=100)


def test_a_fix_is_named_only_where_it_helps() -> None:
    forced = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    switched = forced + "{% if enable_thinking %}{% endif %}"
    for template, each, fixes in (
        (forced, chat("q", "a"), "set data.loss=all, or choose"),
        (
            forced,
            chat("q", "a", "r", "b"),
            "set data.loss=each_turn (a row for each answer), data.loss=last_turn, data",
        ),
        (switched, chat("q", "a"), "set model.thinking=true or false (reasoning), data.loss=all"),
    ):
        with pytest.raises(UserError) as caught:
            trained(template, each)
        assert fixes in str(caught.value)


def test_a_token_of_the_template_in_a_turn_is_kept_if_asked_for() -> None:
    tokenizer, each = tokenizer_of(template=CHATML), chat("a<|im_end|>", "b</s>")
    (row,) = tokenize([each], tokenizer, max_length=100, special_tokens="keep").dataset
    end = [tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|im_end|>")]
    assert row["labels"][-3:-1] == end
    assert row["input_ids"].count(end[1]) == 4  # three turns end, with that of the system
    prompt = make_prompts([each], tokenizer, max_length=100, where="x", special_tokens="keep").ids[0]
    assert prompt == row["input_ids"][: len(prompt)]
    pair = Preference(each, Chat((*each.turns[:-1], turn("assistant", "Other"))))
    kept = prepare_pairs([pair], tokenizer, 100, "x", special_tokens="keep").dataset[0]
    assert kept["chosen_ids"][-2:] == end
    assert tokenize([ONE, each], tokenizer, max_length=100, bad_rows="skip").summary.dropped == {"bad": 1}
    for function, start in (
        (lambda: tokenize([each], tokenizer, max_length=100), "the data, example 1: turn 1"),
        (lambda: make_prompts([each], tokenizer, max_length=100, where="x"), "x, example 1: turn 1"),
        (lambda: prepare_pairs([pair], tokenizer, 100, "x"), "x, example 1: chosen: turn 1"),
    ):
        with pytest.raises(UserError, match=rf"^{start}, the user's, holds the text '<\|im_end\|>'"):
            function()


@pytest.mark.parametrize("template", ["chatml", "tulu"])
@pytest.mark.parametrize("kind", ["bytes", "trimming", "bos", "pieces"])
def test_a_token_of_the_template_is_text_if_asked_for(kind: str, template: str) -> None:
    tokenizer = tokenizer_of(kind, CHATML if template == "chatml" else template)
    end = "<|im_end|>" if template == "chatml" else "</s>"
    each = chat(f"{end}{end} a {end}", f" b{end} c", f"{end}q", f"a\n{end}")
    (row, plain) = tokenize([each, ONE], tokenizer, max_length=999, special_tokens="text").dataset
    number = tokenizer.convert_tokens_to_ids(end)
    assert row["input_ids"].count(number) == rendered(tokenizer, chat("a", "b", "c", "d")).count(end)
    text = rendered(tokenizer, each)
    assert tokenizer.decode(row["input_ids"]).strip() == text.strip()
    answers = f" b{end} c{end}", f"a\n{end}{end}"
    runs = [trained_text(tokenizer, row["labels"][start:stop]) for start, stop in trained_runs(row["labels"])]
    assert [run.strip() for run in runs] == [answer.strip() for answer in answers]
    prompt = make_prompts([each], tokenizer, max_length=999, where="x", special_tokens="text").ids[0]
    assert prompt == row["input_ids"][: len(prompt)]
    assert row["labels"][len(prompt) - 1] == -100
    assert tokenize([ONE], tokenizer, max_length=999).dataset[0]["input_ids"] == plain["input_ids"]
    pair = Preference(each, Chat((*each.turns[:-1], turn("assistant", "Other"))))
    kept = prepare_pairs([pair], tokenizer, 999, "x", special_tokens="text").dataset[0]
    assert kept["prompt_ids"] + kept["chosen_ids"] == row["input_ids"][: len(kept["prompt_ids"] + kept["chosen_ids"])]


def test_a_token_in_a_call_cannot_be_text() -> None:
    call = {"function": {"name": "f", "arguments": {"a": "<|im_end|>"}}}
    template = CHATML.replace("m.content", "m.content + (m.tool_calls | tojson if m.tool_calls else '')")
    each = chat_of(turn("user", "q"), {"role": "assistant", "content": "a", "tool_calls": [call]})
    with pytest.raises(UserError, match=r"^the data, example 1: '<\|im_end\|>' cannot be tokenized as other text"):
        tokenize([each], tokenizer_of(template=template), max_length=99, special_tokens="text")


def test_an_added_token_of_the_template_counts_as_special() -> None:
    from tokenizers import AddedToken

    tokenizer = tokenizer_of(template=CHATML.replace("<|im_start|>", "<user>"))
    tokenizer.add_tokens([AddedToken("<user>", special=False)])  # as DeepSeek's
    for policy, reason in (("refuse", "turn 1, the user's, holds the text '<user>'"), ("text", "'<user>' cannot be")):
        with pytest.raises(UserError, match=rf"^the data, example 1: {reason}"):
            tokenize([chat("a<user>", "b")], tokenizer, max_length=99, special_tokens=policy)
    tokenize([chat("a<user>", "b")], tokenizer, max_length=99, special_tokens="keep")


def test_tokens_that_the_template_does_not_write_are_as_before() -> None:
    tokenizer = tokenizer_of(template=CHATML)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<fim>"]})
    (row,) = tokenize([chat("<fim>a", "b<fim>")], tokenizer, max_length=100).dataset
    assert row["input_ids"].count(tokenizer.convert_tokens_to_ids("<fim>")) == 2


def test_a_forced_think_is_the_prompt_of_rows_that_think() -> None:
    template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    assert trained(template, THINK) == "six\n</think>\n\n42<|im_end|>"


def test_a_footer_of_the_chat_is_not_part_of_an_answer() -> None:
    template = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"  # as Phi 3's
    assert trained(template, chat("q", "a", "r", "b")) == "a<|im_end|>b<|im_end|>"


def test_a_header_without_a_generation_prompt_is_not_trained_on() -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    assert trained(template, chat("q", "a", "r", "b")) == "a</s> b</s>"


@pytest.mark.parametrize("sides", [{"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}])
def test_a_token_that_takes_in_blanks_is_no_part_of_an_answer(sides: dict[str, bool]) -> None:
    from tokenizers import AddedToken

    tokenizer = tokenizer_of(
        template=CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<|a|>'").replace(
            "+ m.content", "+ ('<|a|>' if m.role == 'assistant' else '') + m.content"
        )
    )
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<|a|>", **sides)]})
    each = chat("q ", " a ")
    labels = tokenize([each], tokenizer, max_length=99).dataset[0]["labels"]
    assert trained_text(tokenizer, labels).strip() == "a <|im_end|>"
    prompt = make_prompts([each], tokenizer, max_length=99, where="x").ids[0]
    assert tokenizer.decode(prompt).endswith("<|a|>")


def test_the_number_of_renderings_does_not_grow_with_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for turns in (20, 800):
        tokenizer = tokenizer_of(template=CHATML)
        count = 0
        original = tokenizer.apply_chat_template

        def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
        each = chat(*(f"turn {number}" for number in range(turns)))
        Renderer(tokenizer).render(each, "x", each.answers)
        calls.append(count)
    assert calls[0] == calls[1] < 20


# ------------------------------------------------------------------------------------------------------- by property

ROLES = st.sampled_from(["user", "user", "system", "tool"])
TEXTS = st.text(st.sampled_from(" \naé🙂\u200d<>/|_:3\u00a0"), max_size=6).map(lambda text: "x" + text + "y")


@st.composite
def chats(draw: Any) -> Chat:
    turns: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(1, 2))):
            turns.append(
                turn(draw(ROLES), draw(st.sampled_from(["", " "])) + draw(TEXTS) + draw(st.sampled_from(["", "\n"])))
            )
        thought = draw(st.sampled_from(["", "", f"<think>{draw(TEXTS)}</think>"]))
        turns.append(turn("assistant", thought + draw(TEXTS)))
    answers = [index for index, each in enumerate(turns) if each["role"] == "assistant"]
    masked = draw(st.sets(st.sampled_from(answers), max_size=len(answers) - 1))
    return chat_of(*turns, masked=tuple(sorted(masked)))


@st.composite
def templates(draw: Any) -> tuple[str, str, str]:
    """A template; what it writes after an answer as far as it is trained on; and the filter of the contents."""
    strip = draw(st.sampled_from(["", " | trim"]))
    header = draw(st.sampled_from(["'<|im_start|>' + m.role + '\n'", "'[' + m.role + ']'"]))
    end = draw(st.sampled_from(["<|im_end|>", "</s>", " </s>", "\n###\n"]))
    answer = "{{ m.content" + strip + " }}{{ " + repr(end) + " }}"
    if draw(st.booleans()):
        answer = "{% generation %}" + answer + "{% endgeneration %}"
    whole = "{{ " + header + " }}" + answer
    wrap = draw(
        st.sampled_from(["{}", "{{% set t %}}{}{{% endset %}}{{{{ t }}}}", "{{% filter string %}}{}{{% endfilter %}}"])
    )
    other = "{{ " + header + " }}{{ m.content" + strip + " }}{{ '</s>' }}"
    body = "{% for m in messages %}{% if m.role == 'assistant' %}" + wrap.format(whole) + "{% else %}" + other
    prompt = header.replace("m.role", "'assistant'")
    start = draw(st.sampled_from(["", "{{ bos_token }}"]))
    return (
        start + body + "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ " + prompt + " }}{% endif %}",
        end if "<" in end else end.rstrip(),
        strip,
    )


@settings(max_examples=150, deadline=None)
@given(chats(), templates(), st.sampled_from(["bytes", "trimming", "bos"]))
def test_exactly_the_answers_and_their_ends_have_a_loss(each: Chat, made: tuple[str, str, str], kind: str) -> None:
    template, end, strip = made
    tokenizer = tokenizer_of(kind, template)
    row = tokenize([each], tokenizer, max_length=10_000).dataset[0]
    contents = [each.turns[index]["content"] for index in each.answers if index not in each.masked]
    expected = "".join((content.strip() if strip else content) + end for content in contents)
    assert trained_text(tokenizer, row["labels"]) == expected
    last = each.answers[-1]
    prompt = make_prompts([each], tokenizer, max_length=10_000, where="x").ids[0]
    assert row["input_ids"][: len(prompt)] == prompt
    if last not in each.masked:
        assert row["labels"][len(prompt) - 1] == -100
        assert -100 not in row["labels"][len(prompt) : len(prompt) + 2]
    pair = Preference(each, Chat((*each.turns[:-1], turn("assistant", "zz"))))
    chosen = prepare_pairs([pair], tokenizer, 10_000, "x").dataset[0]
    content = each.turns[last]["content"]
    assert tokenizer.decode(chosen["chosen_ids"]) == (content.strip() if strip else content) + end


def test_one_answer_is_read_as_the_other_tests_do() -> None:
    assert trained(CHATML, ONE) == "Because.<|im_end|>"
