"""The knowledge probe: facts, paraphrases and wrong answers, chosen so that the form of an answer does not matter.

The probe measures whether the correct answer has a higher log-likelihood than wrong answers of the same kind. A fact
(relation, subject, object) is put into several paraphrases, each after a few examples of the same paraphrase, and its
object is ranked among up to nine objects of other facts of the relation. Relations and paraphrases are those of ParaRel
(Elazar et al. 2021, TACL 9:1012-1031). Only the patterns that end in the object are used, because a causal model does
not see the text after the object.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hft_cli.config.settings import check_settings
from hft_cli.config.suites import ProbeConfig
from hft_cli.data.files import read_rows
from hft_cli.errors import UserError
from hft_cli.files import from_dict
from hft_cli.paths import resolve_path

QUESTION = "[question]"  # the pattern of facts whose subject is a whole question

ENDS_IN_OBJECT = re.compile(r"^(?P<before>.*\[X\].*?)\s*\[Y\]\s*[.?!]?\s*$")


@dataclass(frozen=True)
class Fact:
    """`answer` is correct for `subject` in `relation`."""

    relation: str
    subject: str
    answer: str


@dataclass(frozen=True)
class Query:
    """A fact in one paraphrase.

    Attributes:
        examples: the facts that precede it in the prompt.
        answers: the answers to rank, the correct one first.
        commonest: how often the correct one is named by always naming that of the answers which is the object of most
            facts of the relation: 1, 0, or the share of a tie.
    """

    fact: Fact
    pattern: str
    examples: tuple[Fact, ...]
    answers: tuple[str, ...]
    commonest: float = 0.0


def probe_settings(name: str, values: Mapping[str, Any], data_dir: Path | None) -> ProbeConfig | None:
    """Check a suite's settings of the probe `name` and resolve the paths of its files.

    Returns:
        The settings; None if a file is relative to `data_dir` and that is None.

    Raises:
        UserError: for an unknown key, a value out of range, or a missing file.
    """
    key = f"suite.probe.{name}"
    if "facts" not in values:
        raise UserError(f"{key}.facts is not set: the file with the facts.")
    config: ProbeConfig = from_dict(ProbeConfig, dict(values), f"{key}.")
    check_settings(config, f"{key}.")
    files: dict[str, Any] = {}
    for field in ("facts", "patterns"):
        value = getattr(config, field)
        if value is None:
            continue
        if value.startswith("pocket:") or Path(value).is_absolute():
            path = Path(resolve_path(value))
        elif data_dir is None:
            return None
        else:
            path = data_dir / value
        if not path.is_file():
            raise UserError(
                f"{key}.{field}: there is no file {path}. Put it there, or leave {name} out (suite.only=[…])."
            )
        files[field] = str(path)
    return replace(config, **files)


def files_hash(config: ProbeConfig) -> str:
    """SHA-256 over the contents of a probe's files."""
    digest = hashlib.sha256()
    for file in (config.facts, config.patterns):
        if file is not None:
            digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return digest.hexdigest()


def read_relations(config: ProbeConfig) -> dict[str, tuple[list[Fact], list[str]]]:
    """Read relation -> (facts, patterns that end in the object).

    Relations without such a pattern, or with a single object, are left out.

    Raises:
        UserError: for a line without the required keys.
    """
    facts: dict[str, dict[Fact, None]] = {}
    for place, row in read_rows(config.facts, "train"):
        fact = _fact(row, place)
        facts.setdefault(fact.relation, {})[fact] = None
    patterns: dict[str, list[str]] = {}
    if config.patterns is None:
        patterns = {relation: [QUESTION] for relation in facts}
    else:
        for place, row in read_rows(config.patterns, "train"):
            if not all(isinstance(row.get(key), str) for key in ("relation", "pattern")):
                raise UserError(f"{place}: a pattern has relation and pattern, each a text.")
            if ENDS_IN_OBJECT.match(row["pattern"]):
                patterns.setdefault(row["relation"], []).append(row["pattern"])
    return {
        relation: (list(relation_facts), patterns[relation])
        for relation, relation_facts in facts.items()
        if relation in patterns and len({fact.answer.casefold() for fact in relation_facts}) > 1
    }


def _fact(row: Mapping[str, Any], place: str) -> Fact:
    """A fact from ParaRel's keys, or from a chat with a relation: question and answer."""
    values = [row.get(key) for key in ("relation", "sub", "obj")]
    if "messages" in row:
        values = [row.get("relation"), row["messages"][0]["content"], row["messages"][-1]["content"]]
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise UserError(f"{place}: a fact has relation, sub and obj, each a text.")
    return Fact(*(str(value).strip() for value in values))


