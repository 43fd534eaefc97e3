"""Small rows of every kind, and exactly what of them has a loss, on three templates, for SFT and DPO."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from chats import tokenizer_of, trained_text

from hft_cli.data.pairs import prepare_pairs
from hft_cli.data.preferences import Preference
from hft_cli.data.rows import read_chats
from hft_cli.data.summary import trained_runs
from hft_cli.data.tokenization import tokenize
from hft_cli.errors import UserError

TURN = "{{ '<|im_start|>' + m.role + '\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
UNMARKED = f"{{% for m in messages %}}{TURN}{{{{ m.content + '<|im_end|>\n' }}}}{{% endfor %}}{PROMPT}"
MARKED = (
    f"{{% for m in messages %}}{TURN}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    f"{{% endfor %}}{PROMPT}"
)
REASONING = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    f"{{% endif %}}{{% for m in messages %}}{TURN}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' }}{{ c.function.arguments | tojson }}"
    "{{ '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
TEMPLATES = {"marked": MARKED, "unmarked": UNMARKED, "reasoning": REASONING}
END = "<|im_end|>"


@dataclass(frozen=True)
class Case:
    """A row; the answers with a loss; and where they are others, or the row is refused, by template ("": all)."""

    row: dict[str, Any]
    trained: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    loss: str = "assistant"


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def chat(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


def call(arguments: Any, name: str = "weather") -> list[dict[str, Any]]:
    return [{"function": {"name": name, "arguments": arguments}}]


Q = user("q")
PLAIN = ("marked", "unmarked")
NO_CALLS = dict.fromkeys(PLAIN, "leaves out 'tool_calls'")
NO_REASONING = dict.fromkeys(PLAIN, "leaves out the reasoning of turn 2")
NO_TOOLS = dict.fromkeys(PLAIN, "leaves out the row's tool")
TWO = (Q, said("a"), user("r"), said("b"))
SYSTEM = {"role": "system", "content": "s"}
ALPACA = {"instruction": "q", "output": "a"}

CASES: dict[str, Case] = {
    # A. fields with a meaning
    "two answers": Case(chat(*TWO), ["a", "b"]),
    "weight 0": Case(chat(Q, said("a", weight=0), *TWO[2:]), ["b"]),
    "weight 0 of the last": Case(chat(*TWO[:3], said("b", weight=0)), ["a"]),
    "weight 1": Case(chat(Q, said("a", weight=1), *TWO[2:]), ["a", "b"]),
    "weight 0.0": Case(chat(Q, said("a", weight=0.0), *TWO[2:]), ["b"]),
    "weight 0.5": Case(chat(Q, said("a", weight=0.5)), refused={"": "'weight' of turn 2 of 'messages' is 0.5"}),
    "train false": Case(chat(Q, said("a", train=False), *TWO[2:]), ["b"]),
    "loss false": Case(chat(Q, said("a", loss=False), *TWO[2:]), ["b"]),
    "mask false": Case(chat(Q, said("a", mask=False), *TWO[2:]), ["b"]),
    "train true of a user": Case(chat(user("q", train=True), said("a")), refused={"": "gives a loss to the user's"}),
    "weight 0 of a user": Case(chat(user("q", weight=0), said("a")), ["a"]),
    "no answer with a loss": Case(chat(Q, said("a", weight=0)), refused={"": "every answer is without a loss"}),
    "fields that contradict": Case(chat(Q, said("a", weight=0, train=True)), refused={"": "contradict each other"}),
    "a call": Case(chat(Q, said("x", tool_calls=call({"c": "O"}))), ['x<call>weather {"c": "O"}</call>'], NO_CALLS),
    "a call as text": Case(chat(Q, said("", tool_calls=call("{}"))), ["<call>weather {}</call>"], NO_CALLS),
    "a call, no content": Case(chat(Q, said(None, tool_calls=call({}))), ["<call>weather {}</call>"], NO_CALLS),
    "an older call": Case(
        chat(Q, said("", function_call={"name": "f", "arguments": '{"a": 1}'})), ['<call>f {"a": 1}</call>'], NO_CALLS
    ),
    "arguments that are no JSON": Case(chat(Q, said("", tool_calls=call("{"))), refused={"": "weather are not JSON"}),
    "a call without a name": Case(chat(Q, said("", tool_calls=[{}])), refused={"": "a function's 'name'"}),
    "a call and its result": Case(
        chat(Q, said("", tool_calls=call({})), {"role": "tool", "content": "3"}, said("It is 3.")),
        ["<call>weather {}</call>", "It is 3."], NO_CALLS,
    ),
    "a role of results": Case(chat(Q, said("a"), {"role": "observation", "content": "o"}, said("b")), ["a", "b"]),
    "tools": Case(chat(Q, said("a"), tools=[{"name": "weather"}]), ["a"], NO_TOOLS),
    "tools as text": Case(chat(Q, said("a"), tools='[{"name": "weather"}]'), ["a"], NO_TOOLS),
    "tools without a name": Case(chat(Q, said("a"), tools=[{}]), ["a"], dict.fromkeys(PLAIN, "the row's 'tools'")),
    "no tools": Case(chat(Q, said("a"), tools=[]), ["a"]),
    "tools that are none": Case(chat(Q, said("a"), tools=3), refused={"": "'tools' is a number, not a list"}),
    "reasoning": Case(chat(Q, said("a", reasoning_content="t")), ["<think>t</think>a"], NO_REASONING),
    "thinking": Case(chat(Q, said("a", thinking="t")), ["<think>t</think>a"], NO_REASONING),
    "empty reasoning": Case(chat(Q, said("a", reasoning_content="")), ["a"]),
    "reasoning in the content": Case(chat(Q, said("<think>t</think>a")), ["<think>t</think>a"]),
    "reasoning of a user": Case(chat(user("q", thinking="t"), said("a")), refused={"": "reasoning, which only the"}),
    "reasoning of a row": Case({**ALPACA, "reasoning": "t"}, refused={"": "the row has 'reasoning'"}),
    "images": Case(chat(Q, said("a"), images=["x.png"]), refused={"": "the row has 'images'"}),
    "no images": Case(chat(Q, said("a"), images=[]), ["a"]),
    "an image in a turn": Case(chat(user("q", images=["x"]), said("a")), refused={"": "'messages' has 'images'"}),
    "parts of text": Case(chat(user([{"type": "text", "text": "q"}]), said([{"type": "text", "text": "a"}])), ["a"]),
    "a part that is an image": Case(chat(user([{"type": "image_url"}]), said("a")), refused={"": "type 'image_url'"}),
    "a part that is reasoning": Case(
        chat(Q, said([{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}])),
        ["<think>t</think>a"], NO_REASONING,
    ),
    "system and history": Case({**ALPACA, "system": "s", "history": [["x", "y"]]}, ["y", "a"]),
    "history of turns": Case({**ALPACA, "history": [user("x"), said("y", weight=0)]}, ["a"]),
    "history that is none": Case({**ALPACA, "history": [["x"]]}, refused={"": "pairs of question and answer"}),
    "two systems": Case(chat(SYSTEM, Q, said("a"), system="t"), refused={"": "a 'system' and a first turn"}),
    "a system twice": Case(chat(SYSTEM, Q, said("a"), system="s"), ["a"]),
    "input 0": Case({**ALPACA, "input": 0}, ["a"]),
    "input false": Case({**ALPACA, "input": False}, refused={"": "'input' is a boolean, not a string"}),
    "input of a list": Case({**ALPACA, "input": []}, refused={"": "'input' is a list, not a string"}),
    "orca": Case({"system_prompt": "s", "question": "q", "response": "a"}, ["a"]),
    "raw text": Case({"text": "a b"}, [" b</s>"]),
    # C. borders
    "completion only": Case({"prompt": [*TWO[:3]], "completion": "b"}, ["b"]),
    "completion of turns": Case({"prompt": [Q], "completion": [said("a"), user("r"), said("b")]}, ["a", "b"]),
    "a prefilled prompt": Case({"prompt": [Q, said("The city is")], "completion": " Lima"}, [" Lima"]),
    "a prefilled prompt, turns": Case({"prompt": [Q, said("It was:")], "completion": [said("so")]}, ["so"]),
    "a prefill of blanks": Case({"prompt": [Q, said(" ")], "completion": "a"}, ["a"]),
    "an empty completion": Case({"prompt": "q", "completion": " "}, refused={"": "turn 2: the assistant's answer"}),
    "blanks around an answer": Case(chat(Q, said("  a \n")), ["  a \n"]),
    "a blank at the end": Case({"prompt": "q", "completion": "a "}, ["a "]),
    "the EOS token in an answer": Case(
        chat(Q, said("a</s>b")), refused={"": "turn 2, the assistant's, holds the text '</s>'"}
    ),
    "the end in an answer": Case(chat(Q, said("a<|im_end|>")), refused={"": "holds the text '<|im_end|>', which"}),
    "a header in a question": Case(
        chat(*TWO[:2], user("<|im_start|>q"), TWO[3]), refused={"": "turn 3, the user's, holds the text '<|im_start|>'"}
    ),
    "the end in reasoning": Case(
        chat(Q, said("b", reasoning_content="a<|im_end|>")),
        refused={**NO_REASONING, "reasoning": "holds the text '<|im_end|>'"},
    ),
    "the end in a call": Case(
        chat(Q, said("", tool_calls=call({"city": "<|im_end|>"}))),
        refused={**NO_CALLS, "reasoning": "holds the text '<|im_end|>'"},
    ),
    "the end in a tool": Case(
        chat(*TWO, tools=[{"name": "f", "description": "<|im_end|>"}]),
        refused={**NO_TOOLS, "reasoning": "'tools' holds the text"},
    ),
    "the BOS token in a turn": Case(chat(user("<s>q"), said("a<s>b")), ["a<s>b"]),
    "a header's text in an answer": Case(chat(Q, said("assistant\nq"), *TWO[2:]), ["assistant\nq", "b"]),
    "private characters": Case(chat(user("\U000f0000q"), said("a\U000f0001")), ["a\U000f0001"]),
    # what has a loss
    "the last turn": Case(chat(*TWO), ["b"], loss="last_turn"),
    "a chat's completion": Case(chat(*TWO), ["b"], loss="completion"),
    "a completion of two answers": Case(
        {"prompt": [Q], "completion": [said("a"), user("r"), said("b")]}, ["a", "b"], loss="completion"
    ),
    "a completion after a call": Case(
        chat(*TWO[:3], said("", tool_calls=call({})), {"role": "tool", "content": "3"}, said("b")),
        ["<call>weather {}</call>", "b"], NO_CALLS, loss="completion",
    ),
    "the last turn is masked": Case(
        chat(*TWO[:3], said("b", weight=0)), refused={"": "no answer has a loss under data.loss=last_turn"},
        loss="last_turn",
    ),
    "an answer to avoid": Case({"prompt": "q", "completion": "a", "label": False}, refused={"": "'label' is false"}),
    "a greeting": Case(chat(said("hello"), Q, said("a")), refused={"": "the first turn is the assistant's: there is"}),
    "a greeting without a loss": Case(chat(said("hello", weight=0), Q, said("a")), ["a"]),
    "a turn of a tree": Case({"text": "a", "role": "prompter"}, refused={"": "the row is one turn of a chat"}),
    "a good answer": Case({"prompt": "q", "completion": "a", "label": True}, ["a"]),
    "a class": Case({"prompt": "q", "completion": "a", "label": 0}, ["a"]),
    # D. values
    "null fields": Case(chat(user("q", weight=None), said("a", tool_calls=None, weight=None), tools=None), ["a"]),
    "a null column": Case({"messages": None, **ALPACA}, ["a"]),
    "a whole number": Case({"prompt": "q", "answer": 5.0}, ["5"]),
    "roles of ShareGPT": Case(
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["a"]
    ),
    "a function call of ShareGPT": Case(
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f"}'}]},
        ["<call>f {}</call>"], NO_CALLS,
    ),
    "a number as completion": Case({"prompt": 1, "completion": 2}, ["2"]),
    "null in a call": Case(chat(Q, said("", tool_calls=call({"c": "O", "d": None, "e": [{"f": None}]}))),
                           ['<call>weather {"c": "O", "e": [{}]}</call>'], NO_CALLS),
    "NaN in a call": Case(chat(Q, said("", tool_calls=call('{"a": NaN}'))), refused={"": "NaN is not JSON"}),
    "a key twice in a call": Case(
        chat(Q, said("", tool_calls=call('{"a": 1, "a": 2}'))), refused={"": "the key 'a' comes twice"}
    ),
    "a key twice in turns": Case(
        {"messages": '[{"role": "user", "role": "system", "content": "q"}]'}, refused={"": "the key 'role' comes twice"}
    ),
    "tools that are texts": Case(chat(Q, said("a"), tools=['{"name": "weather"}']), ["a"], NO_TOOLS),
    "tools with a text that is none": Case(
        chat(Q, said("a"), tools=["weather"]), refused={"": "'tools' is a list with a string in it, not a list of"}
    ),
    "blank reasoning": Case(chat(Q, said("a", reasoning_content=" \n")), ["a"]),
    "empty reasoning in the content": Case(chat(Q, said("<think>\n\n</think>\n\na")), ["<think>\n\n</think>\n\na"]),
    "tags alone": Case(chat(Q, said("<think></think>")), refused={"": "turn 2, the assistant's, has no text but tags"}),
    "a tag that is mentioned": Case(chat(Q, said("Put <think> there.")), ["Put <think> there."]),
    "a tag at the end": Case(chat(Q, said("in <thought> and </thought>")), ["in <thought> and </thought>"]),
    "a tag and blanks at the end": Case(chat(Q, said("<think>t</think>\n\n")), ["<think>t</think>\n\n"]),
    "a completion that is a dialogue": Case(
        {"prompt": "Write one.", "completion": "Human: q\n\nAssistant: a"}, ["Human: q\n\nAssistant: a"]
    ),
    "a dialogue as text": Case({"prompt": "\n\nHuman: q\n\nAssistant:", "completion": "a"}, ["a"]),
}  # fmt: skip


def spans(tokenizer: Any, labels: list[int]) -> list[str]:
    return [trained_text(tokenizer, labels[start:end]) for start, end in trained_runs(labels)]


def expected(case: Case) -> list[str]:
    return case.trained if "text" in case.row else [answer + END for answer in case.trained]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CASES)
def test_exactly_these_tokens_have_a_loss(name: str, template: str, tmp_path: Path) -> None:
    case, tokenizer = CASES[name], tokenizer_of(template=TEMPLATES[template])
    (tmp_path / "a.jsonl").write_text(json.dumps(case.row) + "\n")

    def trained() -> list[str]:
        rows = read_chats(str(tmp_path / "a.jsonl"))
        return spans(tokenizer, tokenize(rows, tokenizer, max_length=1000, loss=case.loss).dataset[0]["labels"])

    reason = case.refused.get("", case.refused.get(template))
    if reason is None:
        assert trained() == expected(case)
        return
    with pytest.raises(UserError) as caught:
        trained()
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl, line 1: ")
    assert reason in str(caught.value)


def last_answers() -> list[str]:
    """Cases whose last answer has a loss, and is one that a pair may have."""
    return [name for name, case in CASES.items() if case.trained and "text" not in case.row and "last" not in name]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", last_answers())
def test_dpo_trains_on_the_last_answer_of_the_same_rows(name: str, template: str, tmp_path: Path) -> None:
    case, tokenizer = CASES[name], tokenizer_of(template=TEMPLATES[template])
    (tmp_path / "a.jsonl").write_text(json.dumps(case.row) + "\n")
    (chosen,) = read_chats(str(tmp_path / "a.jsonl"))
    content = chosen.turns[-1]["content"][: chosen.prefill if chosen.prompt_turns == len(chosen.turns) - 1 else 0]
    other = {"role": "assistant", "content": f"{content}Another."}
    rejected = type(chosen)(**{**vars(chosen), "turns": (*chosen.turns[:-1], other)})
    pairs = [Preference(chosen, rejected)]
    if template in case.refused:
        with pytest.raises(UserError, match=r"^x, example 1: (chosen|rejected): the chat template leaves out"):
            prepare_pairs(pairs, tokenizer, 1000, "x")
        return
    row = prepare_pairs(pairs, tokenizer, 1000, "x").dataset[0]
    answers = [tokenizer.decode(row[key]) for key in ("chosen_ids", "rejected_ids")]
    assert answers == [expected(case)[-1], f"Another.{END}"]
