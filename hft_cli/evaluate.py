"""Worker: one checkpoint -> scores. Started by the runner as `python -m hft_cli.evaluate JOB.json`.

A row counts when greedy decoding would give its answer, end of turn included, token for token. That needs no decoding:
the answer comes out greedily exactly if, with the right tokens before it, each of its tokens is the likeliest one. So a
set is scored in one forward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from hft_cli.data import chat_template, read_chats, tokenize
from hft_cli.run_dir import Job, write_json, write_text
from hft_cli.schema import UserError, locate


def main(argv: list[str]) -> int:
    """Score the job in the file argv[0]; a user's mistake goes into mistake.txt beside it."""
    path = Path(argv[0])
    try:
        job = Job.read(path)
        write_json(Path(job.out), evaluate(job))
    except UserError as error:
        write_text(path.parent / "mistake.txt", str(error))
        return 2
    return 0


def evaluate(job: Job) -> dict[str, dict[str, dict[str, float]]]:
    """Scores as suite -> task -> metric -> value: `exact_match` in [0, 1], its standard error, `items` and `nll`.

    `nll` is the mean negative log-likelihood of an answer's token, in nats.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(path: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, job.model.dtype),
            attn_implementation=job.model.attention,
        )

    tokenizer = AutoTokenizer.from_pretrained(job.path)
    tokenizer.chat_template = chat_template(job.model.chat_template, tokenizer)
    model = load(job.path)
    if job.base is not None:
        own, base = dict(model.named_parameters()), dict(load(job.base).named_parameters())
        with torch.no_grad():
            for name in job.reset:
                own[name][: len(base[name])] = base[name]  # a longer vocabulary keeps its further rows
    model.to(device).eval()
    return {
        suite: {name: _score(model, tokenizer, where, job, device) for name, where in tasks.items()}
        for suite, tasks in job.tasks.items()
    }


def _score(model: Any, tokenizer: Any, where: str, job: Job, device: str) -> dict[str, float]:
    import torch

    longest = model.config.get_text_config().max_position_embeddings
    made = tokenize(read_chats(locate(where), split="test"), tokenizer, max_length=longest, where=where)
    right: list[bool] = []
    nll, tokens = 0.0, 0
    rows: Sequence[dict[str, list[int]]] = sorted(made.dataset, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(rows), job.batch_size):
        batch = rows[start : start + job.batch_size]
        width = max(len(row["input_ids"]) for row in batch)
        # Right padding needs no attention mask under causal attention: no real token sees a later one.
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in batch], device=device)
        labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in batch], device=device)
        with torch.inference_mode():
            logits = model(ids).logits[:, :-1].float()
        targets = labels[:, 1:]
        counted = targets != -100
        right += ((logits.argmax(-1) == targets) | ~counted).all(dim=1).tolist()
        nll += torch.nn.functional.cross_entropy(logits[counted], targets[counted], reduction="sum").item()
        tokens += int(counted.sum())
    share = sum(right) / len(right)
    return {
        "exact_match": share,
        "exact_match_stderr": sqrt(share * (1 - share) / max(len(right) - 1, 1)),
        "nll": nll / tokens,
        "items": len(right),
        "items_too_long": made.dropped,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
