"""hft_cli.data: what is read, what is refused and how, and that what is trained on is the assistant's text only."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hft_cli.data.rows import SHAPES, Chat, content_hash, count_repeats, read_chats
from hft_cli.data.templates import chat_template
from hft_cli.data.tokenization import prompts, tokenize
from hft_cli.errors import UserError
from hft_cli.paths import resolve_path


def chat(*contents: str, system: str = "") -> Chat:
    """user, assistant, user, … after the system's turn, if there is one."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


ONE = chat("Why?", "Because.")
TWO = chat("Why?", "Because.", "Why so?", "  It is so.\n", system="Be brief.")

# ------------------------------------------------------------------------------------------------------------ reading

ROWS: dict[str, tuple[dict[str, Any], Chat]] = {
    "messages": ({"dataset": "x", "id": "7", "messages": TWO}, TWO),
    "messages, further keys in a turn": ({"messages": [{**turn, "weight": None} for turn in ONE]}, ONE),
    "prompt_completion": ({"prompt": "Why?", "completion": "Because."}, ONE),
    "prompt_completion, as lists": ({"prompt": ONE[:1], "completion": ONE[1:]}, ONE),
    "alpaca": ({"instruction": "Why?", "input": "", "output": "Because."}, ONE),
    "alpaca, no input": ({"instruction": "Why?", "input": None, "output": "Because."}, ONE),
    "alpaca, input": ({"instruction": "Why", "input": "it?", "output": "Because."}, chat("Why\n\nit?", "Because.")),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}, ONE),
    "sharegpt, other names": (
        {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in TWO]},
        TWO,
    ),
    "trace": ({"prompt": "Why?", "answer": "Because."}, ONE),
    "messages rather than trace": ({"prompt": "p", "answer": "a", "messages": ONE}, ONE),
}


def write(path: Path, rows: list[Any]) -> str:
    """Write the rows in the format which the suffix says."""
    if path.name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)
    lines = ".jsonl" in path.name
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ROWS)
def test_a_shape_is_known_from_its_keys(name: str, tmp_path: Path) -> None:
    row, expected = ROWS[name]
    assert read_chats(write(tmp_path / "a.jsonl", [row, row])) == [expected, expected]


@pytest.mark.parametrize("name", ROWS)
def test_a_shape_can_be_said(name: str, tmp_path: Path) -> None:
    row, expected = ROWS[name]
    assert read_chats(write(tmp_path / "a.jsonl", [row]), format=name.split()[0].strip(",")) == [expected]


def test_every_shape_has_a_row_above() -> None:
    assert {name.split(",")[0].split()[0] for name in ROWS} == set(SHAPES)


def test_a_said_shape_wins_over_the_keys(tmp_path: Path) -> None:
    row = {"prompt": "Why?", "answer": "Because.", "messages": TWO}
    assert read_chats(write(tmp_path / "a.jsonl", [row]), format="trace") == [ONE]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet"])
def test_every_file_format_gives_the_same_chats_and_the_same_hash(suffix: str, tmp_path: Path) -> None:
    read = read_chats(write(tmp_path / f"a{suffix}", [{"messages": ONE}, {"messages": TWO}]))
    assert read == [ONE, TWO]
    assert content_hash(read) == content_hash([ONE, TWO])


def test_an_object_with_one_list_is_read_as_that_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": [{"messages": ONE}]}))
    assert read_chats(str(tmp_path / "a.json")) == [ONE]


def test_a_byte_order_mark_and_empty_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\ufeff" + json.dumps({"messages": ONE}) + "\n\n", encoding="utf-8")
    assert read_chats(str(tmp_path / "a.jsonl")) == [ONE]


def test_the_hash_tells_order_roles_and_text_apart() -> None:
    others = [[ONE, TWO], [TWO, ONE], [ONE], [ONE, ONE], [chat("Why?Because.", "")], [chat("é", "Because.")]]
    assert len({content_hash(chats) for chats in others}) == len(others)


def test_rows_that_repeat_an_earlier_one_and_rows_of_the_test_set_are_counted() -> None:
    others = [[turn("user", "Why?"), turn("system", "x"), ONE[1]], chat("Why?", "Because. "), chat("Why?Because.", "x")]
    assert count_repeats([ONE, *others], []) == (0, 0)
    assert count_repeats([ONE, TWO, [dict(turn) for turn in ONE], ONE], [TWO]) == (2, 1)
    assert count_repeats([ONE, TWO, ONE], [chat("Why?", "Because."), *others, ONE]) == (1, 2)
    assert count_repeats([], [ONE]) == (0, 0)


@given(st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)))
def test_repeats_are_what_a_search_finds(train: list[int], test: list[int]) -> None:
    earlier = sum(number in train[:place] for place, number in enumerate(train))
    both = sum(number in test for number in train)
    rows = [[chat("q", str(number)) for number in numbers] for numbers in (train, test)]
    assert count_repeats(*rows) == (earlier, both)


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["train.jsonl", "test.jsonl"], "train"),
        (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"], "train"),
        (["eval.json", "train.json", "test.json"], "eval"),
        (["train_prefs.jsonl.gz", "test_prefs.jsonl.gz"], "train_prefs"),
        (["mine.jsonl"], "train"),
    ],
)
def test_a_folder_gives_the_files_of_its_split(names: list[str], split: str, tmp_path: Path) -> None:
    for name in names:
        wanted = name.startswith(split) or len(names) == 1
        write(tmp_path / name, [{"messages": ONE if wanted else TWO}])
    (tmp_path / "README.md").write_text("not data")
    assert read_chats(str(tmp_path), split=split) == [ONE]


