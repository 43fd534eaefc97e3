"""`hft train` from end to end: real processes, real DeepSpeed ranks, the embedded model."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from helpers import (
    BASE,
    DECAYED,
    QUICK,
    SCORED,
    TWO_ROUNDS,
    changed,
    command,
    environment,
    hft,
    ledger,
    results,
    train,
    wait_for,
    wait_for_step,
    wait_until_gone,
    weights,
)
from safetensors.torch import load_file, save_file

from hft_cli.checkpoint.tensors import read_header
from hft_cli.config.deepspeed import FREE, SIZES, SWITCHES
from hft_cli.errors import UserError
from hft_cli.paths import resolve_path
from hft_cli.training import resume

ZERO2 = ("engine=zero2", "engine.num_processes=2")
ZERO3 = ("engine=zero3", "engine.num_processes=2")
TWO_RANKS = ("engine.num_processes=2", "train.micro_batch_size=2")


def on_one_worker(engine: str, *more: object) -> object:
    """A test's parameters, run with others of its engine, which share their runs."""
    return pytest.param(engine, *more, marks=pytest.mark.xdist_group(engine))


@pytest.fixture(scope="session")
def begun(runs):
    """For an engine: a finished run of two ranks, and a copy of it as it was in the middle of its round."""

    @cache
    def begin(engine: str) -> tuple[Path, Path]:
        whole, part = runs / engine, runs / f"{engine}-part"
        process = start(whole, *DECAYED, f"engine={engine}", *TWO_RANKS)
        round_1 = whole / "rounds/01-order"
        wait_for(round_1 / "checkpoints/checkpoint-2/hft.json", process)
        process.send_signal(signal.SIGSTOP)  # or it would remove the checkpoints of the round that its ranks finish
        wait_for(round_1 / "outcome.json", process)
        wait_until_gone(round_1)
        shutil.copytree(whole, part)
        process.send_signal(signal.SIGCONT)
        for name in ("outcome.json", "delta.safetensors"):
            (part / "rounds/01-order" / name).unlink()
        shutil.rmtree(part / "rounds/01-order/checkpoints/checkpoint-4")
        assert process.wait(120) == 0
        return whole, part

    return begin


# -------------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_changes_what_was_drawn_and_nothing_else(hft_run):
    (entry,) = ledger(hft_run)
    assert changed(BASE, hft_run / "model") == set(entry["updated"])
    assert set(read_header(hft_run / "rounds/01-order/delta.safetensors")) == set(entry["updated"])


def test_a_run_directory_holds_what_the_contract_says(hft_run):
    assert {path.name for path in hft_run.iterdir()} == {
        "config.yaml", "overrides.yaml", "plan.json", "environment.json", "draws.json", "metrics.jsonl", "rounds",
        "model", "results.json", "eval", "DONE", ".lock",
    }  # fmt: skip
    found = results(hft_run)
    assert (found["method"], found["stage"], found["seed"]) == ("hft", "sft", 42)
    (entry,) = found["rounds"]
    assert entry["frozen_bit_identical"] is True
    assert entry["steps"] == 4
    assert 0.5 < entry["updated_fraction"] < 0.7
    assert min(entry["train_seconds"], entry["tokens_per_second"], entry["peak_memory_bytes"]) > 0
    assert entry["checkpoint_seconds"] > 0
    assert entry["checkpoint_bytes"] > (BASE / "model.safetensors").stat().st_size  # weights, and moments of half
    assert found["eval"]["before"]["pocket"]["facts"]["exact_match"] >= 0.98
    assert found["eval"]["after"]["pocket"]["facts"]["items"] >= 900
    assert not (hft_run / "rounds/01-order/checkpoints").exists()
    assert not (hft_run / "rounds/01-order/model").exists()


