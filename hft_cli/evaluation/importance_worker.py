"""Worker: how much each matrix of the layers matters for a few rows, as the diagonal of the empirical Fisher matrix.

Of each row, the gradient of the mean negative log-likelihood of its answer is squared, and averaged over the rows and
the elements of a unit. By this the loss on those rows rises if all elements of a unit move by steps of one size, as
AdamW's do (EWC's weights, Kirkpatrick et al. 2017, arXiv 1612.00796, averaged over a matrix).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.data.rows import read_chats
from hft_cli.data.tokenization import tokenize
from hft_cli.evaluation.workers import device_of_rank, load_model
from hft_cli.files import write_json
from hft_cli.launch.jobs import ImportanceJob, Progress
from hft_cli.paths import resolve_path
from hft_cli.run_dir import RoundDir


def measure_importance(job: ImportanceJob, folder: RoundDir, progress: Progress) -> None:
    """Write the file `job.out`: unit -> mean squared gradient of its elements."""
    progress.activity("loading the model")
    loaded = load_model(job.path, job.model, device_of_rank())
    params = parameters_from_folder(job.path, job.model.kinds, job.model.part)
    chats = spread(read_chats(resolve_path(job.rows), split="train"), job.limit)
    longest = loaded.max_length
    rows = tokenize(chats, loaded.tokenizer, max_length=longest, where=job.rows, special_tokens="text").dataset
    write_json(folder.folder / job.out, squared_gradients(loaded.model, rows, params, progress))


def spread(rows: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` rows, at equal distances: files are often sorted."""
    count = min(limit, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def squared_gradients(model: Any, rows: Sequence[Any], params: Sequence[Param], progress: Progress) -> dict[str, float]:
    """The mean squared gradient of the elements of each unit in the layers. Gradients exist for one tensor at a time.

    Args:
        model: a transformers model for causal language modelling, in evaluation mode.
        rows: `input_ids` and `labels` of each.
    """
    import torch

    in_layers = {p.name: p for p in params if p.layer is not None}
    parameters = {name: value for name, value in model.named_parameters() if name in in_layers}
    sums = {name: torch.zeros((), dtype=torch.float64, device=value.device) for name, value in parameters.items()}
    model.requires_grad_(False)
    hooks = []
    for name, value in parameters.items():

        def add(tensor: Any, total: Any = sums[name]) -> None:
            total += tensor.grad.float().square().sum(dtype=torch.float64)
            tensor.grad = None

        value.requires_grad_(True)
        hooks.append(value.register_post_accumulate_grad_hook(add))
    progress.begin(len(rows))
    for row in rows:
        ids, labels = (torch.tensor([row[key]], device=model.device) for key in ("input_ids", "labels"))
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        loss: Any = torch.nn.functional.cross_entropy(logits, labels[0, 1:])
        loss.backward()
        progress.advance(1, ids.numel())
    for hook in hooks:
        hook.remove()
    totals: dict[str, float] = defaultdict(float)
    elements: dict[str, int] = defaultdict(int)
    for name, total in sums.items():
        totals[in_layers[name].unit] += float(total)
        elements[in_layers[name].unit] += in_layers[name].elements
    return {unit: totals[unit] / elements[unit] / len(rows) for unit in totals}
