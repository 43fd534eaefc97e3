"""Memory of one rank, in bytes, from shapes alone. Pure, standard library only.

Sources:

    ZeRO          Rajbhandari et al. 2020, arXiv 1910.02054, section 5: what each stage divides among the ranks. What
                  DeepSpeed holds beyond that was read in its code and measured.
    Activations   Korthikanti et al. 2022, arXiv 2205.05198. Its 34 s b h bytes of a layer are those of another block
                  (GELU, LayerNorm, dropout). Here each tensor that autograd saves in a Llama block is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import ceil

from hft_cli.checkpoint.naming import Param, Position
from hft_cli.config.optimizers import OPTIMIZERS
from hft_cli.config.settings import FLASH_ATTENTION
from hft_cli.plan.compat import LOGITS_TILE
from hft_cli.plan.workload import Workload

FORWARD = 10 / 12  # of what the loss takes: logits in bfloat16 and float32, and their log-probabilities


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights: the model, in the dtype that it computes with (in a single process float32, except for frozen matrices
            that the files hold in bfloat16).
        gradients: of the trained parameters, before the optimizer's step.
        optimizer: its state; of AdamW two moments in float32.
        masters: float32 copies of the trained weights, as DeepSpeed keeps them.
        reference: the second model of DPO or of a KL anchor, or the start that L2-SP keeps.
        activations: what autograd saves of one micro-batch.
        buffers: for communication, the loss, gathered or cast weights, gradients in flight and GEM's memories.
        step: float32 gradients, or weights before the step, that the optimizer step makes.
        total: the peak. Not all parts exist at once; see `_peak`.
    """

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    masters: float = 0
    reference: float = 0
    activations: float = 0
    buffers: float = 0
    step: float = 0
    total: float = 0

    @property
    def persistent(self) -> float:
        """The bytes that stay allocated over the phase."""
        return self.weights + self.gradients + self.optimizer + self.masters + self.reference

    def at_least(self, other: Memory) -> Memory:
        """The larger of the two, part by part."""
        parts, others = asdict(self), asdict(other)
        return Memory(**{part: max(parts[part], others[part]) for part in parts})


PARTS = tuple(part.name for part in fields(Memory) if part.name != "total")


def memory(work: Workload) -> Memory:
    """The memory of a rank."""
    setup, size = work.setup, work.setup.weight_bytes
    stage, updated = setup.zero_stage, work.updated_elements
    shard = _trained_shard(work)
    weights = float(size * (sum(_zero3_elements(p, work) for p in work.params) if stage == 3 else work.total_elements))
    weights -= 2 * sum(p.elements for p in work.params if p.name in work.low)
    reference = 0.0
    if setup.stage == "dpo" and setup.reference != "precomputed":
        reference = float(size * updated) if setup.reference == "shared" else weights
    if setup.anchor != "none":
        reference += float(size * updated) if setup.anchor == "kl" else 4.0 * shard
    on_gpu = not setup.offload_optimizer  # otherwise gradients go to host memory as well, bucket by bucket
    parts = Memory(
        weights=weights,
        gradients=_gradients(work) * on_gpu,
        optimizer=_optimizer_state(work) * on_gpu,
        masters=0.0 if stage is None else 4.0 * shard * on_gpu,  # DeepSpeed copies float32 weights as well
        reference=reference,
        activations=activations(work),
        buffers=_standing(work) + _buckets(work) + _cast(work) + max(_loss(work), _backward(work)),
        step=_step_memory(work) * on_gpu,
    )
    return replace(parts, total=_peak(work, parts))


def _peak(work: Workload, parts: Memory) -> float:
    """The largest of what exists as a loss is computed, and its gradient, as the backward pass through the layers
    begins and ends, and in the step.

    As the backward pass goes through the layers, it frees activations and makes gradients, by and by. Those of a first
    micro-batch find no gradients; under DeepSpeed there may be some.
    """
    setup = work.setup
    gradients = parts.gradients if setup.accumulation > 1 or setup.zero_stage or setup.tasks else 0.0
    saved, cast = _saved(work), _cast(work)
    kept = 0.0 if setup.checkpointing else cast  # the layers are recomputed with casts of their own
    layer = setup.tokens * max(_each_layer(work), default=0.0)
    backward = _standing(work) + _buckets(work) + _backward(work)
    filled = setup.zero_stage == 3 or (setup.zero_stage == 1 and setup.accumulation > 1)
    forward = gradients + saved + _standing(work) + _buckets(work) * filled
    moments = (
        forward + cast + _loss(work) * FORWARD,
        forward + kept + _loss(work),
        gradients + saved + kept + layer * setup.checkpointing + backward,
        parts.gradients + layer + backward,
        parts.gradients + parts.step,
    )
    return parts.persistent - parts.gradients + max(moments)


