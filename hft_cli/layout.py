"""Every parameter of a causal language model: its shape, its layer, its kind, and the file tensors that hold it.

Importing this module imports only the standard library. A folder whose files already hold the module's own names is
read from the safetensors headers alone; any other is read with a weightless model and transformers' own name mapping.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft_cli.schema import UserError, choose

if TYPE_CHECKING:
    from torch import Tensor

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
_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


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


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: its bytes are `file[start:stop]`, row-major, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


MOST_TOKENS = 2048  # of a row, unless train.max_length says more


def positions(config: Mapping[str, Any]) -> int | None:
    """The most tokens that a model reads, from its config; None if that does not say."""
    own = config.get("text_config") or config
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if own.get(key):
            return int(own[key])
    return None


def classify(name: str, shape: Iterable[int], kinds: Mapping[str, str] = {}) -> tuple[str, int | None]:
    """Kind and layer index (None outside the layers) of the module parameter `name` of shape `shape`.

    `kinds` maps regular expressions, searched in the name, to kinds; its first match wins over the built-in patterns.

    Raises:
        UserError: no pattern places the name, or `kinds` holds a bad expression or an unknown kind.
    """
    placed = _match(name, tuple(shape), _rules(kinds))
    if placed is None:
        raise _unplaced([name])
    return placed


def _rules(kinds: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for pattern, kind in kinds.items():
        try:
            rules.append((re.compile(pattern), choose("kind in model.kinds", kind, KINDS)))
        except re.error as error:
            raise UserError(f"model.kinds: '{pattern}' is not a regular expression: {error}.") from None
    return rules


def _match(
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


def _unplaced(names: list[str]) -> UserError:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    inside = _LAYER.fullmatch(names[0])
    key = inside[2] if inside else names[0]
    return UserError(
        f"Cannot place parameter '{names[0]}'{more} in a kind. "
        f"Map it by a regular expression: 'model.kinds={{{key}: KIND}}', where KIND is one of: {', '.join(KINDS)}."
    )


def _params(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Iterable[str]], kinds: Mapping[str, str]
) -> tuple[Param, ...]:
    rules = _rules(kinds)
    placed = {name: _match(name, shapes[name], rules) for name in sorted(shapes, key=_natural)}
    if missing := [name for name, found in placed.items() if found is None]:
        raise _unplaced(missing)
    for pattern, _ in rules:
        if not any(pattern.search(name) for name in shapes):
            raise UserError(f"model.kinds: '{pattern.pattern}' matches no parameter of this model. Remove it.")
    return tuple(
        Param(name, shapes[name], found[1], found[0], tuple(stored[name]))
        for name, found in placed.items()
        if found is not None
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10, so that every reader lists the parameters in one order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name, with byte offsets counted from the start of the file.

    Raises:
        UserError: the file is missing, no safetensors file, cut short, or its offsets do not fit its tensors.
    """
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if size < 8 or start - 8 > min(size, 100_000_000):  # the format's own limit on a header
                raise UserError(f"{path} is no safetensors file (a failed download, or a Git LFS pointer?). Fetch it.")
            header = json.loads(file.read(start - 8))
        infos: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                infos[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), start + first, start + last)
        end = start
        for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
            bits = math.prod(info.shape) * _BITS[info.dtype]
            if info.start != end or (info.stop - info.start) * 8 != bits or min(info.shape, default=0) < 0:
                raise UserError(f"{path}: the offsets of tensor '{name}' do not fit its shape. Fetch the file again.")
            end = info.stop
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has a broken safetensors header ({error!r}). Fetch the file again.") from None
    if end != size:
        raise UserError(f"{path} has {size} bytes where its header says {end}. Fetch the file again.")
    return infos


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return value


def checkpoint_files(folder: str | Path) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint folder, by tensor name.

    As transformers does, takes `model.safetensors` where there is one, else `model.safetensors.index.json`.

    Raises:
        UserError: no such folder, no config.json, no safetensors weights, a broken index, or a shard is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no checkpoint folder {folder}.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; it must be a folder that save_pretrained() wrote.")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(read_header(single), single)
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise UserError(f"{index} has no weight_map. Fetch it again.")
        if absent := sorted({shard for shard in shards.values() if not (folder / shard).is_file()}):
            raise UserError(f"{folder} lacks {absent[0]} ({len(absent)} of its shards are missing). Fetch them.")
        return {name: folder / shard for name, shard in shards.items()}
    old = sorted(path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}"))
    found = f" only {old[0]}. Convert it once" if old else "; if it has other weights, convert them"
    raise UserError(
        f"{folder} has no model.safetensors{found}: "
        f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')."
    )


def from_config(config_or_path: Any, kinds: Mapping[str, str] = {}) -> tuple[Param, ...]:
    """The parameters of the model that a config describes, in natural name order; `stored` is (name,) for each.

    Takes a transformers config, a folder with a config.json, or such a file. Builds the model without weights.

    Raises:
        UserError: transformers cannot build the model, or a parameter cannot be placed.
    """
    shapes = _shapes(_meta_model(config_or_path))
    return _params(shapes, {name: (name,) for name in shapes}, kinds)


