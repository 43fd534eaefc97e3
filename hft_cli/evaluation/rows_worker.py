"""Worker: one checkpoint -> scores. Started by the runner through hft_cli.launch.work.

By `exact_match` a row counts when greedy decoding would give its answer, end of turn included, token for token. That
needs no decoding: the answer comes out greedily exactly if, with the right tokens before it, each of its tokens is the
likeliest one. So a set is scored in one forward pass. Every other metric is of an answer that is generated.

What is known of each row is kept in eval/WHEN/SUITE/TASK.jsonl, and a task that was scored is not scored again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hft_cli.checkpoint.architectures import DEFAULT_MAX_LENGTH, max_positions
from hft_cli.data.rows import Chat, read_chats
from hft_cli.data.templates import chat_template
from hft_cli.data.tokenization import prompts, tokenize
from hft_cli.evaluation.metrics import mean_and_error, score
from hft_cli.files import write_json, write_text
from hft_cli.launch.jobs import Progress, RowsJob, RowsTask
from hft_cli.paths import resolve_path
from hft_cli.run_dir import RoundDir

Scores = dict[str, float]

Item = dict[str, Any]


@dataclass(frozen=True)
class _Model:
    """A model ready to be scored."""

    model: Any
    tokenizer: Any
    device: str
    longest: int  # positions


def evaluate(job: RowsJob, folder: RoundDir, progress: Progress) -> None:
    """Write each task's scores: first its own in [0, 1], then its standard error and counts.

    With exact_match there is `nll` too, the mean negative log-likelihood of an answer's token, in nats.
    """
    todo = {
        (suite, name): (task, read_chats(resolve_path(task.path), format=task.format, split="test"))
        for suite, tasks in job.tasks.items()
        for name, task in tasks.items()
        if not folder.score(suite, name).exists()
    }
    progress.activity("loading the model")
    loaded = _load(job) if todo else None
    progress.begin(sum(len(chats) for _, chats in todo.values()))
    for (suite, name), (task, chats) in todo.items():
        assert loaded is not None
        one = _teacher_forced if task.metric == "exact_match" else _generated
        scores, items = one(loaded, chats, task, job, progress.advance)
        kept = folder.score(suite, name)
        kept.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        write_text(kept.with_suffix(".jsonl"), "".join(lines))
        write_json(kept, scores)  # last: a task with it is done


def _load(job: RowsJob) -> _Model:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(path: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, job.model.dtype),
            attn_implementation=job.model.attention,
        )

    tokenizer = AutoTokenizer.from_pretrained(job.path)
    tokenizer.chat_template = chat_template(job.model.chat_template, tokenizer)
    model = load(job.path)
    if job.base is not None:
        own, base = dict(model.named_parameters()), dict(load(job.base).named_parameters())
        with torch.no_grad():
            for name in job.reset:
                own[name][: len(base[name])] = base[name]  # a longer vocabulary keeps its further rows
    model.to(device).eval()
    return _Model(model, tokenizer, device, max_positions(model.config.to_dict()) or DEFAULT_MAX_LENGTH)


def _teacher_forced(
    loaded: _Model, chats: Sequence[Chat], task: RowsTask, job: RowsJob, tick: Callable[[int, int], None]
) -> tuple[Scores, list[Item]]:
    import torch

    made = tokenize(chats, loaded.tokenizer, max_length=loaded.longest, where=task.path)
    items: dict[int, Item] = {}
    nll, tokens = 0.0, 0
    rows = list(made.dataset)
    for batch in _batches([len(row["input_ids"]) for row in rows], job.batch_size):
        width = max(len(rows[i]["input_ids"]) for i in batch)

        def padded(key: str, filler: int, batch: Sequence[int] = batch, width: int = width) -> Any:
            # Right padding needs no attention mask under causal attention: no real token sees a later one.
            own = [rows[i][key] + [filler] * (width - len(rows[i][key])) for i in batch]
            return torch.tensor(own, device=loaded.device)

        labels = padded("labels", -100)
        with torch.inference_mode():
            logits = loaded.model(padded("input_ids", 0)).logits[:, :-1].float()
        targets = labels[:, 1:]
        counted = targets != -100
        right = ((logits.argmax(-1) == targets) | ~counted).all(dim=1).tolist()
        losses = torch.zeros(targets.shape, dtype=torch.float64, device=loaded.device)
        of_token = torch.nn.functional.cross_entropy(logits[counted], targets[counted], reduction="none")
        losses[counted] = of_token.double()
        of_row = losses.sum(dim=1).tolist()
        in_row = counted.sum(dim=1).tolist()
        for place, index in enumerate(batch):
            items[index] = {"exact_match": float(right[place]), "nll": of_row[place], "tokens": in_row[place]}
        nll += sum(of_row)
        tokens += sum(in_row)
        tick(len(batch), sum(in_row))
    tick(made.dropped, 0)
    ordered = [{"row": index, **items[index]} for index in sorted(items)]
    share = mean_and_error("exact_match", [item["exact_match"] for item in ordered])
    return {**share, "nll": nll / tokens, "items": len(rows), "items_too_long": made.dropped}, ordered


def _generated(
    loaded: _Model, chats: Sequence[Chat], task: RowsTask, job: RowsJob, tick: Callable[[int, int], None]
) -> tuple[Scores, list[Item]]:
    import torch
    from transformers import GenerationConfig, set_seed

    set_seed(job.seed)
    tokenizer, most = loaded.tokenizer, job.generation.max_new_tokens
    room = min(loaded.longest - most, job.generation.max_prompt_length or loaded.longest)
    made = prompts(chats, tokenizer, max_length=room, where=task.path)
    filler = made.ends[0] if made.ends else 0  # its tokens are masked
    settings = GenerationConfig(
        max_new_tokens=most,
        do_sample=job.generation.temperature > 0,
        **({"temperature": job.generation.temperature, "top_k": 0} if job.generation.temperature > 0 else {}),
        eos_token_id=list(made.ends) or None,
        stop_strings=[made.stop] if made.stop else None,
        pad_token_id=filler,
    )
    loaded.model.generation_config = settings  # a checkpoint's own would fill in what is not set here
    answers: dict[int, str] = {}
    for batch in _batches([len(ids) for ids in made.ids], job.generation.batch_size):
        width = max(len(made.ids[i]) for i in batch)
        ids = [[filler] * (width - len(made.ids[i])) + made.ids[i] for i in batch]
        mask = [[0] * (width - len(made.ids[i])) + [1] * len(made.ids[i]) for i in batch]
        with torch.inference_mode():
            out = loaded.model.generate(
                torch.tensor(ids, device=loaded.device),
                attention_mask=torch.tensor(mask, device=loaded.device),
                generation_config=settings,
                tokenizer=tokenizer if made.stop else None,
            )[:, width:].tolist()
        generated = 0
        for index, tokens in zip(batch, out, strict=True):
            end = next((place for place, token in enumerate(tokens) if token in made.ends), len(tokens))
            generated += end
            text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
            answers[index] = text.split(made.stop)[0] if made.stop else text
        tick(len(batch), generated)
    predictions = [answers[index] for index in range(len(answers))]
    values = score(task.metric, made.texts, predictions, made.answers)
    items = [
        {"row": index, "prompt": prompt, "prediction": prediction, "answer": answer, task.metric: value}
        for index, (prompt, prediction, answer, value) in enumerate(
            zip(made.texts, predictions, made.answers, values, strict=True)
        )
    ]
    return {**mean_and_error(task.metric, values), "items": len(items), "prompts_cut": made.cut}, items


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of rows of about the same length, the longest first: what does not fit fails at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), size):
        yield order[start : start + size]
