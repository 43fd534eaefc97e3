"""Runs over a sequence of tasks in TRACE's layout: scores of generated answers, replay, GEM and LoRA."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import BASE, changed, command, environment, hft, kill, ledger, ranks, results, train, wait_for

from hft_cli.evaluation import metrics

pytestmark = pytest.mark.xdist_group("trace")  # on one worker, because the tests share a run of a minute
TASKS = ("C-STANCE", "Py150", "20Minuten")
SMALL = (
    "train.max_length=96", "generation.max_new_tokens=8", "train.batch_size=8", "train.micro_batch_size=4",
    "train.max_steps=6", "train.learning_rate=3e-3", "train.save_every=2", "train.log_every=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three tasks in TRACE's layout: a letter, a line of code, a German sentence."""
    root, pick = tmp_path_factory.mktemp("trace"), random.Random(0)
    words = ["der", "Hund", "die", "Katze", "sieht", "einen", "Baum", "und", "das", "Haus", "am", "Fluss"]

    def row(task: str) -> dict[str, str]:
        if task == "C-STANCE":
            answer = pick.choice("AB")
            return {"prompt": f"判断：{answer * 3} ({pick.randrange(99)})\n答案：", "answer": answer}
        if task == "Py150":
            name = pick.choice(["a", "b"])
            return {"prompt": f"<s> {name} = <NUM_LIT> <EOL>", "answer": f"return {name} "}
        text = " ".join(pick.choices(words, k=6))
        return {"prompt": f"Simplify.\n\n{text}\n\nSimplification:", "answer": " ".join(text.split()[:3])}

    for task in TASKS:
        (root / task).mkdir()
        for split, count in (("train", 40), ("eval", 2), ("test", 6)):
            rows = [row(task) for _ in range(count)]
            (root / task / f"{split}.json").write_text(json.dumps(rows, ensure_ascii=False))
    rows = json.loads((root / "Py150/train.json").read_text())  # one test row, twice
    rows[:2] = json.loads((root / "Py150/test.json").read_text())[:1] * 2
    (root / "Py150/train.json").write_text(json.dumps(rows))
    return root


def trace(folder: Path, out: Path, *arguments: str) -> tuple[str, ...]:
    tasks = () if any("data.tasks" in a for a in arguments) else (f"data.tasks=[{','.join(TASKS)}]",)
    return ("train", "data=trace", f"data.path={folder}", *tasks, *SMALL, f"output_dir={out}", *arguments)


