"""What a round costs, from shapes alone: memory of each GPU by part, disk, floating-point operations, network.

Pure, standard library only. Sources, by the names that the functions below use:

    ZeRO          Rajbhandari et al. 2020, arXiv 1910.02054: what each stage divides among the ranks (section 5), and
                  its communication (section 7). What DeepSpeed holds beyond that was read in its code and measured.
    Activations   Korthikanti et al. 2022, arXiv 2205.05198. Its 34 s b h bytes a layer are of another block (GELU,
                  LayerNorm, dropout); here each tensor that autograd saves of a Llama block is counted instead.
    FLOPs         Kaplan et al. 2020, arXiv 2001.08361: 2 a parameter and token forwards, 4 backwards. Of the 4, 2 are
                  for the gradient of the input, and 2 for that of the weight, which a frozen matrix does not need.

All memory is in bytes, of one rank.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil
from typing import Any

from hft_cli.checkpoint.naming import Param

# DeepSpeed's defaults (deepspeed/runtime/zero/config.py), which the settings that `train` makes leave as they are.
BUCKET = 500_000_000  # reduce_bucket_size, elements

LIVE = 1_000_000_000  # stage3_max_live_parameters, elements

SUB_GROUP = 1_000_000_000  # sub_group_size, elements: what ZeRO-3 steps at once

PERSISTENT = 100_000  # stage3_param_persistence_threshold: smaller parameters stay whole on each rank

# TRL's head gives log-probabilities without ever holding all logits (trl/kernels/chunked_logprob.py).
TILE = (4096, 32768)  # tokens, vocabulary


@dataclass(frozen=True)
class Shape:
    """What a network's parameters do not say of it. `gated`: a feed-forward has a gate (SwiGLU), as Llama's."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    vocabulary: int
    experts: int = 1
    experts_used: int = 1
    gated: bool = True


def shape(config: Mapping[str, Any], params: Sequence[Param]) -> Shape:
    """The shape of a model, from its config.json (the text model's part of it) and its parameters."""

    def first(*keys: str, default: int = 0) -> int:
        return next((int(config[key]) for key in keys if isinstance(config.get(key), int)), default)

    embedding = max((p for p in params if p.kind == "embedding"), key=lambda p: p.elements, default=None)
    vocabulary, width = embedding.shape if embedding and len(embedding.shape) == 2 else (0, 0)
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
        vocabulary=first("vocab_size", default=vocabulary),
        experts=experts,
        experts_used=first("num_experts_per_tok", "num_experts_per_token", default=1) if experts > 1 else 1,
        gated=any(p.kind == "feed_forward" and re.search(r"gate|w3|input_linear", p.name) for p in params),
    )


