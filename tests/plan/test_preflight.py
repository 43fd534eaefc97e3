"""What a machine must have for a run, and how a run that cannot be is refused before it starts."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import QUICK, as_plan, composed, hft

from hft_cli.errors import UserError
from hft_cli.launch import environment
from hft_cli.plan import preflight
from hft_cli.plan.planner import plan

GIB = 2.0**30
SEVEN_B = ("+method=hft", "model=llama2_7b", "data=tulu_v2", "train.batch_size=128", "engine.num_processes=8")


@cache
def planned(*overrides: str):
    config = composed(*overrides)
    return config, plan(replace(as_plan(config), rows=1000))


@pytest.fixture
def machine(monkeypatch):
    """A machine with the GPUs that nvidia-smi would list, and a torch built for them or not."""

    def put(gpus: int, visible: str | None = None, cuda: bool = True) -> None:
        lines = ["NVIDIA H100 80GB HBM3, 81559 MiB, 550.1"] * gpus
        monkeypatch.setattr(environment, "environment", lambda: {"gpus": lines})
        monkeypatch.setattr(preflight, "cuda_build", lambda: cuda)
        monkeypatch.setattr(environment, "torch_sees_gpu", lambda: False)
        monkeypatch.setattr(preflight, "torch_sees_gpu", lambda: False)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return put


@pytest.mark.parametrize(
    ("visible", "number"),
    [
        (None, 4),
        ("0,1", 2),
        ("", 0),
        ("-1", 0),
        ("3,9,1", 1),
        ("GPU-12ab,GPU-34cd", 2),
        ("MIG-12ab", 1),
        ("NoDevFiles", 0),
        (" 1 , 2", 2),
    ],
)
def test_the_gpus_are_those_that_a_worker_sees(visible, number, machine):
    machine(4, visible)
    assert len(environment.gpus()) == number
    assert all(memory in (None, 81559 * 2**20) for memory in environment.gpus())


def test_visible_devices_of_a_machine_without_gpus_are_none(machine):
    machine(0, "NoDevFiles")
    assert environment.gpus() == []
    preflight.check_device(composed("+method=hft", "engine.device=cpu").engine, environment.gpus(), 7_000_000_000)


def test_a_gpu_that_only_torch_sees_will_do(machine, monkeypatch):
    machine(0)
    monkeypatch.setattr(environment, "torch_sees_gpu", lambda: True)
    monkeypatch.setattr(preflight, "torch_sees_gpu", lambda: True)
    preflight.check_device(composed("+method=hft").engine, [], 7_000_000_000)


def test_an_optimizer_that_cannot_be_used_here_is_refused(monkeypatch):
    preflight.check_optimizer("adafactor", has_gpu=False)
    monkeypatch.setattr(preflight, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"adamw_bnb_8bit needs the package bitsandbytes, which is not installed"):
        preflight.check_optimizer("adamw_bnb_8bit", has_gpu=True)
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    preflight.check_optimizer("adamw_bnb_8bit", has_gpu=True)
    monkeypatch.setattr(preflight.metadata, "version", lambda _: "0.49.2")
    with pytest.raises(UserError, match=r"a GPU with bitsandbytes 0\.49\.2, .* Install bitsandbytes 0\.50 or newer"):
        preflight.check_optimizer("adamw_bnb_8bit", has_gpu=False)
    monkeypatch.setattr(preflight.metadata, "version", lambda _: "0.50.0")
    preflight.check_optimizer("adamw_bnb_8bit", has_gpu=False)


@pytest.mark.parametrize(
    ("gpus", "cuda", "overrides", "words"),
    [
        (0, True, ("model=llama2_7b",), r"There is no GPU here, and on the CPU a step of 7.0B .* engine.device=cpu"),
        (0, True, ("engine.device=gpu",), r"engine.device=gpu, but there is no GPU here"),
        (1, False, (), r"has a GPU, but torch .* was built without CUDA"),
        (2, True, ("engine=zero2", "engine.num_processes=8"), r"this machine has 2. Set engine.num_processes=2"),
        (1, True, ("engine.device=cpu",), r"Hide it: CUDA_VISIBLE_DEVICES="),
    ],
)
def test_missing_gpus_are_refused_before_a_run_starts(gpus, cuda, overrides, words, machine):
    machine(gpus, cuda=cuda)
    config = composed("+method=hft", *overrides)
    with pytest.raises(UserError, match=words):
        preflight.check_device(
            config.engine, environment.gpus(), 7_000_000_000 if "model=llama2_7b" in overrides else 500_000
        )


def test_a_large_model_trains_on_a_cpu_only_if_asked(machine):
    machine(0)
    preflight.check_device(composed("+method=hft").engine, [], 500_000)
    preflight.check_device(composed("+method=hft", "engine.device=cpu").engine, [], 7_000_000_000)


def test_the_build_of_torch_is_read_from_its_files():
    import torch

    assert environment.cuda_build() == (torch.version.cuda is not None or torch.version.hip is not None)


def test_a_model_that_does_not_fit_is_refused_with_what_does():
    config, made = planned(*SEVEN_B, "engine=zero1", "train.micro_batch_size=1")
    with pytest.raises(UserError, match=r"needs [\d.]+ GiB on each GPU, and they have 24.0 GiB. What fits: engine="):
        preflight.check_memory(config, made, [24 * GIB] * 8, 2000 * GIB)
    preflight.check_memory(config, made, [80 * GIB] * 8, 2000 * GIB)


def test_a_small_gpu_that_no_rank_uses_does_not_count():
    config, made = planned(*SEVEN_B, "engine=zero3", "train.micro_batch_size=1", "engine.num_processes=2")
    preflight.check_memory(config, made, [80 * GIB, 80 * GIB, 4 * GIB], 2000 * GIB)


def test_the_memory_limits_of_control_groups_are_found(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/slurm/job_7/step_0\n")
    found = list(environment._limits(own, tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "slurm/job_7/step_0/memory.max", "slurm/job_7/memory.max", "slurm/memory.max", "memory.max",
    ]  # fmt: skip


def test_a_missing_package_is_refused(monkeypatch):
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(preflight.metadata, "version", none)
    with pytest.raises(UserError, match=r"\w+ is not installed, and hft needs it. .*pip install '[\w-]+[<>=]"):
        preflight.check_packages(composed("+method=hft"))


@pytest.mark.parametrize("file", ["datasets.py", "datasets/__init__.py"])
@pytest.mark.parametrize("place", ["the working folder", "PYTHONPATH"])
def test_a_module_that_hides_a_library_is_refused(file, place, tmp_path, monkeypatch):
    if place == "PYTHONPATH":
        monkeypatch.setenv("PYTHONPATH", f"elsewhere:{tmp_path}")
    else:
        monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()  # a folder of data hides nothing
    preflight.check_packages(composed("+method=hft"))
    (tmp_path / file).touch()
    with pytest.raises(UserError, match=rf"{tmp_path / file} hides the library datasets: .* Rename it"):
        preflight.check_packages(composed("+method=hft"))


def test_offload_counts_against_the_hosts_memory():
    config, made = planned(*SEVEN_B, "engine=zero3_offload", "train.micro_batch_size=1")
    preflight.check_memory(config, made, [80 * GIB] * 8, 2000 * GIB)
    with pytest.raises(UserError, match=r"of host memory for 8 ranks, and this machine has 32.0 GiB"):
        preflight.check_memory(config, made, [80 * GIB] * 8, 32 * GIB)


def test_without_a_gpu_the_ranks_share_the_hosts_memory():
    config, made = planned(*SEVEN_B, "engine=zero2")
    with pytest.raises(UserError, match=r"of host memory for 8 ranks"):
        preflight.check_memory(config, made, [], 64 * GIB)


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * GIB))
    preflight.check_disk(tmp_path / "a" / "b", 2 * GIB)
    with pytest.raises(UserError, match=r"keeps 4.0 GiB in .*, where 3.0 GiB are free"):
        preflight.check_disk(tmp_path / "a" / "b", 4 * GIB)


def test_a_version_out_of_range_is_refused_with_the_command(monkeypatch):
    own = importlib.metadata.version
    monkeypatch.setattr(preflight.metadata, "version", lambda name: "0.18.2" if name == "deepspeed" else own(name))
    with pytest.raises(UserError, match=r"deepspeed 0.18.2 is installed; hft needs .*>=0.19.4 .*#47254.*pip install"):
        preflight.check_packages(composed("+method=hft"))


@pytest.mark.parametrize(("version", "package"), [(2, "flash-attn"), (3, "flash-attn-3")])
def test_missing_flash_attention_is_refused_before_the_start(version, package, tmp_path):
    ended = hft("train", *QUICK, "+method=hft", f"model.attention=flash_attention_{version}", "model.dtype=bfloat16",
                f"output_dir={tmp_path / 'run'}")  # fmt: skip
    assert ended.status == 2
    assert f"needs the package {package}, " in ended.err
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_what_its_plan_says(hft_run: Path):
    import json

    costs = json.loads((hft_run / "plan.json").read_text())["costs"]
    (entry,) = costs["rounds"]
    assert entry["steps"] == 4
    assert 0 < entry["memory_bytes"]["total"] <= entry["memory_bytes_fft"]
    assert costs["disk_bytes"]["total"] > (hft_run / "model/model.safetensors").stat().st_size