@pytest.fixture(scope="module")
def replayed(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "replay"
    done = hft(*trace(folder, out, "+method=hft", "continual=replay"))
    assert done.status == 0, done.err
    assert "the test set too" in done.err
    return out


def read_items(run: Path, round: int, task: str) -> list[dict]:
    return [json.loads(line) for line in (run / f"eval/round-0{round}/data/{task}.jsonl").read_text().splitlines()]


SCORES = {
    "C-STANCE": lambda item: item["prediction"].strip() == item["answer"],
    "Py150": lambda item: metrics.code_edit_similarity("", item["prediction"], item["answer"]),
    "20Minuten": lambda item: metrics.sari(item["prompt"], item["prediction"], item["answer"]),
}


def test_r_op_and_bwt_follow_from_the_saved_predictions(replayed, folder):
    continual = results(replayed)["continual"]
    assert continual["tasks"] == list(TASKS)
    matrix = [[None] * 3 for _ in TASKS]  # tasks that are not trained yet are not scored
    for round_index in range(3):
        for place, task in enumerate(TASKS[: round_index + 1]):
            items = read_items(replayed, round_index + 1, task)
            rows = json.loads((folder / task / "test.json").read_text())
            assert [(item["prompt"], item["answer"]) for item in items] == [(r["prompt"], r["answer"]) for r in rows]
            matrix[round_index][place] = sum(map(SCORES[task], items)) / len(items)
    assert [[None if cell is None else pytest.approx(cell) for cell in row] for row in matrix] == continual["R"]
    assert continual["OP"] == pytest.approx(sum(matrix[2]) / 3)
    assert continual["BWT"] == pytest.approx((matrix[2][0] - matrix[0][0] + matrix[2][1] - matrix[1][1]) / 2)
    assert matrix[0][0] > 0.3  # the model learned something: the answer is a letter of the prompt


def test_repeated_rows_and_rows_of_the_test_set_are_counted(replayed):
    rounds = {entry["name"]: entry for entry in results(replayed)["rounds"]}
    assert rounds["Py150"]["rows_repeated"] >= 1
    assert rounds["Py150"]["rows_in_test"] >= 2
    planned = {entry["name"]: entry for entry in json.loads((replayed / "plan.json").read_text())["rounds"]}
    assert planned["Py150"]["rows_in_test"] == rounds["Py150"]["rows_in_test"]


def test_replay_trains_a_tenth_of_past_tasks_under_the_same_draw(replayed):
    rounds = {entry["name"]: entry for entry in results(replayed)["rounds"]}
    assert list(rounds) == ["C-STANCE", "Py150", "Py150-replay", "20Minuten", "20Minuten-replay"]
    assert rounds["Py150-replay"]["rows"] == 4
    assert rounds["20Minuten-replay"]["rows"] == 8
    assert rounds["20Minuten-replay"]["steps"] == 1
    draws = {entry["name"]: entry for entry in ledger(replayed)}
    assert draws["20Minuten-replay"]["updated"] == draws["20Minuten"]["updated"] != draws["Py150"]["updated"]
    shown = hft("show", "draws", replayed)
    assert "updated in 0 rounds" in shown.out
    assert "3 rounds" in shown.out
    assert "4 rounds" not in shown.out
    proven = hft("verify", replayed)
    assert proven.status == 0, proven.out
    assert "round 3 20Minuten-replay" in proven.out


def test_a_run_killed_in_round_three_resumes_to_the_same_results(replayed, folder, tmp_path):
    out = tmp_path / "killed"
    arguments = trace(folder, out, "+method=hft", "continual=replay")
    process = subprocess.Popen(command(*arguments), env=environment())
    wait_for(out / "rounds/04-20Minuten/checkpoints/checkpoint-2/hft.json", process)
    kill(process, out)
    assert ranks(out) == []
    assert not (out / "DONE").exists()
    scored = (out / "eval/round-02/data/Py150.json").stat().st_mtime_ns

    assert hft(*arguments).status == 0
    assert timeless(results(out)) == timeless(results(replayed))
    assert (out / "model/model.safetensors").read_bytes() == (replayed / "model/model.safetensors").read_bytes()
    assert (out / "eval/round-02/data/Py150.json").stat().st_mtime_ns == scored  # finished scores were skipped


MEASURED = ("train_seconds", "tokens_per_second", "peak_memory_bytes", "checkpoint_seconds", "checkpoint_bytes")


def timeless(run_results: dict) -> dict:
    """Results without what depends on the clock and on the memory of the machine."""
    for entry in run_results["rounds"]:
        for key in MEASURED:
            entry.pop(key, None)
    return run_results


def test_only_missing_scores_are_computed_again(replayed, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(replayed, run)
    for missing in ("DONE", "results.json", "eval/round-03/scores.json", "eval/round-03/data/Py150.json"):
        (run / missing).unlink()
    finished = run / "eval/round-03/data/C-STANCE.json"
    finished.write_text(finished.read_text().replace('"accuracy":', '"accuracy": 0.125, "was":'))
    done = hft(*trace(folder, run, "+method=hft", "continual=replay"))
    assert done.status == 0, done.err
    matrix, before = results(run)["continual"]["R"], results(replayed)["continual"]["R"]
    assert matrix[2] == [0.125, *before[2][1:]]


def test_gem_projects_steps_of_later_rounds_only(folder, tmp_path):
    out = tmp_path / "gem"
    done = hft(*trace(folder, out, "+method=hft", "continual=gem", "data.tasks=[C-STANCE,20Minuten]",
                       "continual.gem_memory=6", "continual.score_unseen=true"))  # fmt: skip
    assert done.status == 0, done.err
    run = results(out)
    first, second = run["rounds"]
    assert "steps_projected" not in first
    assert 0 < second["steps_projected"] <= second["steps"]
    assert None not in run["continual"]["R"][0]
    assert run["continual"]["name"] == "gem"
    assert second["memory_rows"] == [6]
    assert hft("verify", out).status == 0


@pytest.mark.parametrize("dora", ["false", "true"])
def test_the_model_of_lora_is_the_base_with_its_last_adapters(dora, folder, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "lora"
    done = hft(*trace(folder, out, "+method=lora", f"lora.dora={dora}", "data.tasks=[C-STANCE,20Minuten]"))
    assert done.status == 0, done.err
    assert hft("verify", out).status == 0
    base = AutoModelForCausalLM.from_pretrained(BASE)
    with_adapters = PeftModel.from_pretrained(base, out / "rounds/02-20Minuten/adapter").merge_and_unload()
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    for (name, merged), (_, saved) in zip(with_adapters.named_parameters(), model.named_parameters(), strict=True):
        assert torch.allclose(merged, saved, atol=1e-6), name
    assert set(ledger(out)[1]["updated"]) == {name for name, _ in model.named_parameters() if "_proj" in name}
    first, second = (
        (out / f"rounds/{name}/adapter/adapter_model.safetensors").read_bytes()
        for name in ("01-C-STANCE", "02-20Minuten")
    )
    assert first != second


@pytest.mark.parametrize(
    "arguments",
    [("+method=lora", "continual=mixed_replay"), ("+method=hft", "continual=gem", "continual.gem_memory=6")],
    ids=["lora", "gem"],
)
def test_lora_and_gem_run_on_deepspeed_ranks_in_bfloat16(tmp_path, arguments):
    run = train(
        tmp_path / "run", *arguments, "train.learning_rate=1e-3", "train.max_steps=3",
        "data.path=[pocket:skills/order/train.jsonl,pocket:skills/backwards/train.jsonl]",
        "engine=zero2", "engine.num_processes=2", "model.dtype=bfloat16",
    )  # fmt: skip
    assert changed(BASE, run / "model") == {name for entry in ledger(run) for name in entry["updated"]}
    assert ("steps_projected" in results(run)["rounds"][1]) == ("continual=gem" in arguments)
