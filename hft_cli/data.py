"""Rows of any supported shape -> chat examples -> tokens with a loss mask.

Reading needs the standard library only, except for parquet files and hub names. A shape is one function and one row of
`READERS` at the foot of this file. Every mistake in the data is a `UserError` which names the file, the row and the
reason; nothing is left out or cut without being counted in `Tokenized` or `Prompts`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from hft_cli.schema import UserError, choose

Chat = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": str}, ...]
Row = dict[str, Any]
Span = tuple[int, int]  # start and end, in characters of the rendered text

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
LOSSES = ("assistant", "all")
LONG_PROMPTS = ("drop", "cut")
TEMPLATES = Path(__file__).parent / "templates"
BATCH = 1000  # rows tokenised at once: enough for the tokenizer's threads, little enough to hold with offsets

_SPLIT_NAME = re.compile(r"(^|[-_.])(train|test|valid|validation|val|dev|eval)[-_.]")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TURN_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **_TURN_ROLES}


# ---------------------------------------------------------------------------------------------------- rows -> chats


def read_chats(path: str, *, format: str = "auto", split: str = "train", max_rows: int | None = None) -> list[Chat]:
    """Read rows of one of the `SHAPES` as chats.

    Args:
        path: a .json (a list of objects, or an object with one list in it), .jsonl or .parquet file, the first two
            also gzipped; a folder of such files; or the name of a data set on the hub.
        format: one of `SHAPES`, or "auto": the shape of the first row, which every row must then have.
        split: which files of a folder (train.jsonl, train-00000-of-00002.parquet, …) or which split of a hub data set.
            A folder whose files carry no split names is read whole as "train". A single file is read whatever its name.
        max_rows: read no more than this many rows (at least 1); None reads all.

    Raises:
        UserError: nothing at `path`, no rows, or a bad row. Rows and lines are counted from 1.
    """
    choose("data.format", format, ("auto", *SHAPES))
    shape = format
    chats: list[Chat] = []
    for place, row in islice(read_rows(path, split, stream=max_rows is not None), max_rows):
        try:
            if not isinstance(row, dict):
                raise UserError(f"not an object but {kind_of(row)}.")
            if shape == "auto":
                shape = _shape_of(row)
            keys, read = READERS[shape]
            if missing := [key for key in keys if key not in row]:
                raise UserError(f"no '{missing[0]}', which the shape '{shape}' needs (keys found: {', '.join(row)}).")
            chats.append(checked(read(row)))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    if not chats:
        raise UserError(f"No rows in {path}.")
    return chats


def content_hash(chats: Iterable[Chat]) -> str:
    """The sha256 (hex) of the examples in their order: the same data give the same hash, from whatever file."""
    digest = hashlib.sha256()
    for chat in chats:
        digest.update(_line(chat))
    return digest.hexdigest()


def repeats(train: Sequence[Chat], test: Sequence[Chat]) -> tuple[int, int]:
    """How many rows of `train` repeat an earlier one exactly, and how many are in `test` as well."""
    own, tested = ([hashlib.sha256(_line(chat)).digest() for chat in chats] for chats in (train, test))
    others = set(tested)
    return len(own) - len(set(own)), sum(row in others for row in own)


def _line(chat: Chat) -> bytes:
    """The turns as a line: two chats have the same one if roles and texts are the same."""
    return json.dumps([(turn["role"], turn["content"]) for turn in chat]).encode() + b"\n"


def read_rows(path: str, split: str, *, stream: bool) -> Iterator[tuple[str, Any]]:
    """(place, row) for each row at `path` (see `read_chats`); an error message begins with the place."""
    local = Path(path).expanduser()
    if local.is_dir():
        for file in _files_of_split(local, split):
            yield from _rows_of_file(file)
    elif local.is_file():
        yield from _rows_of_file(local)
    elif path.endswith(SUFFIXES) or path.startswith((".", "/", "~")):
        raise UserError(f"No such file or folder: '{path}'.")
    else:
        yield from _rows_of_hub(path, split, stream)


def _files_of_split(folder: Path, split: str) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES) and file.is_file())
    found = [file for file in files if re.match(rf"{re.escape(split)}(-\d.*)?\.", file.name)]
    if not found and split == "train" and not any(_SPLIT_NAME.search(file.name) for file in files):
        found = files
    if not found:
        names = ", ".join(file.name for file in files) or f"no file ending in {', '.join(SUFFIXES)}"
        raise UserError(f"No file for the split '{split}' in the folder {folder} (it holds {names}).")
    if len({next(s for s in SUFFIXES if file.name.endswith(s)) for file in found}) > 1:  # likely the same rows twice
        names = ", ".join(file.name for file in found)
        raise UserError(f"More than one format for the split '{split}' in {folder}: {names}. Name one file instead.")
    return found


def _rows_of_file(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        if file.name.endswith(".parquet"):
            import pyarrow.parquet

            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=BATCH)
            rows: Iterable[Any] = (row for batch in batches for row in batch.to_pylist())
        elif not file.name.endswith(SUFFIXES):
            raise UserError(f"{file} is none of {', '.join(SUFFIXES)}.")
        else:
            opened = gzip.open if file.name.endswith(".gz") else open
            with opened(file, "rt", encoding="utf-8-sig") as text:
                if file.name.removesuffix(".gz").endswith(".jsonl"):
                    for number, line in enumerate(text, 1):
                        if line.strip():
                            place = f"{file}, line {number}"
                            yield place, _parsed(line, place)
                    return
                rows = _list_in(_parsed(text.read(), str(file)), file)
        for number, row in enumerate(rows, 1):
            yield f"{file}, row {number}", row
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: not UTF-8, or not parquet
        raise UserError(f"{file} cannot be read: {error}") from error


def _rows_of_hub(name: str, split: str, stream: bool) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, streaming=stream)
    except Exception as error:  # what the hub and its cache raise has no common base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{name}' is no file or folder here, and its split '{split}' could not be loaded from the hub: {reason}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{name} ({split}), row {number}", row


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " One object a line? Then name the file .jsonl." if error.msg == "Extra data" else ""
        at = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{place}: not JSON ({error.msg} at {at}).{hint}") from None


def _list_in(document: Any, file: Path) -> list[Any]:
    if isinstance(document, list):
        return document
    lists = [value for value in document.values() if isinstance(value, list)] if isinstance(document, dict) else []
    if len(lists) != 1:
        raise UserError(
            f"{file}: neither a list of objects nor an object with one list in it, but {kind_of(document)}."
        )
    return lists[0]


def _shape_of(row: Row) -> str:
    for shape, (keys, _) in READERS.items():
        if all(key in row for key in keys):
            return shape
    known = ", ".join(f"{shape} ({' + '.join(keys)})" for shape, (keys, _) in READERS.items())
    raise UserError(f"unknown shape (keys found: {', '.join(row) or 'none'}). Known: {known}.")


def checked(chat: Chat) -> Chat:
    """The chat itself; UserError unless it can be learnt from: it ends with an answer, and no answer is empty."""
    for number, turn in enumerate(chat, 1):
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise UserError(f"turn {number}: the assistant's answer is empty.")
        if not turn["content"].isascii():
            try:
                turn["content"].encode()
            except UnicodeEncodeError as error:
                raise UserError(f"turn {number}: half a surrogate pair at character {error.start}.") from None
    roles = [turn["role"] for turn in chat]
    if "assistant" not in roles:
        raise UserError("no assistant turn, so nothing to learn.")
    if roles[-1] != "assistant":
        raise UserError(f"the last turn is the {roles[-1]}'s, not the assistant's.")
    if roles[0] == "assistant":
        raise UserError("the first turn is the assistant's: there is nothing for it to answer.")
    return chat


def kind_of(value: Any) -> str:
    """What a parsed JSON value is, as an error message says it."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {kind_of(value)}, not a string.")
    return value


