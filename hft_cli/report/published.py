"""The figures of the paper that reports are read beside: Hui et al., HFT, ACL 2025 (2025.acl-long.626), of Llama 2.

They were read from summaries of the paper, not copied from its tables. All in percent, BWT in absolute points.
"""

from __future__ import annotations

from hft_cli.report.tables import Record, Table, plain, short

MARK = "The paper's figures (Hui et al., ACL 2025; Llama 2; read from summaries of the paper), not of these runs."

GENERAL = ("MMLU", "GSM8K", "BBH", "TyDiQA", "TruthfulQA", "HumanEval")

KNOWLEDGE = ("NQ", "TriviaQA", "HotpotQA")

# Our names of the paper's benchmarks. Which of TruthfulQA's scores the paper has is not known to us.
OURS = dict(
    zip(
        ("mmlu", "gsm8k", "bbh", "tydiqa", "truthfulqa_mc2", "humaneval", "nq_open", "triviaqa", "hotpotqa"),
        (*GENERAL, *KNOWLEDGE),
        strict=True,
    )
)

_SFT = {
    "7B base": (41.6, 12.0, 39.9, 48.4, 38.5, 26.2, 34.4, 12.9, 40.2, 15.6, 22.9),
    "7B FFT": (48.5, 25.0, 42.2, 51.2, 41.7, 36.9, 41.0, 3.2, 26.4, 14.5, 14.7),
    "7B HFT": (50.8, 30.5, 43.6, 52.3, 45.4, 34.6, 42.9, 6.2, 32.8, 15.4, 18.1),
    "13B FFT": (50.6, 45.0, 47.8, 55.0, 42.6, 42.4, 47.2, 0.7, 9.2, 4.9, 4.9),
    "13B HFT": (54.5, 46.5, 53.7, 56.7, 45.7, 43.5, 50.1, 2.7, 12.4, 8.2, 7.8),
}

_DPO = (("7B FFT", 41.9, 10.7), ("7B HFT", 41.7, 12.5), ("13B FFT", 47.4, 2.3), ("13B HFT", 48.2, 2.9))

_TRACE = (
    ("SeqFT 7B", 45.7, 51.3, -10.2, -5.6), ("GEM 7B", 48.2, 50.2, -7.9, -5.9), ("Replay 7B", 54.3, 54.1, 1.4, 2.1),
    ("SeqFT 13B", 49.0, 52.0, -9.4, -8.5), ("GEM 13B", 50.4, 53.6, -8.9, -6.1), ("Replay 13B", 54.7, 57.4, -0.6, 1.6),
)  # fmt: skip

_LEVELS = (("all (FFT)", 45.7, -10.2), ("model", 46.9, -9.2), ("layer", 47.9, -8.3), ("category", 51.3, -5.6))


def sft() -> Table:
    heads = [*GENERAL, "general avg", *KNOWLEDGE, "knowledge avg"]
    return Table(
        "paper_sft",
        f"Supervised fine-tuning on Tulu V2. {MARK}",
        [("model", plain("model")), *((head, short(head, ".1f")) for head in heads)],
        [{"model": name, **dict(zip(heads, values, strict=True))} for name, values in _SFT.items()],
        paper=True,
    )


def dpo() -> Table:
    records: list[Record] = [{"model": m, "general avg": g, "knowledge avg": k} for m, g, k in _DPO]
    columns = [("model", plain("model")), *((h, short(h, ".1f")) for h in ("general avg", "knowledge avg"))]
    return Table("paper_dpo", f"DPO after supervised fine-tuning, averages. {MARK}", columns, records, paper=True)


def trace() -> Table:
    heads = ("OP FFT", "OP HFT", "BWT FFT", "BWT HFT")
    records: list[Record] = [{"TRACE": name, **dict(zip(heads, values, strict=True))} for name, *values in _TRACE]
    columns = [("TRACE", plain("TRACE")), *((h, short(h, "+.1f" if "BWT" in h else ".1f")) for h in heads)]
    return Table("paper_trace", f"TRACE, sequences of eight tasks. {MARK}", columns, records, paper=True)


def levels() -> Table:
    records: list[Record] = [{"level": level, "OP": op, "BWT": bwt} for level, op, bwt in _LEVELS]
    columns = [("level", plain("level")), ("OP", short("OP", ".1f")), ("BWT", short("BWT", "+.1f"))]
    return Table("paper_levels", f"Level of selection, TRACE, SeqFT, 7B. {MARK}", columns, records, paper=True)
