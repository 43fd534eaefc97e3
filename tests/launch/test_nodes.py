"""Which node this is, by the config and by what srun and torchrun set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hft_cli.config.schema import EngineConfig
from hft_cli.errors import UserError
from hft_cli.launch.nodes import Node, this_node

TWO = EngineConfig(name="zero3", zero_stage=3, num_nodes=2, rendezvous="head:29500")


def engine(**changes: Any) -> EngineConfig:
    return EngineConfig(**(vars(TWO) | changes))


@pytest.fixture
def surroundings(monkeypatch) -> Callable[[dict[str, str]], None]:
    """Sets what srun or torchrun would set, and nothing else of theirs."""
    for key in ("GROUP_RANK", "LOCAL_WORLD_SIZE", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(key, raising=False)

    def put(values: dict[str, str]) -> None:
        for key, value in values.items():
            monkeypatch.setenv(key, value)

    return put


@pytest.mark.parametrize(
    ("config", "around", "rank"),
    [
        (engine(node_rank=1), {}, 1),
        (engine(), {"SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "2"}, 1),
        (engine(), {"GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "1", "SLURM_NODEID": "0"}, 1),
        (engine(node_rank=0), {"SLURM_NODEID": "1"}, 0),
    ],
    ids=["the key", "srun", "torchrun within a job", "the key goes first"],
)
def test_a_node_knows_its_number(config, around, rank, surroundings):
    surroundings(around)
    assert this_node(config) == Node(rank, 2, "head", 29500)


def test_one_node_meets_nobody(surroundings):
    surroundings({"SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    assert this_node(EngineConfig(name="zero3", zero_stage=3)) is None


@pytest.mark.parametrize(
    ("config", "around", "words"),
    [
        (engine(), {}, r"which node is this\? Give engine.node_rank=0 here"),
        (engine(node_rank=1, rendezvous=None), {}, r"needs engine.rendezvous=HOST:PORT"),
        (engine(node_rank=1, rendezvous="head:80"), {}, r"port must be from 1024"),
        (engine(), {"SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "16"}, r"srun has started 16 tasks .* one task on"),
        (engine(), {"SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "2"}, r"This is node 2, counted from 0"),
        (EngineConfig(name="single"), {"LOCAL_WORLD_SIZE": "8"}, r"torchrun has started 8 .* starts its ranks itself"),
        (EngineConfig(name="single"), {"SLURM_STEP_NUM_TASKS": "8"}, r"srun has started 8 .* starts its ranks itself"),
    ],
)  # fmt: skip
def test_a_node_that_cannot_know_its_place_is_refused(config, around, words, surroundings):
    surroundings(around)
    with pytest.raises(UserError, match=words):
        this_node(config)