def test_the_log_has_a_line_a_step_and_the_loss_falls(hft_run):
    lines = [json.loads(line) for line in (hft_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["round"] == 1 and line["tokens_per_second"] > 0 for line in lines)


def test_the_model_loads_with_transformers_and_generates(hft_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(hft_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(hft_run / "model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert model.generate(prompt, max_new_tokens=4).shape[1] > prompt.shape[1]


def test_show_draws_prints_layers_by_matrices(hft_run):
    shown = hft("show", "draws", hft_run).out
    rows = [line.split() for line in shown.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    head = next(line for line in shown.splitlines() if line.startswith("layer")).split()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert name in head
    attention = [head.index(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    assert all(sum(row[at] == "●" for at in attention) == 2 for row in rows)


def test_report_makes_a_table_and_a_figure(hft_run, two_rounds, tmp_path):
    ended = hft("report", hft_run, two_rounds, "--out", tmp_path / "out")
    assert ended.status == 0
    assert ended.out.count("| verified |") == 2
    for name in ("runs.md", "runs.csv", "runs.json", "tradeoff.png", "tradeoff.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 0


# ----------------------------------------------------------------------------------------------------------- verify


def flip(path: Path, name: str, bit: int = 0) -> None:
    """Change one bit of one tensor of a safetensors file."""
    info = read_header(path)[name]
    with path.open("r+b") as file:
        file.seek(info.start + bit // 8)
        byte = file.read(1)[0]
        file.seek(info.start + bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def test_verify_passes_and_says_so(hft_run):
    ended = hft("verify", hft_run)
    assert (ended.status, ended.out.splitlines()[-1]) == (0, "verified: 1 round")


@pytest.mark.parametrize("state", ["frozen", "updated"])
def test_verify_fails_a_run_with_one_bit_changed(hft_run, tmp_path, state):
    run = copy(hft_run, tmp_path / "run")
    name = ledger(run)[0][state][-1]
    flip(run / "model/model.safetensors", name)
    ended = hft("verify", run)
    assert ended.status == 1
    assert name in ended.out
    assert ended.out.endswith("NOT VERIFIED\n")


def test_verify_blames_the_right_round(two_rounds, tmp_path):
    run = copy(two_rounds, tmp_path / "run")
    first, second = ledger(run)
    name = next(n for n in first["updated"] if n in second["frozen"])
    flip(run / "model/model.safetensors", name)
    said = hft("verify", run).out
    assert "round 1 order" in said
    assert f"frozen tensors differ in the final model: {name}" in said.split("round 2")[1]


def test_verify_fails_a_delta_that_holds_a_frozen_tensor(hft_run, tmp_path):
    run = copy(hft_run, tmp_path / "run")
    delta, frozen = run / "rounds/01-order/delta.safetensors", ledger(run)[0]["frozen"][0]
    save_file(load_file(delta) | {frozen: load_file(BASE / "model.safetensors")[frozen]}, delta)
    assert f"the delta holds tensors that the draw freezes: {frozen}" in hft("verify", run).out


@pytest.mark.parametrize("lie", ["names", "ratio", "no rounds", "not a ledger"])
def test_verify_fails_a_ledger_that_its_seed_does_not_give(hft_run, tmp_path, lie):
    run = copy(hft_run, tmp_path / "run")
    made = json.loads((run / "draws.json").read_text())
    if lie == "names":
        made["rounds"][0]["updated"].append(made["rounds"][0]["frozen"].pop())
    if lie == "ratio":
        made["rounds"][0]["matrices_reached"] = 0.9
    if lie == "no rounds":
        made = {"rounds": []}
    if lie == "not a ledger":
        made = []
    (run / "draws.json").write_text(json.dumps(made))
    ended = hft("verify", run)
    assert ended.status == 1
    assert "draws.json is not what its seed and selection give" in ended.out


def test_verify_fails_a_model_that_is_cut_off(hft_run, tmp_path):
    run = copy(hft_run, tmp_path / "run")
    with (run / "model/model.safetensors").open("r+b") as file:
        file.truncate(10_000)
    ended = hft("verify", run)
    assert ended.status == 1
    assert ended.out.endswith("NOT VERIFIED\n")


def test_verify_says_which_updated_tensors_did_not_move_and_passes(runs):
    run = train(runs / "still", "+method=hft", "train.learning_rate=1e-30", "train.max_steps=1")
    ended = hft("verify", run)
    assert ended.status == 0
    said = next(line for line in ended.out.splitlines() if "did not move, though updated:" in line)
    assert "and 16 more" in said
    assert "verified: 1 round" in ended.out


# ------------------------------------------------------------------------------------------------------- invariants


def test_ratio_one_ends_with_the_same_bits_as_fft(runs):
    half = train(runs / "ratio1", "+method=hft", "selection.ratio=1")
    full = train(runs / "fft", "+method=fft")
    assert weights(half) == weights(full)
    assert changed(BASE, full / "model") == set(load_file(BASE / "model.safetensors"))


def test_two_rounds_start_from_one_another_and_complementary_draws_cover_the_model(two_rounds):
    first, second = ledger(two_rounds)
    assert (first["name"], second["name"]) == ("order", "backwards")
    inside = {name for name in first["updated"] + first["frozen"] if ".layers." in name}
    assert {*first["updated"], *second["updated"]} >= inside
    final = load_file(two_rounds / "model/model.safetensors")
    deltas = [load_file(path) for path in sorted(two_rounds.glob("rounds/*/delta.safetensors"))]
    expected = load_file(BASE / "model.safetensors") | deltas[0] | deltas[1]
    assert all(torch.equal(final[name], expected[name]) for name in final)
    assert hft("verify", two_rounds).out.endswith("verified: 2 rounds\n")


def test_a_sequence_of_tasks_gives_r_op_and_bwt_and_keeps_every_cell(tmp_path):
    tasks = ["capitals", "order"]
    path, test_path = (",".join(f"pocket:skills/{task}/{part}.jsonl" for task in tasks) for part in ("train", "test"))
    run = train(
        tmp_path / "run", "+method=hft", f"data.path=[{path}]", f"data.test_path=[{test_path}]", "train.max_steps=60",
        "continual.score_unseen=true",
    )  # fmt: skip
    found = results(run)["continual"]
    cells = [
        [json.loads((run / f"eval/round-0{i}/scores.json").read_text())["data"][task]["exact_match"] for task in tasks]
        for i in (1, 2)
    ]
    assert found["R"] == cells
    assert found["R"][0][0] > 0
    assert found["OP"] == pytest.approx((cells[1][0] + cells[1][1]) / 2)
    assert found["BWT"] == pytest.approx(cells[1][0] - cells[0][0])


def test_weight_decay_and_bfloat16_leave_frozen_float32_weights_alone(runs):
    run = train(runs / "bf16", "+method=hft", "model.dtype=bfloat16", "train.weight_decay=0.5")
    assert changed(BASE, run / "model") == set(ledger(run)[0]["updated"])


def test_packing_checkpointing_and_a_cosine_schedule_train_and_verify(runs):
    run = train(
        runs / "packed", "+method=hft", "train.packing=true", "train.gradient_checkpointing=true",
        "train.schedule=cosine", "selection=model", "selection.balance=elements",
    )  # fmt: skip
    assert changed(BASE, run / "model") == set(ledger(run)[0]["updated"])


ENGINES = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


@pytest.mark.parametrize("engine", [on_one_worker(engine) for engine in ENGINES])
def test_deepspeed_ranks_agree_with_one_process(begun, hft_run, engine):
    run, _ = begun(engine)
    assert ledger(run) == ledger(hft_run)
    assert changed(BASE, run / "model") == set(ledger(run)[0]["updated"])
    one, many = (load_file(path / "model/model.safetensors") for path in (hft_run, run))
    start = load_file(BASE / "model.safetensors")
    moved = sum((one[name] - start[name]).abs().sum() for name in one)
    apart = sum((one[name] - many[name]).abs().sum() for name in one)
    assert apart < 0.02 * moved
    assert json.loads((run / "deepspeed.json").read_text())["zero_optimization"]["stage"] == int(engine[4])


OTHERWISE = {  # every key that engine.deepspeed may set, otherwise than DeepSpeed does by itself
    "allgather_bucket_size": 20_000, "allgather_partitions": False, "contiguous_gradients": False,
    "ignore_unused_parameters": False, "overlap_comm": True, "reduce_bucket_size": 30_000, "reduce_scatter": False,
    "stage3_max_live_parameters": 10_000,
    "stage3_max_reuse_distance": 1_000, "stage3_param_persistence_threshold": 100,
    "stage3_prefetch_bucket_size": 1_000, "sub_group_size": 50_000, "use_multi_rank_bucket_allreduce": False,
}  # fmt: skip


@pytest.mark.parametrize("engine", [on_one_worker("zero2"), on_one_worker("zero3")])
def test_what_a_deepspeed_json_of_ones_own_may_say_changes_no_weight(begun, tmp_path, engine):
    assert OTHERWISE.keys() == {*SIZES, *SWITCHES}
    profilers = {"comms_logger": {"enabled": True}, "flops_profiler": {"enabled": engine == "zero2", "profile_step": 2}}
    rest = {"communication_data_type": "fp32", "dump_state": True, "memory_breakdown": True, "steps_per_print": 1}
    given = {**profilers, **rest, "wall_clock_breakdown": True}
    assert given.keys() == set(FREE)
    own = tmp_path / "own.json"
    own.write_text(json.dumps({**given, "zero_optimization": OTHERWISE}))
    whole, _ = begun(engine)
    run = train(tmp_path / "run", *DECAYED, f"engine={engine}", *TWO_RANKS, f"engine.deepspeed={own}")
    assert apart(run, whole) < 1e-6


@pytest.mark.parametrize("engine", [ZERO2, ZERO3], ids=lambda e: e[0])
def test_master_weights_under_deepspeed_start_from_the_files_not_from_their_bfloat16_rounding(runs, engine):
    run = train(
        runs / f"masters-{engine[0][-5:]}", "+method=hft", *engine, "train.micro_batch_size=2", "model.dtype=bfloat16",
        "train.learning_rate=1e-30",
    )  # fmt: skip
    assert changed(BASE, run / "model") == set()


def test_zero3_in_bfloat16_with_checkpointing_keeps_float32_files_exact(runs):
    run = train(
        runs / "zero3-bf16", "+method=hft", *ZERO3, "train.micro_batch_size=2", "model.dtype=bfloat16",
        "train.gradient_checkpointing=true",
    )  # fmt: skip
    assert changed(BASE, run / "model") == set(ledger(run)[0]["updated"])


@pytest.mark.parametrize("kind", ["tied and sharded", "fused, no prefix", "experts", "gemma2"])
def test_models_whose_files_do_not_hold_the_modules_own_names_train_and_verify(tmp_path, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    size = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    config = {
        "tied and sharded": LlamaConfig(**size, tie_word_embeddings=True),
        "fused, no prefix": GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=128),
        "gemma2": Gemma2Config(**size, head_dim=8),
        "experts": MixtralConfig(**size, num_local_experts=4, num_experts_per_tok=2),
    }[kind]
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    run = train(tmp_path / "run", "+method=hft", "model=local", f"model.path={folder}")
    assert hft("verify", run).out.endswith("verified: 1 round\n")
    old, new = (
        {n: t for f in sorted(path.glob("*.safetensors")) for n, t in load_file(f).items()}
        for path in (folder, run / "model")
    )
    assert old.keys() == new.keys()
    share = sum(old[n].numel() for n in old if not torch.equal(old[n], new[n])) / sum(t.numel() for t in old.values())
    assert 0.3 < share < 0.9
    AutoModelForCausalLM.from_pretrained(run / "model")


# ----------------------------------------------------------------------------------------------- stopping, resuming


def start(out: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command("train", *QUICK, f"output_dir={out}", *arguments),
        env=environment(),
        # A shell may have started us in the background, where it has SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


LONG = ("+method=hft", "train.max_steps=100", "train.save_every=20")


def test_killed_and_resumed_ends_with_the_same_bits_as_uninterrupted(tmp_path):
    whole = train(tmp_path / "whole", *LONG)
    out = tmp_path / "killed"
    process = start(out, *LONG)
    wait_for(out / "rounds/01-order/checkpoints/checkpoint-20/hft.json", process)
    process.kill()
    process.wait()
    wait_until_gone(out)
    assert not (out / "DONE").exists()

    steps = sorted((out / "rounds/01-order/checkpoints").glob("checkpoint-*/hft.json"))
    assert steps
    state = torch.load(steps[-1].parent / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == len(ledger(out)[0]["updated"])  # only what is updated has optimizer state

    ended = hft("train", *QUICK, *LONG, f"output_dir={out}")
    assert ended.status == 0, ended.err
    assert "Continuing the run" in ended.err
    assert weights(out) == weights(whole)
    lines = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 101))


@pytest.mark.parametrize("engine", [on_one_worker("zero1"), on_one_worker("zero2"), on_one_worker("zero3")])
def test_resumed_on_the_same_engine_it_ends_with_the_same_bits_as_uninterrupted(begun, tmp_path, engine):
    whole, part = begun(engine)
    run = train(copy(part, tmp_path / "run"), *DECAYED, f"engine={engine}", *TWO_RANKS)
    assert weights(run) == weights(whole)


def apart(one: Path, other: Path) -> float:
    """The largest difference between the weights of two runs."""
    first, second = (load_file(run / "model/model.safetensors") for run in (one, other))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize(
    ("engine", "to"),
    [on_one_worker("zero1", "zero3"), on_one_worker("zero3", "zero2"), on_one_worker("zero3_offload", "zero3")],
)
def test_resumed_on_another_number_of_ranks_or_zero_stage_it_ends_as_uninterrupted(begun, tmp_path, engine, to):
    """To the last bits of float32, and with the frozen half as it was: the steps go by 1e-3."""
    whole, part = begun(engine)
    run = train(copy(part, tmp_path / "run"), *DECAYED, f"engine={to}")
    assert apart(run, whole) < 1e-6
    assert changed(BASE, run / "model") == set(ledger(run)[0]["updated"])
    found = results(run)
    assert found["verification"]["passed"]
    engines = [(each["from_step"], each["name"], each["ranks"]) for each in found["rounds"][0]["engines"]]
    assert engines == [(0, engine, 2), (2, to, 1)]
    assert found["engine"] == f"{engine}, {to}"


@pytest.mark.parametrize(
    ("was", "now", "fix"), [(None, 2, "engine=single"), (3, None, "engine=zero3 or another ZeRO stage")]
)
def test_between_one_process_and_deepspeed_a_checkpoint_is_refused_with_the_reason(was, now, fix):
    with pytest.raises(UserError, match=f"DeepSpeed converts only between its own .* Finish the round with {fix};"):
        resume.needed({"zero_stage": was, "ranks": 1}, {"zero_stage": now, "ranks": 1})


def test_another_round_may_have_another_engine(two_rounds, tmp_path):
    run = copy(two_rounds, tmp_path / "run")
    for place in (run / "model", run / "rounds/02-backwards"):
        shutil.rmtree(place)
    for name in ("DONE", "results.json"):
        (run / name).unlink()
    ended = hft("train", *QUICK, *TWO_ROUNDS, f"output_dir={run}", "engine=zero1", "train.micro_batch_size=8")
    assert ended.status == 0, ended.err
    assert apart(run, two_rounds) < 1e-6
    found = results(run)
    assert [entry["engines"][0]["name"] for entry in found["rounds"]] == ["single", "zero1"]
    assert [entry["frozen_bit_identical"] for entry in found["rounds"]] == [True, True]


def test_a_signal_ends_all_ranks_and_the_status_says_which(tmp_path):
    number = signal.SIGINT
    process = start(tmp_path / "run", "+method=hft", "train.max_steps=100", *ZERO2, "train.micro_batch_size=2")
    wait_for_step(tmp_path / "run/rounds/01-order/progress.json", process)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    wait_until_gone(tmp_path / "run")
    (marker,) = (tmp_path / "run/rounds/01-order/checkpoints").glob(
        "checkpoint-*/hft.json"
    )  # though none was asked for
    assert 0 < int(marker.parent.name.split("-")[1]) < 100
    assert not (tmp_path / "run/rounds/01-order/outcome.json").exists()


def test_stopped_five_times_at_random_points_it_ends_with_the_same_bits_as_uninterrupted(tmp_path):
    settings = ("+method=hft", "train.max_steps=120", "train.log_every=10")
    whole = train(tmp_path / "whole", *settings)
    out, random = tmp_path / "stopped", Random(5)
    for number in range(5):
        progress = out / "rounds/01-order/progress.json"
        progress.unlink(missing_ok=True)
        process = start(out, *settings)
        wait_for_step(progress, process)
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(random.choice([signal.SIGTERM, signal.SIGUSR1]))
        assert process.wait(60) in (128 + signal.SIGTERM, 128 + signal.SIGUSR1), f"stop {number}"
        wait_until_gone(out)
    ended = hft("train", *QUICK, *settings, f"output_dir={out}")
    assert ended.status == 0, ended.err
    assert weights(out) == weights(whole)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert {1, *range(10, 121, 10)} <= set(steps)
    (loss,), (uninterrupted,) = ([entry["loss"] for entry in results(run)["rounds"]] for run in (out, whole))
    assert loss == pytest.approx(uninterrupted, rel=1e-4)


def interrupted(out: Path) -> None:
    process = start(out, *LONG)
    wait_for(out / "rounds/01-order/checkpoints/checkpoint-20/hft.json", process)
    process.kill()
    process.wait()
    wait_until_gone(out)


def test_a_changed_base_is_refused_and_a_cut_log_line_is_not(tmp_path):
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    arguments = (*QUICK, *LONG, "model=local", f"model.path={base}", f"output_dir={tmp_path}/run")
    process = subprocess.Popen(command("train", *arguments), env=environment())
    wait_for(tmp_path / "run/rounds/01-order/checkpoints/checkpoint-20/hft.json", process)
    other = hft("train", *arguments)
    assert other.status == 2
    assert "Another process works on" in other.err
    process.kill()
    process.wait()
    wait_until_gone(tmp_path / "run")

    name = "model.layers.0.mlp.up_proj.weight"
    flip(base / "model.safetensors", name)
    ended = hft("train", *arguments)
    assert ended.status == 2
    assert "have changed since" in ended.err
    flip(base / "model.safetensors", name)

    with (tmp_path / "run/metrics.jsonl").open("a") as log:
        log.write('{"round": 1, "st')
    ended = hft("train", *arguments)
    assert ended.status == 0, ended.err
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 101))

    flip(base / "model.safetensors", name)
    ended = hft("verify", tmp_path / "run")
    assert ended.status == 2
    assert "holds other weights now" in ended.err


def test_a_diverged_run_stops_and_says_so(tmp_path):
    ended = hft("train", *QUICK, "+method=hft", f"output_dir={tmp_path}/run", "train.learning_rate=1e20",
                "train.max_steps=30")  # fmt: skip
    assert ended.status == 2
    assert re.search(r"The loss is nan at step \d+: training has diverged\. Lower train\.learning_rate", ended.err)
    assert not (tmp_path / "run/DONE").exists()


def test_resume_finds_the_run_and_refuses_another_draw_or_data(tmp_path):
    out = tmp_path / "runs" / "today" / "run"
    rows = tmp_path / "rows.jsonl"
    shutil.copy(resolve_path("pocket:skills/order/train.jsonl"), rows)
    long = (*LONG, f"data.path={rows}")
    process = start(out, *long)
    wait_for(out / "rounds/01-rows/checkpoints/checkpoint-20/hft.json", process)
    process.kill()
    process.wait()
    wait_until_gone(out)

    ended = hft("train", *QUICK, *long, f"output_dir={out}", "selection.seed=7")
    assert ended.status == 2
    assert "selection.seed was None, is 7" in ended.err

    marker = next((out / "rounds/01-rows/checkpoints").glob("checkpoint-*/hft.json"))
    content = marker.read_text()
    marker.write_text(json.dumps(json.loads(content) | {"draw": "of another seed"}))
    ended = hft("train", *QUICK, *long, f"output_dir={out}")
    assert ended.status == 2
    assert "was made under another draw (of another seed, now" in ended.err
    marker.write_text(content)

    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[1:]))
    ended = hft("train", *QUICK, *long, f"output_dir={out}")
    assert ended.status == 2
    assert "has changed since" in ended.err
    rows.write_text("".join(lines))

    (tmp_path / "runs/other/project").mkdir(parents=True)
    (tmp_path / "runs/other/project/plan.json").write_text("[1, 2]")  # not ours
    (tmp_path / "runs/other/project/config.yaml").write_text("a: 1")
    found = hft("train", *QUICK, *long, "resume=true", cwd=tmp_path)
    assert found.status == 0, found.err
    assert "Continuing the run in runs/today/run" in found.err


def test_a_finished_run_is_left_alone(hft_run):
    before = weights(hft_run)
    ended = hft("train", *QUICK, f"output_dir={hft_run}", *SCORED)
    assert ended.status == 0
    assert "finished already" in ended.err
    assert weights(hft_run) == before
    other = hft("train", *QUICK, f"output_dir={hft_run}", "method=fft")
    assert other.status == 2
    assert "holds a run of another configuration" in other.err


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    ended = hft("train", *QUICK, "+method=hft", f"output_dir={tmp_path}")
    assert ended.status == 2
    assert "has other files in it (thesis.tex)" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_mistake_that_only_the_worker_sees_is_one_line_and_leaves_no_run(tmp_path):
    ended = hft("train", *QUICK, "+method=hft", f"output_dir={tmp_path}/run", "train.max_length=3")
    assert ended.status == 2
    assert "Raise train.max_length" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


def test_a_worker_that_fails_ends_with_status_1_and_names_its_log(tmp_path):
    broken = Path(shutil.copytree(BASE, tmp_path / "model"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_act": "no such function"}))
    ended = hft("train", *QUICK, "+method=hft", f"output_dir={tmp_path}/run", f"model.path={broken}")
    assert ended.status == 1
    assert "no such function" in ended.err
    assert "The whole log: " in ended.err
    assert not (tmp_path / "run/DONE").exists()


def test_a_sweep_makes_a_run_of_each_and_a_failed_one_does_not_stop_the_rest(tmp_path):
    ended = hft("train", "-m", *QUICK, f"output_dir={tmp_path}", "train.max_length=3,64", "+method=hft,fft")
    assert ended.err.count("hft: failed: ") == 2
    assert "train.max_length=3" in ended.err.split("hft: failed: ")[1]
    assert ended.status == 2
    done = {path.parent.name: path.parent for path in tmp_path.glob("*/DONE")}
    assert set(done) == {f"method={method},train.max_length=64" for method in ("hft", "fft")}
    assert {results(run)["method"] for run in done.values()} == {"hft", "fft"}


def test_a_sweep_side_by_side_tells_its_failures_and_extended_does_only_what_is_missing(tmp_path):
    sweep = ("train", *QUICK, "+method=hft", f"output_dir={tmp_path}", "-m", "hydra/launcher=joblib")
    ended = hft(*sweep, "train.max_length=3,64", "hydra.launcher.n_jobs=2")
    assert ended.status == 2
    assert ended.err.count("hft: failed: ") == 1
    first = tmp_path / "train.max_length=64"
    written = (first / "results.json").stat().st_mtime_ns
    ended = hft(*sweep, "train.max_length=64,60", "hydra.launcher.n_jobs=2")
    assert ended.status == 0, ended.err
    assert (tmp_path / "train.max_length=60/DONE").exists()
    assert (first / "results.json").stat().st_mtime_ns == written


ORDER = ("+method=hft", "data.test_path=pocket:skills/order/test.jsonl", "train.max_steps=1")


def test_the_start_is_scored_once_for_all_runs_that_share_it(tmp_path):
    own = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    runs = []
    for name, more in (("one", ()), ("two", ("seed=7",))):
        arguments = ("train", *QUICK, *ORDER, f"output_dir={tmp_path / name}", *more)
        done = subprocess.run(command(*arguments), env=environment() | own, capture_output=True, text=True, check=True)
        runs.append((json.loads((tmp_path / name / "eval/before/scores.json").read_text()), done.stderr))
    assert "scores of the initial model" not in runs[0][1]
    assert "1 of 1 scores of the initial model are taken from" in runs[1][1]
    assert runs[1][0] == runs[0][0]
