"""Knowledge probed so that format does not count: is the right answer likelier than wrong ones of the same kind?

A fact (relation, subject, object) is put in several paraphrases, each after a few examples of the same paraphrase, and
the log-likelihood of its object is ranked against those of up to nine objects of other facts of the relation. The
relations and paraphrases are as in ParaRel (Elazar et al. 2021, TACL 9:1012-1031), of which only the patterns that end
in the object are used, since a model that reads from left to right sees the rest after it.

Also the worker: `python -m hft_cli.probe JOB.json`. With several ranks (torchrun) each scores a share.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

from hft_cli.layout import MOST_TOKENS, positions
from hft_cli.run_dir import RoundDir, read_json, write_json, write_text
from hft_cli.schema import ModelConfig, UserError, from_dict, locate

QUESTION = "[question]"  # stands for the pattern where a fact's subject is a whole question
ENDS_IN_OBJECT = re.compile(r"^(?P<before>.*\[X\].*?)\s*\[Y\]\s*[.?!]?\s*$")
RESAMPLES = 2000


@dataclass(frozen=True)
class ProbeConfig:
    """How a suite runs a probe: an entry of suite.probe."""

    facts: str
    """JSON lines: relation, sub, obj; or rows of messages with a relation. Below suite.data_dir, or pocket:…"""
    patterns: str | None = None
    """JSON lines: relation, pattern with [X] and [Y]; null: the subjects are questions."""
    wrong: int = 9
    """Wrong answers for each fact, fewer where the relation has fewer objects; at least 1."""
    paraphrases: int = 4
    """Paraphrases of each fact at most; at least 1."""
    shots: int = 4
    """Examples before the fact; at least 0."""


@dataclass(frozen=True)
class Fact:
    """Something known: of `subject`, `answer` is right in `relation`."""

    relation: str
    subject: str
    answer: str


@dataclass(frozen=True)
class Query:
    """A fact in one paraphrase, the examples that stand before it, and the answers to rank, the right one first."""

    fact: Fact
    pattern: str
    examples: tuple[Fact, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class ProbeJob:
    """What a worker is told. `outs`: probe -> file of scores; the items go beside it. `limit`: facts a relation."""

    model: ModelConfig
    path: str
    probes: dict[str, ProbeConfig]
    outs: dict[str, str]
    limit: int | None
    chat: bool
    batch_size: int
    seed: int

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> ProbeJob:
        values = read_json(path)
        probes = {name: ProbeConfig(**own) for name, own in values.pop("probes").items()}
        return cls(model=from_dict(ModelConfig, values.pop("model")), probes=probes, **values)


def settings(name: str, values: Mapping[str, Any], data_dir: Path | None) -> ProbeConfig | None:
    """A suite's settings of the probe `name` with its files found; None if they want a data_dir and there is none.

    Raises:
        UserError: for an unknown key, a value out of range, or a missing file.
    """
    where = f"suite.probe.{name}"
    if "facts" not in values:
        raise UserError(f"{where}.facts is not set: the file with the facts.")
    own: ProbeConfig = from_dict(ProbeConfig, dict(values), where + ".")
    for key, low in (("wrong", 1), ("paraphrases", 1), ("shots", 0)):
        if getattr(own, key) < low:
            raise UserError(f"{where}.{key}={getattr(own, key)} is too small: it must be at least {low}.")
    places = {"facts": own.facts, "patterns": own.patterns}
    for key, place in places.items():
        if place is None:
            continue
        if place.startswith("pocket:") or Path(place).is_absolute():
            path = Path(locate(place))
        elif data_dir is None:
            return None
        else:
            path = data_dir / place
        if not path.is_file():
            raise UserError(
                f"{where}.{key}: there is no file {path}. Put it there, or leave {name} out (suite.only=[…])."
            )
        places[key] = str(path)
    return replace(own, facts=str(places["facts"]), patterns=places["patterns"])


def data_hash(config: ProbeConfig) -> str:
    """SHA-256 over the files of a probe."""
    digest = hashlib.sha256()
    for place in (config.facts, config.patterns):
        if place is not None:
            digest.update(hashlib.sha256(Path(place).read_bytes()).digest())
    return digest.hexdigest()


def read(config: ProbeConfig) -> dict[str, tuple[list[Fact], list[str]]]:
    """Relation -> its facts and the patterns that end in the object; relations without either are left out.

    Raises:
        UserError: for a line that is not as it should be.
    """
    facts: dict[str, dict[Fact, None]] = {}
    for where, row in _lines(config.facts):
        if "messages" in row:
            row = {
                "relation": row.get("relation"),
                "sub": row["messages"][0]["content"],
                "obj": row["messages"][-1]["content"],
            }
        values = [row.get(key) for key in ("relation", "sub", "obj")]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise UserError(f"{where}: a fact has relation, sub and obj, each a text.")
        fact = Fact(*(str(value).strip() for value in values))
        facts.setdefault(fact.relation, {})[fact] = None
    patterns: dict[str, list[str]] = {}
    if config.patterns is None:
        patterns = {relation: [QUESTION] for relation in facts}
    else:
        for where, row in _lines(config.patterns):
            if not all(isinstance(row.get(key), str) for key in ("relation", "pattern")):
                raise UserError(f"{where}: a pattern has relation and pattern, each a text.")
            if ENDS_IN_OBJECT.match(row["pattern"]):
                patterns.setdefault(row["relation"], []).append(row["pattern"])
    return {
        relation: (list(own), patterns[relation])
        for relation, own in facts.items()
        if relation in patterns and len({fact.answer.casefold() for fact in own}) > 1
    }


def _lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not an object.")
        yield f"{path}, line {number}", row


def queries(config: ProbeConfig, seed: int, limit: int | None = None) -> list[Query]:
    """What to ask, in order. Every choice is by a hash under the seed: the same on every machine and rank."""
    asked = []
    for relation, (facts, patterns) in read(config).items():
        objects: dict[str, str] = {}  # spelled as it was first
        right: dict[str, set[str]] = {}
        for fact in facts:
            objects.setdefault(fact.answer.casefold(), fact.answer)
            right.setdefault(fact.subject, set()).add(fact.answer.casefold())
        for fact in _first(facts, limit, f"{seed} facts {relation}", lambda fact: f"{fact.subject}\0{fact.answer}"):
            place = f"{seed} {relation}\0{fact.subject}\0{fact.answer}"
            own = fact.answer.casefold()
            # "1" is likelier than "118" whatever a model knows: nothing that begins with the other is compared.
            others = [
                answer
                for key, answer in objects.items()
                if key not in right[fact.subject] and not key.startswith(own) and not own.startswith(key)
            ]
            wrong = _first(others, config.wrong, f"{place} wrong", str)
            if not wrong:
                continue
            answers = (fact.answer, *wrong)
            examples = tuple(_examples(fact, facts, answers, config.shots, f"{place} examples"))
            for pattern in _first(patterns, config.paraphrases, f"{seed} patterns {relation}", str):
                asked.append(Query(fact, pattern, examples, answers))
    return asked


def _first(values: Sequence[Any], number: int | None, place: str, name: Callable[[Any], str]) -> list[Any]:
    """The first `number` values in the order of their hashes."""
    return sorted(values, key=lambda value: hashlib.sha256(f"{place}\0{name(value)}".encode()).digest())[:number]


def _examples(fact: Fact, facts: Sequence[Fact], answers: Sequence[str], number: int, place: str) -> Iterator[Fact]:
    """Facts of other subjects and of different objects, which are none of the answers as far as there are such.

    An object that stands before among the examples would be likelier for that alone.
    """
    ranked = {answer.casefold() for answer in answers}
    ordered = _first(facts, None, place, lambda other: f"{other.subject}\0{other.answer}")
    seen: set[str] = set()
    for other in sorted(ordered, key=lambda other: other.answer.casefold() in ranked):
        if len(seen) == number:
            return
        if other.subject != fact.subject and other.answer.casefold() not in seen:
            seen.add(other.answer.casefold())
            yield other


def text(query: Query, chat: Callable[[str], str] | None) -> tuple[str, str]:
    """What stands before the answer, and what joins the two: a blank, or nothing after a chat template's header."""
    if query.pattern == QUESTION:
        if chat is not None:
            return chat(query.fact.subject), ""
        examples = "".join(f"Question: {one.subject}\nAnswer: {one.answer}\n\n" for one in query.examples)
        return f"{examples}Question: {query.fact.subject}\nAnswer:", " "
    lines = [query.pattern.replace("[X]", one.subject).replace("[Y]", one.answer) for one in query.examples]
    found = ENDS_IN_OBJECT.match(query.pattern)
    assert found is not None
    return "\n".join([*lines, found["before"].replace("[X]", query.fact.subject)]), " "


