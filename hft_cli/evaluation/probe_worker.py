"""Worker: log-likelihoods of correct and wrong answers, and the scores of a probe.

With several ranks, each rank scores a share of the queries.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hft_cli.data.templates import apply_template
from hft_cli.evaluation.probe import Fact, Query, build_queries, prompt_and_separator, with_other_subjects
from hft_cli.evaluation.score_files import write_scores
from hft_cli.evaluation.workers import (
    LoadedModel,
    current_ranks,
    device_of_rank,
    in_batches,
    last_logits,
    load_model,
    pad_rows,
    process_group,
    share_items,
)
from hft_cli.launch.jobs import ProbeJob, Progress
from hft_cli.run_dir import RoundDir

RESAMPLES = 2000

Item = dict[str, Any]
"""The record of a fact, a line of NAME.jsonl."""


def score_probes(job: ProbeJob, folder: RoundDir, progress: Progress) -> None:
    """Score each probe of the job and write its files."""
    ranks = current_ranks()
    with process_group(ranks):
        progress.activity("loading the model")
        loaded = load_model(job.path, job.model, device_of_rank())
        for name, config in job.probes.items():
            start = time.perf_counter()
            queries = build_queries(config, job.seed, job.limit)
            others = with_other_subjects(queries, job.seed)
            asked = [*queries, *others.values()]
            results = share_items(ranks, partial(_score_queries, loaded, job, progress), asked)
            if not ranks.first:
                continue
            values = [likelihoods for likelihoods, _ in results]
            items = fact_records(queries, values[: len(queries)])
            add_other_subjects(items, dict(zip(others, values[len(queries) :], strict=True)))
            scores = {
                **summarize(items, job.seed),
                "prompts_cut": sum(truncated for _, truncated in results),
                "seconds": round(time.perf_counter() - start, 1),
                "settings": asdict(config),
                "limit": job.limit,
                "chat": job.chat,
            }
            write_scores(Path(job.outs[name]), scores, items)


def _score_queries(
    loaded: LoadedModel, job: ProbeJob, progress: Progress, queries: Sequence[Query]
) -> list[tuple[list[float], int]]:
    chat = partial(_ask_by_template, loaded.tokenizer) if job.chat else None
    pairs = []
    for query in queries:
        prompt, separator = prompt_and_separator(query, chat)
        pairs.append((prompt, [separator + answer for answer in query.answers]))
    return log_likelihoods(loaded, pairs, job.batch_size, progress)


def _ask_by_template(tokenizer: Any, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    return apply_template(chat, "the chat template", tokenizer, add_generation_prompt=True)


@dataclass(frozen=True)
class _Continuation:
    """A continuation to score after an input; all its tokens but the last are the end of the input."""

    pair: int
    position: int  # among the continuations of the pair
    tokens: int
    last_token: int


def log_likelihoods(
    loaded: LoadedModel,
    pairs: Sequence[tuple[str, Sequence[str]]],
    batch_size: int | str,
    progress: Progress | None = None,
) -> list[tuple[list[float], int]]:
    """The log-likelihood of each continuation after its prompt.

    Continuations that differ in their last token only, such as all of a single token, share a forward pass. A row that
    is too long for the model loses its start.

    Args:
        pairs: (prompt, continuations).
        batch_size: rows of a forward pass.

    Returns:
        For each pair the log-likelihoods of its continuations in nats, and how many of the rows lost their start.
    """
    inputs, truncated = _encode(loaded, pairs)
    values = [[0.0] * len(continuations) for _, continuations in pairs]
    order = sorted(inputs, key=len, reverse=True)
    if progress is not None:
        progress.begin(len(order))

    def compute(batch: Sequence[tuple[int, ...]]) -> None:
        for row, log_probabilities in zip(batch, list(_log_probabilities(loaded, batch, inputs)), strict=True):
            for continuation in inputs[row]:
                labels = [*row[len(row) - continuation.tokens + 1 :], continuation.last_token]
                values[continuation.pair][continuation.position] = _sum_at(log_probabilities, labels)
        if progress is not None:
            progress.advance(len(batch), sum(map(len, batch)))

    in_batches(order, batch_size, compute)
    return list(zip(values, truncated, strict=True))


def _encode(
    loaded: LoadedModel, pairs: Sequence[tuple[str, Sequence[str]]]
) -> tuple[dict[tuple[int, ...], list[_Continuation]], list[int]]:
    """The distinct inputs with the continuations to score after them, and for each pair how many rows lost their start.

    An input is a row of prompt and continuation without its last token.
    """
    tokenizer = loaded.tokenizer
    inputs: dict[tuple[int, ...], list[_Continuation]] = {}
    truncated = [0] * len(pairs)
    for pair, (prompt, continuations) in enumerate(pairs):
        special = not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))
        prompt_ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
        for position, continuation in enumerate(continuations):
            row = tokenizer(prompt + continuation, add_special_tokens=special)["input_ids"]
            # The last tokens of a prompt may change when the text continues, and some tokenizers append an EOS token.
            shared = next(
                (i for i, (a, b) in enumerate(zip(prompt_ids, row, strict=False)) if a != b),
                min(len(prompt_ids), len(row)),
            )
            shared = max(1, min(shared, len(row) - 1))  # the very first token has no likelihood
            truncated[pair] += len(row) - 1 > loaded.max_length
            key = tuple(row[:-1])[-loaded.max_length :]
            inputs.setdefault(key, []).append(_Continuation(pair, position, len(row) - shared, row[-1]))
    return inputs, truncated


def _log_probabilities(
    loaded: LoadedModel, batch: Sequence[tuple[int, ...]], inputs: Mapping[tuple[int, ...], Sequence[_Continuation]]
) -> Iterator[Any]:
    """For each row the log-probabilities at the places of its longest continuation, float32 (tokens, vocabulary)."""
    import torch

    lengths = [max(continuation.tokens for continuation in inputs[row]) for row in batch]
    first = min(len(row) - length for row, length in zip(batch, lengths, strict=True))
    # Right padding needs no attention mask under causal attention: no real token sees a later one.
    with torch.inference_mode():
        logits = last_logits(loaded.model, pad_rows(batch, 0, loaded.device), max(map(len, batch)) - first)
    for row, length, row_logits in zip(batch, lengths, logits, strict=True):
        yield row_logits[len(row) - length - first : len(row) - first].float().log_softmax(-1)


def _sum_at(log_probabilities: Any, labels: Sequence[int]) -> float:
    """The sum of the log-probabilities of the labels at the last places."""
    import torch

    index = torch.tensor(labels, device=log_probabilities.device)[:, None]
    return float(log_probabilities[-len(labels) :].gather(1, index).double().sum())


def fact_records(queries: Sequence[Query], values: Sequence[Sequence[float]]) -> list[Item]:
    """A record of each fact; its `accuracy` is the share of its paraphrases in which the correct answer ranks first.

    Args:
        values: the log-likelihoods of each query's answers, the correct one first.
    """
    records: dict[Fact, Item] = {}
    for query, likelihoods in zip(queries, values, strict=True):
        fact = query.fact
        record = records.setdefault(
            fact,
            {
                "row": _row(fact),
                **asdict(fact),
                "answers": query.answers,
                "accuracy": 0.0,
                "commonest": query.commonest,
                "paraphrases": [],
            },
        )
        record["paraphrases"].append(
            {
                "pattern": query.pattern,
                "examples": [example.subject for example in query.examples],
                "log_likelihoods": likelihoods,
                "right": likelihoods[0] > max(likelihoods[1:]),  # a tie counts as wrong
            }
        )
    for record in records.values():
        record["accuracy"] = sum(entry["right"] for entry in record["paraphrases"]) / len(record["paraphrases"])
    return list(records.values())


def add_other_subjects(items: Sequence[Item], values: Mapping[Fact, Sequence[float]]) -> None:
    """Note for each fact whether its answer ranks first for another subject: then it needs no knowledge of the fact.

    Args:
        values: the log-likelihoods of the answers for the other subject, that of the fact first.
    """
    by_row = {item["row"]: item for item in items}
    for fact, likelihoods in values.items():
        by_row[_row(fact)]["other_subject"] = float(likelihoods[0] > max(likelihoods[1:]))


def _row(fact: Fact) -> str:
    return f"{fact.relation}/{fact.subject}/{fact.answer}"


def summarize(items: Sequence[Item], seed: int) -> dict[str, Any]:
    """Accuracy of each relation with its 95% interval and LEVELS, and the means over relations (`scores`).

    The intervals are percentiles of a bootstrap over facts, not over paraphrases, because the paraphrases of one fact
    are not independent.
    """
    import numpy as np

    by_relation: dict[str, list[Item]] = {}
    for item in items:
        by_relation.setdefault(item["relation"], []).append(item)
    random = np.random.default_rng(seed)
    relations, resampled = {}, []
    for relation, facts in by_relation.items():
        accuracies = np.array([item["accuracy"] for item in facts])
        means = accuracies[random.integers(len(facts), size=(RESAMPLES, len(facts)))].mean(axis=1)
        resampled.append(means)
        relations[relation] = {
            "accuracy": float(accuracies.mean()),
            **_interval(means),
            **_levels(facts),
            "facts": len(facts),
            "paraphrases": max(len(item["paraphrases"]) for item in facts),
        }
    means = np.mean(resampled, axis=0)
    scores = {
        "accuracy": sum(relation["accuracy"] for relation in relations.values()) / len(relations),
        "accuracy_stderr": float(means.std(ddof=1)),
        **_interval(means),
        **_mean_levels(list(relations.values())),
        "items": sum(relation["facts"] for relation in relations.values()),
    }
    return {"scores": scores, "relations": relations}


LEVELS = ("chance", "commonest", "other_subject")  # of accuracy, without knowledge of the facts


def _levels(facts: Sequence[Item]) -> dict[str, float]:
    """The accuracy of facts by drawing an answer, by the relation's commonest object, and for other subjects."""
    values = {
        "chance": [1 / len(item["answers"]) for item in facts],
        "commonest": [item["commonest"] for item in facts],
        "other_subject": [item["other_subject"] for item in facts if "other_subject" in item],
    }
    return _mean_of_each(values)


def _mean_levels(relations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The means over the relations that have such a level."""
    return _mean_of_each({name: [each[name] for each in relations if name in each] for name in LEVELS})


def _mean_of_each(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: sum(each) / len(each) for name, each in values.items() if each}


def _interval(means: Any) -> dict[str, float]:
    import numpy as np

    low, high = np.percentile(means, [2.5, 97.5])
    return {"accuracy_low": float(low), "accuracy_high": float(high)}
