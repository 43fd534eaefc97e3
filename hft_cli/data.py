"""Rows of any supported shape -> chat examples -> tokens with a loss mask.

Reading needs the standard library only, except for parquet files and hub names. A shape is one function and one row of
`READERS` at the foot of this file. Every mistake in the data is a `UserError` which names the file, the row and the
reason; nothing is left out or cut without being counted in `Tokenized`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hft_cli.schema import UserError, choose

Chat = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": str}, ...]
Row = dict[str, Any]
Span = tuple[int, int]  # start and end, in characters of the rendered text

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
LOSSES = ("assistant", "all")
TEMPLATES = Path(__file__).parent / "templates"

_SPLIT_NAME = re.compile(r"(^|[-_.])(train|test|valid|validation|val|dev|eval)[-_.]")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TURN_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **_TURN_ROLES}
_BATCH = 1000  # rows tokenised at once: enough for the tokenizer's threads, little enough to hold with offsets


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
    for place, row in islice(_rows(path, split, stream=max_rows is not None), max_rows):
        try:
            if not isinstance(row, dict):
                raise UserError(f"not an object but {_kind(row)}.")
            if shape == "auto":
                shape = _shape_of(row)
            keys, read = READERS[shape]
            if missing := [key for key in keys if key not in row]:
                raise UserError(f"no '{missing[0]}', which the shape '{shape}' needs (keys found: {', '.join(row)}).")
            chats.append(_checked(read(row)))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    if not chats:
        raise UserError(f"No rows in {path}.")
    return chats


def content_hash(chats: Iterable[Chat]) -> str:
    """The sha256 (hex) of the examples in their order: the same data give the same hash, from whatever file."""
    digest = hashlib.sha256()
    for chat in chats:
        turns = [(turn["role"], turn["content"]) for turn in chat]
        digest.update(json.dumps(turns).encode() + b"\n")
    return digest.hexdigest()


def _rows(path: str, split: str, *, stream: bool) -> Iterator[tuple[str, Any]]:
    """(place, row) for each row, where the place is what an error message begins with."""
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

            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_BATCH)
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
        raise UserError(f"{file}: neither a list of objects nor an object with one list in it, but {_kind(document)}.")
    return lists[0]


def _shape_of(row: Row) -> str:
    for shape, (keys, _) in READERS.items():
        if all(key in row for key in keys):
            return shape
    known = ", ".join(f"{shape} ({' + '.join(keys)})" for shape, (keys, _) in READERS.items())
    raise UserError(f"unknown shape (keys found: {', '.join(row) or 'none'}). Known: {known}.")


def _checked(chat: Chat) -> Chat:
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


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {_kind(value)}, not a string.")
    return value


def _turns(value: Any, column: str, role: str, content: str, roles: dict[str, str]) -> Chat:
    if not isinstance(value, list) or not value:
        raise UserError(f"'{column}' is {'empty' if value == [] else _kind(value)}, not a list of turns.")
    chat = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise UserError(f"turn {number} of '{column}' is {_kind(turn)}, not an object.")
        for key in (role, content):
            if key not in turn:
                raise UserError(f"turn {number} of '{column}' has no '{key}' (keys found: {', '.join(turn)}).")
        name = roles[choose(f"role in turn {number} of '{column}':", turn[role], roles)]
        chat.append({"role": name, "content": _text(turn[content], f"'{content}' in turn {number} of '{column}'")})
    return chat


def _one_or_more(value: Any, column: str, role: str) -> Chat:
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
        trained_tokens: tokens with a loss. A row's first token has none: nothing comes before it to predict it from.
        total_tokens: tokens in `dataset`.
    """

    dataset: Any
    rows: int
    dropped: int
    truncated: int
    trained_tokens: int
    total_tokens: int