def _step_memory(work: Workload) -> float:
    """Bytes that exist in the optimizer's step alone."""
    setup, shard = work.setup, _trained_shard(work)
    if setup.zero_stage is None:
        copies = OPTIMIZERS[setup.optimizer].step_values[setup.decays]
        return 4.0 * shard * (copies + setup.filtered)  # momentum_filter copies the weights before the step
    if setup.zero_stage in (1, 2) and setup.weight_bytes == 2:
        return 0.0  # the step takes the float32 sums as they are
    return 4.0 * (min(shard, setup.sub_group) if setup.zero_stage == 3 else shard)


def _optimizer_state(work: Workload) -> float:
    """Bytes of the state of the optimizer; under DeepSpeed two moments in float32 of the rank's shard."""
    if work.setup.zero_stage is not None:
        return 8.0 * _trained_shard(work)
    return work.optimizer_state


def _gradients(work: Workload) -> float:
    """Bytes of the gradients of a rank. Under DeepSpeed those of micro-batches are added in float32."""
    setup, updated, shard = work.setup, work.updated_elements, _trained_shard(work)
    if setup.zero_stage == 3:
        return 4.0 * shard  # one flat buffer
    if setup.weight_bytes == 4:
        if setup.zero_stage == 2:
            return 4.0 * _zero2_gradients(work) * (2 if setup.accumulation > 1 else 1)  # sums, and the newest ones
        return 4.0 * updated  # .grad, which stage 1 reduces after the last micro-batch of a step
    return 4.0 * (shard if setup.zero_stage == 2 else updated + shard)  # sums, and the rank's part of their averages


def host_memory(work: Workload) -> float:
    """Bytes of host memory that a rank takes with offload; 0 without.

    Master weights, two moments and float32 gradients of its shard; with ZeRO-2 its shard of the new weights, with
    ZeRO-3 of the sums of gradients in float32; and offloaded weights. torch may round pinned buffers up to powers of
    two.
    """
    setup = work.setup
    if not setup.offload_optimizer:
        return 0.0
    shard = sum(ceil(p.elements / setup.shards) for p in work.updated)
    weights = sum(ceil(p.elements / setup.shards) for p in work.params) if setup.offload_parameters else 0
    arriving = 4 if setup.zero_stage == 3 else setup.weight_bytes
    return float((16 + arriving) * shard + setup.weight_bytes * weights)


def _trained_shard(work: Workload) -> int:
    """The trained elements of one rank. ZeRO-1 and 2 divide one padded vector, ZeRO-3 each tensor."""
    stage, shards = work.setup.zero_stage, work.setup.shards
    if stage is None:
        return work.updated_elements
    if stage == 3:
        return sum(ceil(p.elements / shards) for p in work.updated)
    return ceil(work.updated_elements / (2 * shards)) * 2


def _zero3_elements(param: Param, work: Workload) -> int:
    """Elements of a parameter on a rank between passes under ZeRO-3: its shard, and all of it if it is small."""
    setup = work.setup
    shard = 0 if setup.offload_parameters else ceil(param.elements / setup.shards)
    return shard + param.elements if param.elements <= setup.persistent else shard