def build_queries(config: ProbeConfig, seed: int, limit: int | None = None) -> list[Query]:
    """The queries of a probe, in order.

    Every choice takes the first values in the order of their hashes under the seed, so it is the same on every machine
    and every rank.

    Args:
        limit: facts of each relation; None takes all.
    """
    queries = []
    for relation, (facts, patterns) in read_relations(config).items():
        objects: dict[str, str] = {}  # case-folded -> as first spelled
        correct: dict[str, set[str]] = {}  # subject -> its case-folded objects
        counts = Counter(fact.answer.casefold() for fact in facts)
        for fact in facts:
            objects.setdefault(fact.answer.casefold(), fact.answer)
            correct.setdefault(fact.subject, set()).add(fact.answer.casefold())
        for fact in _first(facts, limit, f"{seed} facts {relation}", _fact_name):
            key = f"{seed} {relation}\0{fact.subject}\0{fact.answer}"
            wrong = _first(_wrong_answers(fact, objects, correct[fact.subject]), config.wrong, f"{key} wrong", str)
            if not wrong:
                continue
            answers = (fact.answer, *wrong)
            examples = tuple(_examples(fact, facts, answers, config.shots, f"{key} examples"))
            for pattern in _first(patterns, config.paraphrases, f"{seed} patterns {relation}", str):
                queries.append(Query(fact, pattern, examples, answers, _commonest(answers, counts)))
    return queries


def _commonest(answers: Sequence[str], counts: Mapping[str, int]) -> float:
    numbers = [counts[answer.casefold()] for answer in answers]
    return (numbers[0] == max(numbers)) / numbers.count(max(numbers))


def with_other_subjects(queries: Sequence[Query], seed: int) -> dict[Fact, Query]:
    """For each fact its first query, about another subject of its relation: what a model answers without the fact.

    The other subject is not in the examples, and its own object is not among the answers if possible. Facts of a
    relation without such a subject are left out.
    """
    first: dict[Fact, Query] = {}
    for query in queries:
        first.setdefault(query.fact, query)
    by_relation: dict[str, list[Fact]] = {}
    for fact in first:
        by_relation.setdefault(fact.relation, []).append(fact)
    others = {}
    for fact, query in first.items():
        ranked = {answer.casefold() for answer in query.answers}
        used = {fact.subject, *(example.subject for example in query.examples)}
        candidates = [other for other in by_relation[fact.relation] if other.subject not in used]
        candidates = [other for other in candidates if other.answer.casefold() != fact.answer.casefold()]
        unranked = [other for other in candidates if other.answer.casefold() not in ranked]
        key = f"{seed} {fact.relation}\0{_fact_name(fact)} other subject"
        for other in _first(unranked or candidates, 1, key, _fact_name):
            others[fact] = replace(query, fact=replace(fact, subject=other.subject))
    return others


def _first(values: Sequence[Any], number: int | None, key: str, name: Callable[[Any], str]) -> list[Any]:
    """The first `number` values in the order of the hashes of their names under `key`."""
    return sorted(values, key=lambda value: hashlib.sha256(f"{key}\0{name(value)}".encode()).digest())[:number]


def _fact_name(fact: Fact) -> str:
    return f"{fact.subject}\0{fact.answer}"


def _wrong_answers(fact: Fact, objects: Mapping[str, str], correct: set[str]) -> list[str]:
    """The objects of the relation that are wrong for the fact.

    An answer that begins with another one is never ranked against it: "1" is likelier than "118" for any model.
    """
    answer = fact.answer.casefold()
    return [
        spelling
        for key, spelling in objects.items()
        if key not in correct and not key.startswith(answer) and not answer.startswith(key)
    ]


def _examples(fact: Fact, facts: Sequence[Fact], answers: Sequence[str], number: int, key: str) -> Iterator[Fact]:
    """Facts of other subjects with different objects, preferably objects that are not ranked.

    An object that occurs among the examples would be likelier for that reason alone.
    """
    ranked = {answer.casefold() for answer in answers}
    ordered = sorted(_first(facts, None, key, _fact_name), key=lambda other: other.answer.casefold() in ranked)
    used: set[str] = set()
    for other in ordered:
        if len(used) == number:
            return
        if other.subject != fact.subject and other.answer.casefold() not in used:
            used.add(other.answer.casefold())
            yield other


def prompt_and_separator(query: Query, chat: Callable[[str], str] | None) -> tuple[str, str]:
    """The text before the answer, and the text between the two.

    Args:
        chat: renders a question by the chat template, up to where the answer begins; None asks in plain text.

    Returns:
        The separator is a space, or empty after the header of a chat template.
    """
    if query.pattern == QUESTION:
        if chat is not None:
            return chat(query.fact.subject), ""
        examples = "".join(f"Question: {fact.subject}\nAnswer: {fact.answer}\n\n" for fact in query.examples)
        return f"{examples}Question: {query.fact.subject}\nAnswer:", " "
    lines = [query.pattern.replace("[X]", fact.subject).replace("[Y]", fact.answer) for fact in query.examples]
    match = ENDS_IN_OBJECT.match(query.pattern)
    assert match is not None
    return "\n".join([*lines, match["before"].replace("[X]", query.fact.subject)]), " "
