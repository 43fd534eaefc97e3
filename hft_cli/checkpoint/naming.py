"""Parameter names: the layer, the category and the role of each parameter. All patterns over names are in this file.

Standard library only. Nothing is guessed: a name that no pattern places is an error that asks for `model.kinds`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import takewhile

from hft_cli.errors import UserError, choose

KINDS = ("attention", "mixer", "feed_forward", "norm", "embedding", "head", "router")
OUTSIDE_KINDS = ("norm", "embedding", "head")  # of parameters outside the layers, which no strategy draws

# Where the layers of a text model are. The path of a vision tower does not match, so its tensors are no layers.
_TEXT_MODEL = r"(?:model|transformer|gpt_neox(?:_japanese)?|backbone|biogpt|rwkv)\.(?:(?:decoder|language_model)\.)?"
_LAYER = re.compile(_TEXT_MODEL + r"(?:layers|h|blocks)\.(\d+)\.(.+)")

# A layer under any prefix: tensors of files without the prefix of the model, and names that `model.kinds` places.
_ANY_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.(.+)")

_NORM = re.compile(r"\w*norm(?:_?\d|_mlstm|_ffn)?|ln_\w+|ln\d|pre_ln")
_LEAF = r"\.(?:weight|bias)"

# Zamba has a transformer block, which several layers share, beside the Mamba block of a layer.
_BLOCKS = ("shared_transf", "shared_transformer", "mamba_decoder")


def _names(text: str, prefix: str = "") -> frozenset[str]:
    return frozenset(prefix + name for name in text.split())


_QKVO = _names("q_proj k_proj v_proj o_proj")
_ATTENTION = (
    _QKVO
    | _names("qkv_proj kv_proj out_proj c_attn q_attn c_proj query_key_value dense Wqkv Wo Wq Wk Wv")
    | _names("q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_a_proj o_b_proj")
    | _names("q_proj k_proj v_proj out_proj", "attention.")  # GPT-Neo
    | _names("q_proj.linear k_proj.linear v_proj.linear o_proj.linear key value receptance output")  # Moshi, RWKV
    # Gates, decays and short convolutions; sinks and other vectors of each head.
    | _names("gate_proj g_proj g_a_proj g_b_proj b_proj dt_proj q_gate_proj output_gate conv1d gate_bias sinks A")
    | _names("A_log dt_bias f_proj f_a_proj f_b_proj", "forget_gate.")
    | _names("lambda_q1 lambda_k1 lambda_q2 lambda_k2 time_decay time_first time_mix_key time_mix_value")
    | _names("time_mix_receptance")
    # Which keys a query sees (DeepSeek-V3.2 and V4), and projections that are mixtures of experts (JetMoe).
    | _names("wq_b wk weights_proj q_b_proj kv_proj gate_proj position_bias scorer.weights_proj", "indexer.")
    | _names("kv_proj gate_proj position_bias", "compressor.")
    | _names("kv_proj gate_proj q_b_proj position_bias scorer.weights_proj", "compressor.indexer.")
    | _names("experts experts.input_linear experts.output_linear")
)
_MIXER = (
    _names("in_proj in_proj_qkvz in_proj_ba in_proj_qkv in_proj_z in_proj_a in_proj_b out_proj x_proj dt_proj")
    | _names("conv conv1d conv_1d A_log D dt_bias linear_x linear_y linear_out")
    | _names("recurrent_param input_gate recurrent_gate", "rg_lru.")
)
_EXPERT = _names("gate_proj up_proj down_proj gate_up_proj w1 w2 w3 input_linear output_linear")
_FEED_FORWARD = (
    _EXPERT
    | {f"{part}.{name}" for part in ("experts", "shared_expert", "shared_experts", "shared_mlp") for name in _EXPERT}
    | _names("fc1 fc2 fc_in fc_out c_fc c_proj dense_h_to_4h dense_4h_to_h proj_up_gate proj_up proj_down Wi Wo")
    | _names("gate_up_proj_adapter_list act_fn.alpha_p act_fn.alpha_n")
    | _names("key value receptance time_mix_key time_mix_receptance")  # RWKV
)
# `gate` is a router; `gate_proj` is a matrix.
_ROUTER = (
    _names("gate shared_expert_gate router router.layer router.gate router.classifier expert_bias")
    | _names("e_score_correction_bias gate.e_score_correction_bias router.e_score_correction_bias")
    | _names("gate.moe_statics.e_score_correction_bias gate.wg")
)

# Modules of a layer -> kind -> names inside the module, with neither indexes nor `.weight` and `.bias`.
_TABLE: dict[str, dict[str, frozenset[str]]] = {
    "self_attn attn attention self_attention multi_head_attention": {
        "attention": _ATTENTION,
        "router": _names("experts.router.layer"),
    },
    "mlp mlps ffn feed_forward block_sparse_moe shared_mlp mlp_block": {
        "router": _ROUTER,
        "feed_forward": _FEED_FORWARD,
    },
    "mamba linear_attn conv": {"mixer": _MIXER | _QKVO | _names("a_proj b_proj g_proj")},
    # The block of a layer, of whatever kind (Mamba, Nemotron-H, RecurrentGemma).
    "mixer temporal_block": {
        "attention": _QKVO,
        "router": _ROUTER,
        "feed_forward": _FEED_FORWARD,
        "mixer": _MIXER,
    },
    "mlstm_layer": {"mixer": _names("q k v out_proj ogate_preact igate_preact fgate_preact")},
    # Weights over several residual streams (Gemma 3n, DeepSeek-V4).
    "altup": {"mixer": _names("correct_output_scale correction_coefs prediction_coefs modality_router")},
    "attn_hc ffn_hc": {"mixer": _names("fn base scale")},
    "laurel": {"feed_forward": _names("linear_left linear_right")},
    "": {
        "feed_forward": _names("fc1 fc2 mlp ffn per_layer_input_gate per_layer_projection"),
        "mixer": _names("linear"),  # Zamba: from the shared block to that of the layer
        "norm": _names("input_residual post_attention_residual"),  # Doge: scales, element by element
    },
}

_MODULES = {module: kinds for modules, kinds in _TABLE.items() for module in modules.split() or [""]}

# Experts merged into one tensor, (experts, rows, columns), and their biases, (experts, rows).
_EXPERTS = re.compile(
    r"(?:mlp|block_sparse_moe|feed_forward|mixer)\.(?:shared_)?experts\.(?:gate_up_proj|gate_proj|up_proj|down_proj)(_bias)?"
)

_OUTSIDE_LAYERS = {
    "embedding": _TEXT_MODEL
    + r"(?:embed_tokens|embed_positions|word_embeddings|embeddings(?:\.tok_embeddings)?|embed_in"
    r"|wte|wpe|project_in|tokens_embed|positions_embed|w|embed_tokens_per_layer|per_layer_model_projection"
    r"|altup_projections\.\d+)\.weight",
    "norm": _TEXT_MODEL + r"(?:norm|norm_f|ln_f|ln_out|layer_?norm|final_layer_?norm|final_norm|out_norm|embedding_norm"
    rf"|embeddings\.norm|word_embeddings_layernorm|per_layer_projection_norm){_LEAF}",
    "head": rf"(?:lm_head(?:\.dense|\.norm)?|embed_out|head|decoder){_LEAF}"
    rf"|{_TEXT_MODEL}(?:(?:project_out|altup_unembed_projections\.\d+){_LEAF}|hc_head\.hc_\w+)",
}

# Constants in files of older releases. A module ignores them on load; transformers ignores the same two in its code.
BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


class Position(IntEnum):
    """The position of a parameter in the forward pass of a layer."""

    FIRST_NORM = 0
    ATTENTION_INPUT = 1
    ATTENTION_OUTPUT = 2
    MIDDLE_NORM = 3
    FEED_FORWARD_INPUT = 4
    FEED_FORWARD_OUTPUT = 5
    LAST_NORM = 6


# (kind, pattern in the name of the matrix, position); the first match wins. An unknown norm counts as the first one.
_POSITIONS = (
    ("norm", r"(?:q|k)_(?:layer)?norm", Position.ATTENTION_INPUT),
    ("norm", r"post_feedforward", Position.LAST_NORM),
    ("norm", r"post_attention|pre_feedforward|ln_2", Position.MIDDLE_NORM),
    ("norm", r"", Position.FIRST_NORM),
    ("attention", r"\.(?:o_proj|out_proj|c_proj|dense|Wo|output|o_b_proj)$", Position.ATTENTION_OUTPUT),
    ("attention", r"", Position.ATTENTION_INPUT),
    ("mixer", r"\.(?:o_proj|out_proj|linear_out)$", Position.ATTENTION_OUTPUT),
    ("mixer", r"", Position.ATTENTION_INPUT),
    (
        "feed_forward",
        r"(?:down_proj|c_proj|fc2|fc_out|dense_4h_to_h|w2|output_linear)$",
        Position.FEED_FORWARD_OUTPUT,
    ),
)
_GATE = re.compile(r"gate|w3|input_linear")
_HEAD_NORM = re.compile(r"\.([qk])_(?:layer)?norm\.")
_ADAPTER = re.compile(r"\.lora_(?:[AB]|magnitude_vector)$")


@dataclass(frozen=True)
class Param:
    """One trainable tensor of a model.

    Attributes:
        name: as in `model.named_parameters()` of the `AutoModelForCausalLM` of transformers 5.
        shape: shape in the module, in elements.
        layer: index of its transformer layer; None for embeddings, head and final norm.
        kind: its category, one of KINDS.
        stored: the tensors that hold it in the safetensors files of the checkpoint; usually (name,). Several for merged
            experts, or where a file repeats a tied embedding as the head.
        owner: the unit that it belongs to, if that is not named after it: a vector such as attention sinks.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    kind: str
    stored: tuple[str, ...]
    owner: str = ""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def unit(self) -> str:
        """The matrix with its bias and the vectors of its module: a name without its last `.weight` or `.bias`."""
        return self.owner or _matrix_of(self.name)

    @property
    def is_vector(self) -> bool:
        """Whether it has one dimension, or is no weight of a module and has one of more than one element."""
        return len(self.shape) < 2 or not (self.name.endswith(".weight") or sum(size > 1 for size in self.shape) > 1)

    @property
    def position(self) -> Position:
        """Its position in the forward pass of its layer; of a LoRA adapter, that of the adapted matrix."""
        matrix = _ADAPTER.sub("", self.unit)
        matches = (at for kind, pattern, at in _POSITIONS if kind == self.kind and re.search(pattern, matrix))
        return next(matches, Position.FEED_FORWARD_INPUT)

    @property
    def is_experts(self) -> bool:
        """Whether it is the matrices of several experts in one tensor."""
        return self.kind == "feed_forward" and len(self.shape) == 3

    @property
    def is_gate(self) -> bool:
        """Whether it is, or contains, the gate of a gated feed-forward block (SwiGLU)."""
        return self.kind == "feed_forward" and _GATE.search(self.name) is not None

    @property
    def head_norm(self) -> str | None:
        """ "q" or "k" for a norm of the queries or the keys."""
        match = _HEAD_NORM.search(self.name)
        return match[1] if match else None


