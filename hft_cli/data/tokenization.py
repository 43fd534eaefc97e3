"""Rows of any supported shape -> chat examples -> tokens with a loss mask.

Reading needs the standard library only, except for parquet files and hub names. A shape is one function and one row of
`READERS` at the foot of this file. Every mistake in the data is a `UserError` which names the file, the row and the
reason; nothing is left out or cut without being counted in `Tokenized` or `Prompts`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from hft_cli.data.rows import BATCH, Chat
from hft_cli.data.templates import MARKS, Span, apply_template, chat_template, check_template, render_chat
from hft_cli.errors import UserError, choose

LOSSES = ("assistant", "all")

LONG_PROMPTS = ("drop", "cut")


@dataclass(frozen=True)
class Tokenized:
    """Tokens for TRL's SFTTrainer, and what happened on the way. All counts are of rows or of tokens.

    Attributes:
        dataset: a `datasets.Dataset` with `input_ids` and `labels` (the same ids, -100 where there is no loss).
        rows: rows in `dataset`.
        dropped: rows left out because truncation would have cut off all that is trained on.
        truncated: rows in `dataset` which lost tokens at their end.
        cut: rows in `dataset` whose prompt lost tokens at its start; a row may have lost some at its end, too.
        trained_tokens: tokens with a loss. A row's first token has none: nothing comes before it to predict it from.
        total_tokens: tokens in `dataset`.
    """

    dataset: Any
    rows: int
    dropped: int
    truncated: int
    cut: int
    trained_tokens: int
    total_tokens: int


def tokenize(
    chats: Sequence[Chat],
    tokenizer: Any,
    *,
    max_length: int,
    loss: str = "assistant",
    long_prompts: str = "drop",
    where: str = "the data",
) -> Tokenized:
    """Render the chats with the tokenizer's chat template, tokenise, mask what is not trained on, and shorten.

    Args:
        chats: as `read_chats` gives them.
        tokenizer: a fast one (any, with loss "all" and long_prompts "drop"), whose `chat_template` is set.
        max_length: tokens of a row at most; of a longer one the end is cut off.
        loss: "assistant" trains on the assistant's turns with their end-of-turn token; "all" on every token.
        long_prompts: what happens to a row longer than max_length before its end is cut off. "drop": nothing, so that
            it is dropped if its prompt alone fills max_length. "cut": it loses as many tokens as needed at the start of
            what the user says first. What the template writes before that (BOS, a system turn) stays.
        where: what errors call the data.

    Raises:
        UserError: the template fails on a row, leaves answers out or without an end, or does not show which text is
            the assistant's, or the user's first where that is to be cut; a slow tokenizer; every row would be dropped.
    """
    import datasets

    choose("data.loss", loss, LOSSES)
    choose("data.long_prompts", long_prompts, LONG_PROMPTS)
    if loss == "assistant":
        _check_fast(tokenizer, "Loss on the assistant's turns", ", or set data.loss=all")
    if long_prompts == "cut":
        _check_fast(tokenizer, "Cutting long prompts", ", or set data.long_prompts=drop")
    if not chats:
        raise UserError(f"No rows in {where}.")
    template = chat_template(None, tokenizer)
    check_template(chats[0], f"{where}, example 1", tokenizer)
    column = datasets.List(datasets.Value("int32"))
    features = datasets.Features({"input_ids": column, "labels": column})
    parts: list[Any] = []
    lengths: list[int] = []  # tokens before the answer, of each dropped row
    truncated = cut = trained = total = 0
    for batch, places in _batches(chats, where):
        rendered = [render_chat(*pair, tokenizer, template, loss) for pair in zip(batch, places, strict=True)]
        texts = [text for text, _ in rendered]
        encoded = _encoded(texts, tokenizer, offsets=loss == "assistant" or long_prompts == "cut")
        rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for number, ids in enumerate(encoded["input_ids"]):
            labels = list(ids)
            if loss == "assistant":
                labels = _labels(ids, encoded["offset_mapping"][number], rendered[number][1])
            surplus = slice(0, 0)
            if long_prompts == "cut" and len(ids) > max_length:
                question = _question(batch[number], texts[number], places[number], tokenizer)
                surplus = _surplus(texts[number], encoded["offset_mapping"][number], question, len(ids) - max_length)
            del ids[surplus], labels[surplus]
            labels[:1] = [-100]  # the first token: see Tokenized.trained_tokens
            first = next((place for place, label in enumerate(labels) if label != -100), None)
            if first is None:
                raise UserError(f"{places[number]}: the chat template leaves no token to train on.")
            if first >= max_length:
                lengths.append(first)
                continue
            truncated += len(ids) > max_length
            cut += surplus.start < surplus.stop
            rows["input_ids"].append(ids[:max_length])
            rows["labels"].append(labels[:max_length])
            total += len(rows["input_ids"][-1])
            trained += sum(label != -100 for label in rows["labels"][-1])
        parts.append(datasets.Dataset.from_dict(rows, features=features))
    if len(lengths) == len(chats):
        what = "prompts" if long_prompts == "drop" else "prompts, without what the user says first,"
        raise UserError(
            f"All {len(chats)} rows of {where} would lose their whole answer at train.max_length={max_length}: their "
            f"{what} are {min(lengths)} to {max(lengths)} tokens long. Raise train.max_length above {max(lengths)}."
        )
    dataset = datasets.concatenate_datasets(parts)
    return Tokenized(dataset, len(dataset), len(lengths), truncated, cut, trained, total)


@dataclass(frozen=True)
class Prompts:
    """What to ask a model, as it was trained to be asked, and how to know that its answer is over.

    Attributes:
        ids: tokens of each chat up to its last answer.
        texts: what the user says last before it ("" if nothing), whole, also where `ids` have been cut.
        answers: the last answers.
        cut: how many of `ids` have lost tokens at their start.
        ends: tokens that end an answer, in ascending order: the EOS token, and the special one that the template writes
            after an answer. None, where the tokenizer has no EOS token and the template writes text.
        stop: the text that ends an answer where the template writes no special token after it, white space around it
            taken off unless it is all there is; else None.
    """

    ids: list[list[int]]
    texts: list[str]
    answers: list[str]
    cut: int
    ends: tuple[int, ...]
    stop: str | None


def prompts(chats: Sequence[Chat], tokenizer: Any, *, max_length: int, where: str) -> Prompts:
    """What comes before each chat's last answer, up to where `tokenize` begins to train on it.

    So a token across the border is the model's to write, such as the blank that many tokenizers join with the word
    after it. The tokens are taken from the whole row, as those of a text that breaks off after the prompt may differ:
    GPT-2's has one token for two newlines at the end, and two tokens where a word follows. Of the answer itself
    nothing is in them.

    Args:
        chats: as `read_chats` gives them.
        tokenizer: a fast one, whose `chat_template` is set.
        max_length: tokens of a prompt at most. Longer ones are cut, by the rule of long_prompts "cut" in `tokenize`.
        where: what errors call the data.

    Raises:
        UserError: no chats; the template fails, leaves answers out or without an end, or does not show where they
            begin; a slow tokenizer; a prompt that is too long without what the user says first.
    """
    _check_fast(tokenizer, "Asking for answers", "")
    if not chats:
        raise UserError(f"No rows in {where}.")
    template = chat_template(None, tokenizer)
    ends, stop = _ends(check_template(chats[0], f"{where}, example 1", tokenizer), tokenizer)
    made: list[list[int]] = []
    cut = 0
    for batch, places in _batches(chats, where):
        asked = [_asked(*pair, tokenizer, template) for pair in zip(batch, places, strict=True)]
        encoded = _encoded([text for text, _ in asked], tokenizer, offsets=True)
        each = zip(batch, places, asked, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for chat, place, (text, begin), tokens, offsets in each:
            ids = tokens[: bisect_right([end for _, end in offsets], begin)]
            if len(ids) > max_length:
                surplus = _surplus(text, offsets, _question(chat, text, place, tokenizer), len(ids) - max_length)
                del ids[surplus]
                cut += 1
            if not ids:
                raise UserError(f"{place}: the chat template writes nothing before the answer.")
            if len(ids) > max_length:
                raise UserError(
                    f"{place}: the prompt is {len(ids)} tokens long even without what the user says first, which is "
                    f"more than the {max_length} that there is room for."
                )
            made.append(ids)
    questions = [[turn["content"] for turn in chat[:-1] if turn["role"] == "user"] for chat in chats]
    texts = [contents[-1] if contents else "" for contents in questions]
    return Prompts(made, texts, [chat[-1]["content"] for chat in chats], cut, ends, stop)


def _asked(chat: Chat, place: str, tokenizer: Any, template: str) -> tuple[str, int]:
    """The chat as text, and where in it the last answer begins."""
    marked = bool(MARKS.search(template))
    text, spans = render_chat(chat, place, tokenizer, template, "assistant" if marked else "all")
    prompt = apply_template(chat[:-1], place, tokenizer, add_generation_prompt=True)
    begins = [len(prompt)] if text.startswith(prompt) else []
    if len(spans) == sum(turn["role"] == "assistant" for turn in chat):
        # Of a template without a generation prompt, marks show the place. Some (SmolLM3's) begin before the answer's
        # header, and there the generation prompt goes further.
        begins.append(spans[-1][0])
    if not begins:
        raise UserError(
            f"{place}: the chat template writes the prompt for an answer differently than in the whole chat, so the "
            "model would be asked as it has not been trained. Put {% generation %} marks into the template, or choose "
            "another (model.chat_template=tulu|plain|PATH)."
        )
    return text, max(begins)


def _ends(tail: str, tokenizer: Any) -> tuple[tuple[int, ...], str | None]:
    """The tokens that end an answer, or the text: see `Prompts`."""
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    places = {tail.find(token): token for token in sorted(special, key=len) if token in tail}  # the longest at a place
    text = tail[: min(places)] if places else tail
    if places and not text.strip():
        return tuple(sorted(ends | {special[places[min(places)]]})), None
    return tuple(sorted(ends)), text.strip() or text


def _question(chat: Chat, text: str, place: str, tokenizer: Any) -> Span:
    """Where in the rendered chat the content of the user's first turn is; an empty place if the user has none."""
    number = next((number for number, turn in enumerate(chat) if turn["role"] == "user"), None)
    if number is None:
        return 0, 0
    # A search for the content itself could find it in a system turn or in the header, and not where it is stripped.
    other = next(other for n in count() if (other := f"[question {n}]") not in text)
    changed = [*chat[:number], {**chat[number], "content": other}, *chat[number + 1 :]]
    before, found, after = apply_template(changed, place, tokenizer).partition(other)
    start, end = len(before), len(text) - len(after)
    if not (found and start <= end and text.startswith(before) and text.endswith(after)):
        raise UserError(
            f"{place}: too long, and the chat template does not write what the user says first once and unchanged, so "
            "it cannot be cut. Choose another template (model.chat_template=tulu|plain|PATH), or a longer max_length."
        )
    return start, end


