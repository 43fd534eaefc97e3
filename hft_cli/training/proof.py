"""What the ranks hold in memory, compared with files: before the first step, and of frozen weights after the last.
The loss that they train on, compared with the model's own.

`hft verify` compares files with files. That the frozen weights did not move while the model was trained, the processes
that trained it must say: they write the SHA-256 of each frozen tensor in their memory, which `hft verify` compares with
the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from trl import __version__ as trl_version

from hft_cli.checkpoint.conversion import to_stored
from hft_cli.checkpoint.folders import stored_tensors
from hft_cli.errors import UserError
from hft_cli.files import write_json
from hft_cli.live.compat import gathered
from hft_cli.training import compat
from hft_cli.training.batches import TokensAndLabels, padded
from hft_cli.training.compat import trained_log_probs
from hft_cli.training.session import Session
from hft_cli.training.weights import DTYPES, bytes_of

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def prove_loaded(model: Any, session: Session, resumed: bool) -> None:
    """Compare the weights in memory with the model's files, bit by bit. Collective over the ranks.

    Under ZeRO-3 the first rank sees the parts of all ranks. Under ZeRO-1 and 2 each rank has the whole model: the first
    one is compared with the files, and the frozen weights of the others with the first one's.

    Args:
        resumed: whether the updated weights come from a checkpoint and not from these files.

    Raises:
        UserError: for weights that are not finite, or that the model changes when it loads them.
        RuntimeError: for ranks that hold different frozen weights.
    """
    if session.identity.zero_stage in (1, 2) and len(set(session.state.frozen)) > 1:
        raise RuntimeError("The ranks hold different frozen weights: this is a fault of the engine.")
    base = _without_adapters(model)
    names = {
        compat.base_name(name)
        for name, parameter in model.named_parameters()
        if not (resumed and parameter.requires_grad)
    }
    files = stored_tensors(Path(session.job.model)) if session.params else {}
    with ExitStack() as opened:
        readers = {
            tensor.file: opened.enter_context(safe_open(tensor.file, "pt"))
            for tensor in files.values()
            if session.ranks.first
        }
        for stored, value in _in_memory(model, session, names & session.params.keys()):
            expected: torch.Tensor = readers[files[stored].file].get_tensor(stored)
            if not torch.isfinite(expected).all():
                raise UserError(
                    f"{stored} in {files[stored].file} has values that are not finite: it cannot be trained."
                )
            if not torch.equal(expected.to(value.dtype), value):
                raise UserError(
                    f"{stored} in memory differs from that in {files[stored].file} before the first step. Either "
                    f"{type(base).__name__} changes it when it loads it, and a run would not train the model in the "
                    "files: save it once with save_pretrained() and start from that. Or the engine is at fault."
                )


LOSS_TOLERANCE = {"float32": 0.01, "bfloat16": 0.1}  # nats per token
PROVEN_TOKENS = 512  # of a row, so that all logits of a large vocabulary fit


def prove_loss(trainer: Any, row: TokensAndLabels, dtype: str) -> None:
    """Compare the log-probability of a row's labels by TRL's fused head with that by the model's own logits.

    TRL multiplies hidden states with the head itself. A model that does more to its logits would be trained on another
    loss than its own. Collective over the ranks.

    Args:
        row: int ids and labels, each of shape (tokens,), with at least one label.
        dtype: model.dtype, in which the model computes.

    Raises:
        UserError: if they differ.
    """
    ids, labels = row
    end = int((labels != -100).nonzero().max()) + 1
    batch = padded([(ids[:end][-PROVEN_TOKENS:], labels[:end][-PROVEN_TOKENS:])])
    model = trainer.model
    was_training = model.training
    model.eval()
    with torch.no_grad():
        trained = trained_log_probs(trainer, batch).double().sum().item()
        own = _own_log_probs(trainer, batch).double().sum().item()
    model.train(was_training)
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    if not abs(trained - own) <= LOSS_TOLERANCE[dtype] * tokens:
        raise UserError(
            f"TRL {trl_version} computes another loss for a {_without_adapters(model).config.model_type} model than "
            f"the model itself: {-trained / tokens:.4f} against {-own / tokens:.4f} nats per token of the first row. "
            "It cannot be trained: TRL does not know what this model does to its logits."
        )


def _own_log_probs(trainer: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`trained_log_probs` by all logits of the model itself, in float32."""
    inputs = {key: value.to(trainer.args.device) for key, value in batch.items()}
    labels = inputs.pop("labels")[:, 1:]
    with trainer.compute_loss_context_manager():
        logits = trainer.model(**inputs, use_cache=False).logits[:, :-1].float()
    log_probs: torch.Tensor = logits.log_softmax(dim=-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return log_probs * (labels != -100)


def write_frozen(model: Any, session: Session) -> str:
    """Write frozen.json, the SHA-256 of each frozen tensor in memory; the hash of that file. Collective over the ranks.

    The tensors have the names and shapes of the model's files, and their dtypes, unless memory has fewer bits.
    """
    files = stored_tensors(Path(session.job.model))
    tensors = {}
    for stored, value in _in_memory(model, session, set(session.job.frozen)):
        dtype = DTYPES[files[stored].dtype]
        if torch.promote_types(dtype, value.dtype) == value.dtype:  # this gives the bits of the file again
            value = value.to(dtype)
        tensors[stored] = {"dtype": NAMES[value.dtype], "sha256": hashlib.sha256(bytes_of(value)).hexdigest()}
    if not session.ranks.first:
        return ""
    write_json(session.folder.frozen, {"ranks": session.ranks.count, "tensors": tensors})
    return hashlib.sha256(session.folder.frozen.read_bytes()).hexdigest()


def _in_memory(model: Any, session: Session, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by the names of their file tensors, on the CPU, for the first rank. Collective over the ranks."""
    base = _without_adapters(model)
    for memory_name, parameter in model.named_parameters():
        name = compat.base_name(memory_name)
        if name not in names:
            continue
        with gathered(parameter):
            if session.ranks.first:
                yield from to_stored(base, {name: parameter.detach().cpu()}, [session.params[name]]).items()


def _without_adapters(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
