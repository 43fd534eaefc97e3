"""The ledger as text."""

from __future__ import annotations

import json

from hft_cli.report.draws_table import draws_table
from hft_cli.run_dir import RunDir

Q, K = "model.layers.0.a.q_proj", "model.layers.1.a.k_proj"


def entry(number: int, name: str, updated: list[str], frozen: list[str]) -> dict:
    return {"round": number, "name": name, "level": "category", "ratio": 0.5, "seed": 3, "matrices_reached": 0.5,
            "updated_fraction": 0.5,
            "elements_reached": 0.25, "sha256": "0123456789abcdef", "updated": updated, "frozen": frozen}  # fmt: skip


def test_layers_by_matrices_have_a_mark_for_each_round(tmp_path):
    q, bias, k, head = f"{Q}.weight", f"{Q}.bias", f"{K}.weight", "lm_head.weight"
    rounds = [
        entry(1, "one", [q, bias, head], [k]),
        entry(2, "two", [head], [q, bias, k]),
        entry(2, "two-replay", [head], [q, bias, k]),  # shares the draw of its round
    ]
    (tmp_path / "draws.json").write_text(json.dumps({"rounds": rounds}))
    assert draws_table(RunDir(tmp_path)).splitlines() == [
        "round 1 one: category, ratio 0.5, seed 3; reached 50.0% of the layers' matrices, 25.0% of their elements; "
        "sha256 0123456789ab",
        "round 2 two: category, ratio 0.5, seed 3; reached 50.0% of the layers' matrices, 25.0% of their elements; "
        "sha256 0123456789ab",
        "",
        "● updated   ○ frozen   one mark for each round",
        "",
        "layer  k_proj  q_proj  bias",
        "0              ●○      ●○",
        "1      ○○",
        "",
        "●●  lm_head",
        "",
        "updated in 0 rounds: 1, 1 round: 2, 2 rounds: 0",
        f"never updated: {k}",
    ]
