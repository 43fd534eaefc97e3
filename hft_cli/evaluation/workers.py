"""What the scoring workers share: the model, batches, and the division of items among ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar

from hft_cli.checkpoint.architectures import DEFAULT_MAX_LENGTH, max_positions
from hft_cli.checkpoint.text_part import load_options
from hft_cli.config.schema import ModelConfig
from hft_cli.data import templates
from hft_cli.data.model_template import use_template
from hft_cli.errors import UserError
from hft_cli.launch.ranks import Ranks
from hft_cli.text import plural

T = TypeVar("T")
R = TypeVar("R")

TIMEOUT = timedelta(weeks=1)  # the other ranks wait while the first one runs programs


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode.

    Attributes:
        model: a transformers model for causal language modelling, on `device`.
        tokenizer: its tokenizer, with the chat template of the configuration.
        max_length: tokens that the model reads at most.
    """

    model: Any
    tokenizer: Any
    device: str
    max_length: int


def load_model(path: str, config: ModelConfig, device: str = "cpu") -> LoadedModel:
    """Load the model in the folder `path` with the dtype, attention and chat template of `config`."""
    tokenizer = load_tokenizer(path, config)
    model = load_weights(path, config).to(device).eval()
    return LoadedModel(model, tokenizer, device, max_positions(model.config.to_dict()) or DEFAULT_MAX_LENGTH)


def load_weights(path: str, config: ModelConfig) -> Any:
    """Load a transformers model on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attention,
        **load_options(path, config.part),
    )


def load_tokenizer(path: str, config: ModelConfig) -> Any:
    """Load a tokenizer; `model.chat_template` replaces its own chat template, `model.thinking` sets its switch,
    and `model.date` the day that it writes.

    Raises:
        UserError: for an unknown chat template, or a tokenizer that cannot be read.
    """
    tokenizer = templates.load_tokenizer(path)
    if config.changes_template or config.date is not None:
        use_template(config, tokenizer)
    return tokenizer


def by_length(lengths: Iterable[int]) -> list[int]:
    """Indices by length, the longest first: a batch has rows of similar lengths, and one that is too large is first."""
    return [index for index, _ in sorted(enumerate(lengths), key=lambda pair: -pair[1])]


AUTO = 64  # items at once with suite.batch_size=auto, as long as the memory suffices


def in_batches(
    items: Sequence[T], size: int | str, compute: Callable[[Sequence[T]], None], key: str = "suite.batch_size"
) -> None:
    """Call `compute` for one batch of items after the other.

    With size "auto" a batch that does not fit into the memory of the GPU is halved, and so are those after it, so
    `compute` must change nothing before it has computed all. `key` is the config key of the size.

    Raises:
        UserError: if a batch of a given size, or a single item, does not fit.
    """
    import torch

    count, start = AUTO if size == "auto" else int(size), 0
    while start < len(items):
        try:
            compute(items[start : start + count])
        except torch.OutOfMemoryError:
            if size != "auto" or count == 1:
                fix = f"Lower {key}." if size != "auto" else "Take a GPU with more memory, or shorter rows."
                raise UserError(f"The memory of the GPU does not suffice for {plural(count, 'row')}. {fix}") from None
            count //= 2
            torch.cuda.empty_cache()
        else:
            start += count


def map_batches(
    size: int | str, compute: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T], key: str = "suite.batch_size"
) -> list[R]:
    """The results of `compute` for all items, in their order; otherwise as `in_batches`."""
    results: list[R] = []
    in_batches(items, size, lambda batch: results.extend(compute(batch)), key)
    return results


def pad_rows(rows: Sequence[Sequence[int]], value: int, device: str, side: str = "right") -> Any:
    """Rows of tokens as an int64 tensor of shape (rows, longest row) on `device`, padded with `value`."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side).to(device)


def last_logits(model: Any, input_ids: Any, count: int) -> Any:
    """The logits of the last `count` positions of `input_ids` (rows, tokens): shape (rows, count, vocabulary).

    Models that can leave out the others do so, which saves memory.
    """
    options = {"logits_to_keep": count} if "logits_to_keep" in signature(model.forward).parameters else {}
    return model(input_ids, **options).logits[:, -count:]


def current_ranks() -> Ranks:
    """This process among the ranks that torchrun started; rank 0 of 1 without torchrun."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def device_of_rank() -> str:
    """The GPU of this rank on its node, or the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


@contextmanager
def process_group(ranks: Ranks) -> Iterator[None]:
    """Within this context the ranks can exchange objects, by gloo."""
    if ranks.count == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.count, timeout=TIMEOUT)
    yield
    dist.barrier()
    dist.destroy_process_group()


def share_items(ranks: Ranks, function: Callable[..., Sequence[R]], items: Sequence[T], **options: Any) -> Sequence[R]:
    """The results of `function(items, **options)`, of which each rank computes a share; every rank gets all results."""
    own_items = items[ranks.rank :: ranks.count]
    shares = ranks.gather(function(own_items, **options) if own_items else [])
    results: list[Any] = [None] * len(items)
    for rank, share in enumerate(shares):
        results[rank :: ranks.count] = share
    return results