def tokenize(
    chats: Sequence[Chat], tokenizer: Any, *, max_length: int, loss: str = "assistant", where: str = "the data"
) -> Tokenized:
    """Render the chats with the tokenizer's chat template, tokenise, mask what is not trained on, and truncate.

    Args:
        chats: as `read_chats` gives them.
        tokenizer: a fast one (any, with loss "all"), whose `chat_template` is set.
        max_length: tokens kept of a row, from its start.
        loss: "assistant" trains on the assistant's turns with their end-of-turn token; "all" on every token.
        where: what errors call the data.

    Raises:
        UserError: the template fails on a row, leaves answers out or without an end, or does not show which text is
            the assistant's; a slow tokenizer; every row would be dropped.
    """
    import datasets

    choose("data.loss", loss, LOSSES)
    if loss == "assistant" and not tokenizer.is_fast:
        raise UserError(
            "Loss on the assistant's turns needs a fast tokenizer, which gives each token's place in the text, and "
            f"{type(tokenizer).__name__} is not one. Convert it to tokenizer.json, or set data.loss=all."
        )
    if not chats:
        raise UserError(f"No rows in {where}.")
    template = chat_template(None, tokenizer)
    _check_template(chats[0], f"{where}, example 1", tokenizer, template)
    column = datasets.List(datasets.Value("int32"))
    features = datasets.Features({"input_ids": column, "labels": column})
    parts: list[Any] = []
    prompts: list[int] = []  # tokens before the answer, of each dropped row
    truncated = trained = total = 0
    for start in range(0, len(chats), _BATCH):
        batch = chats[start : start + _BATCH]
        places = [f"{where}, example {start + number}" for number in range(1, len(batch) + 1)]
        rendered = [_rendered(*pair, tokenizer, template, loss) for pair in zip(batch, places, strict=True)]
        encoded = tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,  # the template has written them already: another BOS would be one too many
            return_offsets_mapping=loss == "assistant",
            return_attention_mask=False,
            verbose=False,
        )
        rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for number, ids in enumerate(encoded["input_ids"]):
            labels = list(ids)
            if loss == "assistant":
                labels = _labels(ids, encoded["offset_mapping"][number], rendered[number][1])
            labels[:1] = [-100]  # the first token: see Tokenized.trained_tokens
            first = next((place for place, label in enumerate(labels) if label != -100), None)
            if first is None:
                raise UserError(f"{places[number]}: the chat template leaves no token to train on.")
            if first >= max_length:
                prompts.append(first)
                continue
            truncated += len(ids) > max_length
            rows["input_ids"].append(ids[:max_length])
            rows["labels"].append(labels[:max_length])
            total += len(rows["input_ids"][-1])
            trained += sum(label != -100 for label in rows["labels"][-1])
        parts.append(datasets.Dataset.from_dict(rows, features=features))
    if len(prompts) == len(chats):
        raise UserError(
            f"All {len(chats)} rows of {where} would lose their whole answer at train.max_length={max_length}: their "
            f"prompts are {min(prompts)} to {max(prompts)} tokens long. Raise train.max_length above {max(prompts)}."
        )
    dataset = datasets.concatenate_datasets(parts)
    return Tokenized(dataset, len(dataset), len(prompts), truncated, trained, total)


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


def _rendered(chat: Chat, place: str, tokenizer: Any, template: str, loss: str) -> tuple[str, list[Span]]:
    """The chat as text, and the assistant's spans of it: the answers with what ends each."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(turns: Chat, **options: Any) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))

    try:
        if loss == "all":
            return render(chat), []
        if _MARKS.search(template):
            texts, spans = render_jinja_template(
                conversations=[chat],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
            return texts[0], _with_ends(chat, texts[0], spans[0])
        return _rendered_by_prefixes(chat, render)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{place}: the chat template fails: {error}") from error
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _check_template(chat: Chat, place: str, tokenizer: Any, template: str) -> None:
    """Refuse what would train without a sign of it: answers which are not in the text, or which nothing ends."""
    answer = "An answer to look for."
    text, _ = _rendered([*chat[:-1], {"role": "assistant", "content": answer}], place, tokenizer, template, "all")
    other = "choose another (model.chat_template=tulu|plain|PATH)"
    if answer not in text:
        raise UserError(f"The chat template leaves out what the assistant says (is it for images?): {other}.")
    if text.endswith(answer):
        raise UserError(
            "The chat template writes nothing after an answer, so the model would not learn to stop: let it write "
            f"eos_token there, or {other}."
        )


def _with_ends(chat: Chat, text: str, spans: list[Span]) -> list[Span]:
    """The marked spans with the end-of-turn token: where a template leaves it unmarked, stopping is never learnt."""
    if not spans or len(spans) != sum(turn["role"] == "assistant" for turn in chat):
        return spans  # not one span for a turn: what follows the last span need not be the end of a turn
    tail = text[spans[-1][1] :].rstrip()  # what follows the last answer, and so each answer
    return [(start, end + len(tail) if text.startswith(tail, end) else end) for start, end in spans]


def _rendered_by_prefixes(chat: Chat, render: Callable[..., str]) -> tuple[str, list[Span]]:
    """Without marks: a turn is what the text has grown by since the prompt for it was written."""
    text = render(chat)
    spans = []
    for number, turn in enumerate(chat):
        if turn["role"] != "assistant":
            continue
        prompt = render(chat[:number], add_generation_prompt=True)
        upto = text if number + 1 == len(chat) else render(chat[: number + 1])
        if not (text.startswith(upto) and upto.startswith(prompt)):
            raise UserError(
                f"the chat template writes turn {number + 1} differently in the whole chat than on its own (templates "
                "that leave out earlier reasoning do), so the assistant's tokens cannot be told. Put {% generation %} "
                "marks into the template, choose another (model.chat_template=tulu), or set data.loss=all."
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
    prompt = _one_or_more(row["prompt"], "prompt", "user")
    return prompt + _one_or_more(row["completion"], "completion", "assistant")


def _alpaca(row: Row) -> Chat:
    question = _text(row["instruction"], "'instruction'")
    extra = _text(row.get("input") or "", "'input'")
    return _pair(f"{question}\n\n{extra}" if extra.strip() else question, _text(row["output"], "'output'"))


def _sharegpt(row: Row) -> Chat:
    return _turns(row["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES)


def _trace(row: Row) -> Chat:
    return _pair(_text(row["prompt"], "'prompt'"), _text(row["answer"], "'answer'"))


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
