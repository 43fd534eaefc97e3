"""Sequences of tasks as TRACE has them: metrics of generated answers, replay, GEM and LoRA, kept cell by cell."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import BASE, changed, command, environment, hft, ledger, ranks, results, train, wait_for, wait_until_gone

from hft_cli.config.data_sets import test_format as shape_of_tests
from hft_cli.config.schema import DataConfig, MethodConfig, ModelConfig, RunConfig
from hft_cli.config.validate import check
from hft_cli.errors import UserError
from hft_cli.evaluation import metrics
from hft_cli.method.rounds import phases

pytestmark = pytest.mark.xdist_group("trace")  # on one worker: they share a run of a minute
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
    rows = json.loads((root / "Py150/train.json").read_text())  # a test row, and it twice
    rows[:2] = json.loads((root / "Py150/test.json").read_text())[:1] * 2
    (root / "Py150/train.json").write_text(json.dumps(rows))
    return root


def trace(folder: Path, out: Path, *arguments: str) -> tuple[str, ...]:
    tasks = () if any("data.tasks" in a for a in arguments) else (f"data.tasks=[{','.join(TASKS)}]",)
    return ("train", "data=trace", f"data.path={folder}", *tasks, *SMALL, f"output_dir={out}", *arguments)


@pytest.fixture(scope="module")
def replayed(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "replay"
    ended = hft(*trace(folder, out, "+method=hft", "continual=replay"))
    assert ended.status == 0, ended.err
    assert "the test set too" in ended.err
    return out


# ------------------------------------------------------------------------------------------------------ the measures


def kept(run: Path, round: int, task: str) -> list[dict]:
    return [json.loads(line) for line in (run / f"eval/round-0{round}/data/{task}.jsonl").read_text().splitlines()]


def test_r_op_and_bwt_are_what_the_saved_predictions_give(replayed, folder):
    found = results(replayed)["continual"]
    assert found["tasks"] == list(TASKS)
    matrix = []
    for number in (1, 2, 3):
        row = []
        for place, task in enumerate(TASKS):
            if place >= number:
                row.append(None)  # not asked for: only tasks seen so far
                continue
            items, rows = kept(replayed, number, task), json.loads((folder / task / "test.json").read_text())
            assert [(item["prompt"], item["answer"]) for item in items] == [(r["prompt"], r["answer"]) for r in rows]
            own = {
                "C-STANCE": lambda item: item["prediction"].strip() == item["answer"],
                "Py150": lambda item: metrics.code_edit_similarity("", item["prediction"], item["answer"]),
                "20Minuten": lambda item: metrics.sari(item["prompt"], item["prediction"], item["answer"]),
            }[task]
            row.append(sum(map(own, items)) / len(items))
        matrix.append(row)
    assert [[None if cell is None else pytest.approx(cell) for cell in row] for row in matrix] == found["R"]
    assert found["OP"] == pytest.approx(sum(matrix[2]) / 3)
    assert found["BWT"] == pytest.approx((matrix[2][0] - matrix[0][0] + matrix[2][1] - matrix[1][1]) / 2)
    assert matrix[0][0] > 0.3  # something was learned: a letter is copied


def test_repeated_rows_and_rows_of_the_test_set_are_counted(replayed):
    rounds = {entry["name"]: entry for entry in results(replayed)["rounds"]}
    assert rounds["Py150"]["rows_repeated"] >= 1
    assert rounds["Py150"]["rows_in_test"] >= 2
    planned = {entry["name"]: entry for entry in json.loads((replayed / "plan.json").read_text())["rounds"]}
    assert planned["Py150"]["rows_in_test"] == rounds["Py150"]["rows_in_test"]


def test_replay_is_a_pass_over_a_tenth_of_every_past_task_under_the_rounds_own_draw(replayed):
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


def test_killed_in_round_three_and_resumed_it_ends_with_the_same_results(replayed, folder, tmp_path):
    out = tmp_path / "killed"
    arguments = trace(folder, out, "+method=hft", "continual=replay")
    process = subprocess.Popen(command(*arguments), env=environment())
    wait_for(out / "rounds/04-20Minuten/checkpoints/checkpoint-2/hft.json", process)
    process.kill()
    process.wait()
    wait_until_gone(out)
    assert ranks(out) == []
    assert not (out / "DONE").exists()
    scored = (out / "eval/round-02/data/Py150.json").stat().st_mtime_ns

    assert hft(*arguments).status == 0
    assert timeless(results(out)) == timeless(results(replayed))
    assert (out / "model/model.safetensors").read_bytes() == (replayed / "model/model.safetensors").read_bytes()
    assert (out / "eval/round-02/data/Py150.json").stat().st_mtime_ns == scored  # no cell is scored twice


def timeless(found: dict) -> dict:
    """Results without what hangs on the clock and the machine's memory."""
    for entry in found["rounds"]:
        for key in (
            "train_seconds",
            "tokens_per_second",
            "peak_memory_bytes",
            "checkpoint_seconds",
            "checkpoint_bytes",
        ):
            entry.pop(key, None)
    return found