def _matrix_of(name: str) -> str:
    return re.sub(r"\.(?:weight|bias)$|(?<=_proj|_gate)_(?:weight|bias)$|(?<=dense|value)_bias$", "", name)


Rule = tuple[re.Pattern[str], str]  # a pattern of `model.kinds` and its kind


def make_params(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Iterable[str]], kinds: Mapping[str, str]
) -> tuple[Param, ...]:
    """The parameters of a model, in natural order of their names.

    Args:
        shapes: parameter name -> shape.
        stored: parameter name -> file tensors.
        kinds: `model.kinds`, regular expressions over names -> kinds. They precede the built-in patterns.

    Raises:
        UserError: if a parameter cannot be placed, or `kinds` has a broken or unused expression or an unknown kind,
            places a parameter outside the layers in a kind of the layers, or divides a matrix from its bias.
    """
    rules = parse_rules(kinds)
    params, unplaced = [], []
    for name in sorted(shapes, key=parameter_order):
        placed = classify(name, shapes[name], rules)
        if placed is None:
            unplaced.append(name)
        else:
            params.append(Param(name, shapes[name], placed[1], placed[0], tuple(stored[name])))
    if unplaced:
        raise _unplaced_error(unplaced)
    for pattern, _ in rules:
        if not any(pattern.search(name) for name in shapes):
            raise UserError(f"model.kinds: '{pattern.pattern}' matches no parameter of this model. Remove it.")
    _check_rules_fit(params)
    return _with_owners(params)