def test_the_parts_of_a_split_are_read_in_order(tmp_path: Path) -> None:
    for part in (1, 0):
        write(tmp_path / f"train-0000{part}-of-00002.jsonl", [{"messages": [ONE, TWO][part]}])
    assert read_chats(str(tmp_path)) == [ONE, TWO]


def test_max_rows_leaves_later_rows_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": ONE}) + "\nnot JSON\n")
    assert read_chats(str(path), max_rows=1) == [ONE]


def test_another_name_is_one_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(name: str, **options: Any) -> Any:
        calls.append((name, options))
        return iter([{"messages": ONE}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_chats("org/set", split="test", max_rows=2) == [ONE, ONE]
    assert calls == [("org/set", {"split": "test", "streaming": True})]


def test_what_the_hub_raises_is_one_line_with_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, **options: Any) -> Any:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError) as caught:
        read_chats("org/set")
    assert str(caught.value) == (
        "'org/set' is no file or folder here, and its split 'train' could not be loaded from the hub: no route"
    )


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "a string": ("Why?", "not an object but a string."),
    "a list": ([1], "not an object but a list."),
    "a key missing": ({"prompt": "p"}, "no 'messages', which the shape 'messages' needs (keys found: prompt)."),
    "no list": ({"messages": None}, "'messages' is null, not a list of turns."),
    "an empty list": ({"messages": []}, "'messages' is empty, not a list of turns."),
    "a turn that is text": ({"messages": ["hi"]}, "turn 1 of 'messages' is a string, not an object."),
    "a turn without content": (
        {"messages": [{"role": "user"}]},
        "turn 1 of 'messages' has no 'content' (keys found: role)",
    ),
    "content in parts": (
        {"messages": [turn("user", [{"type": "text"}])]},
        "'content' in turn 1 of 'messages' is a list, not a string.",
    ),
    "content a number": (
        {"messages": [turn("user", 3)]},
        "'content' in turn 1 of 'messages' is a number, not a string.",
    ),
    "a role unknown": (
        {"messages": [ONE[0], turn("asistant", "x")]},
        "Unknown role in turn 2 of 'messages': 'asistant'. Did you mean 'assistant'?",
    ),
    "a tool": ({"messages": [turn("tool", "x")]}, "Unknown role in turn 1 of 'messages': 'tool'."),
    "no assistant": ({"messages": ONE[:1]}, "no assistant turn, so nothing to learn."),
    "an empty answer": ({"messages": chat("q", " \n")}, "turn 2: the assistant's answer is empty."),
    "a user at the end": ({"messages": chat("q", "a", "q")}, "the last turn is the user's, not the assistant's."),
    "an answer at the start": ({"messages": [turn("assistant", "a")]}, "the first turn is the assistant's"),
    "half a surrogate": ({"messages": chat("q", "a\ud83d")}, "turn 2: half a surrogate pair at character 1."),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_its_line_and_its_fault(name: str, tmp_path: Path) -> None:
    row, reason = BAD_ROWS[name]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": ONE}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        read_chats(str(path))
    assert str(caught.value).startswith(f"{path}, line 3: {reason}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_bad_row_of_a_list_or_table_is_named_by_its_number(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{suffix}", [{"prompt": "q", "answer": "a"}, {"prompt": "q", "answer": None}])
    with pytest.raises(UserError) as caught:
        read_chats(path)
    assert str(caught.value) == f"{path}, row 2: 'answer' is null, not a string."


def test_an_unknown_shape_is_answered_with_the_known_ones_and_the_keys_found(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_chats(write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}]))
    assert "line 1: unknown shape (keys found: question, answer). Known: messages (messages), " in str(caught.value)
    assert all(shape in str(caught.value) for shape in SHAPES)