def _surplus(text: str, offsets: list[Span], question: Span, number: int) -> slice:
    """The first `number` tokens of the question (all, if it has no more), to be taken out of the row."""
    start, end = question
    ends = [last for _, last in offsets]
    first, last = bisect_right(ends, start), bisect_right(ends, end)
    if first < last:
        # A token across the border is the question's if it holds no more of the header than the blank before a word,
        # as it is anyway where a tokenizer trims blanks off the offsets (see _labels).
        first += bool(text[offsets[first][0] : start].strip(" "))
    return slice(first, min(last, first + number))


def _check_fast(tokenizer: Any, what: str, instead: str) -> None:
    if not tokenizer.is_fast:
        raise UserError(
            f"{what} needs a fast tokenizer, which gives each token's place in the text, and "
            f"{type(tokenizer).__name__} is not one. Convert it to tokenizer.json{instead}."
        )


def _batches(chats: Sequence[Chat], where: str) -> Iterator[tuple[Sequence[Chat], list[str]]]:
    """(chats, what errors call each) for each `BATCH` of them."""
    for start in range(0, len(chats), BATCH):
        batch = chats[start : start + BATCH]
        yield batch, [f"{where}, example {start + number}" for number in range(1, len(batch) + 1)]


def _encoded(texts: list[str], tokenizer: Any, *, offsets: bool) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,  # the template has written them already: another BOS would be one too many
        return_offsets_mapping=offsets,
        return_attention_mask=False,
        verbose=False,
    )


def _labels(ids: list[int], offsets: list[tuple[int, int]], spans: list[Span]) -> list[int]:
    """`ids` where a token shares a character with a span, -100 elsewhere."""
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    labels = [-100] * len(ids)
    for start, end in spans:
        first = bisect_right(ends, start)
        # The second term: some tokenizers (Llama 3's, GPT-2's) trim blanks off the offsets, so that a token of blanks
        # only is the empty range at its own end. transformers' own assistant mask loses its way there.
        last = max(bisect_left(starts, end), bisect_right(ends, end))
        labels[first:last] = ids[first:last]
    return labels
