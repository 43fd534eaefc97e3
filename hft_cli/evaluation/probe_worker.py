"""Worker: log-likelihoods of right and wrong answers.

Started through hft_cli.launch.work.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.architectures import DEFAULT_MAX_LENGTH, max_positions
from hft_cli.evaluation.probe import Fact, Query, queries, text
from hft_cli.files import write_json, write_text
from hft_cli.launch.jobs import ProbeJob, Progress
from hft_cli.run_dir import RoundDir

RESAMPLES = 2000


def score(job: ProbeJob, folder: RoundDir, progress: Progress) -> None:
    """Score every probe of the job; each one's file of scores is written last, when it is done."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hft_cli.data.templates import apply_template, chat_template

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if ranks > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(weeks=1))
    progress.activity("loading the model")
    tokenizer = AutoTokenizer.from_pretrained(job.path)
    if job.model.chat_template is not None:
        tokenizer.chat_template = chat_template(job.model.chat_template, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        job.path, dtype=getattr(torch, job.model.dtype), attn_implementation=job.model.attention
    )
    model.to(device).eval()

    def through_template(question: str) -> str:
        chat = [{"role": "user", "content": question}]
        return apply_template(chat, "the chat template", tokenizer, add_generation_prompt=True)

    for name, config in job.probes.items():
        start = time.perf_counter()
        asked = queries(config, job.seed, job.limit)
        mine = asked[rank::ranks]
        texts = [text(query, through_template if job.chat else None) for query in mine]
        pairs = [
            (before, [gap + answer for answer in query.answers])
            for query, (before, gap) in zip(mine, texts, strict=True)
        ]
        found, cut = log_likelihoods(model, tokenizer, pairs, job.batch_size, progress)
        gathered: list[Any] = [(found, cut)]
        if ranks > 1:
            gathered = [None] * ranks
            torch.distributed.all_gather_object(gathered, (found, cut))
        if rank == 0:
            values: list[list[float]] = [[] for _ in asked]
            for number, (own, _) in enumerate(gathered):
                values[number::ranks] = own
            seconds = round(time.perf_counter() - start, 1)
            how = {"settings": asdict(config), "limit": job.limit, "chat": job.chat}
            _write(Path(job.outs[name]), how, asked, values, sum(cut for _, cut in gathered), seconds, job.seed)
    if ranks > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def log_likelihoods(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, Sequence[str]]],
    batch_size: int,
    progress: Progress | None = None,
) -> tuple[list[list[float]], int]:
    """For each (text, continuations) the log-likelihood of each continuation after the text, in nats.

    Continuations that differ in their last token alone, such as all of one token, share a forward pass. A row too long
    for the model loses its start; the second value is how many did. `progress` counts
    the rows.
    """
    import torch

    keeps = "logits_to_keep" in signature(model.forward).parameters
    longest = max_positions(model.config.to_dict()) or DEFAULT_MAX_LENGTH
    rows: dict[
        tuple[int, ...], list[tuple[int, int, int, int]]
    ] = {}  # input -> (pair, continuation, tokens, last token)
    cut = 0
    for number, (before, continuations) in enumerate(pairs):
        special = not (tokenizer.bos_token and before.startswith(tokenizer.bos_token))
        own = tokenizer(before, add_special_tokens=special)["input_ids"]
        for place, continuation in enumerate(continuations):
            whole = tokenizer(before + continuation, add_special_tokens=special)["input_ids"]
            # A tokenizer may write the end of the text otherwise once it goes on; and one may append a token (EOS).
            shared = next(
                (i for i, (a, b) in enumerate(zip(own, whole, strict=False)) if a != b), min(len(own), len(whole))
            )
            shared = max(1, min(shared, len(whole) - 1))  # the first token of all has nothing before it
            cut += len(whole) - 1 > longest
            given = tuple(whole[:-1])[-longest:]
            rows.setdefault(given, []).append((number, place, len(whole) - shared, whole[-1]))
    found = [[0.0] * len(continuations) for _, continuations in pairs]
    order = sorted(rows, key=len, reverse=True)
    if progress is not None:
        progress.begin(len(order))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(batch[0])
        if progress is not None:
            progress.advance(len(batch), sum(map(len, batch)))
        # Right padding needs no mask under causal attention: no real token sees a later one.
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=model.device)
        # Only what stands before a continuation's tokens is wanted: over a whole vocabulary the rest would be large.
        first = min(len(row) - max(tokens for _, _, tokens, _ in rows[row]) for row in batch) if keeps else 0
        with torch.inference_mode():
            logits = model(ids, **({"logits_to_keep": width - first} if keeps else {})).logits
        for row, of_row in zip(batch, logits, strict=True):
            most = max(tokens for _, _, tokens, _ in rows[row])
            scored = of_row[len(row) - most - first : len(row) - first].float().log_softmax(-1)
            for number, place, tokens, last in rows[row]:
                wanted = torch.tensor([*row[len(row) - tokens + 1 :], last], device=model.device)
                picked = scored[most - tokens :].gather(1, wanted[:, None])
                found[number][place] = float(picked.double().sum())
    return found, cut