@dataclass(frozen=True)
class Setup:
    """How a round trains.

    Attributes:
        zero_stage: of DeepSpeed, 1 to 3; None is a single process without it.
        ranks: processes, one a GPU, over all nodes.
        dtype: of computing, float32 or bfloat16.
        rows: that a rank handles at once, and `length` their tokens. A row of DPO is a pair, of two answers.
        accumulation: micro batches in a step.
        attention: flash_attention_2, sdpa or eager.
        checkpointing: whether activations are recomputed in the backward pass.
        stage: sft or dpo; `reference` as in dpo.reference.
        tasks: past tasks that GEM keeps gradients of, of `memory_rows` rows each.
        offload_optimizer: masters and moments lie in the host's memory; `offload_parameters`: weights as well.
        bucket, live, sub_group, persistent: DeepSpeed's settings, in elements; see above.
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
    bucket: int = BUCKET
    live: int = LIVE
    sub_group: int = SUB_GROUP
    persistent: int = PERSISTENT

    @property
    def answers(self) -> int:
        """Rows of tokens for each row of the data."""
        return 2 if self.stage == "dpo" else 1

    @property
    def tokens(self) -> int:
        """Tokens that a rank handles at once."""
        return self.rows * self.length * self.answers

    @property
    def shards(self) -> int:
        """Over how many ranks ZeRO divides."""
        return self.ranks if self.zero_stage else 1

    @property
    def autocast(self) -> bool:
        """A single process computes in bfloat16 by autocast, over float32 weights; DeepSpeed has bfloat16 weights."""
        return self.dtype == "bfloat16" and self.zero_stage is None

    @property
    def weight_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" and self.zero_stage else 4

    @property
    def compute_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4


Place = tuple[int, int]  # layer (-1: embeddings, the number of layers: final norm, one more: head), and step within it


def place(param: Param, layers: int) -> Place:
    """Where in the forward pass a parameter is used. An unknown name counts as early: that needs more, not less."""
    if param.layer is None:
        return {"embedding": (-1, 0), "head": (layers + 1, 0)}.get(param.kind, (layers, 0))
    name = re.sub(r"\.lora_.*", "", param.unit)
    if param.kind == "norm":
        late = {r"(q|k)_(layer)?norm": 1, r"post_feedforward": 6, r"post_attention|pre_feedforward|ln_2": 3}
        return param.layer, next((step for pattern, step in late.items() if re.search(pattern, name)), 0)
    if param.kind == "attention":
        return param.layer, 2 if re.search(r"\.(o_proj|out_proj|c_proj|dense)$", name) else 1
    return param.layer, 5 if re.search(r"(down_proj|c_proj|fc2|fc_out|dense_4h_to_h|w2|output_linear)$", name) else 4


def lowest(params: Iterable[Param], trained: Collection[str], layers: int) -> Place:
    """The first place with a trained parameter: nothing before it has a backward pass."""
    return min((place(p, layers) for p in params if p.name in trained), default=(layers + 2, 0))


def adapters(params: Iterable[Param], adapted: Collection[str], rank: int) -> tuple[Param, ...]:
    """LoRA's two matrices beside each adapted one (Hu et al. 2021)."""
    return tuple(
        Param(f"{p.unit}.lora_{part}.weight", size, p.layer, p.kind, ())
        for p in params
        if p.name in adapted
        for part, size in (("A", (rank, p.shape[1])), ("B", (p.shape[0], rank)))
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. `step` takes the place of `activations` and `buffers`: it is held when they are not.

    Attributes:
        weights: of the model, in the dtype that it computes with (of a single process: float32).
        gradients: of what is trained, at their most between a step's first backward pass and the optimizer.
        optimizer: AdamW's two moments, float32.
        masters: float32 copies of the trained weights, beside bfloat16 ones or as DeepSpeed keeps them.
        reference: DPO's second model.
        activations: what autograd saves of one micro batch.
        buffers: of communication, of the loss, of gathered or cast weights, of gradients in flight, of GEM's memories.
        step: float32 gradients, made from those in bfloat16 when the optimizer steps.
    """

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    masters: float = 0
    reference: float = 0
    activations: float = 0
    buffers: float = 0
    step: float = 0

    @property
    def total(self) -> float:
        """The most that is held at once: an upper bound, as not all activations and gradients are."""
        held = self.weights + self.gradients + self.optimizer + self.masters + self.reference
        return held + max(self.activations + self.buffers, self.step)

    def at_least(self, other: Memory) -> Memory:
        """Part by part the larger one."""
        own, others = asdict(self), asdict(other)
        return Memory(**{part: max(own[part], others[part]) for part in own})


PARTS = tuple(part.name for part in fields(Memory))


def memory(params: Sequence[Param], trained: Collection[str], net: Shape, setup: Setup) -> Memory:
    """The memory of a rank in a round that trains the named ones of `params`, adapters of LoRA among them."""
    stage, shards, size = setup.zero_stage, setup.shards, setup.weight_bytes
    updated = _flat_order([p for p in params if p.name in trained], net.layers)
    whole = sum(p.elements for p in params)
    ours = sum(p.elements for p in updated)
    # Each rank's part of what is trained. ZeRO-1 and 2 cut one flat vector (padded to 2 elements a rank), ZeRO-3 each
    # parameter.
    part = sum(ceil(p.elements / shards) for p in updated) if stage == 3 else ceil(ours / (2 * shards)) * 2
    if stage is None:
        part = ours
    weights = float(size * (sum(_held(p, setup) for p in params) if stage == 3 else whole))
    gradients = {
        None: size * ours,  # .grad
        1: size * ours,  # .grad, reduced when the step's last micro batch is done
        2: size * _overlap(updated, shards) * (2 if setup.accumulation > 1 else 1),  # sums, and the newest beside them
        3: size * part,  # one flat buffer
    }[stage]
    reference = 0.0
    if setup.stage == "dpo" and setup.reference != "precomputed":
        reference = float(size * ours) if setup.reference == "shared" else weights
    grouped = min(part, setup.sub_group) if stage == 3 else part
    here = not setup.offload_optimizer  # else gradients go to the host's memory too, bucket by bucket
    return Memory(
        weights=weights,
        gradients=float(gradients) * here,
        optimizer=8.0 * part * here,
        # Also beside float32 weights: DeepSpeed always copies.
        masters=0.0 if stage is None else 4.0 * part * here,
        reference=reference,
        activations=activations(params, trained, net, setup),
        buffers=_buffers(params, trained, net, setup),
        step=0.0 if stage is None else float(grouped * (6 if size == 2 else 4) * here),
    )


def host(params: Sequence[Param], trained: Collection[str], setup: Setup) -> float:
    """Bytes of the host's memory that a rank takes under offload; 0 without.

    Masters, two moments and float32 gradients of its part; under ZeRO-2 also its part of the new weights, under ZeRO-3
    of the gradients, as they come; and offloaded weights. torch may round pinned buffers up to powers of two.
    """
    if not setup.offload_optimizer:
        return 0.0
    ours = [p.elements for p in params if p.name in trained]
    part = sum(ceil(elements / setup.shards) for elements in ours)
    shards = sum(ceil(p.elements / setup.shards) for p in params) if setup.offload_parameters else 0
    return float((16 + setup.weight_bytes) * part + setup.weight_bytes * shards)


def _held(param: Param, setup: Setup) -> int:
    """Elements of a parameter on a rank between passes, under ZeRO-3: its shard, and all of it if it is small."""
    shard = 0 if setup.offload_parameters else ceil(param.elements / setup.shards)
    return shard + param.elements if param.elements <= setup.persistent else shard


def _flat_order(updated: Iterable[Param], layers: int) -> list[Param]:
    """The order of the optimizer's vectors: matrices as the model uses them, then what has no weight decay."""
    return sorted(updated, key=lambda p: (len(p.shape) < 2, place(p, layers), p.name))


def _overlap(updated: Sequence[Param], shards: int) -> int:
    """ZeRO-2: elements of the gradients that a rank keeps, the most of all ranks.

    It keeps whole gradients of the parameters that lie in its part of the vector, also where only their end does.
    """
    most = [0] * shards
    for group in ([p for p in updated if len(p.shape) >= 2], [p for p in updated if len(p.shape) < 2]):
        size = ceil(sum(p.elements for p in group) / shards) or 1
        start = 0
        for p in group:
            for rank in range(start // size, min((start + p.elements - 1) // size, shards - 1) + 1):
                most[rank] += p.elements
            start += p.elements
    return max(most)


def activations(params: Sequence[Param], trained: Collection[str], net: Shape, setup: Setup) -> float:
    """Bytes that autograd saves of one micro batch, for a block such as Llama's in transformers (RMSNorm in float32).

    A linear layer saves its input for the gradient of its weight, so not if that is frozen; except under ZeRO-3, whose
    own linear layer always does. With checkpointing, each layer's input, and all of the one layer that is recomputed.
    """
    first = lowest(params, trained, net.layers)
    passed: dict[int, list[Param]] = {}
    for p in params:
        if p.layer is not None and p.layer >= first[0]:  # below, no gradient passes
            passed.setdefault(p.layer, []).append(p)
    layers = [_layer(own, trained, net, setup) for own in passed.values()]
    stream = setup.weight_bytes  # of the residual stream: float32 under autocast
    outside = (4 + setup.compute_bytes + stream) * net.hidden  # the final norm, and what the head reads
    inside = sum(layers)
    if setup.checkpointing:
        inside = len(layers) * stream * net.hidden + max(layers, default=0.0)
    return float(setup.tokens * (inside + outside))


def _layer(own: Sequence[Param], trained: Collection[str], net: Shape, setup: Setup) -> float:
    """Bytes a token that one layer saves, whose parameters are `own`."""
    e, stream = setup.compute_bytes, setup.weight_bytes
    queries, keys = net.heads * net.head_width, net.kv_heads * net.head_width
    f = stream if net.experts > 1 else e  # autocast does not reach the grouped products of experts
    always = setup.zero_stage == 3
    updated = [(place(p, net.layers)[1], p) for p in own if p.name in trained]
    matrices = [step for step, p in updated if p.kind != "norm" and len(p.shape) > 1]
    # Each norm saves its input in float32, and for its weight what that multiplies, which is float32 too in the models
    # with norms after their blocks (OLMo 2, Gemma).
    late = any("post_feedforward" in p.name for p in own)
    total = 0.0
    for p in own:
        if p.kind == "norm" and p.name.endswith("weight"):
            found = _HEADS.search(p.name)
            width = {"q": queries, "k": keys}[found[1]] if found else net.hidden
            total += (4 + (4 if late else e if found else stream) * (p.name in trained)) * width
    for step in (1, 4):  # what q, k, v read, and what gate and up read; autocast casts it for each of them
        readers = matrices.count(step)
        by_experts = step == 4 and net.experts > 1
        copies = net.experts_used if by_experts else readers if setup.autocast else 1
        total += (f if by_experts else e) * net.hidden * copies * bool(readers or always)
    # Queries, keys, values, and the output, which o reads; a mask of padding makes sdpa repeat keys and values.
    shared = keys if setup.attention == "flash_attention_2" or setup.rows * setup.answers == 1 else queries
    total += e * (2 * queries + 2 * shared) + 4 * net.heads
    if setup.attention == "eager":
        total += (4 + (2 if e == 2 else 0)) * net.heads * setup.length  # probabilities in float32, and cast
    inner = net.inner * net.experts_used
    total += f * inner * (3 if net.gated else 1)  # gate, its SiLU, up; or what GELU reads
    total += f * inner * bool(always or 5 in matrices)  # what down reads
    if net.experts > 1:
        total += 2 * f * net.hidden * net.experts_used  # each expert's output, and weighted
    return total


_HEADS = re.compile(r"\.([qk])_(?:layer)?norm\.")  # norms of queries and of keys


def _buffers(params: Sequence[Param], trained: Collection[str], net: Shape, setup: Setup) -> float:
    """What comes and goes beside the activations. See Memory."""
    e, size = setup.compute_bytes, setup.weight_bytes
    ours = sum(p.elements for p in params if p.name in trained)
    # In flight in a layer's backward pass: gradients of gate, up and their product, and of the residual stream.
    total = setup.tokens * (3.0 * e * net.inner * net.experts_used + 2 * size * net.hidden)
    # The loss: one tile of logits, the gradient of the head's input, and of its weight in float32 before it is cast.
    total += e * min(setup.tokens, TILE[0]) * TILE[1] + 4 * setup.tokens * net.hidden
    head = _head(params)
    if head is not None and head.name in trained:
        total += 4 * head.elements
    if setup.autocast:
        # Copies in bfloat16: of what is trained for as long as the forward pass lasts, and without checkpointing of
        # every matrix, for the gradient of its input.
        matrices = [p for p in params if len(p.shape) > 1 and p.kind != "embedding"]
        total += 2 * sum(p.elements for p in matrices if p.name in trained or not setup.checkpointing)
    if setup.zero_stage is not None:
        total += size * (setup.bucket + min(setup.bucket, ours))  # the bucket that is filled, and the one that is sent
    if setup.zero_stage in (2, 3):  # the newest gradient, before it goes into the bucket
        total += size * max((p.elements for p in params if p.name in trained), default=0)
    if setup.zero_stage == 3:
        modules: dict[str, int] = {}  # what a module needs is gathered at once, also if that is more
        for p in params:
            if p.elements > setup.persistent:
                own = p.unit.rpartition(".")[0] if len(p.shape) == 3 else p.unit
                modules[own] = modules.get(own, 0) + p.elements
        total += size * min(max(setup.live, *modules.values(), 0), sum(modules.values()))
    if setup.tasks:
        total += 4 * ours * setup.tasks + size * ours  # GEM: see gem.py
    return float(total)


def _head(params: Iterable[Param]) -> Param | None:
    """What gives the logits: the head, or the embedding that serves as it too."""
    found = [p for p in params if p.kind == "head" and len(p.shape) == 2]
    found = found or [p for p in params if p.kind == "embedding"]
    return max(found, key=lambda p: p.elements, default=None)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one optimizer step, over all ranks.

    Attributes:
        forward: of the model.
        inputs: backwards, gradients of inputs, for what lies above the lowest trained parameter.
        weights: backwards, gradients of weights, of what is trained.
        recompute: forwards again, with checkpointing.
        reference: DPO's reference in each step, if it is not precomputed.
        memories: GEM, forwards and backwards through what it keeps of past tasks.
    """

    forward: float
    inputs: float
    weights: float
    recompute: float = 0.0
    reference: float = 0.0
    memories: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.inputs + self.weights + self.recompute + self.reference + self.memories


def flops(
    params: Sequence[Param], trained: Collection[str], net: Shape, setup: Setup, rows: int, row_tokens: int
) -> Flops:
    """Of a step on `rows` rows (pairs, in DPO) of so many tokens.

    Norms, activation functions and the optimizer are left out: together they are below 1% for a hidden size of
    thousands. Attention is counted where the mask lets it look, which is half; eager computes all.
    """
    first = lowest(params, trained, net.layers)
    head = _head(params)
    forward = inputs = weights = again = 0.0
    for p in params:
        is_head = head is not None and p.name == head.name
        if len(p.shape) < 2 or (p.kind == "embedding" and not is_head):
            continue
        used = 2.0 * p.elements * (net.experts_used / net.experts if len(p.shape) == 3 else 1)
        at = (net.layers + 1, 0) if is_head else place(p, net.layers)
        forward += used
        inputs += used * (first < at)
        weights += used * (p.name in trained)
        again += used * (at[0] >= first[0] and p.layer is not None)
    scores = 4.0 * net.heads * net.head_width * row_tokens * (1.0 if setup.attention == "eager" else 0.5)
    forward += scores * net.layers
    inputs += 2 * scores * sum(first <= (layer, 1) for layer in range(net.layers))
    again += scores * sum(layer >= first[0] for layer in range(net.layers))
    tokens = float(rows * row_tokens * setup.answers)
    kept = float(setup.tasks * setup.memory_rows * setup.length)
    again *= setup.checkpointing
    return Flops(
        forward=forward * tokens,
        inputs=inputs * tokens,
        weights=weights * tokens,
        recompute=again * tokens,
        reference=forward * tokens * (setup.stage == "dpo" and setup.reference != "precomputed"),
        memories=(forward + inputs + weights + again) * kept,
    )


@dataclass(frozen=True)
class Network:
    """Bytes that one rank sends in an optimizer step, by what for, in rings; it receives as many."""

    gradients: float = 0.0
    weights: float = 0.0

    @property
    def total(self) -> float:
        return self.gradients + self.weights


def network(params: Sequence[Param], trained: Collection[str], net: Shape, setup: Setup) -> Network:
    """ZeRO, section 7, with what DeepSpeed does: stages 1 and 2 all-reduce gradients (twice the bytes of the paper's
    reduce-scatter), stage 2 and 3 after each micro batch; stage 3 gathers weights forwards and backwards.
    """
    share = (setup.shards - 1) / setup.shards  # of a ring's bytes that leave a rank
    size, stage = setup.weight_bytes, setup.zero_stage
    ours = size * sum(p.elements for p in params if p.name in trained) * share
    if stage is None:
        return Network()
    if stage < 3:
        return Network(gradients=2 * ours * (setup.accumulation if stage == 2 else 1), weights=ours)
    first = lowest(params, trained, net.layers)
    large = [p for p in params if p.elements > setup.persistent]
    forwards = sum(p.elements for p in large) * (1 + (setup.stage == "dpo" and setup.reference == "full"))
    backwards = sum(p.elements for p in large if place(p, net.layers)[0] >= first[0] and p.kind != "embedding")
    return Network(
        gradients=ours * setup.accumulation, weights=size * share * (forwards + backwards) * setup.accumulation
    )


@dataclass(frozen=True)
class Disk:
    """Bytes: the deltas of all rounds, the models (the last, and one before it while it is written), checkpoints."""

    deltas: float
    models: float
    checkpoints: float

    @property
    def total(self) -> float:
        return self.deltas + self.models + self.checkpoints


def checkpoint(params: Sequence[Param], trained: Collection[str], setup: Setup) -> float:
    """Bytes of one checkpoint within a round: weights for loading, float32 weights and moments for going on.

    DeepSpeed's has the weights a second time (stage 3: only the frozen ones), stage 2 the frozen ones once more.
    """
    whole = sum(p.elements for p in params)
    ours = sum(p.elements for p in params if p.name in trained)
    size = setup.weight_bytes
    if setup.zero_stage is None:
        return float(4 * whole + 8 * ours)
    more = {1: whole, 2: 2 * whole - ours, 3: whole - ours}[setup.zero_stage]
    return float(size * (whole + more) + 12 * ours)


def hours(total: float, ranks: int, tflops: float, utilization: float) -> float:
    """Hours for so many FLOPs on `ranks` GPUs of that peak rate (in TFLOP/s), reaching that share of it."""
    return total / (ranks * tflops * 1e12 * utilization) / 3600
