"""What a phase trains and how: the input of the formulas for memory, operations and bytes. Standard library only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hft_cli.checkpoint.naming import Param
from hft_cli.config.optimizers import DEFAULT, OPTIMIZERS
from hft_cli.config.training import LoraConfig
from hft_cli.plan.compat import MAX_LIVE, PERSISTENT, REDUCE_BUCKET, SUB_GROUP


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its parameters do not show.

    Attributes:
        kv_heads: number of key and value heads.
        head_width: size of one head.
        inner: inner size of a feed-forward block, of one expert in a mixture.
        experts_used: experts for each token.
        gated: whether feed-forward blocks have a gate (SwiGLU).
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    experts: int = 1
    experts_used: int = 1
    gated: bool = True


def model_shape(config: Mapping[str, Any], params: Sequence[Param]) -> Shape:
    """The shape of a model, from its config.json (that of the text model) and its parameters."""

    def first(*keys: str, default: int = 0) -> int:
        return next((int(config[key]) for key in keys if isinstance(config.get(key), int)), default)

    embedding = max((p for p in params if p.kind == "embedding"), key=lambda p: p.elements, default=None)
    width = embedding.shape[1] if embedding and len(embedding.shape) == 2 else 0
    hidden = first("hidden_size", "n_embd", "d_model", default=width)
    heads = first("num_attention_heads", "n_head", default=1)
    experts = first("num_local_experts", "num_experts", "n_routed_experts", default=1)
    inner = first("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    return Shape(
        hidden=hidden,
        layers=len({p.layer for p in params if p.layer is not None}),
        heads=heads,
        kv_heads=first("num_key_value_heads", "num_kv_heads", default=heads),
        head_width=first("head_dim", default=hidden // heads),
        inner=first("moe_intermediate_size", default=inner) if experts > 1 else inner,
        experts=experts,
        experts_used=first("num_experts_per_tok", "num_experts_per_token", default=1) if experts > 1 else 1,
        gated=any(p.is_gate for p in params),
    )


HELD_LOGITS = 2**27  # of a micro-batch: SFT holds so many; with more, TRL's head computes them in tiles, twice


@dataclass(frozen=True)
class Setup:
    """How a phase trains.

    Attributes:
        zero_stage: DeepSpeed ZeRO stage, 1 to 3; None is a single process without DeepSpeed.
        ranks: processes over all nodes, one for each GPU.
        dtype: dtype of computing, float32 or bfloat16.
        rows: rows that a rank handles at once. In DPO a row is a pair of answers.
        length: tokens of a row.
        accumulation: micro-batches in an optimizer step.
        attention: model.attention.
        checkpointing: whether the backward pass recomputes activations.
        stage: sft or dpo.
        reference: dpo.reference.
        tasks: number of past tasks whose gradients GEM keeps.
        memory_rows: rows of each of these tasks.
        offload_optimizer: whether master weights and moments are in host memory.
        offload_parameters: whether weights are in host memory as well.
        optimizer: train.optimizer.
        decays: whether train.weight_decay is set.
        anchor: anchor.name.
        filtered: whether train.momentum_filter is set.
        low_files: whether the model's files are in bfloat16.
        bucket, live, sub_group, persistent: settings of DeepSpeed, in elements; see compat.py.
    """

    zero_stage: int | None
    ranks: int
    dtype: str
    rows: int
    length: int
    accumulation: int = 1
    attention: str = "sdpa"
    checkpointing: bool = False
    stage: str = "sft"
    reference: str = "precomputed"
    tasks: int = 0
    memory_rows: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    optimizer: str = DEFAULT
    decays: bool = False
    anchor: str = "none"
    filtered: bool = False
    low_files: bool = False
    bucket: int = REDUCE_BUCKET
    live: int = MAX_LIVE
    sub_group: int = SUB_GROUP
    persistent: int = PERSISTENT

    @property
    def answers(self) -> int:
        """Sequences for each row of the data."""
        return 2 if self.stage == "dpo" else 1

    @property
    def tokens(self) -> int:
        """Tokens that a rank handles at once."""
        return self.rows * self.length * self.answers

    @property
    def shards(self) -> int:
        """Number of ranks over which ZeRO divides."""
        return self.ranks if self.zero_stage else 1

    @property
    def autocast(self) -> bool:
        """Whether float32 weights compute in bfloat16: in a single process. DeepSpeed has bfloat16 weights."""
        return self.dtype == "bfloat16" and self.zero_stage is None

    @property
    def weight_bytes(self) -> int:
        """Bytes of an element of the weights, and of the residual stream."""
        return 2 if self.dtype == "bfloat16" and self.zero_stage else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element in matrix products."""
        return 2 if self.dtype == "bfloat16" else 4