def facts(asked: Sequence[Query], values: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """A record of each fact. Its `accuracy` is the share of its paraphrases in which the right answer is likeliest."""
    found: dict[Fact, dict[str, Any]] = {}
    for query, own in zip(asked, values, strict=True):
        fact = query.fact
        record = found.setdefault(
            fact,
            {
                "row": f"{fact.relation}/{fact.subject}/{fact.answer}",
                **asdict(fact),
                "answers": query.answers,
                "accuracy": 0.0,
                "paraphrases": [],
            },
        )
        right = own[0] > max(own[1:])  # a tie is not knowing
        examples = [one.subject for one in query.examples]
        record["paraphrases"].append(
            {"pattern": query.pattern, "examples": examples, "log_likelihoods": own, "right": right}
        )
    for record in found.values():
        record["accuracy"] = sum(one["right"] for one in record["paraphrases"]) / len(record["paraphrases"])
    return list(found.values())


def _write(
    out: Path,
    how: dict[str, Any],
    asked: Sequence[Query],
    values: Sequence[Sequence[float]],
    cut: int,
    seconds: float,
    seed: int,
) -> None:
    items = facts(asked, values)
    write_text(out.with_suffix(".jsonl"), "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    write_json(
        out,
        {
            **measure(items, seed),
            "prompts_cut": cut,
            "seconds": seconds,
            **how,
        },
    )


def measure(items: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Accuracy of each relation with its 95% interval, and the mean over relations (macro).

    The intervals are percentiles over resampled facts, since the paraphrases of one fact stand or fall together.
    """
    import numpy as np

    of_relation: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        of_relation.setdefault(item["relation"], []).append(item)
    random = np.random.default_rng(seed)
    relations, resampled = {}, []
    for relation, own in of_relation.items():
        shares = np.array([item["accuracy"] for item in own])
        means = shares[random.integers(len(shares), size=(RESAMPLES, len(shares)))].mean(axis=1)
        resampled.append(means)
        relations[relation] = {
            "accuracy": float(shares.mean()),
            **_interval(means),
            "chance": sum(1 / len(item["answers"]) for item in own) / len(own),
            "facts": len(own),
            "paraphrases": max(len(item["paraphrases"]) for item in own),
        }
    macro = np.mean(resampled, axis=0)
    scores = {
        "accuracy": sum(one["accuracy"] for one in relations.values()) / len(relations),
        "accuracy_stderr": float(macro.std(ddof=1)),
        **_interval(macro),
        "chance": sum(one["chance"] for one in relations.values()) / len(relations),
        "items": sum(one["facts"] for one in relations.values()),
    }
    return {"scores": scores, "relations": relations}


def _interval(means: Any) -> dict[str, float]:
    import numpy as np

    low, high = np.percentile(means, [2.5, 97.5])
    return {"accuracy_low": float(low), "accuracy_high": float(high)}
