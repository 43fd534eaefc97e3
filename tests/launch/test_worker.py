"""The parent's side of a worker: start, progress bar, failures."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import BASE

from hft_cli.config.schema import GenerationConfig, ModelConfig
from hft_cli.errors import UserError
from hft_cli.launch import worker
from hft_cli.launch.jobs import RowsJob, RowsTask
from hft_cli.launch.nodes import Node
from hft_cli.launch.worker import WorkerRun, run_worker
from hft_cli.run_dir import RoundDir

pytestmark = pytest.mark.usefixtures("of_a_command")


def scoring(folder: Path, model: str, tasks: dict[str, dict[str, RowsTask]]) -> WorkerRun:
    return WorkerRun(RowsJob(ModelConfig(), model, tasks, 4, GenerationConfig(), 1), RoundDir(folder), "Scoring")


def test_a_worker_is_polled_and_leaves_its_job_and_log(tmp_path, monkeypatch):
    (tmp_path / "mistake.txt").write_text("of an earlier run")
    ended, polls = worker._ended, list[None]()
    monkeypatch.setattr(worker, "_ended", lambda process, _: ended(process, 1e-4))  # this worker has little to do
    run_worker(scoring(tmp_path, "m", {}), lambda: polls.append(None))
    assert polls
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.json", "progress.json", "worker.log"]


def test_a_mistake_that_only_the_worker_sees_is_raised(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        run_worker(scoring(tmp_path, "m", {"s": {"t": RowsTask("nowhere.jsonl")}}))


def test_a_failure_names_the_log_and_its_last_error(tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "no such function"}))
    with caplog.at_level(logging.DEBUG), pytest.raises(subprocess.CalledProcessError):
        run_worker(scoring(tmp_path, str(model), {"s": {"t": RowsTask(str(tmp_path / "rows.jsonl"))}}))
    messages = caplog.messages
    assert "-m hft_cli.launch.work RowsJob" in messages[0]
    assert "Error" in messages[1]
    assert messages[2] == f"Scoring failed (exit status 1). The whole log: {tmp_path}/worker.log"


@pytest.mark.parametrize(
    ("text", "last"),
    [("a\nValueError: x\nb\n", "ValueError: x"), ("1\n2\n3\n4\n5\n6\n", "2\n3\n4\n5\n6"), ("", "")],
)
def test_the_last_error_of_a_log_or_its_end_is_shown(text, last, tmp_path):
    (tmp_path / "worker.log").write_text(text)
    assert worker._last_error(tmp_path / "worker.log") == last


def test_the_bar_shows_the_activity_and_then_the_count(tmp_path):
    file, shown = tmp_path / "progress.json", []
    bar = SimpleNamespace(
        total=0, n=0, initial=0, bar_format="",
        reset=lambda total: setattr(bar, "total", total),
        set_postfix_str=lambda text, refresh: shown.append(text),
        update=lambda steps: setattr(bar, "n", bar.n + steps),
    )  # fmt: skip
    worker._update(bar, file)
    assert shown == []
    names = ("step", "total", "loss", "validation_loss", "tokens_per_second")
    values: dict = {"activity": "loading torch", **dict.fromkeys(names)}
    file.write_text(json.dumps(values))
    worker._update(bar, file)
    assert (shown, bar.n, bar.bar_format) == (["loading torch"], 0, "")
    counted = {"activity": None, "step": 41, "total": 60, "loss": 2, "validation_loss": 3, "tokens_per_second": 1e4}
    file.write_text(json.dumps(values | counted))
    worker._update(bar, file)
    assert (shown[-1], bar.initial, bar.n, bar.total) == ("loss 2.000, validation 3.000, 10,000 tokens/s", 40, 41, 60)
    assert bar.bar_format == worker.WITH_COUNT


@pytest.mark.parametrize(
    "name",
    [
        "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_FP8_BACKEND", "FSDP_OFFLOAD_PARAMS",
        "MEGATRON_LM_TP_DEGREE", "PARALLELISM_CONFIG_TP_SIZE", "FORK_LAUNCHED", "PMI_SIZE", "OMPI_COMM_WORLD_RANK",
    ],
)  # fmt: skip
def test_workers_do_not_read_the_settings_of_accelerate(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert name not in worker._environment(None)
    assert name not in worker._environment(2)


def test_ranks_do_not_read_the_settings_of_an_outer_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "outer")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("MASTER_ADDR", "outer")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert not {"TORCHELASTIC_RUN_ID", "LOCAL_RANK", "MASTER_ADDR"} & worker._environment(2).keys()
    assert worker._environment(2)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert worker._environment(None)["CUDA_VISIBLE_DEVICES"] == "2"
    alone = worker._command("PhaseJob", Path("step.json"), 2, None)
    assert alone[1:4] == ["-m", "torch.distributed.run", "--standalone"]
    assert alone[-4:] == ["-m", "hft_cli.launch.work", "PhaseJob", "step.json"]
    second = worker._command("PhaseJob", Path("step.json"), 2, Node(1, 2, "head", 29500))
    assert second[3:11] == ["--nnodes", "2", "--node_rank", "1", "--master_addr", "head", "--master_port", "29501"]
    assert worker._command("RowsJob", Path("job.json"), None, None)[1:3] == ["-m", "hft_cli.launch.work"]
