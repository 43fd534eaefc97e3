"""Exactly the assistant's text is trained on, and truncation is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chats import (
    CHATML,
    CHATS,
    DROPS_REASONING,
    NEWLINE_ENDS,
    ONE,
    TEMPLATES,
    TWO,
    chat,
    ids_of,
    tokenizer_of,
    trained_text,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from hft_cli.data.chats import Chat
from hft_cli.data.tokenization import tokenize
from hft_cli.errors import UserError


def expected_text(chat: Chat, answer: str) -> str:
    return "".join(answer.format(turn["content"]) for turn in chat.turns if turn["role"] == "assistant")


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
def test_only_answers_are_trained_on_whatever_the_turns_say(turns: list[tuple[str, str]], name: str, kind: str) -> None:
    each = chat(*(text for pair in turns for text in (pair[0], "x" + pair[1])))
    template, answer = TEMPLATES[name]
    tokenizer = tokenizer_of(kind, template)
    row = tokenize([each], tokenizer, max_length=10_000).dataset[0]
    assert trained_text(tokenizer, row["labels"]) == expected_text(each, answer)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_the_tokens_are_those_of_the_rendered_chat(name: str, loss: str) -> None:
    tokenizer = tokenizer_of("bos", TEMPLATES[name][0])
    result = tokenize(CHATS, tokenizer, max_length=1000, loss=loss)
    assert list(result.dataset["input_ids"]) == [ids_of(tokenizer, each) for each in CHATS]
    assert all(
        row.count(tokenizer.bos_token_id) <= (3 if name == "llama2" else 1) for row in result.dataset["input_ids"]
    )


def test_a_token_across_the_border_of_an_answer_belongs_to_it() -> None:
    tokenizer = tokenizer_of("pieces", NEWLINE_ENDS.replace(":\n", ": "))
    row = tokenize([ONE], tokenizer, max_length=100).dataset[0]
    assert trained_text(tokenizer, row["labels"]) == " Because.\n"


def test_loss_all_trains_on_every_token_but_the_first() -> None:
    result = tokenize([ONE, TWO], tokenizer_of(template="tulu"), max_length=1000, loss="all")
    for row in result.dataset:
        assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert result.summary.trained_tokens == result.summary.tokens - 2


def test_truncation_and_dropped_rows_are_counted() -> None:
    tokenizer = tokenizer_of(template="tulu")
    long_prompt = chat("the cat " * 50, "no")
    long_answer = chat("cat", "the mat " * 50)
    result = tokenize([ONE, long_prompt, long_answer, ONE], tokenizer, max_length=40)
    assert (
        result.summary.used,
        sum(result.summary.dropped.values()),
        result.summary.truncated,
        result.summary.cut,
    ) == (3, 1, 1, 0)
    assert max(len(row) for row in result.dataset["input_ids"]) == 40
    cut = trained_text(tokenizer, result.dataset[1]["labels"])
    assert cut
    assert (long_answer.turns[1]["content"] + "</s>").startswith(cut)
    assert result.summary.tokens == sum(len(row) for row in result.dataset["input_ids"])
    assert result.summary.trained_tokens == sum(label != -100 for row in result.dataset["labels"] for label in row)


def test_a_row_keeps_the_answers_before_the_cut() -> None:
    tokenizer = tokenizer_of(template=CHATML)
    both = ids_of(tokenizer, TWO)
    result = tokenize([TWO], tokenizer, max_length=len(both) - 20)
    assert (sum(result.summary.dropped.values()), result.summary.truncated) == (0, 1)
    assert trained_text(tokenizer, result.dataset[0]["labels"]) == "Because.<|im_end|>"


def test_the_error_for_dropped_rows_has_the_prompt_lengths() -> None:
    tokenizer = tokenizer_of(template="tulu")
    lengths = [
        len(tokenizer.apply_chat_template(list(each.turns[:1]), add_generation_prompt=True)["input_ids"])
        for each in CHATS
    ]
    chats = [CHATS[0], CHATS[2]]
    with pytest.raises(UserError) as caught:
        tokenize(chats, tokenizer, max_length=5, where="train.jsonl")
    longest = max(lengths[0], lengths[2])
    assert str(caught.value).startswith("All 2 rows of train.jsonl would lose their whole answer at train.max_length=5")
    assert str(caught.value).endswith(f"to {longest} tokens long. Raise train.max_length above {longest}.")
    assert tokenize(chats, tokenizer, max_length=longest + 1).summary.dropped == {}


def test_rows_of_several_batches_are_in_order() -> None:
    tokenizer = tokenizer_of(template="plain")
    chats = [chat("q", f"a{number}") for number in range(2100)]
    result = tokenize(chats, tokenizer, max_length=50)
    assert [trained_text(tokenizer, row) for row in result.dataset["labels"]] == [f"a{n}</s>" for n in range(2100)]


def test_a_slow_tokenizer_is_refused_unless_all_is_trained_on() -> None:
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer(chat_template=CHATML)
    with pytest.raises(UserError, match=r"needs a fast tokenizer, .* ByT5Tokenizer is not one\. .* data\.loss=all\."):
        tokenize([ONE], slow, max_length=100)
    assert tokenize([ONE], slow, max_length=100, loss="all").summary.used == 1


def test_no_chats_and_a_misspelt_loss_are_errors() -> None:
    tokenizer = tokenizer_of(template="tulu")
    with pytest.raises(UserError, match=r"^No rows in the data\.$"):
        tokenize([], tokenizer, max_length=9)
    with pytest.raises(UserError, match=r"Unknown data\.loss 'asistant'\. Did you mean 'assistant'\?"):
        tokenize([ONE], tokenizer, max_length=9, loss="asistant")


PREPARATIONS: dict[str, dict[str, Any]] = {
    "padding": {},
    "padding, preparation skipped": {"dataset_kwargs": {"skip_prepare_dataset": True}},
    "packing, bfd": {"packing": True, "packing_strategy": "bfd"},
    "packing, wrapped": {"packing": True, "packing_strategy": "wrapped"},
}


@pytest.mark.parametrize("loss", ["assistant", "all"])
@pytest.mark.parametrize("name", PREPARATIONS)
def test_the_mask_survives_the_preparation_of_sft_trainer(name: str, loss: str, tmp_path: Path) -> None:
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
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == data.summary.trained_tokens
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


def test_a_template_of_last_turns_trains_on_each_answer() -> None:
    tokenizer = tokenizer_of(template=DROPS_REASONING)
    with pytest.raises(UserError, match=r"set data\.loss=each_turn \(a row for each answer\)"):
        tokenize([TWO], tokenizer, max_length=200)
    chats = list(TWO.each_answer().values())
    rows = tokenize(chats, tokenizer, max_length=200, loss="last_turn").dataset["labels"]
    answers = [tokenizer.decode([label for label in labels if label != -100]) for labels in rows]
    assert answers == [f"<think>\n\n</think>\n\n{text}<|im_end|>" for text in ("Because.", "  It is so.\n")]


def test_a_text_with_bos_and_eos_gets_no_other() -> None:
    tokenizer = tokenizer_of("bos")
    rows = tokenize([Chat(text=text) for text in ("a b", "<s>a b", "a b</s>")], tokenizer, max_length=9).dataset
    assert rows["input_ids"][0][0] == tokenizer.bos_token_id
    assert rows["input_ids"][0] == rows["input_ids"][1] == rows["input_ids"][2]


def test_a_text_with_eos_gets_no_other_by_the_tokenizer() -> None:
    tokenizer = tokenizer_of("bytes")
    end = ("</s>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[end])
    rows = tokenize([Chat(text=text) for text in ("a b", "a b</s>")], tokenizer, max_length=9).dataset["input_ids"]
    assert rows[0] == rows[1]
    assert rows[0].count(end[1]) == 1


@given(st.integers(2, 40), st.text("ab c", min_size=1, max_size=200).filter(str.strip))
def test_a_long_text_is_trained_on_in_pieces(max_length: int, text: str) -> None:
    tokenizer = tokenizer_of()
    result = tokenize([Chat(text=text)], tokenizer, max_length=max_length)
    rows = result.dataset[:]
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert [label for labels in rows["labels"] for label in labels if label != -100] == whole[1:]
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        assert 2 <= len(ids) <= max_length
        assert labels == [-100, *ids[1:]]
    divided = len(whole) > max_length
    assert result.summary.notices == ({"texts longer than train.max_length were divided": 1} if divided else {})
    assert result.summary.truncated == 0