FILES: dict[str, tuple[str, bytes, str]] = {
    "not JSON": ("a.jsonl", b'{"a": 1}x\n', "a.jsonl, line 1: not JSON (Extra data at line 1 column 9)."),
    "JSON lines in .json": (
        "a.json",
        b"{}\n{}",
        "a.json: not JSON (Extra data at line 2 column 1). One object a line? ",
    ),
    "no list": ("a.json", b'{"a": 1}', "neither a list of objects nor an object with one list in it, but an object."),
    "two lists": ("a.json", b'{"a": [], "b": []}', "neither a list of objects nor an object with one list in it"),
    "no rows": ("a.jsonl", b"\n", "No rows in "),
    "an empty list": ("a.json", b"[]", "No rows in "),
    "not UTF-8": ("a.jsonl", b'{"a": "\xff"}', "a.jsonl cannot be read: 'utf-8' codec"),
    "not gzip": ("a.jsonl.gz", b"{}", "a.jsonl.gz cannot be read: Not a gzipped file"),
    "gzip cut short": ("a.jsonl.gz", gzip.compress(b"{}" * 99)[:15], "a.jsonl.gz cannot be read: "),
    "not parquet": ("a.parquet", b"{}", "a.parquet cannot be read: "),
    "another suffix": ("a.csv", b"", "a.csv is none of .json, .jsonl, .json.gz, .jsonl.gz, .parquet."),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named_with_its_fault(name: str, tmp_path: Path) -> None:
    file, content, reason = FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_chats(str(tmp_path / file))
    assert reason in str(caught.value)
    assert str(tmp_path / file) in str(caught.value)


@pytest.mark.parametrize("path", ["./nothing", "/nothing/here", "nothing.jsonl", "some/where/train.parquet"])
def test_a_path_that_looks_local_is_not_asked_of_the_hub(path: str) -> None:
    with pytest.raises(UserError) as caught:
        read_chats(path)
    assert str(caught.value) == f"No such file or folder: '{path}'."


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "(it holds no file ending in .json, .jsonl, .json.gz, .jsonl.gz, .parquet)."),
        (["eval.json", "test.json"], "No file for the split 'train' in the folder"),
        (["train_prefs.jsonl", "test_prefs.jsonl"], "(it holds test_prefs.jsonl, train_prefs.jsonl)."),
        (["tiny_dev.jsonl"], "(it holds tiny_dev.jsonl)."),
        (["train.json", "train.jsonl"], "More than one format for the split 'train'"),
    ],
)
def test_a_folder_without_one_clear_split_is_refused(names: list[str], reason: str, tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / name, [{"messages": ONE}])
    with pytest.raises(UserError) as caught:
        read_chats(str(tmp_path))
    assert reason in str(caught.value)


def test_a_misspelt_format_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Unknown data\.format 'alpca'\. Did you mean 'alpaca'\?"):
        read_chats("x.jsonl", format="alpca")


def test_importing_the_module_loads_no_heavy_package() -> None:
    heavy = ("torch", "transformers", "datasets", "pyarrow", "trl", "jinja2", "numpy")
    code = f"import sys, hft_cli.data.tokenization; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -------------------------------------------------------------------------------------------------------- tokenising

CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set text = '<<SYS>>\n' + sys + '\n<</SYS>>\n\n' + m.content if loop.first and sys else m.content %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BODY = "'<|im_start|>' + m.role + '\n'"
MARKED = (  # the end-of-turn token inside the marks
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ "
    + BODY
    + " }}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ " + BODY + " + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
MARKED_BARE = (  # and outside
    "{% for m in messages %}{{ " + BODY + " }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
NEWLINE_ENDS = "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
DROPS_REASONING = (  # as Qwen3's: only the last answer keeps the place for its reasoning
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# template: how an assistant's turn reads in it, as far as it is trained on
TEMPLATES: dict[str, tuple[str, str]] = {
    "tulu": ("tulu", "{}</s>"),
    "plain": ("plain", "{}</s>"),
    "chatml": (CHATML, "{}<|im_end|>"),
    "chatml, marked": (MARKED, "{}<|im_end|>"),
    "chatml, marked without the end of the turn": (MARKED_BARE, "{}<|im_end|>"),
    "llama2": (LLAMA2, " {} </s>"),
    "ends in newlines": (NEWLINE_ENDS, "{}\n"),
}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@cache
def backend(kind: str) -> Any:
    """A byte-level BPE tokenizer which trims blanks off its offsets ("trimming", as Llama 3's) or does not ("bytes"),
    one that puts BOS first ("bos"), or a SentencePiece-like one ("pieces")."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "pieces"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "pieces":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=kind == "trimming")
        if kind == "bos":
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    trainer = trainers.BpeTrainer(
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256) if kind == "pieces")],
        initial_alphabet=alphabet,
        vocab_size=600,
        show_progress=False,
    )
    text = [turn["content"] for turn in TWO] + ["the cat sat on the mat  and it was so, because it was so\n"] * 9
    text += ["\n\n"] * 9  # one token, as in GPT-2: but at the end of a text only, as a word takes its newline away
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def tokenizer_of(kind: str = "bytes", template: str | None = None) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if kind == "pocket":
        tokenizer = AutoTokenizer.from_pretrained(resolve_path("pocket:model"))
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend(kind), bos_token="<s>", eos_token="</s>")
    if template is not None:
        tokenizer.chat_template = chat_template(template, tokenizer) if template in ("tulu", "plain") else template
    return tokenizer


def trained_text(tokenizer: Any, labels: list[int]) -> str:
    return str(tokenizer.decode([label for label in labels if label != -100]))


def expected_text(chat: Chat, answer: str) -> str:
    return "".join(answer.format(turn["content"]) for turn in chat if turn["role"] == "assistant")


CHATS = [
    ONE,
    TWO,
    chat("Wie?", "Ça va: 你好 🙂"),
    chat("a", "b", "a", "b", "assistant\nb", "a"),
    chat("  q  ", "  two  blanks  "),
]


@pytest.mark.parametrize("kind", ["bytes", "trimming", "bos", "pieces"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_assistants_turns_are_trained_on(name: str, kind: str) -> None:
    template, answer = TEMPLATES[name]
    tokenizer = tokenizer_of(kind, template)
    result = tokenize(CHATS, tokenizer, max_length=1000)
    for each, row in zip(CHATS, result.dataset, strict=True):
        assert trained_text(tokenizer, row["labels"]) == expected_text(each, answer)
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=12), st.text(" \nab7é🙂", min_size=1, max_size=12)), min_size=1, max_size=3),
    st.sampled_from(["tulu", "chatml", "chatml, marked without the end of the turn", "llama2"]),
    st.sampled_from(["bytes", "trimming"]),
)
def test_whatever_the_turns_say_only_answers_are_trained_on(turns: list[tuple[str, str]], name: str, kind: str) -> None:
    each = chat(*(text for pair in turns for text in (pair[0], "x" + pair[1])))
    template, answer = TEMPLATES[name]
    tokenizer = tokenizer_of(kind, template)
    row = tokenize([each], tokenizer, max_length=10_000).dataset[0]
    assert trained_text(tokenizer, row["labels"]) == expected_text(each, answer)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_the_tokens_are_those_of_the_rendered_chat_and_no_more(name: str, loss: str) -> None:
    tokenizer = tokenizer_of("bos", TEMPLATES[name][0])
    result = tokenize(CHATS, tokenizer, max_length=1000, loss=loss)
    assert list(result.dataset["input_ids"]) == tokenizer.apply_chat_template(CHATS)["input_ids"]
    assert all(
        row.count(tokenizer.bos_token_id) <= (3 if name == "llama2" else 1) for row in result.dataset["input_ids"]
    )


def test_a_token_across_the_border_of_an_answer_belongs_to_it() -> None:
    tokenizer = tokenizer_of("pieces", NEWLINE_ENDS.replace(":\n", ": "))
    row = tokenize([ONE], tokenizer, max_length=100).dataset[0]
    assert trained_text(tokenizer, row["labels"]) == " Because.\n"


def test_with_loss_on_all_every_token_but_the_first_is_trained_on() -> None:
    result = tokenize([ONE, TWO], tokenizer_of(template="tulu"), max_length=1000, loss="all")
    for row in result.dataset:
        assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert result.trained_tokens == result.total_tokens - 2


def test_truncation_cuts_from_the_right_drops_lost_answers_and_counts_both() -> None:
    tokenizer = tokenizer_of(template="tulu")
    long_prompt = chat("the cat " * 50, "no")
    long_answer = chat("cat", "the mat " * 50)
    result = tokenize([ONE, long_prompt, long_answer, ONE], tokenizer, max_length=40)
    assert (result.rows, result.dropped, result.truncated, result.cut) == (3, 1, 1, 0)
    assert max(len(row) for row in result.dataset["input_ids"]) == 40
    cut = trained_text(tokenizer, result.dataset[1]["labels"])
    assert cut
    assert (long_answer[1]["content"] + "</s>").startswith(cut)
    assert result.total_tokens == sum(len(row) for row in result.dataset["input_ids"])
    assert result.trained_tokens == sum(label != -100 for row in result.dataset["labels"] for label in row)


def test_a_row_keeps_the_answers_before_the_cut() -> None:
    tokenizer = tokenizer_of(template=CHATML)
    both = tokenizer.apply_chat_template(TWO)["input_ids"]
    result = tokenize([TWO], tokenizer, max_length=len(both) - 20)
    assert (result.dropped, result.truncated) == (0, 1)
    assert trained_text(tokenizer, result.dataset[0]["labels"]) == "Because.<|im_end|>"


def test_if_every_row_is_dropped_the_error_says_how_long_the_prompts_are() -> None:
    tokenizer = tokenizer_of(template="tulu")
    lengths = [len(tokenizer.apply_chat_template(each[:1], add_generation_prompt=True)["input_ids"]) for each in CHATS]
    chats = [CHATS[0], CHATS[2]]
    with pytest.raises(UserError) as caught:
        tokenize(chats, tokenizer, max_length=5, where="train.jsonl")
    longest = max(lengths[0], lengths[2])
    assert str(caught.value).startswith("All 2 rows of train.jsonl would lose their whole answer at train.max_length=5")
    assert str(caught.value).endswith(f"to {longest} tokens long. Raise train.max_length above {longest}.")
    assert tokenize(chats, tokenizer, max_length=longest + 1).dropped == 0


def test_more_rows_than_a_batch_are_kept_in_order() -> None:
    tokenizer = tokenizer_of(template="plain")
    chats = [chat("q", f"a{number}") for number in range(2100)]
    result = tokenize(chats, tokenizer, max_length=50)
    assert [trained_text(tokenizer, row) for row in result.dataset["labels"]] == [f"a{n}</s>" for n in range(2100)]


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_fix_and_taken_where_it_does_not() -> None:
    tokenizer = tokenizer_of(template=DROPS_REASONING)
    result = tokenize([ONE], tokenizer, max_length=100)
    assert trained_text(tokenizer, result.dataset[0]["labels"]) == "<think>\n\n</think>\n\nBecause.<|im_end|>"
    with pytest.raises(UserError) as caught:
        tokenize([ONE, TWO], tokenizer, max_length=100, where="train.jsonl")
    assert str(caught.value).startswith("train.jsonl, example 2: the chat template writes turn 3 differently")
    for fix in ("{% generation %}", "model.chat_template=tulu", "data.loss=all"):
        assert fix in str(caught.value)
    assert tokenize([ONE, TWO], tokenizer, max_length=100, loss="all").rows == 2


def test_what_a_template_raises_is_told_with_the_example() -> None:
    twice = [ONE[0], ONE[0], ONE[1]]
    with pytest.raises(UserError, match=r"^the data, example 2: the chat template fails: roles must alternate$"):
        tokenize([ONE, twice], tokenizer_of(template=LLAMA2), max_length=100)


def test_marks_around_nothing_are_an_error() -> None:
    template = "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{{ eos_token }}{% endfor %}"
    with pytest.raises(UserError, match=r"^the data, example 1: the chat template leaves no token to train on"):
        tokenize([ONE], tokenizer_of(template=template), max_length=100)


def test_marks_around_some_turns_only_are_taken_as_they_are() -> None:
    template = (
        "{% for m in messages %}{% if loop.index == 2 %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    )
    tokenizer = tokenizer_of(template=template)
    result = tokenize([chat("q", "first", "q", "second")], tokenizer, max_length=100)
    assert trained_text(tokenizer, result.dataset[0]["labels"]) == "first"


def test_a_template_that_loses_answers_or_never_ends_them_is_refused() -> None:
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{{ eos_token }}{% endfor %}"
    endless = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    for loss in ("assistant", "all"):
        with pytest.raises(UserError, match=r"^The chat template leaves out what the assistant says .*=tulu\|plain"):
            tokenize([ONE], tokenizer_of(template=parts), max_length=100, loss=loss)
        with pytest.raises(UserError, match=r"^The chat template writes nothing after an answer, .* write eos_token"):
            tokenize([ONE], tokenizer_of(template=endless), max_length=100, loss=loss)


def test_a_slow_tokenizer_is_refused_unless_all_is_trained_on() -> None:
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer(chat_template=CHATML)
    with pytest.raises(UserError, match=r"needs a fast tokenizer, .* ByT5Tokenizer is not one\. .* data\.loss=all\."):
        tokenize([ONE], slow, max_length=100)
    assert tokenize([ONE], slow, max_length=100, loss="all").rows == 1


def test_no_chats_and_a_misspelt_loss_are_errors() -> None:
    tokenizer = tokenizer_of(template="tulu")
    with pytest.raises(UserError, match=r"^No rows in the data\.$"):
        tokenize([], tokenizer, max_length=9)
    with pytest.raises(UserError, match=r"Unknown data\.loss 'asistant'\. Did you mean 'assistant'\?"):
        tokenize([ONE], tokenizer, max_length=9, loss="asistant")


# --------------------------------------------------------------------------------------------------------- templates


def rendered(tokenizer: Any, chat: Chat, **options: Any) -> str:
    return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))


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
def test_what_the_model_is_asked_with_is_what_it_was_trained_after(name: str, kind: str) -> None:
    tokenizer = tokenizer_of(kind, name)
    assert rendered(tokenizer, TWO).startswith(rendered(tokenizer, TWO[:2], add_generation_prompt=True) + "Because.")


@pytest.mark.parametrize("name", ["tulu", "plain"])
def test_a_built_in_template_begins_with_bos_only_where_the_tokenizer_does(name: str) -> None:
    assert rendered(tokenizer_of("bos", name), ONE).startswith("<s>")
    assert "<s>" not in rendered(tokenizer_of("bytes", name), ONE)


def test_none_is_the_tokenizers_own_template_and_a_path_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }} ü", encoding="utf-8")
    tokenizer = tokenizer_of(template=CHATML)
    assert chat_template(None, tokenizer) == CHATML
    assert chat_template(str(tmp_path / "mine.jinja"), tokenizer) == "{{ messages[0].content }} ü"


def test_a_missing_template_is_told_with_the_choices(tmp_path: Path) -> None:
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


# ------------------------------------------------------------------------------------------------- cutting the prompt

KINDS = ("bytes", "trimming", "bos", "pieces")
MAT = "the mat " * 50
COLONS = "{{ bos_token }}{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
TWICE = "{% for m in messages %}{{ m.content + '|' + m.content + eos_token }}{% endfor %}"
STRIPPED = CHATML.replace("m.content", "m.content | trim")
EVERY = {**{name: template for name, (template, _) in TEMPLATES.items()}, "stripped": STRIPPED}


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def around(tokenizer: Any, each: Chat) -> tuple[str, str]:
    """What is written before and after the user's first content, which must be there once."""
    content = next(turn["content"] for turn in each if turn["role"] == "user").strip()
    before, found, after = rendered(tokenizer, each).partition(content)
    assert found
    assert content not in before + after
    return before, after


@pytest.mark.parametrize("loss", ["assistant", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EVERY)
def test_a_cut_prompt_keeps_header_and_tail_and_the_whole_answer(name: str, kind: str, loss: str) -> None:
    tokenizer = tokenizer_of(kind, EVERY[name])
    each = chat(MAT + "?", "Because.", "Why so?", "So.", system="Be brief.")
    whole = tokenize([each], tokenizer, max_length=1000, loss=loss).dataset[0]
    most = len(whole["input_ids"]) - 30
    result = tokenize([each], tokenizer, max_length=most, loss=loss, long_prompts="cut")
    assert (result.rows, result.dropped, result.truncated, result.cut) == (1, 0, 0, 1)
    row = result.dataset[0]
    assert len(row["input_ids"]) == result.total_tokens == most
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
def test_whatever_the_user_says_tokens_are_lost_there_only_and_just_enough(
    content: str, system: str, name: str, kind: str, room: int
) -> None:
    tokenizer = tokenizer_of(kind, EVERY[name])
    system = content if system == "same" else system
    each, empty = (chat(text, "Because.", system=system) for text in (content, ""))
    most = room + len(tokenizer.apply_chat_template(empty)["input_ids"])
    whole = tokenize([each], tokenizer, max_length=1000).dataset[0]
    result = tokenize([each], tokenizer, max_length=most, long_prompts="cut")
    row, ids = result.dataset[0], whole["input_ids"]
    surplus = max(len(ids) - most, 0)
    assert (result.rows, result.truncated, result.cut) == (1, 0, surplus > 0)
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
def test_prompt_first_then_the_end_of_the_answer_then_the_row(content: str, answer: str, most: int) -> None:
    tokenizer = tokenizer_of("pocket")
    user, assistant, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])
    question, reply = tokenizer([content, "x" + answer], add_special_tokens=False)["input_ids"]
    lost = min(max(len(question) + len(reply) + 3 - most, 0), len(question))
    expected = [user, *question[lost:], assistant, *reply, end]
    row = chat(content, "x" + answer)
    if most <= 2:
        with pytest.raises(UserError, match=r"prompts, without what the user says first, are 2 to 2 tokens long"):
            tokenize([row], tokenizer, max_length=most, long_prompts="cut")
        return
    result = tokenize([row], tokenizer, max_length=most, long_prompts="cut")
    assert result.dataset[0]["input_ids"] == expected[:most]
    assert (result.truncated, result.cut) == (len(expected) > most, lost > 0)


def test_cut_and_dropped_rows_are_counted_apart_and_without_cutting_nothing_is_cut() -> None:
    tokenizer = tokenizer_of(template="tulu")
    system = chat("Why?", "Because.", system=MAT)
    rows = [ONE, chat(MAT, "no"), chat("cat", MAT), chat(MAT, MAT), system, ONE]
    result = tokenize(rows, tokenizer, max_length=40, long_prompts="cut")
    assert (result.rows, result.dropped, result.truncated, result.cut) == (5, 1, 2, 3)
    assert max(len(row) for row in result.dataset["input_ids"]) == 40
    assert result.total_tokens == sum(len(row) for row in result.dataset["input_ids"])
    assert result.trained_tokens == sum(label != -100 for row in result.dataset["labels"] for label in row)
    dropping, default = (tokenize(rows, tokenizer, max_length=40, **o) for o in ({"long_prompts": "drop"}, {}))
    assert (dropping.rows, dropping.dropped, dropping.truncated, dropping.cut) == (3, 3, 1, 0)
    assert dropping.dataset[:] == default.dataset[:]


def test_rows_that_fit_are_the_same_whether_long_prompts_are_cut_or_dropped() -> None:
    tokenizer = tokenizer_of(template=TWICE)
    one, other = (tokenize([ONE], tokenizer, max_length=100, loss="all", long_prompts=long) for long in ("cut", "drop"))
    assert one.dataset[:] == other.dataset[:]
    assert one.cut == other.cut == 0


@pytest.mark.parametrize("content", ["s", "user", "<|user|>", "Be brief.", "mat"])
def test_the_same_text_in_the_header_or_the_system_turn_is_left_alone(content: str) -> None:
    tokenizer = tokenizer_of(template="tulu")
    each = chat(content * 9, "Because.", system=content * 9)
    header, after = f"<|system|>\n{content * 9}\n<|user|>\n", "\n<|assistant|>\nBecause.</s>\n"
    longest = len(tokenizer.apply_chat_template(each)["input_ids"])
    result = tokenize([each], tokenizer, max_length=longest - 5, long_prompts="cut")
    text = text_of(tokenizer, result.dataset[0]["input_ids"])
    assert text.startswith(header)
    assert text.endswith(after)
    assert (content * 9).endswith(text.removeprefix(header).removesuffix(after))


@pytest.mark.parametrize("kind", ["bytes", "trimming"])
def test_a_token_that_holds_more_of_the_header_than_a_blank_stays(kind: str) -> None:
    tokenizer = tokenizer_of(kind, NEWLINE_ENDS)
    each = chat("\n " + MAT, "Because.")
    two = tokenizer.convert_tokens_to_ids("ĊĊ")
    assert two in tokenizer.apply_chat_template(each)["input_ids"]  # one newline is the header's, the other the user's
    result = tokenize([each], tokenizer, max_length=30, long_prompts="cut")
    assert text_of(tokenizer, result.dataset[0]["input_ids"]).startswith("user:\n\n")


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_word_goes_first_also_where_it_is_one_token_with_the_headers_blank(kind: str) -> None:
    tokenizer = tokenizer_of(kind, LLAMA2)
    result = tokenize([chat("cat " + MAT, "no")], tokenizer, max_length=60, long_prompts="cut")
    text = text_of(tokenizer, result.dataset[0]["input_ids"])
    assert "[INST]" in text
    assert "cat" not in text


def test_a_row_without_a_user_is_cut_at_its_end_only() -> None:
    row = [turn("system", "Be brief."), turn("assistant", MAT)]
    result = tokenize([row], tokenizer_of(template="tulu"), max_length=40, long_prompts="cut")
    assert (result.truncated, result.cut) == (1, 0)


def test_the_first_token_has_no_loss_where_the_prompt_begins_the_row() -> None:
    result = tokenize([chat(MAT, "no")], tokenizer_of(template="plain"), max_length=9, loss="all", long_prompts="cut")
    row = result.dataset[0]
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert (result.trained_tokens, result.total_tokens) == (8, 9)


def test_what_a_template_changes_or_repeats_cannot_be_cut() -> None:
    for template in (
        TWICE,
        COLONS.replace("m.content", "m.content | upper if m.role == 'user' else m.content"),
    ):
        with pytest.raises(UserError, match=r"^the data, example 2: too long, and the chat template does not write"):
            tokenize(
                [ONE, chat(MAT, "no")], tokenizer_of(template=template), max_length=30, long_prompts="cut", loss="all"
            )


def test_cutting_needs_a_fast_tokenizer_and_a_known_word() -> None:
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer(chat_template=CHATML)
    with pytest.raises(UserError, match=r"^Cutting long prompts needs a fast tokenizer, .* data\.long_prompts=drop\.$"):
        tokenize([ONE], slow, max_length=100, loss="all", long_prompts="cut")
    with pytest.raises(
        UserError, match=r"^Asking for answers needs a fast tokenizer, .* Convert it to tokenizer\.json\.$"
    ):
        prompts([ONE], slow, max_length=100, where="the data")
    with pytest.raises(UserError, match=r"Unknown data\.long_prompts 'cutt'\. Did you mean 'cut'\?"):
        tokenize([ONE], slow, max_length=100, long_prompts="cutt")


# ------------------------------------------------------------------------------------------------- asking for answers

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
    made = prompts([each], tokenizer, max_length=1000, where="the data")
    row = tokenize([each], tokenizer, max_length=1000).dataset[0]
    asked = made.ids[0]
    assert row["input_ids"][: len(asked)] == asked
    assert row["labels"][len(asked) - 1] == -100
    assert -100 not in row["labels"][len(asked) : len(asked) + 2]
    if len(each) == 2:
        assert set(row["labels"][: len(asked)]) == {-100}
    assert (made.texts, made.answers, made.cut) == ([each[-2]["content"]], [each[-1]["content"]], 0)


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
def test_whatever_is_said_a_prompt_is_the_row_up_to_its_first_trained_token(
    question: str, answer: str, made_of: tuple[str, str | None]
) -> None:
    asked_as_trained(chat("q" + question, answer + "x"), tokenizer_of(*made_of))


def test_the_first_answers_of_a_chat_are_part_of_the_prompt() -> None:
    tokenizer = tokenizer_of("bos", "tulu")
    made = prompts([TWO], tokenizer, max_length=100, where="the data")
    assert text_of(tokenizer, made.ids[0]) == rendered(tokenizer, TWO[:-1], add_generation_prompt=True)
    assert (made.texts, made.answers) == (["Why so?"], ["  It is so.\n"])


def test_two_newlines_before_an_answer_are_two_tokens_as_in_training() -> None:
    tokenizer = tokenizer_of("bytes", "plain")
    text = rendered(tokenizer, ONE[:1], add_generation_prompt=True)
    alone = tokenizer(text)["input_ids"]
    asked = prompts([ONE], tokenizer, max_length=100, where="the data").ids[0]
    assert text_of(tokenizer, asked) == text_of(tokenizer, alone) == "Why?\n\n"
    assert len(asked) == len(alone) + 1


def test_where_the_answers_header_is_trained_on_too_the_prompt_has_it() -> None:
    tokenizer = tokenizer_of("bytes", MARKED_HEADER)
    made = prompts([ONE], tokenizer, max_length=100, where="the data")
    assert text_of(tokenizer, made.ids[0]).endswith("<|im_start|>assistant\n")
    assert tokenizer.apply_chat_template(ONE)["input_ids"][: len(made.ids[0])] == made.ids[0]


def test_a_template_that_rewrites_earlier_turns_can_be_asked_with() -> None:
    tokenizer = tokenizer_of("bytes", DROPS_REASONING)
    made = prompts([TWO], tokenizer, max_length=100, where="the data")
    assert text_of(tokenizer, made.ids[0]) == rendered(tokenizer, TWO[:-1], add_generation_prompt=True)


def test_a_template_that_asks_otherwise_than_it_trains_is_refused() -> None:
    template = NEWLINE_ENDS.replace("'assistant:\n'", "'assistant:\n<think>'")
    with pytest.raises(
        UserError, match=r"^x, example 1: the chat template writes the prompt for an answer differently"
    ):
        prompts([ONE], tokenizer_of(template=template), max_length=100, where="x")
    wordless = "{% for m in messages if m.role == 'assistant' %}{{ m.content + eos_token }}{% endfor %}"
    with pytest.raises(UserError, match=r"^x, example 1: the chat template writes nothing before the answer\.$"):
        prompts([ONE], tokenizer_of(template=wordless), max_length=100, where="x")
    with pytest.raises(UserError, match=r"^No rows in x\.$"):
        prompts([], tokenizer_of(template="tulu"), max_length=100, where="x")


def test_a_chat_without_a_user_is_asked_without_a_text() -> None:
    row = [turn("system", "Be brief."), turn("assistant", "Yes.")]
    made = prompts([row], tokenizer_of(template="tulu"), max_length=100, where="x")
    assert (made.texts, made.answers) == ([""], ["Yes."])


@pytest.mark.parametrize(("kind", "template"), [("pocket", None), ("bos", "tulu"), ("trimming", LLAMA2)])
def test_a_long_prompt_loses_its_start_and_is_counted(kind: str, template: str | None) -> None:
    tokenizer = tokenizer_of(kind, template)
    made = prompts([ONE, chat(MAT, MAT), ONE], tokenizer, max_length=30, where="x")
    assert (made.cut, made.texts[1], made.answers[1]) == (1, MAT, MAT)
    assert len(made.ids[1]) == 30
    assert max(len(made.ids[0]), len(made.ids[2])) < 30
    before, after = rendered(tokenizer, chat("(?)", "Because.")[:1], add_generation_prompt=True).split("(?)")
    text = text_of(tokenizer, made.ids[1])
    assert text.startswith(before.strip(" "))
    assert text.endswith(after)
    assert MAT.strip().endswith(text.removeprefix(before.strip(" ")).removesuffix(after).strip())
    longest = len(tokenizer.apply_chat_template(chat(MAT, MAT))["input_ids"])
    with pytest.raises(
        UserError, match=r"^x, example 2: the prompt is \d+ tokens long even without what the user says"
    ):
        prompts([chat("", "b"), chat("a" + MAT, "b", MAT, "b")], tokenizer, max_length=longest // 2, where="x")


def test_prompts_of_more_rows_than_a_batch_are_in_order() -> None:
    tokenizer = tokenizer_of("pocket")
    made = prompts([chat(f"q{n}", f"a{n}") for n in range(1100)], tokenizer, max_length=50, where="x")
    assert [text_of(tokenizer, ids) for ids in made.ids] == [f"<|user|>q{n}<|assistant|>" for n in range(1100)]
    assert (made.texts, made.answers) == ([f"q{n}" for n in range(1100)], [f"a{n}" for n in range(1100)])


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
def test_what_ends_an_answer_is_known_from_the_template(name: str) -> None:
    kind, template, ends, stop = ENDS[name]
    tokenizer = tokenizer_of(kind, template)
    made = prompts([ONE], tokenizer, max_length=100, where="x")
    assert made.ends == tuple(sorted(tokenizer.convert_tokens_to_ids(ends)))
    assert made.stop == stop


def test_of_two_special_tokens_that_begin_alike_the_longer_ends_an_answer() -> None:
    tokenizer = tokenizer_of(template=CHATML)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end"]})
    ends = prompts([ONE], tokenizer, max_length=100, where="x").ends
    assert ends == tuple(sorted(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])))


def test_without_an_eos_token_the_templates_own_ends_an_answer() -> None:
    tokenizer = tokenizer_of(template=CHATML)
    tokenizer.eos_token = None
    made = prompts([ONE], tokenizer, max_length=100, where="x")
    assert (made.ends, made.stop) == ((tokenizer.convert_tokens_to_ids("<|im_end|>"),), None)
    tokenizer.chat_template = NEWLINE_ENDS
    made = prompts([ONE], tokenizer, max_length=100, where="x")
    assert (made.ends, made.stop) == ((), "\n")


# --------------------------------------------------------------------------------------------------- TRL's SFTTrainer

PREPARATIONS: dict[str, dict[str, Any]] = {
    "padding": {},
    "padding, preparation skipped": {"dataset_kwargs": {"skip_prepare_dataset": True}},
    "packing, bfd": {"packing": True, "packing_strategy": "bfd"},
    "packing, wrapped": {"packing": True, "packing_strategy": "wrapped"},
}


@pytest.mark.parametrize("loss", ["assistant", "all"])
@pytest.mark.parametrize("name", PREPARATIONS)
def test_the_mask_outlives_what_sft_trainer_does_to_the_data(name: str, loss: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizer_of(template="tulu")
    chats = [chat("Who?", "Me."), TWO, chat("the cat?", "sat on the mat")]
    data = tokenize(chats, tokenizer, max_length=128, loss=loss)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_length=128,
            per_device_train_batch_size=3,
            report_to=[],
            use_cpu=True,
            bf16=False,
            **PREPARATIONS[name],
        ),
        train_dataset=data.dataset,
        processing_class=tokenizer,
    )
    batches = list(trainer.get_train_dataloader())
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == data.trained_tokens
    got = "".join(trained_text(tokenizer, row) for batch in batches for row in batch["labels"].tolist())
    for row in data.dataset:
        text = trained_text(tokenizer, row["labels"])
        assert text in got
        got = got.replace(text, "", 1)
    assert got == ""
    for batch in batches:
        kept = batch["labels"] != -100
        assert (batch["labels"][kept] == batch["input_ids"][kept]).all()
        if "attention_mask" in batch:  # the pad token is the EOS token here, which must be learnt all the same
            assert not kept[batch["attention_mask"] == 0].any()
        assert model(**batch).loss.isfinite()
