"""Where a parameter belongs, by its name: layer, category and stored tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hft_cli.errors import UserError, choose

KINDS = ("attention", "feed_forward", "norm", "embedding", "head", "router")

# Model types whose checkpoints hold the module's own names under `model.`, with the type's default of
# tie_word_embeddings (config.json may leave it out). All their layers have the same parameters.
PLAIN = {
    "llama": False, "mistral": False, "qwen2": False, "qwen3": False, "gemma": True, "gemma2": True,
    "gemma3_text": True, "olmo2": False, "olmo3": False, "phi3": False, "phi": False, "stablelm": False,
    "cohere": True, "cohere2": True, "granite": False, "smollm3": True, "starcoder2": True, "glm": False,
    "glm4": False, "nemotron": False,
}  # fmt: skip

# Where a text model's layers may sit. A vision tower's path does not match, so its tensors are never taken for layers.
_STACK = r"(?:model|transformer|gpt_neox|backbone)\.(?:(?:decoder|language_model)\.)?"

_LAYER = re.compile(_STACK + r"(?:layers|h|blocks)\.(\d+)\.(.+)")

_ANY_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")  # for names that the user's own map places

_ATTENTION = r"(?:self_attn|attn|attention|self_attention)\."

_NORM = r"(?:\w*norm(?:_?\d)?|ln_\w+)"

_LEAF = r"\.(?:weight|bias)"

# Patterns of the whole path inside a layer. `gate` is a router; `gate_proj` is a matrix of the feed-forward.
_INSIDE = {
    "norm": rf"(?:{_ATTENTION}|(?:mlp|ffn)\.)?{_NORM}(?:\.norms\.\d+)?{_LEAF}",
    "attention": _ATTENTION + r"(?:attention\.)?(?:(?:q|k|v|o|qkv|out)_proj|c_attn|q_attn|c_proj|query_key_value|dense"
    rf"|Wqkv|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj){_LEAF}",
    "router": rf"(?:mlp|block_sparse_moe|feed_forward)\.(?:gate|router(?:\.layer)?|shared_expert_gate){_LEAF}",
    "feed_forward": r"(?:(?:mlp|ffn|feed_forward|block_sparse_moe|shared_mlp)\.)?"
    r"(?:(?:experts\.\d+|shared_experts?)\.)?"
    r"(?:gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2|fc_in|fc_out|c_fc|c_proj|dense_h_to_4h|dense_4h_to_h|w[123]"
    rf"|input_linear|output_linear){_LEAF}",
}

_EXPERTS = re.compile(r"(?:mlp|block_sparse_moe|feed_forward)\.experts\.(?:gate_up_proj|up_proj|down_proj)(_bias)?")

_OUTSIDE = {
    "embedding": _STACK
    + r"(?:embed_tokens|embed_positions|word_embeddings|embeddings|embed_in|wte|wpe|project_in)\.weight",
    "norm": _STACK + rf"(?:norm|norm_f|ln_f|layer_norm|final_layer_?norm|word_embeddings_layernorm){_LEAF}",
    "head": rf"(?:lm_head|embed_out|{_STACK}project_out){_LEAF}",
}

# Constants that older releases saved. A module ignores them on load; transformers adds the same two by code.
BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class Param:
    """One trainable tensor of the model.

    Attributes:
        name: as in `model.named_parameters()` of the transformers 5 `AutoModelForCausalLM`.
        shape: the module's shape, in elements.
        layer: index of its transformer layer; None for embeddings, head and final norm.
        kind: one of KINDS.
        stored: the tensors of the checkpoint's safetensors files that hold it; (name,) in the plain case. Several for
            merged experts, or where a file repeats a tied embedding as the head.
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
        """The matrix together with its bias: the name without its last `.weight` or `.bias`."""
        return re.sub(r"\.(?:weight|bias)$|(?<=_proj)_bias$", "", self.name)


def classify(name: str, shape: Iterable[int], kinds: Mapping[str, str] = {}) -> tuple[str, int | None]:
    """Kind and layer index (None outside the layers) of the module parameter `name` of shape `shape`.

    `kinds` maps regular expressions, searched in the name, to kinds; its first match wins over the built-in patterns.

    Raises:
        UserError: no pattern places the name, or `kinds` holds a bad expression or an unknown kind.
    """
    placed = match(name, tuple(shape), placing_rules(kinds))
    if placed is None:
        raise unplaced([name])
    return placed


def placing_rules(kinds: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for pattern, kind in kinds.items():
        try:
            rules.append((re.compile(pattern), choose("kind in model.kinds", kind, KINDS)))
        except re.error as error:
            raise UserError(f"model.kinds: '{pattern}' is not a regular expression: {error}.") from None
    return rules


def match(
    name: str, shape: tuple[int, ...], rules: Iterable[tuple[re.Pattern[str], str]] = ()
) -> tuple[str, int | None] | None:
    for pattern, kind in rules:
        if pattern.search(name):
            index = _ANY_LAYER.search(name)
            return kind, int(index[1]) if index else None
    inside = _LAYER.fullmatch(name)
    if inside is None:
        return next(((kind, None) for kind, pattern in _OUTSIDE.items() if re.fullmatch(pattern, name)), None)
    layer, rest = int(inside[1]), inside[2]
    experts = _EXPERTS.fullmatch(rest)
    if experts:
        return ("feed_forward", layer) if len(shape) == (2 if experts[1] else 3) else None
    return next(((kind, layer) for kind, pattern in _INSIDE.items() if re.fullmatch(pattern, rest)), None)


def unplaced(names: list[str]) -> UserError:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    inside = _LAYER.fullmatch(names[0])
    key = inside[2] if inside else names[0]
    return UserError(
        f"Cannot place parameter '{names[0]}'{more} in a kind. "
        f"Map it by a regular expression: 'model.kinds={{{key}: KIND}}', where KIND is one of: {', '.join(KINDS)}."
    )


def parameter_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10, so that every reader lists the parameters in one order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def layer_and_matrix(name: str) -> tuple[int, str] | None:
    """Layer and matrix (with its bias) of a parameter's name; None outside the layers."""
    found = re.search(r"\.(\d+)\.(.+?)(?:\.weight|\.bias)?$", name)
    return (int(found.group(1)), found.group(2)) if found else None


def short_names(matrices: Iterable[str]) -> dict[str, str]:
    """Matrix -> a short name for a figure's edge, where no other has the same: q, gate, input_norm."""
    names = list(matrices)
    ends = [name.rsplit(".", 1)[-1].removesuffix("_proj").replace("layernorm", "norm") for name in names]
    ends = [end.replace("attention", "attn").replace("feedforward", "ffn") for end in ends]
    return {name: end if ends.count(end) == 1 else name for name, end in zip(names, ends, strict=True)}


def category(matrix: str) -> str:
    """attention, feed-forward, norm or other, by the usual names of matrices."""
    if re.search(r"norm|(^|\.)ln_", matrix):
        return "norm"
    if re.search(r"attn|attention|(^|\.)(q|k|v|o|qkv)_proj", matrix):
        return "attention"
    if re.search(r"mlp|ffn|feed_forward|experts|fc\d|(gate|up|down)_proj|dense_|shared", matrix):
        return "feed-forward"
    return "other"