# ------------------------------------------------------------------------------------------------------------ worker


def main(argv: list[str]) -> int:
    """Score the job in the file argv[0]; a user's mistake goes into mistake.txt beside it."""
    path = Path(argv[0])
    try:
        score(ProbeJob.read(path), RoundDir(path.parent).progress)
    except UserError as error:
        write_text(path.parent / "mistake.txt", str(error))
        return 2
    return 0


def score(job: ProbeJob, progress: Path) -> None:
    """Score every probe of the job; each one's file of scores is written last, when it is done.

    `progress`: the file that the parent shows; with several ranks it is of the first.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hft_cli.data import as_text, chat_template

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if ranks > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(weeks=1))
    tokenizer = AutoTokenizer.from_pretrained(job.path)
    if job.model.chat_template is not None:
        tokenizer.chat_template = chat_template(job.model.chat_template, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        job.path, dtype=getattr(torch, job.model.dtype), attn_implementation=job.model.attention
    )
    model.to(device).eval()

    def through_template(question: str) -> str:
        chat = [{"role": "user", "content": question}]
        return as_text(chat, "the chat template", tokenizer, add_generation_prompt=True)

    for name, config in job.probes.items():
        start = time.perf_counter()
        asked = queries(config, job.seed, job.limit)
        mine = asked[rank::ranks]
        texts = [text(query, through_template if job.chat else None) for query in mine]
        pairs = [
            (before, [gap + answer for answer in query.answers])
            for query, (before, gap) in zip(mine, texts, strict=True)
        ]
        found, cut = log_likelihoods(
            model, tokenizer, pairs, job.batch_size, _progress(progress) if rank == 0 else None
        )
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
    tick: Callable[[int, int, int], None] | None = None,
) -> tuple[list[list[float]], int]:
    """For each (text, continuations) the log-likelihood of each continuation after the text, in nats.

    Continuations that differ in their last token alone, such as all of one token, share a forward pass. A row too long
    for the model loses its start; the second value is how many did. `tick` hears (forward passes done, of, tokens).
    """
    import torch

    keeps = "logits_to_keep" in signature(model.forward).parameters
    longest = positions(model.config.to_dict()) or MOST_TOKENS
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
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(batch[0])
        if tick is not None:
            tick(start + len(batch), len(order), sum(map(len, batch)))
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


def _progress(file: Path) -> Callable[[int, int, int], None]:
    """Count rows and tokens into the file that the parent shows."""
    start, tokens = time.perf_counter(), [0]

    def tick(done: int, of: int, more: int) -> None:
        tokens[0] += more
        rate = tokens[0] / max(time.perf_counter() - start, 1e-9)
        file.write_text(json.dumps({"step": done, "of": of, "loss": None, "tokens_per_second": rate}))

    return tick


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