def from_fields(config: Mapping[str, Any], kinds: Mapping[str, str] = {}) -> tuple[Param, ...] | None:
    """What `from_config` gives, from the fields of config.json alone and without torch; None unless the model type is
    in FIELDS and all the fields that its shapes hang on are there.

    Raises:
        UserError: `kinds` holds a bad expression or an unknown kind.
    """
    family = config.get("model_type")
    if family not in FIELDS or any(config.get(key) is None for key in (*_SIZES, *FIELDS[family])):
        return None
    hidden, inner, layers, heads, vocabulary = (config[key] for key in _SIZES)
    width = config.get("head_dim") or hidden // heads
    queries, keys = heads * width, (config.get("num_key_value_heads") or heads) * width
    inside: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "post_feedforward_layernorm.weight" if family == "olmo2" else "input_layernorm.weight": (hidden,),
    }
    if config.get("attention_bias") or family == "qwen2":
        biased = "qkv" if family == "qwen2" else "qkvo"
        inside |= {f"self_attn.{x}_proj.bias": inside[f"self_attn.{x}_proj.weight"][:1] for x in biased}
    if family in ("qwen3", "olmo2"):  # over each head, and over all of them
        inside["self_attn.q_norm.weight"] = (width if family == "qwen3" else queries,)
        inside["self_attn.k_norm.weight"] = (width if family == "qwen3" else keys,)
    if family == "mixtral":
        experts = config["num_local_experts"]
        inside["mlp.gate.weight"] = (experts, hidden)
        inside["mlp.experts.gate_up_proj"] = (experts, 2 * inner, hidden)
        inside["mlp.experts.down_proj"] = (experts, hidden, inner)
    else:
        matrices = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        inside |= {f"mlp.{name}.weight": shape for name, shape in matrices.items()}
        if config.get("mlp_bias"):
            inside |= {f"mlp.{name}.bias": shape[:1] for name, shape in matrices.items()}
    shapes = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in inside.items()}
    shapes |= {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return _params(shapes, {name: (name,) for name in shapes}, kinds)


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Model types whose shapes `from_fields` knows (none ties its head unless its config says so), and what else it needs of
# their configs, because the type's default is not one for all sizes.
FIELDS: dict[str, tuple[str, ...]] = {
    "llama": (), "olmo2": (), "mistral": ("num_key_value_heads",), "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"), "mixtral": ("num_key_value_heads", "num_local_experts"),
}  # fmt: skip


def _meta_model(config_or_path: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_or_path
    try:
        if isinstance(config, (str, Path)):
            if not Path(config).exists():
                raise UserError(f"There is no {config}.")
            config = AutoConfig.from_pretrained(config, trust_remote_code=False)
        with torch.device("meta"):
            # a copy, because transformers notes its choice of attention kernel in the config it is given
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # a faulty config fails in many ways inside the model's own code
        text = str(error).strip().splitlines() or [type(error).__name__]
        where = config_or_path if isinstance(config_or_path, (str, Path)) else type(config).__name__
        raise UserError(f"transformers cannot build a causal language model from {where}: {text[0]}") from error


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(param.shape) for name, param in model.named_parameters()}  # lists a tied weight once


def from_folder(path: str | Path, kinds: Mapping[str, str] = {}) -> tuple[Param, ...]:
    """The parameters of the checkpoint in a folder, in natural name order, each with the file tensors that hold it.

    File tensors in no Param's `stored` are buffers: constants that the module holds itself or ignores on load.
    A model type in PLAIN whose names fit is read without importing torch.

    Raises:
        UserError: the folder or a file is broken, the weights are quantized, the files do not fit the model, a tied
            head differs from the embedding, or a parameter cannot be placed.
    """
    folder = Path(path)
    files = checkpoint_files(folder)
    config = _read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise UserError(f"{folder} holds quantized weights, which cannot be trained. Use the unquantized checkpoint.")
    headers = {file: read_header(file) for file in sorted(set(files.values()))}
    if lost := [name for name, file in files.items() if name not in headers[file]]:
        raise UserError(f"{folder}: tensor '{lost[0]}' is not in {files[lost[0]].name}, where the index has it.")
    infos = {name: headers[file][name] for name, file in files.items()}
    plain = _plain(config, infos)
    shapes, stored, twins = plain if plain is not None else _converted(_meta_model(folder), infos, folder)
    for first, second in twins:
        if not _same_bytes(files[first], infos[first], files[second], infos[second]):
            raise UserError(
                f"{folder}: the config ties '{second}' to '{first}', but the files hold different values. "
                "Set tie_word_embeddings to false in its config.json to keep both."
            )
    return _params(shapes, stored, kinds)


# Shapes and file tensors by parameter, and pairs of file tensors that tied weights require to be equal.
_Layout = tuple[dict[str, tuple[int, ...]], dict[str, list[str]], list[tuple[str, str]]]