def _check_rules_fit(params: Iterable[Param]) -> None:
    """Raise UserError for parameters that `model.kinds` places where no draw and no key would find them."""
    units: dict[str, Param] = {}
    for param in params:
        if param.layer is None and param.kind not in OUTSIDE_KINDS:
            raise UserError(
                f"model.kinds: '{param.name}' is outside the layers, where nothing is drawn, so it cannot be "
                f"{param.kind}. Map it to one of: {', '.join(OUTSIDE_KINDS)}, which selection.final_norm, "
                "selection.embeddings and selection.head update or freeze."
            )
        first = units.setdefault(param.unit, param)
        if first.kind != param.kind:
            raise UserError(
                f"model.kinds: '{first.name}' is {first.kind} and '{param.name}' is {param.kind}, but a matrix and its "
                "bias are drawn together. Map both to one kind."
            )


def _with_owners(params: Sequence[Param]) -> tuple[Param, ...]:
    """The parameters; vectors in layers that are neither a norm nor a bias belong to the largest matrix beside them.

    As a unit of its own, a vector of some elements (attention sinks, the decay of a state space) would count as much as
    a matrix in a draw.
    """
    matrices: dict[tuple[int | None, str], list[Param]] = {}
    for param in params:
        if not param.is_vector:
            matrices.setdefault((param.layer, param.kind), []).append(param)
    units = {param.unit for group in matrices.values() for param in group}

    def owner(param: Param) -> str:
        if param.layer is None or param.kind == "norm" or not param.is_vector or param.unit in units:
            return ""
        beside = matrices.get((param.layer, param.kind), [])
        nearest = min(beside, key=lambda m: (-_shared_modules(m, param), -m.elements, m.position, m.name), default=None)
        return nearest.unit if nearest else ""

    return tuple(replace(param, owner=name) if (name := owner(param)) else param for param in params)


