"""Several sets in one round: how many rows of each, which, and what repeats."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers import composed
from hypothesis import given, settings
from hypothesis import strategies as st

from hft_cli.config.schema import RunConfig
from hft_cli.data.mixing import read_mixed
from hft_cli.data.rows import chat_of_answer
from hft_cli.data.sources import Source, draw_rows, row_counts
from hft_cli.errors import UserError
from hft_cli.method.rounds import phases


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": text, "completion": "a"}) + "\n" for text in texts))
    return str(path)


def config(*overrides: str) -> RunConfig:
    return composed("+method=hft", *overrides)


def questions(stage: str, sources: list[Source], of: RunConfig | None = None) -> list[str]:
    return [str(chat.turns[0]["content"]) for chat in read_mixed(stage, sources, of or config()).rows]


# what is asked of sets with these numbers of rows -> the rows that are taken of each
COUNTS: dict[str, tuple[list[dict[str, Any]], list[int], list[int]]] = {
    "all": ([{}, {}], [10, 3], [10, 3]),
    "a fraction": ([{"fraction": 0.25}, {"fraction": 0.01}], [10, 3], [2, 1]),
    "at most": ([{"at_most": 5}, {"at_most": 5}], [10, 3], [5, 3]),
    "a number": ([{"rows": 5}, {"rows": 7}], [10, 3], [5, 7]),
    "1% replay": ([{}, {"share": 0.01}], [990, 5000], [990, 10]),
    "a share that repeats rows": ([{}, {"share": 0.5}], [100, 30], [100, 100]),
    "a share of a tiny round": ([{}, {"share": 0.01}], [5, 100], [5, 1]),
    "shares beside a number": ([{}, {"rows": 20}, {"share": 0.25}, {"share": 0.25}], [80, 99, 99, 99],
                               [80, 20, 50, 50]),
    "shares alone": ([{"share": 0.75}, {"share": 0.25}], [300, 50], [150, 50]),
    "one share alone": ([{"share": 1.0}], [7], [7]),
    "an empty set": ([{}, {"share": 0.5}, {"rows": 3}], [4, 0, 0], [4, 0, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_a_round_takes_what_is_asked_of_each_set(name: str) -> None:
    asked, sizes, counts = COUNTS[name]
    assert row_counts([Source("x", **values) for values in asked], sizes) == counts


@given(
    st.integers(1, 10_000), st.lists(st.tuples(st.integers(1, 10_000), st.floats(0.01, 0.2)), min_size=1, max_size=4)
)
def test_a_share_is_that_of_the_whole_round(size: int, others: list[tuple[int, float]]) -> None:
    shares = [share for _, share in others]
    counts = row_counts([Source("x"), *(Source("y", share=share) for share in shares)], [size, *(n for n, _ in others)])
    assert counts[0] == size
    for count, share in zip(counts[1:], shares, strict=True):
        assert abs(count - share * sum(counts)) < 1 + share * len(counts)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=4))
def test_shares_alone_repeat_no_row_and_use_one_set_whole(sizes: list[int]) -> None:
    shares = [share / sum(range(1, len(sizes) + 1)) for share in range(1, len(sizes) + 1)]
    counts = row_counts([Source("x", share=share) for share in shares], sizes)
    assert all(count <= size for count, size in zip(counts, sizes, strict=True))
    assert any(count == size for count, size in zip(counts, sizes, strict=True))


def test_rows_are_drawn_by_the_key_in_the_files_order() -> None:
    for rows, count in ((10, 3), (10, 10), (3, 10)):
        drawn = draw_rows(rows, count, "42\0x")
        assert drawn == sorted(drawn) == draw_rows(rows, count, "42\0x")
        assert len(drawn) == count
        times = Counter(drawn).values()
        assert len(times) == min(rows, count)
        assert max(times) - min(times) <= 1
    assert len({tuple(draw_rows(100, 10, f"{seed}\0x")) for seed in range(50)}) == 50


def test_a_mix_holds_rows_of_its_sets_by_the_seed(tmp_path: Path) -> None:
    new = write(tmp_path / "new.jsonl", [f"new {number}" for number in range(99)])
    old = write(tmp_path / "old.jsonl", [f"old {number}" for number in range(5000)])
    sources = [Source(new), Source(old, share=0.01)]
    mixed = read_mixed("sft", sources, config())
    assert [(part.path, part.read, part.taken) for part in mixed.parts] == [(new, 99, 99), (old, 5000, 1)]
    assert questions("sft", sources)[:99] == [f"new {number}" for number in range(99)]
    replayed = {questions("sft", sources, config(f"seed={seed}"))[-1] for seed in range(20)}
    assert len(replayed) > 10
    assert all(text.startswith("old") for text in replayed)
    again = read_mixed("sft", sources, config())
    assert again.rows.sha256() == mixed.rows.sha256() != read_mixed("sft", sources, config("seed=1")).rows.sha256()


def test_rows_that_repeat_are_left_out_only_by_choice(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", ["a", "b", "a"])
    two = write(tmp_path / "two.jsonl", ["b", "c", "d"])
    sources = [Source(one), Source(two, share=0.5)]
    assert sorted(questions("sft", sources)) == sorted(["a", "b", "a", "b", "c", "d"])
    chosen = config("data.deduplicate=true")
    assert questions("sft", sources, chosen) == ["a", "b", "c", "d"]
    assert [(part.read, part.repeats, part.taken) for part in read_mixed("sft", sources, chosen).parts] == [
        (3, 1, 2), (3, 1, 2),
    ]  # fmt: skip


def test_a_set_with_nothing_new_is_no_error(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", ["a"])
    chosen = config("data.deduplicate=true")
    assert questions("sft", [Source(one), Source(one, rows=3)], chosen) == ["a"]
    with pytest.raises(UserError, match=r"No rows in .*empty\.jsonl"):
        questions("sft", [Source(one), Source(write(tmp_path / "empty.jsonl", []))])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 20), min_size=2, max_size=60), st.floats(0.05, 0.9), st.integers(0, 5))
def test_equal_rows_are_on_the_same_side_of_a_split(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], share: float, seed: int
) -> None:
    path = write(tmp_path_factory.mktemp("split") / "a.jsonl", [f"row {number}" for number in numbers])
    seeded, wanted, most = config(f"seed={seed}"), max(round(share * len(numbers)), 1), max(Counter(numbers).values())
    try:
        mixed = read_mixed("sft", [Source(path)], seeded, share)
    except UserError:  # the last rows that are equal were held out too
        assert len(numbers) < wanted + most
        return
    sides = [[str(chat.turns[0]["content"]) for chat in rows] for rows in (mixed.rows, mixed.held_out)]
    assert not set(sides[0]) & set(sides[1])
    assert sorted(sides[0] + sides[1]) == sorted(f"row {number}" for number in numbers)
    assert wanted <= len(sides[1]) < wanted + most
    (part,) = mixed.parts
    assert (part.taken, part.held_out) == (len(mixed.rows), len(mixed.held_out))
    assert read_mixed("sft", [Source(path)], seeded, share).held_out == mixed.held_out


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=4, max_size=20), st.integers(0, 5))
def test_the_answers_of_a_chat_are_on_one_side_of_a_split(
    tmp_path_factory: pytest.TempPathFactory, chats: list[list[int]], seed: int
) -> None:
    file = tmp_path_factory.mktemp("split") / "a, turn 2.jsonl"
    rows = [
        [{"role": role, "content": f"{number}"} for number in numbers for role in ("user", "assistant")]
        for numbers in chats
    ]
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    try:
        mixed = read_mixed("sft", [Source(str(file))], config(f"seed={seed}", "data.loss=each_turn"), 0.3)
    except UserError:  # all chats are connected by equal answers
        return
    trained, held_out = (set(map(chat_of_answer, rows.places())) for rows in (mixed.rows, mixed.held_out))
    assert trained
    assert held_out
    assert not trained & held_out
    assert None not in trained
    assert not set(mixed.rows.digests()) & set(mixed.held_out.digests())


def test_a_split_depends_on_the_seed_and_the_rows_alone(tmp_path: Path) -> None:
    texts = [str(number) for number in range(50)]
    paths = [write(tmp_path / "a.jsonl", texts), write(tmp_path / "b.jsonl", texts[::-1])]
    one, other = (set(read_mixed("sft", [Source(path)], config(), 0.2).held_out.digests()) for path in paths)
    assert one == other != set(read_mixed("sft", [Source(paths[0])], config("seed=1"), 0.2).held_out.digests())
    with pytest.raises(UserError, match=r"data\.validation=0\.9 leaves no row of .*c\.jsonl to train on"):
        read_mixed("sft", [Source(write(tmp_path / "c.jsonl", ["a", "a"]))], config(), 0.9)


def test_pairs_are_mixed_like_chats(tmp_path: Path) -> None:
    paths = []
    for name, number in (("new", 30), ("old", 50)):
        rows = [{"prompt": f"{name} {index}", "chosen": "yes", "rejected": "no"} for index in range(number)]
        rows.append({"prompt": name, "chosen": "same", "rejected": "same"})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(str(tmp_path / f"{name}.jsonl"))
    rows = read_mixed("dpo", [Source(paths[0]), Source(paths[1], share=0.25)], config()).rows
    assert Counter(pair.chosen.turns[0]["content"][:3] for pair in rows) == {"new": 30, "old": 10}


def test_each_set_of_a_mix_has_its_own_columns(tmp_path: Path) -> None:
    new = write(tmp_path / "new.jsonl", ["new"])
    (tmp_path / "old.json").write_text(json.dumps([{"frage": "old", "antwort": "a"}]))
    mix = f"data.mix=[{{path: {tmp_path}/old.json, columns: {{question: frage, response: antwort}}}}]"
    (phase,) = phases(composed("+method=hft", "data.test_path=null", f"data.path={new}", mix))
    assert questions("sft", list(phase.sources)) == ["new", "old"]
