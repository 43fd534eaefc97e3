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
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hft_cli.config.settings import check_settings
from hft_cli.config.suites import ProbeConfig
from hft_cli.errors import UserError
from hft_cli.files import from_dict
from hft_cli.paths import resolve_path

QUESTION = "[question]"  # stands for the pattern where a fact's subject is a whole question

ENDS_IN_OBJECT = re.compile(r"^(?P<before>.*\[X\].*?)\s*\[Y\]\s*[.?!]?\s*$")


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


def settings(name: str, values: Mapping[str, Any], data_dir: Path | None) -> ProbeConfig | None:
    """A suite's settings of the probe `name` with its files found; None if they want a data_dir and there is none.

    Raises:
        UserError: for an unknown key, a value out of range, or a missing file.
    """
    where = f"suite.probe.{name}"
    if "facts" not in values:
        raise UserError(f"{where}.facts is not set: the file with the facts.")
    own: ProbeConfig = from_dict(ProbeConfig, dict(values), where + ".")
    check_settings(own, where + ".")
    places = {"facts": own.facts, "patterns": own.patterns}
    for key, place in places.items():
        if place is None:
            continue
        if place.startswith("pocket:") or Path(place).is_absolute():
            path = Path(resolve_path(place))
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
