"""Worker: scores of one model on sets of rows.

All metrics score the last answer of a row. `exact_match` counts a row if greedy decoding would give this answer token
for token, including the end of the turn. This needs no decoding: greedy decoding gives the answer exactly if each of
its tokens is the most likely one after the correct tokens before it. So a row needs one forward pass. `token_accuracy`
is the share of an answer's tokens that are the most likely one, in the same pass. All other metrics compare a generated
answer.
With several ranks, each rank computes a share of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hft_cli.checkpoint.architectures import DEFAULT_MAX_LENGTH, max_positions
from hft_cli.checkpoint.folders import stored_tensors
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.config.settings import FORCED_METRICS
from hft_cli.config.training import GenerationConfig
from hft_cli.data.chats import Chat
from hft_cli.data.prompts import Prompts, make_prompts
from hft_cli.data.reasoning import decode_answer, split_reasoning
from hft_cli.data.rows import read_chats
from hft_cli.data.summary import IGNORED
from hft_cli.data.templates import chat_template
from hft_cli.data.tokenization import LONGEST, tokenize
from hft_cli.errors import UserError
from hft_cli.evaluation import vllm_engine
from hft_cli.evaluation.compat import use_generation_settings_only
from hft_cli.evaluation.metrics import mean_and_error, score
from hft_cli.evaluation.score_files import write_scores
from hft_cli.evaluation.texts import METRIC, read_texts, score_texts
from hft_cli.evaluation.workers import (
    LoadedModel,
    by_length,
    current_ranks,
    device_of_rank,
    last_logits,
    load_model,
    load_tokenizer,
    load_weights,
    map_batches,
    pad_rows,
    process_group,
    share_items,
)
from hft_cli.files import read_json
from hft_cli.launch.jobs import Progress, RowsJob, RowsTask
from hft_cli.paths import resolve_path
from hft_cli.run_dir import RoundDir

PROMPT_END = 16  # tokens, in which a chat template opens the reasoning

Scores = dict[str, float]

Item = dict[str, Any]

R = TypeVar("R")


def score_rows(job: RowsJob, folder: RoundDir, progress: Progress) -> None:
    """Score each task of the job and write its files; finished tasks are skipped.

    The first score of a task is its metric in [0, 1], followed by the standard error and counts. Without generating,
    `nll` is the mean negative log-likelihood of the answers' tokens, in nats.
    """
    tasks = {
        folder.score(suite, name): (
            task,
            _read(task),
        )
        for suite, suite_tasks in job.tasks.items()
        for name, task in suite_tasks.items()
        if not folder.score(suite, name).exists()
    }
    if not tasks:
        return
    ranks = current_ranks()
    with process_group(ranks):  # all ranks have listed the tasks before one is finished
        progress.activity("loading the model")
        loaded = _load(job)
        progress.begin(-(-sum(len(chats) for _, chats in tasks.values()) // ranks.count))
        for file, (task, chats) in tasks.items():
            if task.metric == METRIC:
                scores, items = score_texts(loaded, chats, progress)
            else:
                score_task = _score_forced if task.metric in FORCED_METRICS else _score_answers
                scores, items = score_task(loaded, chats, task, job, progress)
            if ranks.first:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_scores(file, scores, items)


def _read(task: RowsTask) -> Sequence[Any]:
    """The rows of a task as chats, or its texts."""
    if task.metric == METRIC:
        return read_texts(resolve_path(task.path), task.hub)
    return read_chats(resolve_path(task.path), format=task.format, split="test", hub=task.hub)


def _load(job: RowsJob) -> LoadedModel:
    import torch

    if job.generation.backend == "vllm":
        return _load_into_vllm(job)
    loaded = load_model(job.path, job.model, device_of_rank())
    if any(task.metric != METRIC for tasks in job.tasks.values() for task in tasks.values()):
        chat_template(None, loaded.tokenizer)  # raises an error if there is none
    if job.base is not None:
        with torch.no_grad():
            _put_back(loaded.model, job, job.base)
    return loaded


def _load_into_vllm(job: RowsJob) -> LoadedModel:
    positions = max_positions(read_json(Path(job.path) / "config.json")) or DEFAULT_MAX_LENGTH
    generation, longest = job.generation, None
    if generation.max_prompt_length is not None:
        longest = min(positions, generation.max_prompt_length + generation.max_new_tokens)
    engine = vllm_engine.start_engine(job.path, job.model, longest)
    return LoadedModel(engine, load_tokenizer(job.path, job.model), "cpu", positions)


def _put_back(model: Any, job: RowsJob, folder: str) -> None:
    """Put parameters back to a base, wholly or in part, with the rounding of checkpoint/interpolation.py."""
    import torch

    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16}
    files = stored_tensors(Path(job.path))
    stored = {p.name: p.stored[0] for p in parameters_from_folder(job.path, job.model.kinds, job.model.part)}
    parameters, bases = dict(model.named_parameters()), dict(load_weights(folder, job.model).named_parameters())
    for name, share in job.kept.items():
        base = bases[name].to(parameters[name].device)
        shared = parameters[name][: len(base)]  # additional rows of a larger vocabulary are kept
        if share == 0:
            shared.copy_(base)
        elif share < 1:
            rounded = dtypes.get(files[stored[name]].dtype)
            computed = torch.float32 if rounded else torch.float64
            shared.copy_((base.to(computed) * (1 - share) + shared.to(computed) * share).to(rounded or shared.dtype))


def _score_forced(
    loaded: LoadedModel, chats: Sequence[Chat], task: RowsTask, job: RowsJob, progress: Progress
) -> tuple[Scores, list[Item]]:
    metric = task.metric
    rows = _forced_rows(loaded, chats, task)
    progress.advance(len(chats) - len(rows), 0)
    items = dict(zip(rows, _forced_items(loaded, list(rows.values()), job, metric, progress), strict=True))
    # An answer that has other spellings gets the best score over all of them.
    others = [(number, spelling) for number in items for spelling in spellings(chats[number])]
    if others:
        more = _forced_rows(loaded, [chat for _, chat in others], task, needed=False)
        for index, item in zip(more, _forced_items(loaded, list(more.values()), job, metric), strict=True):
            own = items[others[index][0]]
            own[metric] = max(own[metric], item[metric])
    nll, tokens = (sum(item[key] for item in items.values()) for key in ("nll", "tokens"))
    scores = mean_and_error(metric, [item[metric] for item in items.values()])
    counts = {"items": len(rows), "items_too_long": len(chats) - len(rows)}
    return {**scores, "nll": nll / tokens, **counts}, [{"row": number, **item} for number, item in items.items()]


def _forced_rows(
    loaded: LoadedModel, chats: Sequence[Chat], task: RowsTask, needed: bool = True
) -> dict[int, dict[str, list[int]]]:
    """The tokens of the chats that the model can read up to the end of their answer, by the number of the chat.

    Raises:
        UserError: if there is no such chat, and one is needed.
    """
    longest, settings = loaded.max_length, {"special_tokens": task.special_tokens, "loss": "last_turn"}
    if any(chat.masked for chat in chats):  # what the marks of a row take out of training is scored all the same
        chats = [replace(chat, masked=()) for chat in chats]
    tokenized = tokenize(chats, loaded.tokenizer, where=task.path, max_length=LONGEST, **settings)
    rows = dict(zip(tokenized.kept, tokenized.dataset, strict=True))
    ends = {number: _answer_end(row["labels"]) for number, row in rows.items()}
    if needed and min(ends.values()) > longest:
        raise UserError(
            f"All {len(rows)} rows of {task.path} are too long: with their answers they have {min(ends.values())} to "
            f"{max(ends.values())} tokens, and the model takes {longest}. Give shorter rows."
        )
    return {
        number: {key: row[key][:longest] for key in ("input_ids", "labels")}
        for number, row in rows.items()
        if ends[number] <= longest
    }


def _answer_end(labels: Sequence[int]) -> int:
    """How many tokens a row has up to the last one with a label."""
    return len(labels) - next(index for index, label in enumerate(reversed(labels)) if label != IGNORED)


def spellings(chat: Chat) -> list[Chat]:
    """The chat with each of the other spellings of its last answer: its aliases, and all without white space around."""
    last = chat.turns[-1]
    given = [last["content"], *chat.aliases]
    stripped = [text.rstrip() if chat.prefill else text.strip() for text in given]
    return [
        replace(chat, turns=(*chat.turns[:-1], {**last, "content": text}), aliases=())
        for text in dict.fromkeys((*given, *stripped))
        if text and text != last["content"]
    ]


def _forced_items(
    loaded: LoadedModel,
    rows: Sequence[dict[str, list[int]]],
    job: RowsJob,
    metric: str,
    progress: Progress | None = None,
) -> list[Item]:
    """The items of rows of tokens, in order."""

    def compute(batch: Sequence[int]) -> list[Item]:
        batch_items = _teacher_forced(loaded, [rows[index] for index in batch], metric)
        if progress is not None:
            progress.advance(len(batch), sum(item["tokens"] for item in batch_items))
        return batch_items

    return _shared_by_length([len(row["input_ids"]) for row in rows], partial(map_batches, job.batch_size, compute))


def _shared_by_length(lengths: Sequence[int], function: Callable[[Sequence[int]], Sequence[R]]) -> list[R]:
    """The results of `function` for the indices of rows, in order. Each rank has rows of all lengths, longest first."""
    order = by_length(lengths)
    results = dict(zip(order, share_items(current_ranks(), function, order), strict=True))
    return [results[index] for index in range(len(lengths))]


def _teacher_forced(loaded: LoadedModel, rows: Sequence[dict[str, list[int]]], metric: str) -> list[Item]:
    """The score of each answer by a metric of FORCED_METRICS, its negative log-likelihood in nats, and its tokens."""
    import torch

    # Right padding needs no attention mask under causal attention: no real token sees a later one.
    input_ids = pad_rows([row["input_ids"] for row in rows], 0, loaded.device)
    labels = pad_rows([row["labels"] for row in rows], IGNORED, loaded.device)[:, 1:]
    first = int((labels != IGNORED).any(dim=0).nonzero().min())
    labels = labels[:, first:]
    in_answer = labels != IGNORED
    with torch.inference_mode():
        # In float32 only where the answers are: all positions of 64 rows would take gigabytes with a large vocabulary.
        logits = last_logits(loaded.model, input_ids, labels.shape[1] + 1)[:, :-1][in_answer].float()
    right = torch.ones_like(in_answer)
    right[in_answer] = logits.argmax(-1) == labels[in_answer]
    nll = torch.zeros(labels.shape, dtype=torch.float64, device=loaded.device)
    nll[in_answer] = torch.nn.functional.cross_entropy(logits, labels[in_answer], reduction="none").double()
    tokens = in_answer.sum(dim=1)
    scores = right.all(dim=1).double() if metric == "exact_match" else (right & in_answer).sum(dim=1) / tokens
    values = zip(scores.tolist(), nll.sum(dim=1).tolist(), tokens.tolist(), strict=True)
    return [{metric: score, "nll": row_nll, "tokens": count} for score, row_nll, count in values]


def _score_answers(
    loaded: LoadedModel, chats: Sequence[Chat], task: RowsTask, job: RowsJob, progress: Progress
) -> tuple[Scores, list[Item]]:
    room = min(loaded.max_length - job.generation.max_new_tokens, job.generation.max_prompt_length or loaded.max_length)
    questions = make_prompts(
        chats, loaded.tokenizer, max_length=room, where=task.path, special_tokens=task.special_tokens
    )
    generate = _generate_by_vllm if job.generation.backend == "vllm" else _generate
    generated = generate(loaded, questions, job, progress)
    answers = [_decode(*pair, loaded.tokenizer, questions) for pair in zip(questions.ids, generated, strict=True)]
    predictions = [answer for _, answer in answers]
    expected = [split_reasoning(answer)[1] or answer for answer in questions.answers]
    values = score(task.metric, questions.texts, predictions, expected)
    others = [(index, alias) for index, chat in enumerate(chats) for alias in chat.aliases]
    if others:
        texts, given, wanted = zip(*((questions.texts[i], predictions[i], alias) for i, alias in others), strict=True)
        for (index, _), value in zip(others, score(task.metric, texts, given, wanted), strict=True):
            values[index] = max(values[index], value)
    items = [
        {"row": index, "prompt": prompt, "prediction": prediction, "answer": answer, task.metric: value}
        for index, (prompt, prediction, answer, value) in enumerate(
            zip(questions.texts, predictions, expected, values, strict=True)
        )
    ]
    scores = {**mean_and_error(task.metric, values), "items": len(items), "prompts_cut": questions.cut}
    reasoning = {index: text for index, (text, _) in enumerate(answers) if text is not None}
    if reasoning:
        for index, text in reasoning.items():
            items[index]["reasoning"] = text
        scores["reasoning_unfinished"] = sum(not predictions[index] for index in reasoning)
    return scores, items


def _generation_settings(generation: GenerationConfig, questions: Prompts) -> Any:
    """The settings as a GenerationConfig of transformers."""
    from transformers import GenerationConfig as TransformersGenerationConfig

    sampling = {"temperature": generation.temperature, "top_k": 0} if generation.temperature > 0 else {}
    return TransformersGenerationConfig(
        max_new_tokens=generation.max_new_tokens,
        do_sample=generation.temperature > 0,
        **sampling,
        eos_token_id=list(questions.ends) or None,
        stop_strings=[questions.stop] if questions.stop else None,
        pad_token_id=questions.ends[0] if questions.ends else 0,  # masked
    )


def _generate(loaded: LoadedModel, questions: Prompts, job: RowsJob, progress: Progress) -> list[list[int]]:
    """The tokens that the model generates after each prompt."""
    import torch
    from transformers import set_seed

    set_seed(job.seed)
    settings = _generation_settings(job.generation, questions)
    use_generation_settings_only(loaded.model, settings)

    def compute(batch: Sequence[int]) -> list[list[int]]:
        rows = [questions.ids[index] for index in batch]
        input_ids = pad_rows(rows, settings.pad_token_id, loaded.device, side="left")
        with torch.inference_mode():
            outputs = loaded.model.generate(
                input_ids,
                attention_mask=pad_rows([[1] * len(row) for row in rows], 0, loaded.device, side="left"),
                generation_config=settings,
                tokenizer=loaded.tokenizer if questions.stop else None,
            )
        answers: list[list[int]] = outputs[:, input_ids.shape[1] :].tolist()
        progress.advance(len(batch), sum(len(_without_end(tokens, questions)) for tokens in answers))
        return answers

    size = job.generation.batch_size
    lengths = [len(ids) for ids in questions.ids]
    return _shared_by_length(lengths, partial(map_batches, size, compute, key="generation.batch_size"))


def _generate_by_vllm(loaded: LoadedModel, questions: Prompts, job: RowsJob, progress: Progress) -> list[list[int]]:
    """The same, by vLLM."""
    decoding = vllm_engine.Decoding(
        job.generation.max_new_tokens,
        ends=questions.ends,
        stops=[questions.stop] if questions.stop else [],
        temperature=job.generation.temperature,
        seed=job.seed,
    )
    return vllm_engine.generate(loaded.model, questions.ids, decoding, progress.advance)


def _without_end(tokens: list[int], questions: Prompts) -> list[int]:
    """Generated tokens up to the first one that ends an answer, or the padding."""
    return tokens[: next((index for index, token in enumerate(tokens) if token in questions.ends), len(tokens))]


def _decode(prompt: list[int], tokens: list[int], tokenizer: Any, questions: Prompts) -> tuple[str | None, str]:
    """The reasoning and the answer in generated tokens, without what ends them."""
    prompt_end = tokenizer.decode(prompt[-PROMPT_END:], skip_special_tokens=False)
    reasoning, text = decode_answer(_without_end(tokens, questions), tokenizer, prompt_end)
    return reasoning, text.split(questions.stop)[0] if questions.stop else text
