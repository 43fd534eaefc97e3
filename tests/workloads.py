"""Workloads of the small families, for the tests of costs; hypothesis strategies over them."""

from __future__ import annotations

from dataclasses import replace

from architectures import FAMILIES
from hypothesis import settings
from hypothesis import strategies as st

from hft_cli.checkpoint.parameters import parameters_from_fields
from hft_cli.config.schema import SelectionConfig
from hft_cli.plan.workload import Setup, Workload, model_shape

PARAMS = {name: parameters_from_fields(fields) or () for name, fields in FAMILIES.items()}
SHAPES = {name: model_shape(fields, PARAMS[name]) for name, fields in FAMILIES.items()}

few = settings(deadline=None, max_examples=60)
families = st.sampled_from(sorted(FAMILIES))
setups = st.builds(
    Setup,
    zero_stage=st.sampled_from([None, 1, 2, 3]),
    ranks=st.integers(1, 9),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    rows=st.integers(1, 4),
    length=st.integers(2, 99),
    accumulation=st.integers(1, 3),
    attention=st.sampled_from(["sdpa", "eager", "flash_attention_2"]),
    checkpointing=st.booleans(),
    stage=st.sampled_from(["sft", "dpo"]),
    reference=st.sampled_from(["precomputed", "full"]),
    anchor=st.sampled_from(["none", "none", "l2_sp", "kl"]),
).map(lambda setup: replace(setup, ranks=1) if setup.zero_stage is None else setup)
selections = st.builds(
    SelectionConfig,
    level=st.sampled_from(["category", "layer", "model"]),
    ratio=st.integers(0, 20).map(lambda twentieth: twentieth / 20),
    balance=st.sampled_from(["matrices", "elements"]),
    embeddings=st.sampled_from(["update", "freeze"]),
    final_norm=st.sampled_from(["update", "freeze"]),
).map(lambda selection: replace(selection, head=selection.embeddings))


def fft(family: str, setup: Setup) -> Workload:
    """Full fine-tuning of a family."""
    return train(family, (p.name for p in PARAMS[family]), setup)


def train(family: str, names, setup: Setup) -> Workload:
    return Workload(PARAMS[family], frozenset(names), SHAPES[family], setup)


def enlarge(work: Workload) -> Workload:
    """The same with parameters so large that none of them is small for ZeRO-3."""
    params = tuple(replace(p, shape=(p.shape[0] * 10_000, *p.shape[1:])) for p in work.params)
    return replace(work, params=params)
