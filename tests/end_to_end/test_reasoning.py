"""A model whose chat template has a place for reasoning, and that answers right, scores what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import hft, results

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("reasoning")]  # one process makes the models

COLORS = ["red", "blue", "green", "black", "white", "brown", "gold", "gray"]

# As Qwen3's: an empty place for reasoning is part of an answer without any.
TEMPLATE = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- 'A: ' + ('<think>\\n\\n</think>\\n\\n' if loop.last else '') + m.content + eos_token }}
    {%- else %}
        {{- 'Q: ' + m.content + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'A: ' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# A stop string that is in the empty place for reasoning, as BBH's.
TASK = """\
task: colors{part}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: completion
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 32}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """\
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{prompt}}}} {{{{completion}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


def write_rows(file: Path, colors: list[str]) -> Path:
    rows = ({"prompt": f"Color {COLORS.index(color)}?", "completion": color} for color in colors)
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reasoning")
    (folder / "template.jinja").write_text(TEMPLATE)
    rows = write_rows(folder / "rows.jsonl", COLORS)
    settings = (
        "+method=fft", f"model.chat_template={folder}/template.jinja", f"data.path={rows}", f"data.test_path={rows}",
        "suite=none", "train.max_steps=150", "train.learning_rate=3e-3", "train.batch_size=8",
        "train.micro_batch_size=8", "generation.max_new_tokens=32",
    )  # fmt: skip
    for name, more in (
        ("default", ("data.metric=accuracy",)),
        ("off", ("data.metric=trace_rouge_l", "model.thinking=false")),
    ):
        done = hft("train", *settings, *more, f"output_dir={folder}/{name}")
        assert done.status == 0, done.err
    tasks = folder / "tasks"
    tasks.mkdir()
    for part, colors in (("1", COLORS[:6]), ("2", COLORS[6:])):
        text = TASK.format(part=part, rows=write_rows(folder / f"part{part}.jsonl", colors))
        (tasks / f"{part}.yaml").write_text(text)
    (tasks / "rolling.yaml").write_text(ROLLING.format(rows=rows))
    (tasks / "group.yaml").write_text(
        "group: colors\ntask: [colors1, colors2]\n"
        "aggregate_metric_list: [{metric: exact_match, aggregation: mean, weight_by_size: true}]\n"
    )
    return folder


@pytest.mark.parametrize(("run", "metric"), [("default", "accuracy"), ("off", "trace_rouge_l")])
def test_rows_are_scored_without_the_place_for_reasoning(folder, run, metric):
    assert results(folder / run)["eval"]["after"]["data"]["rows"][metric] == pytest.approx(1)
    items = [json.loads(line) for line in (folder / run / "eval/after/data/rows.jsonl").read_text().splitlines()]
    assert [item["prediction"] for item in items] == COLORS
    assert [item.get("reasoning") for item in items] == [None if run == "off" else ""] * len(COLORS)


def evaluated(folder: Path, out: Path, *more: str):
    return hft(
        "eval", f"run={folder}", "models=[after]", "suite=harness", f"suite.include_path={folder.parent}/tasks", *more
    )


@pytest.mark.parametrize("run", ["default", "off"])
def test_a_harness_task_is_scored_without_it(folder, run, tmp_path):
    done = evaluated(folder / run, tmp_path, "suite.harness=[colors,rolling]")
    assert done.status == 0, done.err
    scores = json.loads((folder / run / "eval/harness.json").read_text())["models"]["after"]["eval"]["harness"]
    assert scores["colors"] == {"exact_match": 1, "exact_match_stderr": 0, "items": 8}
    assert scores["rolling"]["byte_perplexity"] > 1
    assert "100.0" in done.out


def test_a_task_that_fails_does_not_stop_the_next_one(folder, tmp_path):
    done = evaluated(folder / "off", tmp_path, "suite.harness=[nope,colors1]")
    assert (done.status, done.err.strip().splitlines()[-1]) == (
        2,
        "hft: lm-evaluation-harness has no task 'nope'. Did you mean nq_open? To list all tasks: lm_eval ls tasks The "
        "scores of the other benchmarks are kept.",
    )
    assert list((folder / "off/eval/after/harness").glob("colors1-*.json"))