def _shared_modules(one: Param, other: Param) -> int:
    """The number of modules, from the outermost, that two parameters are in."""
    pairs = zip(one.name.split("."), other.name.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def parse_rules(kinds: Mapping[str, str]) -> list[Rule]:
    """The rules of `model.kinds`, compiled. A broken expression or an unknown kind is a UserError."""
    rules = []
    for pattern, kind in kinds.items():
        try:
            rules.append((re.compile(pattern), choose("kind in model.kinds", kind, KINDS)))
        except re.error as error:
            raise UserError(f"model.kinds: '{pattern}' is not a regular expression: {error}.") from None
    return rules


def classify(name: str, shape: tuple[int, ...], rules: Iterable[Rule] = ()) -> tuple[str, int | None] | None:
    """The kind and the layer (None outside the layers) of a parameter; None if no rule and no pattern places it."""
    for pattern, kind in rules:
        if pattern.search(name):
            match = _ANY_LAYER.search(name)
            return kind, int(match[1]) if match else None
    match = _LAYER.fullmatch(name)
    if match is None:
        return next(((kind, None) for kind, pattern in _OUTSIDE_LAYERS.items() if re.fullmatch(pattern, name)), None)
    experts = _EXPERTS.fullmatch(match[2])
    if experts and len(shape) != (2 if experts[1] else 3):
        return None
    kind_in_layer = _kind_in_layer(_matrix_of(match[2]))
    return None if kind_in_layer is None else (kind_in_layer, int(match[1]))


def _kind_in_layer(matrix: str) -> str | None:
    """The kind of a matrix, norm or vector by its path inside a layer, without `.weight` and `.bias`."""
    words = [word for word in matrix.split(".") if not word.isdigit() and word != "norms"]
    module, *inside = words[1:] if words[0] in _BLOCKS and len(words) > 1 else words
    if _NORM.fullmatch(inside[-1] if inside else module):
        return "norm"
    module, name = (module, ".".join(inside)) if inside else ("", module)
    return next((kind for kind, names in _MODULES.get(module, {}).items() if name in names), None)


MOST_PATTERNS = 30  # of an error


def _unplaced_error(names: Sequence[str]) -> UserError:
    """All names that no pattern places, those of several layers once, as the override that places them."""
    patterns = list(dict.fromkeys(_pattern_over_layers(name) for name in names))
    override = ", ".join(f"{pattern}: KIND" for pattern in patterns[:MOST_PATTERNS])
    others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    cut = f" ({len(patterns) - MOST_PATTERNS} more are not shown)" if len(patterns) > MOST_PATTERNS else ""
    return UserError(
        f"Cannot place parameter '{names[0]}'{others} in a kind. Map by regular expressions, each for all layers: "
        f"'model.kinds={{{override}}}'{cut}, where KIND is one of: {', '.join(KINDS)}."
    )


def _pattern_over_layers(name: str) -> str:
    """A regular expression for a parameter in all layers, in characters that an override takes without quotes."""
    match = _ANY_LAYER.search(name)
    return re.sub(r"(?<=\.)\d+(?=\.|$)", ".*", match[2] if match else name)


def parameter_order(name: str) -> list[tuple[int, str]]:
    """Sort key for natural order: layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def layer_and_matrix(name: str) -> tuple[int, str] | None:
    """The layer of a parameter or file tensor, and the path of its matrix inside it; None outside the layers."""
    match = _ANY_LAYER.search(name)
    return (int(match[1]), _matrix_of(match[2])) if match else None


def category(matrix: str) -> str:
    """attention, mixer, feed-forward (with its router), norm, or other, from the path of a matrix inside its layer."""
    names = {"router": "feed-forward", "feed_forward": "feed-forward", None: "other"}
    kind = _kind_in_layer(matrix)
    return names.get(kind, str(kind))


def short_names(matrices: Iterable[str]) -> dict[str, str]:
    """Matrix -> a short label for the axis of a figure, if no other matrix has the same: q, gate, input_norm."""
    matrices = list(matrices)
    labels = [name.rsplit(".", 1)[-1].removesuffix("_proj").replace("layernorm", "norm") for name in matrices]
    labels = [label.replace("attention", "attn").replace("feedforward", "ffn") for label in labels]
    return {name: label if labels.count(label) == 1 else name for name, label in zip(matrices, labels, strict=True)}
