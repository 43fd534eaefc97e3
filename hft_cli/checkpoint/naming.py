"""Parameter names: the layer, the category and the role of each parameter. All patterns over names are in this file.

Standard library only. Nothing is guessed: a name that no pattern places is an error that asks for `model.kinds`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

from hft_cli.errors import UserError, choose

KINDS = ("attention", "feed_forward", "norm", "embedding", "head", "router")

# Where the layers of a text model are. The path of a vision tower does not match, so its tensors are no layers.
_TEXT_MODEL = r"(?:model|transformer|gpt_neox|backbone)\.(?:(?:decoder|language_model)\.)?"
_LAYER = re.compile(_TEXT_MODEL + r"(?:layers|h|blocks)\.(\d+)\.(.+)")

# A layer under any prefix: tensors of files without the prefix of the model, and names that `model.kinds` places.
_ANY_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.(.+)")

_LEAF = r"\.(?:weight|bias)"
_NORM = r"(?:\w*norm(?:_?\d)?|ln_\w+)"
_ATTENTION = r"(?:self_attn|attn|attention|self_attention)\."

# Patterns of the whole path inside a layer. `gate` is a router; `gate_proj` is a matrix of the feed-forward block.
_IN_LAYER = {
    "norm": rf"(?:{_ATTENTION}|(?:mlp|ffn)\.)?{_NORM}(?:\.norms\.\d+)?{_LEAF}",
    "attention": _ATTENTION + r"(?:attention\.)?(?:(?:q|k|v|o|qkv|out)_proj|c_attn|q_attn|c_proj|query_key_value|dense"
    rf"|Wqkv|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj){_LEAF}",
    "router": rf"(?:mlp|block_sparse_moe|feed_forward)\.(?:gate|router(?:\.layer)?|shared_expert_gate){_LEAF}",
    "feed_forward": r"(?:(?:mlp|ffn|feed_forward|block_sparse_moe|shared_mlp)\.)?"
    r"(?:(?:experts\.\d+|shared_experts?)\.)?"
    r"(?:gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2|fc_in|fc_out|c_fc|c_proj|dense_h_to_4h|dense_4h_to_h|w[123]"
    rf"|input_linear|output_linear){_LEAF}",
}

# Experts merged into one tensor, (experts, rows, columns), and their biases, (experts, rows).
_EXPERTS = re.compile(r"(?:mlp|block_sparse_moe|feed_forward)\.experts\.(?:gate_up_proj|up_proj|down_proj)(_bias)?")

_OUTSIDE_LAYERS = {
    "embedding": _TEXT_MODEL
    + r"(?:embed_tokens|embed_positions|word_embeddings|embeddings|embed_in|wte|wpe|project_in)\.weight",
    "norm": _TEXT_MODEL + rf"(?:norm|norm_f|ln_f|layer_norm|final_layer_?norm|word_embeddings_layernorm){_LEAF}",
    "head": rf"(?:lm_head|embed_out|{_TEXT_MODEL}project_out){_LEAF}",
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
    ("attention", r"\.(?:o_proj|out_proj|c_proj|dense)$", Position.ATTENTION_OUTPUT),
    ("attention", r"", Position.ATTENTION_INPUT),
    (
        "feed_forward",
        r"(?:down_proj|c_proj|fc2|fc_out|dense_4h_to_h|w2|output_linear)$",
        Position.FEED_FORWARD_OUTPUT,
    ),
)
_GATE = re.compile(r"gate|w3|input_linear")
_HEAD_NORM = re.compile(r"\.([qk])_(?:layer)?norm\.")
_ADAPTER = re.compile(r"\.lora_[AB]$")


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
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    kind: str
    stored: tuple[str, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def unit(self) -> str:
        """The matrix with its bias: the name without its last `.weight` or `.bias`."""
        return _matrix_of(self.name)

    @property
    def position(self) -> Position:
        """Its position in the forward pass of its layer; of a LoRA adapter, that of the adapted matrix."""
        matrix = _ADAPTER.sub("", self.unit)
        matches = (at for kind, pattern, at in _POSITIONS if kind == self.kind and re.search(pattern, matrix))
        return next(matches, Position.FEED_FORWARD_INPUT)

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
    return re.sub(r"\.(?:weight|bias)$|(?<=_proj)_bias$", "", name)


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
        UserError: if a parameter cannot be placed, or `kinds` has a broken or unused expression or an unknown kind.
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
    return tuple(params)


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
    kind_in_layer = _kind_in_layer(match[2])
    return None if kind_in_layer is None else (kind_in_layer, int(match[1]))


def _kind_in_layer(path: str) -> str | None:
    """The kind of a parameter by its path inside a layer."""
    if _EXPERTS.fullmatch(path):
        return "feed_forward"
    return next((kind for kind, pattern in _IN_LAYER.items() if re.fullmatch(pattern, path)), None)


def _unplaced_error(names: list[str]) -> UserError:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    match = _LAYER.fullmatch(names[0])
    pattern = match[2] if match else names[0]
    return UserError(
        f"Cannot place parameter '{names[0]}'{more} in a kind. "
        f"Map it by a regular expression: 'model.kinds={{{pattern}: KIND}}', where KIND is one of: {', '.join(KINDS)}."
    )


def parameter_order(name: str) -> list[tuple[int, str]]:
    """Sort key for natural order: layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def layer_and_matrix(name: str) -> tuple[int, str] | None:
    """The layer of a parameter or file tensor, and the path of its matrix inside it; None outside the layers."""
    match = _ANY_LAYER.search(name)
    return (int(match[1]), _matrix_of(match[2])) if match else None


def category(matrix: str) -> str:
    """attention, feed-forward (with its router), norm, or other, from the path of a matrix inside its layer."""
    kind = _kind_in_layer(f"{matrix}.weight") or _kind_in_layer(matrix)
    names = {"attention": "attention", "feed_forward": "feed-forward", "router": "feed-forward", "norm": "norm"}
    return names.get(kind or "", "other")


def short_names(matrices: Iterable[str]) -> dict[str, str]:
    """Matrix -> a short label for the axis of a figure, if no other matrix has the same: q, gate, input_norm."""
    matrices = list(matrices)
    labels = [name.rsplit(".", 1)[-1].removesuffix("_proj").replace("layernorm", "norm") for name in matrices]
    labels = [label.replace("attention", "attn").replace("feedforward", "ffn") for label in labels]
    return {name: label if labels.count(label) == 1 else name for name, label in zip(matrices, labels, strict=True)}