def test_a_scored_task_is_not_scored_again_and_the_missing_one_is(replayed, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(replayed, run)
    for gone in ("DONE", "results.json", "eval/round-03/scores.json", "eval/round-03/data/Py150.json"):
        (run / gone).unlink()
    kept_one = run / "eval/round-03/data/C-STANCE.json"
    kept_one.write_text(kept_one.read_text().replace('"accuracy":', '"accuracy": 0.125, "was":'))
    ended = hft(*trace(folder, run, "+method=hft", "continual=replay"))
    assert ended.status == 0, ended.err
    found, before = results(run)["continual"]["R"], results(replayed)["continual"]["R"]
    assert found[2] == [0.125, *before[2][1:]]


# ---------------------------------------------------------------------------------------------------- GEM and LoRA


def test_gem_projects_steps_of_later_rounds_only_and_verifies(folder, tmp_path):
    out = tmp_path / "gem"
    ended = hft(*trace(folder, out, "+method=hft", "continual=gem", "data.tasks=[C-STANCE,20Minuten]",
                       "continual.gem_memory=6", "continual.score_unseen=true"))  # fmt: skip
    assert ended.status == 0, ended.err
    found = results(out)
    first, second = found["rounds"]
    assert "steps_projected" not in first
    assert 0 < second["steps_projected"] <= second["steps"]
    assert None not in found["continual"]["R"][0]
    assert found["continual"]["name"] == "gem"
    assert second["memory_rows"] == [6]
    assert hft("verify", out).status == 0


def test_lora_goes_on_from_round_to_round_and_the_model_is_the_base_with_its_last_adapters(folder, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "lora"
    ended = hft(*trace(folder, out, "+method=fft", "continual=lora", "data.tasks=[C-STANCE,20Minuten]"))
    assert ended.status == 0, ended.err
    assert hft("verify", out).status == 0
    base = AutoModelForCausalLM.from_pretrained(BASE)
    with_adapters = PeftModel.from_pretrained(base, out / "rounds/02-20Minuten/adapter").merge_and_unload()
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    for (name, one), (_, other) in zip(with_adapters.named_parameters(), model.named_parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name
    changed = set(ledger(out)[1]["updated"])
    assert changed == {name for name, _ in model.named_parameters() if "_proj" in name}
    first, second = (
        (out / f"rounds/{name}/adapter/adapter_model.safetensors").read_bytes()
        for name in ("01-C-STANCE", "02-20Minuten")
    )
    assert first != second


@pytest.mark.parametrize(("method", "strategy"), [("fft", "lora"), ("hft", "gem")])
def test_lora_and_gem_run_on_deepspeed_ranks_in_bfloat16(tmp_path, method, strategy):
    run = train(
        tmp_path / "run", f"+method={method}", f"continual={strategy}", "train.learning_rate=1e-3", "train.max_steps=3",
        "data.path=[pocket:skills/order/train.jsonl,pocket:skills/backwards/train.jsonl]", "continual.gem_memory=6",
        "engine=zero2", "engine.num_processes=2", "model.dtype=bfloat16",
    )  # fmt: skip
    assert changed(BASE, run / "model") == {name for entry in ledger(run) for name in entry["updated"]}
    assert ("steps_projected" in results(run)["rounds"][1]) == (strategy == "gem")


# ----------------------------------------------------------------------------------------------------- without a run


def config(**changes) -> RunConfig:
    made = RunConfig(
        output_dir="x",
        model=ModelConfig(name="m", path="p"),
        data=DataConfig(name="d", path="root", tasks=list(TASKS), metric={**dict.fromkeys(TASKS, "accuracy")}),
        method=MethodConfig(name="hft"),
        train=replace(RunConfig().train, epochs={"C-STANCE": 1, "Py150": 5, "20Minuten": 5}),
    )
    made.engine.name = made.suite.name = "none"
    for key, value in changes.items():
        section, name = key.split("__")
        setattr(getattr(made, section), name, value)
    return made


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__epochs": {"C-STANCE": 1}}, r"train\.epochs has nothing for Py150 .*'train\.epochs=\{Py150: …, …\}'"),
        ({"train__epochs": {**dict.fromkeys(TASKS, 1), "Py150": 0}}, r"train\.epochs\.Py150=0 must be above 0"),
        ({"data__metric": "bleu"}, r"Unknown data\.metric 'bleu'\. .*Available: exact_match, accuracy"),
        ({"data__test_path": "x"}, r"data\.tasks names folders below data\.path, which also hold the test rows"),
        ({"continual__name": "ewc"}, r"Unknown continual\.name 'ewc'\. .*Available: seqft, replay, gem, lora"),
        ({"continual__name": "lora"}, r"continual=lora trains adapters .* use method=fft"),
        ({"continual__name": "gem", "data__tasks": ["Py150"]}, r"continual=gem needs a sequence of tasks"),
        ({"continual__name": "gem", "engine__zero_stage": 3}, r"does not work on engine=zero3: use engine=single"),
        ({"continual__name": "gem", "train__packing": True}, r"set train\.packing=false"),
        ({"continual__name": "replay", "method__stages": ["dpo"]}, r"continual=replay is for SFT"),
        ({"train__epochs": None}, r"train\.epochs=null is not a number\. It must be above 0"),
        ({"train__epochs": [1, 2, 3]}, r"train\.epochs=\[1, 2, 3\] is not a number\. It must be above 0"),
        ({"continual__replay_general": "x"}, r"continual\.replay_general is for continual=replay"),
        (
            {"continual__name": "replay", "continual__replay_shuffle": False, "train__packing": True},
            r"set continual\.replay_shuffle=true",
        ),
        ({"continual__replay_ratio": 1.5}, r"continual\.replay_ratio=1\.5 must be in \(0, 1\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(changes, said):
    def both() -> None:
        made = config(**changes)
        check(made)
        phases(made)

    with pytest.raises(UserError, match=said) as caught:
        both()
    assert "\n" not in str(caught.value)


def test_test_rows_of_a_task_have_the_shape_of_its_training_rows(folder):
    """Also where a row fits two shapes: what is trained on is what is scored."""
    assert shape_of_tests(DataConfig(name="d", path="p", tasks=["a"], format="trace")) == "trace"
    assert shape_of_tests(DataConfig(name="d", path="p", format="trace")) == "auto"


def test_lora_is_refused_where_peft_would_adapt_other_matrices(monkeypatch):
    import peft
    from transformers import AutoModelForCausalLM

    from hft_cli.training import lora

    model = AutoModelForCausalLM.from_pretrained(BASE)
    make = peft.get_peft_model
    monkeypatch.setattr(
        peft, "get_peft_model", lambda m, c: make(m, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    )
    with pytest.raises(UserError, match=r"PEFT adapts other matrices than were asked for, such as model\.layers"):
        lora.adapt(model, ["model.layers.0.mlp.up_proj.weight"], RunConfig().continual, None)
