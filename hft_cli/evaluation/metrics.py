"""Metrics of generated answers, and the two measures of a sequence of tasks (OP and BWT).

The metrics are those of TRACE (Wang et al. 2023, arXiv 2310.06762), all on a scale from 0 to 1. To add a metric, write
one function of a prompt, a prediction and an answer, and add one row to `METRICS` at the foot of this file. Importing
this module needs the standard library only.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from math import sqrt
from types import SimpleNamespace
from typing import Any

ScoreMatrix = Sequence[Sequence[float | None]]
"""R: R[i][j] is the score on task j after round i; None if the task was not scored after that round."""

Metric = Callable[[str, str, str], float]
"""(prompt, prediction, answer) -> score in [0, 1]."""


def overall_performance(scores: ScoreMatrix) -> float:
    """Overall performance OP = (1/T) sum_i R[T][i]: the mean over all T tasks after the last round.

    Raises:
        ValueError: if the matrix is not square, or a score of the last round is missing.
    """
    _check_square(scores)
    last = len(scores) - 1
    return sum(_score_at(scores, last, task) for task in range(len(scores))) / len(scores)


def backward_transfer(scores: ScoreMatrix) -> float:
    """Backward transfer BWT = (1/(T-1)) sum_{i<T} (R[T][i] - R[i][i]); a negative value means forgetting.

    Raises:
        ValueError: if the matrix is not square, a required score is missing, or there are fewer than two rounds.
    """
    _check_square(scores)
    if len(scores) < 2:
        raise ValueError("backward transfer needs two rounds or more")
    last = len(scores) - 1
    return sum(_score_at(scores, last, task) - _score_at(scores, task, task) for task in range(last)) / last


def _score_at(scores: ScoreMatrix, round_index: int, task: int) -> float:
    value = scores[round_index][task]
    if value is None:
        raise ValueError(f"R has no score of task {task + 1} after round {round_index + 1}")
    return value


def _check_square(scores: ScoreMatrix) -> None:
    if not scores or any(len(row) != len(scores) for row in scores):
        raise ValueError("R must have a row and a column for each round")


def score(metric: str, prompts: Sequence[str], predictions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Score each item by a metric of `METRICS`.

    Raises:
        ValueError: if prompts, predictions and answers differ in number.
    """
    return [METRICS[metric](*item) for item in zip(prompts, predictions, answers, strict=True)]


def mean_and_error(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of the values (key `name`) and its standard error (key `name_stderr`), which is 0 for one value."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return {name: mean, f"{name}_stderr": sqrt(variance / len(values))}


def accuracy(prompt: str, prediction: str, answer: str) -> float:
    """1 if prediction and answer are equal after stripping white space, else 0."""
    return float(prediction.strip() == answer.strip())


def first_character(prompt: str, prediction: str, answer: str) -> float:
    """1 if the first characters are equal (ScienceQA: the letter of the option); an empty prediction scores 0."""
    first = prediction.strip()[:1]
    return float(first != "" and first == answer.strip()[:1])


def rouge_l(prompt: str, prediction: str, answer: str) -> float:
    """F-measure of ROUGE-L (Lin 2004), on the longest common subsequence of words; a text without words scores 0."""
    return float(_rouge_scorer().score(answer, prediction)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    # The default tokenizer of rouge-score keeps a-z and 0-9 only: a Chinese text has no words, "über" becomes "ber".
    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=SimpleNamespace(tokenize=_letters_and_marks))


def _letters_and_marks(text: str) -> list[str]:
    """The words of a text: letters and digits with the marks on them (vowels of Indic scripts), composed."""
    text = unicodedata.normalize("NFC", text.lower())
    return "".join(c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in text).split()


def trace_rouge_l(prompt: str, prediction: str, answer: str) -> float:
    """ROUGE-L as TRACE's code computes it, with the package rouge: F-measure on the summary level.

    Texts are divided into sentences at periods and into words at white space. Each distinct word counts once, so that
    the order of words matters less than in `rouge_l`. A text without a sentence scores 0.
    """
    from rouge import Rouge

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + len(prediction) + len(answer))  # the package recurses once for each word
    try:
        return float(Rouge(metrics=["rouge-l"]).get_scores(answer, prediction)[0]["rouge-l"]["f"])
    except ValueError:  # no sentence
        return 0.0
    finally:
        sys.setrecursionlimit(limit)