def _turns(value: Any, column: str, role: str, content: str, roles: dict[str, str]) -> Chat:
    if not isinstance(value, list) or not value:
        raise UserError(f"'{column}' is {'empty' if value == [] else kind_of(value)}, not a list of turns.")
    chat = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise UserError(f"turn {number} of '{column}' is {kind_of(turn)}, not an object.")
        for key in (role, content):
            if key not in turn:
                raise UserError(f"turn {number} of '{column}' has no '{key}' (keys found: {', '.join(turn)}).")
        name = roles[choose(f"role in turn {number} of '{column}':", turn[role], roles)]
        chat.append({"role": name, "content": _text(turn[content], f"'{content}' in turn {number} of '{column}'")})
    return chat


def turns_or_text(value: Any, column: str, role: str) -> Chat:
    """A list of turns as a chat, or a string as one turn of `role`; UserError naming the column otherwise."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _turns(value, column, "role", "content", _TURN_ROLES)


# -------------------------------------------------------------------------------------------------- chats -> tokens


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
        rendered = [_rendered(*pair, tokenizer, template, loss) for pair in zip(batch, places, strict=True)]
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
    marked = bool(_MARKS.search(template))
    text, spans = _rendered(chat, place, tokenizer, template, "assistant" if marked else "all")
    prompt = as_text(chat[:-1], place, tokenizer, add_generation_prompt=True)
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
    before, found, after = as_text(changed, place, tokenizer).partition(other)
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


@contextmanager
def _failing_at(place: str) -> Iterator[None]:
    """What a template raises, as a UserError with the place."""
    import jinja2

    try:
        yield
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{place}: the chat template fails: {error}") from error


def as_text(chat: Chat, place: str, tokenizer: Any, **options: Any) -> str:
    """The chat as its template writes it, with `options` of apply_chat_template; UserError at `place` if that fails."""
    with _failing_at(place):
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))


def _rendered(chat: Chat, place: str, tokenizer: Any, template: str, loss: str) -> tuple[str, list[Span]]:
    """The chat as text, and the assistant's spans of it: the answers with what ends each."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if loss == "all":
        return as_text(chat, place, tokenizer), []
    if not _MARKS.search(template):
        return _rendered_by_prefixes(chat, place, tokenizer)
    with _failing_at(place):
        texts, spans = render_jinja_template(
            conversations=[chat],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    return texts[0], _with_ends(chat, texts[0], spans[0])


def check_template(chat: Chat, place: str, tokenizer: Any) -> str:
    """What is written after an answer; UserError if that is nothing, or the answer is left out: neither would show."""
    chat_template(None, tokenizer)  # a tokenizer without one is refused here
    answer = "An answer to look for."
    text = as_text([*chat[:-1], {"role": "assistant", "content": answer}], place, tokenizer)
    _, found, tail = text.rpartition(answer)
    other = "choose another (model.chat_template=tulu|plain|PATH)"
    if not found:
        raise UserError(f"The chat template leaves out what the assistant says (is it for images?): {other}.")
    if not tail:
        raise UserError(
            "The chat template writes nothing after an answer, so the model would not learn to stop: let it write "
            f"eos_token there, or {other}."
        )
    return tail


def _with_ends(chat: Chat, text: str, spans: list[Span]) -> list[Span]:
    """The marked spans with the end-of-turn token: where a template leaves it unmarked, stopping is never learnt."""
    if not spans or len(spans) != sum(turn["role"] == "assistant" for turn in chat):
        return spans  # not one span for a turn: what follows the last span need not be the end of a turn
    tail = text[spans[-1][1] :].rstrip()  # what follows the last answer, and so each answer
    return [(start, end + len(tail) if text.startswith(tail, end) else end) for start, end in spans]


def _rendered_by_prefixes(chat: Chat, place: str, tokenizer: Any) -> tuple[str, list[Span]]:
    """Without marks: a turn is what the text has grown by since the prompt for it was written."""
    text = as_text(chat, place, tokenizer)
    spans = []
    for number, turn in enumerate(chat):
        if turn["role"] != "assistant":
            continue
        prompt = as_text(chat[:number], place, tokenizer, add_generation_prompt=True)
        upto = text if number + 1 == len(chat) else as_text(chat[: number + 1], place, tokenizer)
        if not (text.startswith(upto) and upto.startswith(prompt)):
            raise UserError(
                f"{place}: the chat template writes turn {number + 1} differently in the whole chat than on its own "
                "(templates that leave out earlier reasoning do), so the assistant's tokens cannot be told. Put "
                "{% generation %} marks into the template, choose another (model.chat_template=tulu), or set "
                "data.loss=all."
            )
        answer = upto[len(prompt) :]
        # A newline after an end-of-turn token is never generated; but where nothing else ends the turn, it does.
        if not answer.rstrip().endswith(turn["content"].rstrip()):
            answer = answer.rstrip()
        spans.append((len(prompt), len(prompt) + len(answer)))
    return text, spans


def chat_template(name_or_path: str | None, tokenizer: Any) -> str:
    """The text of a chat template, to be set as `tokenizer.chat_template`.

    Args:
        name_or_path: "tulu" or "plain" (in `hft_cli/templates`), the path of a Jinja file, or None for the tokenizer's
            own. The built-in ones begin with the BOS token if the tokenizer puts it before plain text, as Llama's does.
        tokenizer: the one the template is for.

    Raises:
        UserError: the tokenizer has no template, or no end-of-sequence token for a built-in one; unknown name; no file.
    """
    if name_or_path is None:
        try:
            return str(tokenizer.get_chat_template())
        except ValueError:
            raise UserError("The tokenizer has no chat template. Set model.chat_template=tulu|plain|PATH.") from None
    built_in = {file.stem: file for file in sorted(TEMPLATES.glob("*.jinja"))}
    if name_or_path not in built_in:
        file = Path(name_or_path).expanduser()
        if file.is_file():
            return file.read_text(encoding="utf-8")
        if file.suffix or len(file.parts) > 1:
            raise UserError(f"No such chat template file: '{name_or_path}'. Built in: {', '.join(built_in)}.")
        choose("model.chat_template", name_or_path, built_in)
    if not tokenizer.eos_token:
        raise UserError(f"The chat template '{name_or_path}' ends answers with the EOS token; the tokenizer has none.")
    begins = bool(tokenizer.bos_token) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + built_in[name_or_path].read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- the shapes


def _messages(row: Row) -> Chat:
    return _turns(row["messages"], "messages", "role", "content", _TURN_ROLES)


def _prompt_completion(row: Row) -> Chat:
    prompt = turns_or_text(row["prompt"], "prompt", "user")
    return prompt + turns_or_text(row["completion"], "completion", "assistant")


def _alpaca(row: Row) -> Chat:
    question = _text(row["instruction"], "'instruction'")
    extra = _text(row.get("input") or "", "'input'")
    return _pair(f"{question}\n\n{extra}" if extra.strip() else question, _text(row["output"], "'output'"))


def _sharegpt(row: Row) -> Chat:
    return _turns(row["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES)


def _trace(row: Row) -> Chat:
    answer = row["answer"]
    if isinstance(answer, int | float) and not isinstance(answer, bool):  # as arithmetic tasks may have it
        answer = str(answer)
    return _pair(_text(row["prompt"], "'prompt'"), _text(answer, "'answer'"))


def _pair(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# shape: (the keys by which it is known, its reader). The first whose keys a row has is its shape.
READERS: dict[str, tuple[tuple[str, ...], Callable[[Row], Chat]]] = {
    "messages": (("messages",), _messages),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
    "sharegpt": (("conversations",), _sharegpt),
    "trace": (("prompt", "answer"), _trace),
}
SHAPES = tuple(READERS)
