"""The worker of sets of rows: exact match without decoding, generated answers, and parameters set back in memory.

Run as a program, this file is one of the ranks: `torchrun … test_rows_worker.py ROWS OUT`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import torchrun
from safetensors.torch import load_file, save_file

from hft_cli.config.schema import ModelConfig
from hft_cli.config.training import GenerationConfig
from hft_cli.data.rows import read_chats
from hft_cli.data.tokenization import tokenize
from hft_cli.errors import UserError
from hft_cli.evaluation.rows_worker import score_rows
from hft_cli.evaluation.score_files import notes_on, read_scores
from hft_cli.evaluation.workers import load_model
from hft_cli.launch.jobs import Progress, RowsJob, RowsTask
from hft_cli.paths import resolve_path
from hft_cli.run_dir import RoundDir

MODEL = resolve_path("pocket:model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Facts that the model knows, and the same questions with the answers of other facts."""
    lines = Path(resolve_path("pocket:facts.jsonl")).read_text().splitlines()[:40:4]
    facts = [json.loads(line)["messages"] for line in lines]
    wrong = [[*fact[:-1], other[-1]] for fact, other in zip(facts, facts[1:] + facts[:1], strict=True)]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in facts + wrong))
    return file


def score(out: Path, task: RowsTask, model: str = MODEL, **reset) -> tuple[dict, list[dict]]:
    """The scores of a model on a task, and its items."""
    generation = GenerationConfig(max_new_tokens=24, batch_size=6)
    job = RowsJob(ModelConfig(), model, {"s": {"t": task}}, 7, generation, seed=1, **reset)
    out.mkdir(exist_ok=True)
    score_rows(job, RoundDir(out), Progress(out / "progress.json"))
    items = (out / "s" / "t.jsonl").read_text().splitlines()
    return json.loads((out / "s" / "t.json").read_text()), [json.loads(item) for item in items]


def test_exact_match_is_what_greedy_decoding_gives(rows, tmp_path):
    scores, items = score(tmp_path / "forced", RowsTask(str(rows)))
    generated, answers = score(tmp_path / "generated", RowsTask(str(rows), metric="accuracy"))
    assert [item["exact_match"] for item in items] == [answer["accuracy"] for answer in answers]
    assert scores["exact_match"] == generated["accuracy"] == 0.5
    assert scores["items"] == generated["items"] == 20
    assert answers[0]["prediction"] == answers[0]["answer"]
    assert json.loads((tmp_path / "forced" / "progress.json").read_text())["step"] == 20


def test_token_accuracy_is_the_share_of_the_right_tokens(rows, tmp_path):
    """Right answers have all tokens right, others some; it agrees with exact match, and with a count by hand."""
    scores, items = score(tmp_path / "tokens", RowsTask(str(rows), metric="token_accuracy"))
    exact, exact_items = score(tmp_path / "exact", RowsTask(str(rows)))
    shares = [item["token_accuracy"] for item in items]
    assert [share == 1 for share in shares] == [item["exact_match"] == 1 for item in exact_items]
    assert any(0 < share < 1 for share in shares)
    assert scores["token_accuracy"] == pytest.approx(sum(shares) / len(shares))
    assert (scores["nll"], scores["items"]) == (exact["nll"], exact["items"])
    loaded = load_model(MODEL, ModelConfig())
    row = tokenize(read_chats(str(rows)), loaded.tokenizer, max_length=64, where="rows").dataset[15]
    guesses = loaded.model(torch.tensor([row["input_ids"]])).logits[0].argmax(-1)[:-1]
    answer = [(guess, label) for guess, label in zip(guesses.tolist(), row["labels"][1:], strict=True) if label != -100]
    assert shares[15] == pytest.approx(sum(guess == label for guess, label in answer) / len(answer))
    assert items[15]["tokens"] == len(answer)


