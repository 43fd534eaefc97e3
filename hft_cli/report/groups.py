"""Runs of one setting as groups, and groups as families and comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from hft_cli.config.settings import WITHOUT_TRAINING
from hft_cli.report.runs import Run, RunRow, SettingKey

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
METHOD_ORDER = ("FFT", "HFT", "Half-Reset", "Interpolation", "DPO", "HFT-DPO", "LoRA")
# The keys that are tried first to label groups. Their values stand alone, other values follow the last part of the key.
LABEL_KEYS = ("selection.level", "selection.ratio", "train.learning_rate", "model.name", "data.name", "continual.name",
              "engine.name", "suite.name")  # fmt: skip
LONGEST_LABEL_PART = 60  # characters
MOST_MAPS = 6  # in one figure


@dataclass(frozen=True)
class Group:
    """The counted runs of one setting, which differ in their seeds only. No two groups of a report share a label."""

    label: str
    runs: tuple[Run, ...]

    @property
    def row(self) -> RunRow:
        """The row of the first run, for what all of its runs have in common."""
        return self.runs[0].row

    @property
    def label_without_rate(self) -> str:
        return self.label.replace(f" lr {self.runs[0].setting.get('train.learning_rate')}", "")

    def key_without(self, *prefixes: str) -> SettingKey:
        return self.runs[0].key_without(*prefixes)


@dataclass(frozen=True)
class Comparison:
    """Runs whose scores can be compared, because they have the same data, base model and suites.

    Attributes:
        name: tells the comparison from others in titles; empty if there is only one.
        suffix: the same for file names; empty for the first.
    """

    runs: Sequence[Run]
    name: str = ""
    suffix: str = ""

    @cached_property
    def groups(self) -> list[Group]:
        return group_runs(self.runs)

    def title(self, text: str) -> str:
        return f"{text}: {self.name}" if self.name else text

    def stem(self, text: str) -> str:
        """The stem of a file's name."""
        safe = "".join(char if char.isalnum() else "_" for char in self.suffix)
        return f"{text}_{safe}" if safe else text


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """The scored runs by their data, their base model and their suites, the largest comparison first."""
    keys = ("data.name", "data.path", "data.test_path")
    by_data = grouped(
        (run for run in runs if run.row.scores),
        lambda run: (*(run.setting.get(key, "") for key in keys), *run.basis),
    )
    if len(by_data) == 1:
        return [Comparison(members) for members in by_data.values()]
    members_of = sorted(by_data.values(), key=lambda members: -len(members))
    firsts = [members[0] for members in members_of]
    names = Counter(_name(run, firsts) for run in firsts)
    numbers: Counter[str] = Counter()
    comparisons: list[Comparison] = []
    for members in members_of:
        name = _name(members[0], firsts)
        numbers[name] += 1
        title = name if names[name] == 1 else f"{name} {numbers[name]}"
        comparisons.append(Comparison(members, title, title if comparisons else ""))
    return comparisons


def _name(run: Run, others: Sequence[Run]) -> str:
    """The data of a run, with the model and the suite where those of the others differ."""
    keys = ("model.name", "suite.name")
    told = [run.setting.get(key, "") for key in keys if len({other.setting.get(key) for other in others}) > 1]
    return ", ".join(filter(None, [run.setting.get("data.name", ""), *told]))


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by key, both in the order in which they come."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Counted runs by setting, in the order of method, selection and learning rate."""
    by_setting = list(grouped((run for run in runs if run.counted), Run.key_without).values())
    labels = _labels([members[0] for members in by_setting])
    groups = [
        Group(label, tuple(sorted(members, key=lambda run: (run.row.seed or 0, run.draw_seed or 0))))
        for label, members in zip(labels, by_setting, strict=True)
    ]
    return sorted(groups, key=lambda g: (method_order(g.row.label), g.row.selection, g.row.learning_rate or 0, g.label))


def _labels(runs: Sequence[Run]) -> list[str]:
    """A label for each setting: the method, and each further value only if it tells more settings apart."""
    labels: list[tuple[str, ...]] = [(run.row.label,) for run in runs]
    for key in _label_keys(runs):
        longer = [(*label, _label_part(run, key)) for label, run in zip(labels, runs, strict=True)]
        if len(set(longer)) > len(set(labels)):
            labels = longer
    shortened = [" ".join(map(_shortened, filter(None, label))) for label in labels]
    return shortened if len(set(shortened)) == len(set(labels)) else [" ".join(filter(None, label)) for label in labels]


def _shortened(part: str) -> str:
    return part if len(part) < LONGEST_LABEL_PART else part[: LONGEST_LABEL_PART - 3] + "…"


def _label_keys(runs: Sequence[Run]) -> list[str]:
    """The keys of labels by priority. Keys that only some versions of the program write come last."""
    others = {key for run in runs for key in run.setting}.difference(LABEL_KEYS)
    return [*LABEL_KEYS, *sorted(others, key=lambda key: (not all(key in run.setting for run in runs), key))]


def _label_part(run: Run, key: str) -> str:
    value = run.setting.get(key, "")
    if value in ("", "None") or (key == "selection.level" and run.row.method in ("fft", "dpo", "lora")):  # implied
        return ""
    if key == "train.learning_rate":
        return f"lr {value}"
    return value if key in LABEL_KEYS or key.endswith(".name") else f"{key.rsplit('.', 1)[-1]} {value}"


def method_order(label: str) -> tuple[int, str]:
    """Sort key of method labels: FFT first, then HFT, then Half-Reset, then the rest."""
    method = label.split(" + ")[0]
    return METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER), label


def families(groups: Iterable[Group], *prefixes: str) -> list[list[Group]]:
    """Groups whose settings differ only in keys that begin with one of the prefixes."""
    return list(grouped(groups, lambda group: group.key_without(*prefixes)).values())


def with_full_counterparts(groups: Sequence[Group], key: str) -> list[list[Group]]:
    """Families of partial fine-tuning that differ in a key of the setting, with two values of it or more.

    Each has its counterpart that updates everything at the end, if there is one.
    """
    result = []
    for family in families([group for group in groups if group.row.level not in ("all", "lora")], key):
        if len({group.runs[0].setting.get(key) for group in family}) > 1:
            full = full_counterpart(family[0], groups)
            result.append([*family, full] if full else family)
    return result


def full_counterpart(group: Group, groups: Iterable[Group]) -> Group | None:
    """The group that updates every matrix and is otherwise set as this one: FFT for HFT. None without training."""
    if group.row.method in WITHOUT_TRAINING:
        return None
    key = group.key_without("method.name", "selection.")
    return next((g for g in groups if g.row.level == "all" and g.key_without("method.name", "selection.") == key), None)


def batches(stem: str, groups: Sequence[Group]) -> Iterator[tuple[str, Sequence[Group]]]:
    """Groups in batches of one figure each, with the stem of the figure's file: STEM, STEM_2, STEM_3."""
    for i in range(0, len(groups), MOST_MAPS):
        yield f"{stem}_{i // MOST_MAPS + 1}" if i else stem, groups[i : i + MOST_MAPS]
