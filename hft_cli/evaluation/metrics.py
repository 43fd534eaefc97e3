"""Continual learning: which rows of past tasks are trained on again, and the measures of a sequence. No torch.

R[i][j] is the score on task j after round i, all on one scale from 0 to 1 (TRACE: Wang et al. 2023, arXiv 2310.06762);
None where it was not scored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from math import sqrt
from types import SimpleNamespace
from typing import Any

Matrix = Sequence[Sequence[float | None]]


def overall_performance(scores: Matrix) -> float:
    """OP: the mean over all T tasks after the last round, (1/T) sum_i R[T][i].

    Raises:
        ValueError: if the matrix is not T x T, or a score that is needed is missing.
    """
    _square(scores)
    last = len(scores) - 1
    return sum(_at(scores, last, i) for i in range(len(scores))) / len(scores)


def backward_transfer(scores: Matrix) -> float:
    """BWT: what the tasks lost since they were learned, (1/(T-1)) sum_{i<T} (R[T][i] - R[i][i]); below 0 is forgetting.

    Raises:
        ValueError: if the matrix is not T x T, a score that is needed is missing, or T is 1: a single task has none
            before it to forget.
    """
    _square(scores)
    if len(scores) < 2:
        raise ValueError("backward transfer needs two rounds or more")
    last = len(scores) - 1
    return sum(_at(scores, last, i) - _at(scores, i, i) for i in range(last)) / last


def _at(scores: Matrix, row: int, column: int) -> float:
    value = scores[row][column]
    if value is None:
        raise ValueError(f"R has no score of task {column + 1} after round {row + 1}")
    return value


def _square(scores: Matrix) -> None:
    if not scores or any(len(row) != len(scores) for row in scores):
        raise ValueError("R must have a row and a column for each round")


Metric = Callable[[str, str, str], float]


def score(metric: str, prompts: Sequence[str], predictions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """One score per item, in order.

    Raises:
        ValueError: if prompts, predictions and answers differ in number.
    """
    return [METRICS[metric](*item) for item in zip(prompts, predictions, answers, strict=True)]


def mean_and_error(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean over items under `name`, and its standard error, which for one item is 0."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return {name: mean, f"{name}_stderr": sqrt(spread / len(values))}


def accuracy(prompt: str, prediction: str, answer: str) -> float:
    """1 if the texts are equal, white space around them aside."""
    return float(prediction.strip() == answer.strip())


def first_character(prompt: str, prediction: str, answer: str) -> float:
    """1 if the texts begin with the same character, in ScienceQA the option's letter; an empty prediction scores 0."""
    first = prediction.strip()[:1]
    return float(first != "" and first == answer.strip()[:1])


def rouge_l(prompt: str, prediction: str, answer: str) -> float:
    """F-measure of ROUGE-L (Lin 2004): the longest common subsequence of words. A text without words scores 0."""
    return float(_rouge().score(answer, prediction)["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    # rouge-score's own tokenizer keeps a-z and 0-9 only: a Chinese text would have no words and "über" would be "ber".
    tokenizer = SimpleNamespace(tokenize=lambda text: re.findall(r"[^\W_]+", text.lower()))
    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=tokenizer)


def edit_similarity(prompt: str, prediction: str, answer: str) -> float:
    """1 - d / (sum of the lengths), d the fewest characters to insert and delete: the normalised indel similarity.

    fuzzywuzzy's `ratio`, which TRACE takes, is this in whole percents when python-Levenshtein is installed; without it,
    it is difflib's, which can be lower. Two empty texts score 1.
    """
    from rapidfuzz import fuzz

    return fuzz.ratio(prediction.strip(), answer.strip()) / 100


def code_edit_similarity(prompt: str, prediction: str, answer: str) -> float:
    """Edit similarity after putting literals back for their marks, as CodeXGLUE and TRACE do for Py150.

    <NUM_LIT:7> is 7 and <STR_LIT:a> is a; a mark without a literal is 0 for a number, and nothing for text.
    """

    def plain(code: str) -> str:
        code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
        return re.sub(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", r"\1", code, flags=re.DOTALL)

    return edit_similarity(prompt, plain(prediction), plain(answer))


def sari(prompt: str, prediction: str, answer: str) -> float:
    """SARI with the whole prompt as the text to simplify, as in TRACE's code, and the answer as the one reference.

    Doing nothing right is not 0: an empty prediction rightly deletes all of the prompt that the answer lacks.
    """
    return _sari(prompt, prediction, [answer])


def _sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI (Xu et al. 2016, TACL 4:401-415) of one item: the mean over n-grams of 1, 2, 3 and 4 words.

    It follows the metric `sari` of Hugging Face's `evaluate` where that departs from the authors' code: 0/0 is 1, and
    the recall of keep is equation 5 of the paper. A prediction equal to its only reference scores 1, or less where the
    source has one of its n-grams more often: deleting that n-gram counts as wrong as often as the reference has it.
    """
    old, new, *wanted = (_words(text) for text in (source, prediction, *references))
    return sum(_sari_of_n_grams(n, old, new, wanted) for n in range(1, 5)) / 4


def _sari_of_n_grams(n: int, source: list[str], prediction: list[str], references: list[list[str]]) -> float:
    """The mean of F1 of keep, F1 of add and precision of delete."""

    def count(words: list[str], times: int = 1) -> Counter[tuple[str, ...]]:
        found = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        return Counter({gram: times * number for gram, number in found.items()}) if times > 1 else found

    # The references' counts are summed, so the others are taken as often: what half the references keep is half right.
    old, new = count(source, len(references)), count(prediction, len(references))
    wanted = sum(map(count, references), Counter[tuple[str, ...]]())

    # The precisions of keep and delete give each distinct n-gram the same weight, the recall each occurrence.
    kept, gone = old & new, old - new
    rightly_kept = kept & wanted
    keep = _f1(_mean_share(rightly_kept, kept), _share(rightly_kept.total(), (old & wanted).total()))
    delete = _mean_share(gone - wanted, gone)

    # For add only the distinct n-grams count, not how often they occur.
    added, to_add = new.keys() - old.keys(), wanted.keys() - old.keys()
    add = _f1(_share(len(added & to_add), len(added)), _share(len(added & to_add), len(to_add)))
    return (keep + add + delete) / 3


def _mean_share(part: Counter[tuple[str, ...]], whole: Counter[tuple[str, ...]]) -> float:
    return _share(sum(number / whole[gram] for gram, number in part.items()), len(whole))


def _share(part: float, whole: int) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _words(text: str) -> list[str]:
    # As in `evaluate`, an empty text is one empty word, so an empty prediction counts as adding something wrong.
    return str(_13a()(text.lower())).split(" ")


@cache
def _13a() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer: Any = Tokenizer13a
    return tokenizer()


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "first_character": first_character,
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
    "code_edit_similarity": code_edit_similarity,
    "sari": sari,
}
