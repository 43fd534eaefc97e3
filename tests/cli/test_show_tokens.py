"""`hft show tokens` prints what training will see, and needs no weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import BASE, Ended, hft, hft_here

CHAT = {
    "messages": [
        {"role": "user", "content": "Capital of Peru?"},
        {"role": "assistant", "content": "Quito", "weight": 0},
        {"role": "user", "content": "No."},
        {"role": "assistant", "content": "Lima"},
    ]
}
ALPACA = {
    "instruction": "And of Chile?",
    "output": "Santiago",
    "system": "Be brief.",
    "history": [["Capital of Peru?", "Lima"]],
    "source": "me",
}
PAIR = {"prompt": "Capital of Peru?", "chosen": "Lima", "rejected": "Quito"}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={path}"


def show(*words: object) -> Ended:
    done = hft_here("show", "tokens", "model=pocket", *words)
    assert done.status == 0, done.err
    return done


def test_json_has_a_line_for_each_row_with_what_is_trained(tmp_path: Path) -> None:
    done = show("--json", "+method=hft", write(tmp_path / "a.jsonl", CHAT, ALPACA))
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["row"] for row in rows] == [1, 2]
    assert [row["trained_text"] for row in rows] == [["Lima<|end|>"], ["Lima<|end|>", "Santiago<|end|>"]]
    for row in rows:
        assert len(row["tokens"]) == len(row["ids"]) == len(row["trained"])
        assert set(row["trained"]) == {0, 1}
    assert rows[1]["text"].startswith("<|system|>Be brief.<|user|>Capital of Peru?")
    assert re.search(r"not used: +source \(1\)", done.err)


def test_rows_of_each_set_of_a_mix_are_shown(tmp_path: Path) -> None:
    new = write(tmp_path / "new.jsonl", *({"prompt": f"new {number}", "completion": "a"} for number in range(30)))
    write(tmp_path / "old.jsonl", *({"prompt": f"old {number}", "completion": "b"} for number in range(30)))
    mix = f"data.mix=[{{path: {tmp_path}/old.jsonl, share: 0.25}}]"
    done = show("--json", "--rows", "3", "+method=hft", new, mix)
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["row"] for row in rows] == [1, 2, 31]
    assert [row["trained_text"] for row in rows] == [["a<|end|>"], ["a<|end|>"], ["b<|end|>"]]
    assert f"10 of 30 rows of {tmp_path}/old.jsonl" in done.err
    held_out = show("--json", "--rows", "all", "+method=hft", new, mix, "data.validation=0.5")
    assert len(held_out.out.splitlines()) == 20
    some = show("--json", "--rows", "19", "+method=hft", new, mix, "data.validation=0.5")
    assert len(some.out.splitlines()) == 19


def test_both_answers_of_a_pair_are_shown(tmp_path: Path) -> None:
    done = show("--json", "+method=dpo", write(tmp_path / "a.jsonl", PAIR))
    row = json.loads(done.out)
    assert [row[side]["trained_text"] for side in ("chosen", "rejected")] == [["Lima<|end|>"], ["Quito<|end|>"]]


def test_it_needs_no_weights_and_writes_a_page_only(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    where = (f"model.path={folder}", write(tmp_path / "a.jsonl", CHAT), f"output_dir={tmp_path}/run")
    done = show("--rows", "1", "--html", tmp_path / "page.html", "+method=hft", *where)
    assert "1 read, 1 trained on" in done.out
    page = (tmp_path / "page.html").read_text()
    assert re.search(r'<span class="loss" title="[\d ]+">Lima</span>', page)
    assert '<span title="' in page
    assert not (tmp_path / "run").exists()


def test_the_text_marks_what_has_a_loss(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", *[CHAT] * 5)
    done = show("--rows=2", "+method=hft", rows, "data.loss=last_turn")
    assert done.out.count("⟦Lima⟧⟦<|end|>⟧") == 2
    assert "Quito<|end|>" in done.out
    assert "5 read, 5 trained on" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rows", "0", "+method=hft"), r"^hft: --rows 0 is not a number of rows"),
        (("--row", "3", "+method=hft"), r"^hft: Unknown option '--row'\. Did you mean '--rows'"),
        (("-m", "+method=hft", "seed=1,2"), r"^hft: hft show tokens shows one run"),
        (("+method=half_reset", "model.base=pocket:model", "model.path=pocket:model"), r"trains on no rows"),
        (("+method=hft", "data.path=nowhere.jsonl"), r"^hft: No such file or folder: 'nowhere\.jsonl'"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], message: str) -> None:
    done = hft("show", "tokens", *words)
    assert done.status == 2, done.err
    assert re.search(message, done.err)
    assert len(done.err.strip().splitlines()) == 1