def _zero2_gradients(work: Workload) -> int:
    """Elements of the gradients that a rank keeps under ZeRO-2; the maximum over the ranks.

    A rank keeps whole gradients of the parameters in its part of the vector, even if only their end is in it. The
    vectors hold the matrices in the order of use, and then the parameters without weight decay.
    """
    shards = work.setup.shards
    order = sorted(work.updated, key=lambda p: (len(p.shape) < 2, work.place(p), p.name))
    elements = [0] * shards
    for vector in ([p for p in order if len(p.shape) >= 2], [p for p in order if len(p.shape) < 2]):
        size = ceil(sum(p.elements for p in vector) / shards) or 1
        start = 0
        for p in vector:
            for rank in range(start // size, min((start + p.elements - 1) // size, shards - 1) + 1):
                elements[rank] += p.elements
            start += p.elements
    return max(elements)


def activations(work: Workload) -> float:
    """Bytes that autograd saves of one micro-batch, for a block like Llama's in transformers (RMSNorm in float32).

    A linear layer saves its input for the gradient of its weight; not if the weight is frozen, except under ZeRO-3,
    whose own linear layer always does. With checkpointing: the input of each layer, and all of the one that is
    recomputed.
    """
    recomputed = max(_each_layer(work), default=0.0) if work.setup.checkpointing else 0.0
    return _saved(work) + work.setup.tokens * recomputed


def _saved(work: Workload) -> float:
    """Bytes that autograd saves in the forward pass."""
    setup, shape, each = work.setup, work.shape, _each_layer(work)
    outside = (4 + setup.compute_bytes + setup.weight_bytes) * shape.hidden  # the final norm, and the input of the head
    inside = len(each) * setup.weight_bytes * shape.hidden if setup.checkpointing else sum(each)
    return float(setup.tokens * (inside + outside))


def _each_layer(work: Workload) -> list[float]:
    """Bytes for each token that autograd saves in each layer through which gradients pass."""
    layers: dict[int, list[Param]] = {}
    for p in work.params:
        if p.layer is not None and p.layer >= work.lowest[0]:
            layers.setdefault(p.layer, []).append(p)
    return [_layer_activations(params, work) for params in layers.values()]


def _layer_activations(params: Sequence[Param], work: Workload) -> float:
    """Bytes for each token that one layer with these parameters saves."""
    trained = [p for p in params if p.name in work.trained]
    readers = [p.position for p in trained if p.kind != "norm" and len(p.shape) > 1]
    kinds = {p.kind for p in params}
    total = _norm_activations(params, work) + _mixer_activations(params, work)
    if "attention" in kinds:
        inputs = [p for p in trained if p.kind == "attention" and p.position == Position.ATTENTION_INPUT]
        total += _attention_activations(sum(len(p.shape) > 1 for p in inputs), work)
    if "feed_forward" in kinds:
        total += _feed_forward_activations(readers, work)
    return total


def _mixer_activations(params: Sequence[Param], work: Workload) -> float:
    """The inputs and outputs of the matrices of state spaces and convolutions, without what their kernels keep."""
    matrices = [p for p in params if p.kind == "mixer" and not p.is_vector]
    widths = sum(p.shape[0] + (p.shape[1] if len(p.shape) == 2 else p.shape[0]) for p in matrices)
    return float(work.setup.compute_bytes * widths)


def _norm_activations(params: Sequence[Param], work: Workload) -> float:
    """A norm saves its input in float32, and for a trained weight what that multiplies.

    The latter is float32 as well in models with norms after their blocks (OLMo 2, Gemma).
    """
    shape, setup = work.shape, work.setup
    widths = {"q": shape.heads * shape.head_width, "k": shape.kv_heads * shape.head_width, None: shape.hidden}
    norms_after_blocks = any("post_feedforward" in p.name for p in params)
    total = 0.0
    for p in params:
        if p.kind == "norm" and p.name.endswith("weight"):
            factor = setup.compute_bytes if p.head_norm else setup.weight_bytes
            factor = 4 if norms_after_blocks else factor
            total += (4 + factor * (p.name in work.trained)) * widths[p.head_norm]
    return total


def _attention_activations(readers: int, work: Workload) -> float:
    """`readers`: how many of the matrices that read the input of the attention are trained."""
    shape, setup = work.shape, work.setup
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    # Autocast casts the input for each matrix that reads it.
    copies = readers if setup.autocast else 1
    total = float(setup.compute_bytes * shape.hidden * copies * bool(readers or setup.zero_stage == 3))
    # Queries, keys, values and the output; a padding mask makes sdpa repeat keys and values for all heads.
    one_row = setup.rows * setup.answers == 1
    unpadded = setup.attention in FLASH_ATTENTION or one_row
    stored_keys = keys if unpadded else queries
    total += setup.compute_bytes * (2 * queries + 2 * stored_keys) + 4 * shape.heads
    if setup.attention == "sdpa" and not unpadded:  # the mask, as numbers
        total += setup.compute_bytes * setup.length
    if setup.attention == "eager":  # probabilities in float32, and their cast
        total += (4 + (2 if setup.compute_bytes == 2 else 0)) * shape.heads * setup.length
    return total


def _feed_forward_activations(readers: Sequence[Position], work: Workload) -> float:
    """`readers`: the positions of the trained matrices of the layer."""
    shape, setup = work.shape, work.setup
    is_mixture, always = shape.experts > 1, setup.zero_stage == 3
    # Autocast does not cover the grouped products of experts.
    size = setup.weight_bytes if is_mixture else setup.compute_bytes
    inputs = readers.count(Position.FEED_FORWARD_INPUT)
    copies = shape.experts_used if is_mixture else inputs if setup.autocast else 1
    total = float(size * shape.hidden * copies * bool(inputs or always))
    inner = size * shape.inner * shape.experts_used
    total += inner * (3 if shape.gated else 1)  # gate, its SiLU and up; or the input of GELU
    total += inner * bool(always or Position.FEED_FORWARD_OUTPUT in readers)  # the input of down
    if is_mixture:
        total += 2 * size * shape.hidden * shape.experts_used  # the output of each expert, and its weighted copy
    return total


def _backward(work: Workload) -> float:
    """Gradients on their way: of the head's weight; in a layer of gate, up and their product, and of its input."""
    setup, shape = work.setup, work.shape
    inner = 3.0 * setup.compute_bytes * shape.inner * shape.experts_used
    return setup.tokens * (inner + 2 * setup.weight_bytes * shape.hidden) + _head_gradient(work)


def _head_gradient(work: Workload) -> float:
    """The gradient of the head's weight, in float32 before the cast."""
    return 4.0 * work.head.elements if work.head is not None and work.head.name in work.trained else 0.0


def _loss(work: Workload) -> float:
    """What the loss takes: all logits, or one tile of them and the gradient of the head's input."""
    setup, compute = work.setup, work.setup.compute_bytes
    if not work.holds_logits or work.head is None:
        tile = compute * min(setup.tokens, LOGITS_TILE[0]) * LOGITS_TILE[1]
        return tile + 4 * setup.tokens * work.shape.hidden + _head_gradient(work)
    logits = setup.tokens * work.head.shape[0]
    # Log-probabilities, their gradient and that of the logits in float32. With KL the logits of the start;
    # log-probabilities of both in float32, and a gradient.
    return (12.0 + (12 + compute if setup.anchor == "kl" else 0)) * logits


def _cast(work: Workload) -> float:
    """Copies in bfloat16 by autocast: of trained matrices over the forward pass; without checkpointing of every matrix,
    for the gradient of its input."""
    if not work.setup.autocast:
        return 0.0
    matrices = [p for p in work.params if len(p.shape) > 1 and p.kind != "embedding" and p.name not in work.low]
    return 2.0 * sum(p.elements for p in matrices if p.name in work.trained or not work.setup.checkpointing)


def _buckets(work: Workload) -> float:
    """Gradients of DeepSpeed on their way: the bucket that is filled, and the one being sent."""
    setup, size = work.setup, work.setup.weight_bytes
    if setup.zero_stage is None:
        return 0.0
    total = size * min(setup.bucket, work.updated_elements)
    total += (4 if setup.zero_stage == 1 else size) * setup.bucket  # stage 1 fills it from the float32 sums
    if setup.zero_stage in (2, 3):  # the newest gradient, before it goes into the bucket
        total += size * max((p.elements for p in work.updated), default=0)
    return float(total)


def _standing(work: Workload) -> float:
    """Buffers that exist in the forward and in the backward pass: gathered weights, and GEM's memories."""
    setup, size, updated = work.setup, work.setup.weight_bytes, work.updated_elements
    total = 0.0
    if setup.zero_stage == 3:
        total += size * _gathered_elements(work)
    if setup.tasks:
        # GEM's gradients of past tasks, divided among the ranks, the whole one in work, and that of a batch.
        total += 4 * updated * (setup.tasks / setup.shards + (setup.shards > 1)) + size * updated
    return total


def _gathered_elements(work: Workload) -> int:
    """Elements that ZeRO-3 gathers at most. All parameters of a module are gathered together, even if they are more."""
    modules: dict[str, int] = {}
    for p in work.params:
        if p.elements > work.setup.persistent:
            module = p.unit.rpartition(".")[0] if p.is_experts else p.unit
            modules[module] = modules.get(module, 0) + p.elements
    return min(max(work.setup.live, *modules.values(), 0), sum(modules.values()))