def _plain(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> _Layout | None:
    """The layout read from names alone; None unless the type is in PLAIN and its names leave no doubt."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.get("model_type") not in PLAIN:
        return None
    shapes = {name: info.shape for name, info in infos.items() if not re.search(_BUFFERS[0], name)}
    layers: dict[int, set[tuple[str, tuple[int, ...]]]] = {}
    outside = set()
    for name, shape in shapes.items():
        placed = _match(name, shape)
        if placed is None or not name.startswith(("model.", "lm_head.")):
            return None
        if placed[1] is None:
            outside.add(placed[0])
        else:
            layers.setdefault(placed[1], set()).add((name.split(".", 3)[3], shape))
    alike = len({frozenset(layer) for layer in layers.values()}) == 1
    if not alike or sorted(layers) != list(range(config.get("num_hidden_layers", 0))):
        return None
    tied = config.get("tie_word_embeddings", PLAIN[config["model_type"]])
    if embedding not in shapes or "norm" not in outside or (not tied and head not in shapes):
        return None
    stored = {name: [name] for name in shapes}
    if not tied or head not in shapes:
        return shapes, stored, []
    del shapes[head], stored[head]
    stored[embedding].append(head)
    return shapes, stored, [(embedding, head)]


def _converted(model: Any, infos: Mapping[str, TensorInfo], folder: Path) -> _Layout:
    """The layout by transformers' own renamings and mergers, the steps of its loader on names alone."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    shapes, state = _shapes(model), model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    split = {source for entry in converters if len(entry.target_patterns) > 1 for source in entry.source_patterns}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *_BUFFERS]
    stored: dict[str, list[str]] = {name: [] for name in shapes}
    aliases: dict[str, list[str]] = {}
    strange = []
    for name in sorted(infos, key=_natural):
        target, source = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:  # the loader's own fallback
            target, source = name, None
        if source in split and target in shapes:
            raise UserError(f"{folder}: tensor '{name}' holds several parameters at once, which is not supported.")
        if target in model.all_tied_weights_keys:
            aliases.setdefault(model.all_tied_weights_keys[target], []).append(name)
        elif target in shapes:
            stored[target].append(name)
        elif target not in state and not any(re.search(pattern, target) for pattern in ignored):
            strange.append(name)
    wrong = [
        name
        for name, tensors in stored.items()
        if tensors and sum(math.prod(infos[tensor].shape) for tensor in tensors) != math.prod(shapes[name])
    ]
    twins = []
    for name, others in aliases.items():
        stored[name] += others
        twins += [(stored[name][0], other) for other in stored[name][1:]]
    for what, names in (
        ("no file tensor holds parameter", [name for name in shapes if not stored[name]]),
        ("no parameter of the model takes file tensor", strange),
        ("the files and config.json disagree on the shape of", wrong),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if names[1:] else ""
            raise UserError(f"{folder}: {what} '{names[0]}'{more}. Are config.json and the weights of one model?")
    return shapes, stored, twins


def _same_bytes(first: Path, one: TensorInfo, second: Path, other: TensorInfo) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open(first, "rb") as left, open(second, "rb") as right:
        left.seek(one.start)
        right.seek(other.start)
        step = 1 << 24
        return all(
            left.read(min(step, one.stop - at)) == right.read(min(step, one.stop - at))
            for at in range(one.start, one.stop, step)
        )


def to_stored(model: Any, named: Mapping[str, Tensor], params: Iterable[Param] = ()) -> dict[str, Tensor]:
    """Module tensors under the names and in the layout of the files, for example 3-D experts cut to 2-D matrices.

    Args:
        model: the transformers model (weights are not read; a model on the meta device will do).
        named: tensors by parameter name, in the module's shapes; any subset of the model's parameters.
        params: the `from_folder` result of the folder whose layout is wanted. Without it the layout is the one that
            `model.save_pretrained` writes.

    Returns:
        Tensors by file name. They may share memory with the given ones.

    Raises:
        UserError: transformers cannot write the folder's layout.
    """
    from transformers.core_model_loading import revert_weight_conversion

    wanted = {param.name: param.stored for param in params}
    if not wanted:
        return dict(revert_weight_conversion(model, dict(named)))
    tied = set(model.all_tied_weights_keys.values())
    result: dict[str, Tensor] = {}
    for name, tensor in named.items():
        written: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
        stored = wanted[name]
        if stored[0] == name and name not in written:  # the folder already has the module's layout
            written = {name: tensor}
        # One tensor under the folder's own prefix, or repeated as a tied head.
        if len(written) == 1 and (len(stored) == 1 or name in tied):
            result.update(dict.fromkeys(stored, next(iter(written.values()))))
            continue
        # The names may differ by the prefix alone, so both in natural order pair up.
        pairs = list(zip(sorted(written, key=_natural), sorted(stored, key=_natural), strict=False))
        if len(written) != len(stored) or any(a.split(".")[-3:] != b.split(".")[-3:] for a, b in pairs):
            raise UserError(f"Cannot write '{name}' as '{stored[0]}': transformers writes it as '{pairs[0][0]}'.")
        result.update((target, written[own]) for own, target in pairs)
    return result
