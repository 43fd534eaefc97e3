"""What a chat template does with the rows of a run: refused rows stop it early, and its model knows its end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from helpers import BASE, QUICK, hft, train


def test_a_row_of_a_later_round_is_refused_before_the_first(tmp_path: Path) -> None:
    call = {"function": {"name": "weather", "arguments": "{}"}}
    answer = {"role": "assistant", "content": "I look.", "tool_calls": [call]}
    row = {"messages": [{"role": "user", "content": "Weather in Oslo?"}, answer]}
    (tmp_path / "later.jsonl").write_text(json.dumps(row))
    paths = f"data.path=[pocket:skills/order/train.jsonl,{tmp_path}/later.jsonl]"
    done = hft("train", *QUICK, "+method=hft", paths, f"output_dir={tmp_path}/run")
    assert done.status == 2, done.err
    assert "later.jsonl, line 1: the chat template leaves out 'tool_calls'" in done.err
    assert not list((tmp_path / "run/rounds").glob("*/checkpoints"))
    assert not list((tmp_path / "run/rounds").glob("*/outcome.json"))


def test_tokens_of_the_template_are_kept_in_rows_of_both_kinds(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Say <|end|> twice.", "completion": "No <|end|>"}) + "\n")
    sets = ("train.max_steps=1", "+method=hft", f"data.path={rows}")
    done = hft("train", *QUICK, *sets, f"output_dir={tmp_path}/run")
    assert "rows.jsonl, line 1: turn 1, the user's, holds the text '<|end|>'" in done.err
    run = train(tmp_path / "run", *sets, f"data.test_path={rows}", "data.special_tokens=keep")
    assert json.loads((run / "rounds/01-rows/data.json").read_text())["used"] == 1
    assert (run / "eval/after/data/rows.json").exists()


def test_raw_text_needs_no_chat_template(tmp_path: Path) -> None:
    model = Path(shutil.copytree(BASE, tmp_path / "base"))
    (model / "chat_template.jinja").unlink()
    texts, chats = tmp_path / "texts.jsonl", tmp_path / "chats.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Text number {n}. " * 5}) + "\n" for n in range(40)))
    chats.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    start = ("+method=hft", f"model.path={model}", "suite=none")
    run = train(tmp_path / "run", *start, f"data.path={texts}", "data.validation=0.1")
    assert hft("verify", run).status == 0
    assert {file.name for file in (run / "model").iterdir()} == {file.name for file in model.iterdir()}
    for more in ((f"data.path={chats}",), (f"data.path={texts}", f"data.test_path={chats}"),
                 (f"data.path={texts}", "suite=pocket"), (f"data.path=[{texts},{chats}]",)):  # fmt: skip
        done = hft("train", *QUICK, *start, *more, f"output_dir={tmp_path}/refused")
        assert done.err.startswith("hft: The tokenizer has no chat template. Set model.chat_template")  # no worker ran
        assert not (tmp_path / "refused").exists()


def test_old_rows_are_trained_on_in_the_batches_of_new_ones(tmp_path: Path) -> None:
    mix = "data.mix=[{path: pocket:skills/order/train.jsonl, share: 0.2}]"
    tasks = "data.path=[pocket:skills/capitals/train.jsonl,pocket:skills/backwards/train.jsonl]"
    two = (*QUICK, "+method=hft", tasks, "data.max_rows=40", "train.max_steps=3")
    run = train(tmp_path / "run", *two, mix, "continual=mixed_replay", "continual.replay_share=0.3")
    rounds = json.loads((run / "plan.json").read_text())["rounds"]
    parts = [[(Path(part["path"]).parent.name, part["taken"]) for part in row["parts"]] for row in rounds]
    assert parts == [
        [("capitals", 40), ("order", 10)],
        [("backwards", 40), ("order", 16), ("capitals", 24)],
    ]
    data = json.loads((run / "rounds/02-backwards/data.json").read_text())
    assert [part["taken"] for part in data["parts"]] == [40, 16, 24]
    assert data["used"] == 80
    assert hft("verify", run).status == 0
    changed = hft("train", *two, mix.replace("0.2", "0.3"), f"output_dir={run}")
    assert "data.mix was" in changed.err


def test_a_model_knows_the_end_that_it_was_trained_on(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    template = tmp_path / "other.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{% if m.role == 'assistant' %}{{ '<|system|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    two = "data.path=[pocket:skills/order/train.jsonl,pocket:skills/backwards/train.jsonl]"
    run = train(tmp_path / "run", "+method=hft", f"model.chat_template={template}", two)
    assert hft("verify", run).status == 0
    assert hft("materialize", run, "--out", tmp_path / "again").status == 0
    for folder in (run / "model", tmp_path / "again"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|system|>", template.read_text())
        end = tokenizer.convert_tokens_to_ids(["<|end|>", "<|system|>"])
        assert GenerationConfig.from_pretrained(folder).eos_token_id == end