def edit_similarity(prompt: str, prediction: str, answer: str) -> float:
    """Normalised indel similarity: 1 - d / (sum of the lengths), where d counts inserted and deleted characters.

    TRACE uses fuzzywuzzy's `ratio`, which is this value in whole percent if python-Levenshtein is installed. Without
    it, fuzzywuzzy uses difflib, whose value can be lower. Two empty texts score 1.
    """
    from rapidfuzz import fuzz

    return fuzz.ratio(prediction.strip(), answer.strip()) / 100


def code_edit_similarity(prompt: str, prediction: str, answer: str) -> float:
    """Edit similarity after literals have replaced their placeholders, as in CodeXGLUE and TRACE (Py150).

    <NUM_LIT:7> becomes 7 and <STR_LIT:a> becomes a. A placeholder without a literal becomes 0 if it is a number, and
    is removed otherwise.
    """

    def plain(code: str) -> str:
        code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
        return re.sub(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", r"\1", code, flags=re.DOTALL)

    return edit_similarity(prompt, plain(prediction), plain(answer))


def sari(prompt: str, prediction: str, answer: str) -> float:
    """SARI with one reference, the answer; the source is the whole prompt, as in TRACE's code.

    An empty prediction scores above 0, because it correctly deletes every word of the prompt that the answer lacks.
    """
    return sari_with_references(prompt, prediction, [answer])


def sari_with_references(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI of one item (Xu et al. 2016, TACL 4:401-415): the mean over n-grams of 1, 2, 3 and 4 words.

    Where the authors' code and the metric `sari` of Hugging Face's `evaluate` differ, this follows `evaluate`: 0/0 is
    1, and the recall of keep is equation 5 of the paper. A prediction equal to its only reference scores 1, or less if
    an n-gram of the reference occurs more often in the source: its deletion is then counted as wrong.
    """
    source_words, prediction_words, *reference_words = (_words(text) for text in (source, prediction, *references))
    return sum(_sari_of_n_grams(n, source_words, prediction_words, reference_words) for n in range(1, 5)) / 4


def _sari_of_n_grams(n: int, source: list[str], prediction: list[str], references: list[list[str]]) -> float:
    """The mean of the F1 of keep, the F1 of add and the precision of delete."""

    def count(words: list[str], times: int = 1) -> Counter[tuple[str, ...]]:
        n_grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        return Counter({n_gram: times * number for n_gram, number in n_grams.items()})

    # The counts of the references are summed, so the counts of source and prediction are multiplied by their number:
    # an n-gram that half of the references keep is half right.
    before, after = count(source, len(references)), count(prediction, len(references))
    target = sum(map(count, references), Counter[tuple[str, ...]]())

    # The precisions of keep and delete weight each distinct n-gram equally, the recall of keep each occurrence.
    kept, deleted = before & after, before - after
    correctly_kept = kept & target
    keep = _f1(_mean_ratio(correctly_kept, kept), _ratio(correctly_kept.total(), (before & target).total()))
    delete = _mean_ratio(deleted - target, deleted)

    # Add considers distinct n-grams only, not how often they occur.
    added, to_add = after.keys() - before.keys(), target.keys() - before.keys()
    add = _f1(_ratio(len(added & to_add), len(added)), _ratio(len(added & to_add), len(to_add)))
    return (keep + add + delete) / 3


def _mean_ratio(part: Counter[tuple[str, ...]], whole: Counter[tuple[str, ...]]) -> float:
    return _ratio(sum(number / whole[n_gram] for n_gram, number in part.items()), len(whole))


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _words(text: str) -> list[str]:
    # As in `evaluate`, an empty text is one empty word, so an empty prediction counts as a wrong addition.
    return str(_tokenizer_13a()(text.lower())).split(" ")


@cache
def _tokenizer_13a() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer_class: Any = Tokenizer13a
    return tokenizer_class()


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "first_character": first_character,
    "rouge_l": rouge_l,
    "trace_rouge_l": trace_rouge_l,
    "edit_similarity": edit_similarity,
    "code_edit_similarity": code_edit_similarity,
    "sari": sari,
}