# Layer (-1: embeddings; the number of layers: final norm; one more: head), and the position inside it.
Place = tuple[int, int]


@dataclass(frozen=True)
class Workload:
    """A phase of training.

    Attributes:
        params: all parameters in memory, with the adapters of LoRA.
        trained: names of those that are trained.
        shape: the sizes of the model.
        setup: how it is trained.
    """

    params: tuple[Param, ...]
    trained: frozenset[str]
    shape: Shape
    setup: Setup

    @cached_property
    def updated(self) -> list[Param]:
        """The trained parameters."""
        return [p for p in self.params if p.name in self.trained]

    @cached_property
    def total_elements(self) -> int:
        return sum(p.elements for p in self.params)

    @cached_property
    def updated_elements(self) -> int:
        return sum(p.elements for p in self.updated)

    @cached_property
    def optimizer_state(self) -> float:
        """Bytes of the optimizer's state of the trained parameters, where one process holds all of it."""
        state_bytes = OPTIMIZERS[self.setup.optimizer].state_bytes
        return sum(state_bytes(p.shape, p.kind == "embedding") for p in self.updated)

    @cached_property
    def low(self) -> frozenset[str]:
        """Names of the frozen matrices that a single process holds in bfloat16 (see `store_frozen_in_bfloat16`)."""
        if not (self.setup.autocast and self.setup.low_files):
            return frozenset()
        return frozenset(
            p.name
            for p in self.params
            if p.layer is not None and len(p.shape) == 2 and p.name not in self.trained and not p.is_experts
        )

    @property
    def holds_logits(self) -> bool:
        """Whether the loss holds all logits of a micro-batch."""
        vocabulary = self.head.shape[0] if self.head is not None else 0
        few = self.setup.tokens * vocabulary <= HELD_LOGITS
        return self.setup.stage == "sft" and (few or self.setup.anchor == "kl")

    def place(self, param: Param) -> Place:
        """Where the forward pass uses a parameter. An unknown name counts as early, which needs more, not less."""
        if param.layer is None:
            outside = {"embedding": (-1, 0), "head": (self.shape.layers + 1, 0)}
            return outside.get(param.kind, (self.shape.layers, 0))
        return param.layer, param.position

    @cached_property
    def lowest(self) -> Place:
        """The first place with a trained parameter: the backward pass ends there."""
        return min((self.place(p) for p in self.updated), default=(self.shape.layers + 2, 0))

    @cached_property
    def head(self) -> Param | None:
        """The matrix that gives the logits: the head, or the embedding if it is tied."""
        heads = [p for p in self.params if p.kind == "head" and len(p.shape) == 2]
        heads = heads or [p for p in self.params if p.kind == "embedding"]
        return max(heads, key=lambda p: p.elements, default=None)


def lora_adapters(params: Iterable[Param], adapted: Collection[str], lora: LoraConfig) -> tuple[Param, ...]:
    """The two matrices of LoRA beside each adapted matrix, and the lengths of its rows with DoRA."""
    adapters = []
    for p in (p for p in params if p.name in adapted):
        shapes: dict[str, tuple[int, ...]] = {"A": (lora.rank, p.shape[1]), "B": (p.shape[0], lora.rank)}
        shapes |= {"magnitude_vector": (p.shape[0],)} if lora.dora else {}
        adapters += [Param(f"{p.unit}.lora_{part}.weight", s, p.layer, p.kind, ()) for part, s in shapes.items()]
    return tuple(adapters)
