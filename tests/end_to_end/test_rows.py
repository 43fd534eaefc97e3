"""Rows that a chat template refuses stop a run before it trains."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import QUICK, hft


def test_a_row_of_a_later_round_is_refused_before_the_first(tmp_path: Path) -> None:
    call = {"function": {"name": "weather", "arguments": "{}"}}
    answer = {"role": "assistant", "content": "I look.", "tool_calls": [call]}
    row = {"messages": [{"role": "user", "content": "Weather in Oslo?"}, answer]}
    (tmp_path / "later.jsonl").write_text(json.dumps(row))
    paths = f"data.path=[pocket:skills/order/train.jsonl,{tmp_path}/later.jsonl]"
    done = hft("train", *QUICK, "+method=hft", paths, f"output_dir={tmp_path}/run")
    assert done.status == 2, done.err
    assert "later.jsonl, line 1: the chat template leaves out 'tool_calls'" in done.err
    assert not list((tmp_path / "run/rounds").glob("*/checkpoints"))
    assert not list((tmp_path / "run/rounds").glob("*/outcome.json"))
