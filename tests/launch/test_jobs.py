"""The protocol between a parent and its workers: job files and the progress file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import composed, environment

from hft_cli.config.schema import ModelConfig
from hft_cli.config.suites import ProbeConfig
from hft_cli.config.training import GenerationConfig
from hft_cli.errors import UserError
from hft_cli.launch import jobs, work
from hft_cli.launch.jobs import (
    WORKERS,
    HarnessJob,
    HarnessTask,
    ImportanceJob,
    PhaseJob,
    ProbeJob,
    Progress,
    RowsJob,
    RowsTask,
    Worker,
    read_job,
    write_job,
)
from hft_cli.method.rounds import phase_config, phases


def training_job(*overrides: str) -> PhaseJob:
    config = composed("+method=hft", *overrides)
    phase = phases(config)[-1]
    settings: dict = {"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}
    return PhaseJob(
        phase_config(config, phase), phase, "base", "metrics.jsonl", ("a", "b"), ("c",), None, "0" * 64, settings
    )


JOBS = {
    "training": training_job(),
    "sequence with a null": training_job("data=pocket_sequence", "continual=gem", "train.max_length=null"),
    "replay": training_job("data=pocket_sequence", "continual=replay", "+model.kinds={mamba: attention}"),
    "rows": RowsJob(ModelConfig(), "m", {"s": {"t": RowsTask("f")}}, 4, GenerationConfig(), 1, "b", {"x": 0.5}),
    "importance": ImportanceJob(ModelConfig(), "m", "rows", 64, "out.json"),
    "harness": HarnessJob(ModelConfig(), "m", (HarnessTask("mmlu", {"shots": 5}, None, True, "o"),), None, 4, 1),
    "probe": ProbeJob(ModelConfig(), "m", {"p": ProbeConfig(facts="f", patterns=None)}, {"p": "o"}, 5, False, 4, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_read_as_it_was_written(name, tmp_path):
    job = JOBS[name]
    assert read_job(type(job).__name__, write_job(job, tmp_path)) == job


def test_every_job_has_one_worker():
    assert {type(job).__name__ for job in JOBS.values()} == WORKERS.keys()


def test_only_the_first_rank_writes_progress(tmp_path):
    file = tmp_path / "progress.json"
    Progress(file, rank=1).activity("loading torch")
    assert not file.exists()
    Progress(file).activity("loading torch")
    assert json.loads(file.read_text())["activity"] == "loading torch"


def test_an_activity_leaves_the_count_as_it_is(tmp_path):
    progress = Progress(tmp_path / "progress.json")
    progress.begin(8)
    progress.advance(2, tokens=30)
    progress.advance(3, tokens=30)
    progress.activity("writing")
    values = json.loads(progress.path.read_text())
    assert values["tokens_per_second"] > 0
    assert values | {"tokens_per_second": 1} == {
        "activity": "writing", "step": 5, "total": 8, "loss": None, "validation_loss": None, "tokens_per_second": 1,
    }  # fmt: skip
    progress.validated(1.5)
    progress.count(1, 4, loss=2.5)
    values = {
        "activity": None, "step": 1, "total": 4, "loss": 2.5, "validation_loss": 1.5, "tokens_per_second": None,
    }  # fmt: skip
    assert json.loads(progress.path.read_text()) == values


def test_a_worker_says_that_it_loads_torch_before_it_does(tmp_path):
    code = (
        "import sys; from hft_cli.launch import work; from hft_cli.launch.jobs import Progress\n"
        "Progress.activity = lambda self, text: sys.exit(f'{text}, loaded: ' + str('torch' in sys.modules))\n"
        "work.main(['PhaseJob', 'step.json'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert ended.stderr == "loading torch, loaded: False\n"


def refuse(job: RowsJob, folder: object, progress: object) -> None:
    raise UserError(f"{job.path} has no rows.")


def test_a_mistake_that_a_worker_sees_goes_into_its_file(tmp_path, monkeypatch):
    monkeypatch.setitem(jobs.WORKERS, "RowsJob", Worker(RowsJob, "job.json", "refusing:refuse"))
    monkeypatch.setitem(sys.modules, "refusing", sys.modules[__name__])
    assert work.main(["RowsJob", str(write_job(JOBS["rows"], tmp_path))]) == 2
    assert (tmp_path / "mistake.txt").read_text() == "m has no rows."
    assert not list(Path(tmp_path).glob("*.part"))


def test_libraries_are_loaded_without_garbage_collection(tmp_path):
    (tmp_path / "library.py").write_text("import gc\ncollects = gc.isenabled()\n")
    script = (
        "import gc; from hft_cli.launch.work import load_modules\n"
        "load_modules('library'); frozen = gc.get_freeze_count(); load_modules('library')\n"
        "import library; print(library.collects, gc.isenabled(), frozen > 0, gc.get_freeze_count() == frozen)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True", "True"]