@pytest.mark.end_to_end
@pytest.mark.parametrize("kept", [20, 1])  # with one row, the other rank has none
def test_two_ranks_give_the_items_of_one(kept, rows, tmp_path):
    some = tmp_path / "rows.jsonl"
    some.write_text("".join(rows.read_text().splitlines(keepends=True)[:kept]))
    torchrun(2, __file__, some, tmp_path / "two")
    for name, task in tasks(some).items():
        scores, items = score(tmp_path / name, task)
        shared = [json.loads(line) for line in (tmp_path / "two/s" / f"{name}.jsonl").read_text().splitlines()]
        for item, other in zip(items, shared, strict=True):
            assert item == pytest.approx(other, abs=1e-4) if "nll" in item else item == other
        of_ranks = json.loads((tmp_path / "two/s" / f"{name}.json").read_text())
        assert {key: of_ranks[key] for key in scores} == pytest.approx(scores, abs=1e-4)


def tasks(rows: Path) -> dict[str, RowsTask]:
    return {"forced": RowsTask(str(rows)), "generated": RowsTask(str(rows), metric="accuracy")}


def rank(rows: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    generation = GenerationConfig(max_new_tokens=24, batch_size=6)
    score_rows(
        RowsJob(ModelConfig(), MODEL, {"s": tasks(rows)}, 7, generation, seed=1),
        RoundDir(out),
        Progress(out / "p", rank=int(os.environ["RANK"])),
    )


def test_nll_is_the_mean_over_the_tokens_of_all_answers(rows, tmp_path):
    scores, items = score(tmp_path, RowsTask(str(rows)))
    assert scores["nll"] == pytest.approx(sum(item["nll"] for item in items) / sum(item["tokens"] for item in items))
    correct, wrong = items[:10], items[10:]
    assert max(item["nll"] / item["tokens"] for item in correct) < min(item["nll"] / item["tokens"] for item in wrong)


def test_reset_parameters_have_the_values_of_the_base(rows, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(MODEL, tuned)
    weights = load_file(tuned / "model.safetensors")
    changed = [name for name in weights if "mlp" in name]
    save_file(
        {name: torch.zeros_like(value) if name in changed else value for name, value in weights.items()},
        tuned / "model.safetensors",
        metadata={"format": "pt"},
    )
    task = RowsTask(str(rows))
    assert score(tmp_path / "tuned scores", task, str(tuned))[0]["exact_match"] == 0
    partly = score(tmp_path / "partly", task, str(tuned), base=MODEL, kept=dict.fromkeys(changed[1:], 0.0))
    wholly = score(tmp_path / "wholly", task, str(tuned), base=MODEL, kept=dict.fromkeys(changed, 0.0))
    assert wholly == score(tmp_path / "base", task)
    assert partly != wholly


def test_a_finished_task_is_skipped(rows, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "t.json").write_text('{"exact_match": 0.25}')
    (tmp_path / "s" / "t.jsonl").touch()
    assert score(tmp_path, RowsTask(str(rows))) == ({"exact_match": 0.25}, [])


@pytest.mark.parametrize("metric", ["exact_match", "accuracy"])
def test_another_spelling_of_an_answer_is_as_right(metric, rows, tmp_path):
    """Rows with the answers of other facts, which are wrong, and the right ones as aliases of every second row."""
    lines = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    known, wrong = lines[:10], lines[10:]
    file = tmp_path / "aliases.jsonl"
    with file.open("w") as out:
        for number, (right, row) in enumerate(zip(known, wrong, strict=True)):
            aliases = ["no answer", right[-1]["content"]] if number % 2 else ["no answer"]
            out.write(json.dumps({"messages": row, "aliases": aliases}) + "\n")
    scores, items = score(tmp_path / metric, RowsTask(str(file), metric=metric))
    assert [item[metric] for item in items] == [0, 1] * 5
    assert scores[metric] == 0.5
    assert scores["items"] == 10


def with_positions(folder: Path, count: int) -> str:
    """The embedded model, which takes `count` tokens."""
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": count}))
    return str(folder)


def test_an_answer_that_does_not_fit_has_no_score(rows, tmp_path):
    """The start of a long answer may be right; the model cannot read its end."""
    loaded = load_model(MODEL, ModelConfig())
    lengths = [
        len(row["input_ids"]) for row in tokenize(read_chats(str(rows)), loaded.tokenizer, max_length=99).dataset
    ]
    fit = [number for number, length in enumerate(lengths) if length <= sorted(lengths)[5]]
    model = with_positions(tmp_path / "model", sorted(lengths)[5])
    whole, short = score(tmp_path / "whole", RowsTask(str(rows)))[1], score(tmp_path / "s", RowsTask(str(rows)), model)
    assert (short[0]["items"], short[0]["items_too_long"]) == (len(fit), 20 - len(fit))
    assert [item["row"] for item in short[1]] == fit
    assert [item["exact_match"] for item in short[1]] == [whole[number]["exact_match"] for number in fit]
    (note,) = notes_on("t", *read_scores(tmp_path / "s/s/t.json"))
    assert note == f"t: {20 - len(fit)} of 20 rows have no score, because the model takes no more tokens."


def test_rows_that_are_all_too_long_are_one_line(rows, tmp_path):
    model = with_positions(tmp_path / "model", 3)
    with pytest.raises(UserError, match=r"^All 20 rows of .* have \d+ to \d+ tokens, and the model takes 3\. Give"):
        score(tmp_path / "out", RowsTask(str(rows)), model)


def messages_of(rows: Path) -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in rows.read_text().splitlines()]


def write_rows(file: Path, chats: list[list[dict]]) -> Path:
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return file


@pytest.mark.parametrize("metric", ["exact_match", "token_accuracy"])
@pytest.mark.parametrize("mark", [{}, {"weight": 0}])
def test_the_last_answer_alone_is_scored(metric, mark, rows, tmp_path):
    """A wrong answer before it changes nothing, nor what the row says of training."""
    known = messages_of(rows)[:10]
    before = [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "qqq"}]
    longer = [[*before, *chat[:-1], {**chat[-1], **mark}] for chat in known]
    scores, items = score(tmp_path / "s", RowsTask(str(write_rows(tmp_path / "r.jsonl", longer)), metric=metric))
    tokens = [item["tokens"] for item in score(tmp_path / "one", RowsTask(str(rows), metric=metric))[1]]
    assert [item["tokens"] for item in items] == tokens[:10]
    assert scores["items"] == 10


