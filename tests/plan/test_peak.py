"""The peak of memory in training is what is planned: the bytes of all tensors that are alive at once."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import as_plan, composed, phase_job, save_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hft_cli.launch.jobs import Progress
from hft_cli.plan.planner import plan
from hft_cli.run_dir import RoundDir
from hft_cli.training.phase import train_phase

FIELDS = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": False,
}  # fmt: skip
LENGTH = 96


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they exist."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, and rows of the greatest length but for one in four, for which there is a mask."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("peak")
    config = LlamaConfig(**FIELDS, max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    save_model(LlamaForCausalLM(config), folder / "model")
    rows = [{"text": "xyz " * (LENGTH if number % 4 else LENGTH // 4)} for number in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("model.dtype=float32", "train.micro_batch_size=8"),
        ("model.dtype=bfloat16", "train.micro_batch_size=4"),
        ("model.dtype=bfloat16", "train.micro_batch_size=4", "method=fft", "train.gradient_checkpointing=true"),
        ("model.dtype=float32", "train.micro_batch_size=8", "train.gradient_checkpointing=true"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_peak_of_training_is_what_is_planned(arguments: tuple[str, ...], work: Path, tmp_path: Path) -> None:
    run = (
        f"data.path={work}/rows.jsonl", "data.name=rows", "data.loss=all", "suite=none", "train.batch_size=8",
        f"train.max_length={LENGTH}", "train.max_steps=2", *arguments,
    )  # fmt: skip
    config = composed("+method=hft", f"model.path={work}/model", *run, f"output_dir={tmp_path}")
    planned = plan(as_plan(config)).rounds[0].memory.total
    job, alive = phase_job(tmp_path, work / "model", *run), Alive()
    with alive:
        train_phase(job, RoundDir(tmp_path), Progress(tmp_path / "progress.json"))
    assert 0.94 * planned < alive.peak < 1.05 * planned
