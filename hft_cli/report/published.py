"""The paper's results, which a report shows beside its own; the numbers are in published.yaml."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from hft_cli.report.groups import Comparison
from hft_cli.report.tables import Table, columns, formatted

SOURCE = "Results of the paper (Hui et al., ACL 2025; Llama 2; read from summaries of the paper), not of these runs."

# Tasks of the suites -> the paper's benchmarks. Which score of TruthfulQA the paper reports is not known to us.
GENERAL = {
    "mmlu": "MMLU", "gsm8k": "GSM8K", "bbh": "BBH", "tydiqa": "TyDiQA", "truthfulqa_mc2": "TruthfulQA",
    "humaneval": "HumanEval",
}  # fmt: skip
KNOWLEDGE = {"nq_open": "NQ", "triviaqa": "TriviaQA", "hotpotqa": "HotpotQA"}


def is_the_papers(comparison: Comparison) -> bool:
    """Whether these are models and data of the paper: only then its numbers stand beside ours."""
    models, data = ({run.setting.get(f"{key}.name", "") for run in comparison.runs} for key in ("model", "data"))
    return models <= {"llama2_7b", "llama2_13b"} and all(name.startswith(("tulu", "ultra", "trace")) for name in data)


@cache
def paper_table(name: str) -> Table:
    """A table of published.yaml: paper_sft, paper_dpo, paper_trace or paper_levels."""
    import yaml

    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))[name]
    first, *others = table["columns"]
    numbers = [(heading, formatted(heading, "+.1f" if "BWT" in heading else ".1f")) for heading in others]
    records = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    return Table(name, f"{table['title']} {SOURCE}", [*columns(first), *numbers], records, paper=True)