def test_white_space_around_an_answer_does_not_count(rows, tmp_path):
    chats = messages_of(rows)
    spaced = [[*chat[:-1], {**chat[-1], "content": f"  {chat[-1]['content']} \n"}] for chat in chats]
    scores, _ = score(tmp_path / "s", RowsTask(str(write_rows(tmp_path / "r.jsonl", spaced))))
    assert scores["exact_match"] == score(tmp_path / "o", RowsTask(str(rows)))[0]["exact_match"] == 0.5


def test_scores_do_not_depend_on_the_size_of_batches(rows, tmp_path):
    sizes = {}
    for size in (1, 7, "auto"):
        job = RowsJob(ModelConfig(), MODEL, {"s": {"t": RowsTask(str(rows))}}, size, GenerationConfig(), seed=1)
        out = tmp_path / str(size)
        out.mkdir()
        score_rows(job, RoundDir(out), Progress(out / "progress.json"))
        sizes[size] = json.loads((out / "s/t.json").read_text())
    assert sizes[1]["exact_match"] == sizes[7]["exact_match"] == sizes["auto"]["exact_match"] == 0.5
    assert sizes[1]["nll"] == pytest.approx(sizes["auto"]["nll"], rel=1e-5)


if __name__ == "__main__":
    rank(Path(sys.argv[1]), Path(sys.argv[2]))
