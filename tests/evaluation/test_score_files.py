"""Files of scores, and the cache of the scores of initial models."""

from __future__ import annotations

import json
import re

import pytest

from hft_cli.evaluation.score_files import (
    add_to_cache,
    cache_key,
    copy_from_cache,
    read_items,
    read_scores,
    write_scores,
)


def test_scores_and_items_are_written_beside_each_other(tmp_path):
    write_scores(tmp_path / "a.json", {"scores": {"acc": 0.5}, "limit": 3}, [{"row": "ü"}, {"row": 1}])
    assert read_scores(tmp_path / "a.json") == ({"acc": 0.5}, {"limit": 3})
    assert (tmp_path / "a.jsonl").read_text() == '{"row": "ü"}\n{"row": 1}\n'
    write_scores(tmp_path / "rows.json", {"exact_match": 1.0}, [])
    assert read_scores(tmp_path / "rows.json") == ({"exact_match": 1.0}, {})


@pytest.mark.parametrize("mark", ["\u0085", "\u2028", "\u2029", "\x0b", "\x1c", "\r"])
def test_any_character_may_stand_in_an_item(mark, tmp_path):
    write_scores(tmp_path / "a.json", {"acc": 0.5}, [{"row": f"a{mark}b", "acc": 1.0}, {"row": mark, "acc": 0.0}])
    assert list(read_items(tmp_path / "a.jsonl", "acc")) == [f"a{mark}b", mark]


def test_cached_scores_are_copied_to_missing_files_only(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, second = tmp_path / "first" / "a.json", tmp_path / "second" / "a.json"
    first.parent.mkdir()
    write_scores(first, {"acc": 0.5}, [{"row": 1}])
    assert copy_from_cache({second: "key"}) == 0
    add_to_cache({first: "key"})
    assert copy_from_cache({first: "key", second: "key"}) == 1
    assert json.loads(second.read_text()) == {"acc": 0.5}
    assert second.with_suffix(".jsonl").read_text() == '{"row": 1}\n'


def test_a_cache_key_depends_on_every_value():
    keys = {cache_key({"dtype": dtype}, seed) for dtype in ("float32", "bfloat16") for seed in (1, 2, 2)}
    assert len(keys) == 4


def test_a_score_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_scores(tmp_path / "a.json", {"accuracy": 1.0}, [])
    add_to_cache({tmp_path / "a.json": "key"})
    (message,) = caplog.messages
    assert re.match(r"Scores are not kept for other runs: .* cannot be written \(Not a directory\)", message)
