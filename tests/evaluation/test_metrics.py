"""Metrics of generated answers and OP and BWT: published values, values by hand, and properties of any text."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hft_cli.evaluation.metrics import (
    METRICS,
    accuracy,
    backward_transfer,
    edit_similarity,
    first_character,
    overall_performance,
    rouge_l,
    sari,
    sari_with_references,
    score,
    trace_rouge_l,
)

vocabulary = st.sampled_from(["a", "b", "c", "Über", "模型", "7", "3.5", ".", "?!"])
words = st.lists(vocabulary, max_size=12).map(" ".join)
distinct_words = st.lists(vocabulary, unique=True).map(" ".join)
texts = st.text(max_size=40) | st.text("。，！模型遗忘", max_size=10) | st.text(" \n.,;!?-_&", max_size=10) | words
matrices = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n, max_size=n)
)
ascii_texts = st.text(st.characters(max_codepoint=127)) | st.text("abAB1 -_.\n")


@pytest.fixture(scope="module", autouse=True)
def imported():
    """A metric's first call imports what it needs, which would exceed hypothesis's deadline for one example."""
    for metric in METRICS.values():
        metric("p", "a", "a")


# ------------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("metric", METRICS)
@given(prompt=texts, prediction=texts, answer=texts)
def test_a_score_is_between_0_and_1_for_any_texts(metric, prompt, prediction, answer):
    assert 0 <= METRICS[metric](prompt, prediction, answer) <= 1


@pytest.mark.parametrize("metric", ["accuracy", "first_character", "rouge_l", "edit_similarity"])
@given(prompt=texts, before=texts, word=st.sampled_from(["x", "7", "模型", "Über"]), after=texts)
def test_the_answer_itself_scores_1(metric, prompt, before, word, after):
    answer = f"{before} {word} {after}"
    assert METRICS[metric](prompt, answer, answer) == 1


@pytest.mark.parametrize("metric", ["accuracy", "first_character", "rouge_l", "edit_similarity"])
@given(prompt=texts, prediction=texts, answer=texts)
def test_white_space_around_a_text_does_not_count(metric, prompt, prediction, answer):
    plain = METRICS[metric](prompt, prediction, answer)
    assert METRICS[metric](prompt, f"\n {prediction}\t", f" {answer}\n") == plain


@pytest.mark.parametrize("metric", ["accuracy", "first_character", "rouge_l", "edit_similarity"])
@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_prediction_of_an_answer_scores_0(metric, empty):
    assert METRICS[metric]("Why?", empty, "Because.") == 0


def test_items_are_scored_in_their_order():
    prompts = ["p", "q", "r"]
    assert score("accuracy", prompts, ["a", "b", "c"], ["a", "x", "c"]) == [1, 0, 1]
    assert score("sari", prompts, ["q", "q", "q"], ["q"] * 3) == [sari(prompt, "q", "q") for prompt in prompts]
    assert score("rouge_l", [], [], []) == []


@pytest.mark.parametrize("numbers", [(1, 2, 2), (2, 1, 2), (2, 2, 1)])
def test_lists_of_different_lengths_are_refused(numbers):
    with pytest.raises(ValueError, match="argument"):
        score("accuracy", *(["a"] * number for number in numbers))


def test_importing_metrics_needs_the_standard_library_only():
    code = "import sys; before = set(sys.modules); import hft_cli.evaluation.metrics; "
    code += "names = {name.split('.')[0] for name in set(sys.modules) - before}; "
    code += "print(sorted(names - sys.stdlib_module_names))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "['hft_cli']"


# ----------------------------------------------------------------------------------------- accuracy, first_character


def test_accuracy_requires_the_whole_answer():
    assert accuracy("p", "neutral", "neutral") == 1
    assert accuracy("p", "neutral.", "neutral") == 0
    assert accuracy("p", "Neutral", "neutral") == 0


def test_first_character_compares_the_option_letter_only():
    assert first_character("p", "B\nBecause it melts.", "B\nIt is warmer than ice.") == 1
    assert first_character("p", "A\nIt is warmer than ice.", "B\nIt is warmer than ice.") == 0
    assert first_character("p", "", "") == 0


# ---------------------------------------------------------------------------------------------------------- rouge_l


def test_marks_belong_to_the_words_of_rouge_l():
    assert rouge_l("", "की", "कि") == 0
    assert rouge_l("", "की बात", "की बात") == 1
    assert rouge_l("", "caf\u00e9", "cafe\u0301") == 1


def test_rouge_l_equals_a_value_computed_by_hand():
    # The common subsequence is "the cat mat": 3 of 4 words and 3 of 6.
    assert rouge_l("p", "The cat! Red mat.", "the cat is on the mat") == pytest.approx(2 * 3 / (4 + 6))


@given(ascii_texts, ascii_texts)
def test_rouge_l_equals_the_rouge_score_package_on_ascii_text(prediction, answer):
    from rouge_score.rouge_scorer import RougeScorer

    assert rouge_l("p", prediction, answer) == RougeScorer(["rougeL"]).score(answer, prediction)["rougeL"].fmeasure


def test_rouge_l_handles_words_of_any_alphabet():
    assert rouge_l("p", "遗忘", "学习") == 0
    assert rouge_l("p", "模型，遗忘", "模型，学习") == pytest.approx(1 / 2)
    assert rouge_l("p", "ÜBER Zürich", "über Zug") == pytest.approx(1 / 2)  # "Zürich" is no "z"


@pytest.mark.parametrize("harm", ["nothing", "shuffled", "half", "repeated", "sentences", "empty", "periods", "long"])
def test_trace_rouge_l_is_what_its_code_computes(harm):
    """TRACE calls Rouge(metrics=["rouge-l"]).get_scores(answer, prediction, avg=True), and scores empty texts 0."""
    from rouge import Rouge

    answer = "The council adopts the plan. It asks the clerk to publish the plan. The vote was five to two."
    words = answer.split()
    prediction = {
        "nothing": answer, "shuffled": " ".join(words[::-1]), "half": " ".join(words[::2]),
        "repeated": f"{answer} " * 3,
        "sentences": ". ".join(answer.split(". ")[::-1]), "empty": "", "periods": "...", "long": "a b c " * 2000,
    }[harm]  # fmt: skip
    value = trace_rouge_l("p", prediction, answer)
    if harm in ("empty", "periods"):
        assert value == 0
    elif harm == "long":
        assert value == 0  # and no RecursionError
    else:
        assert value == Rouge(metrics=["rouge-l"]).get_scores(answer, prediction, avg=True)["rouge-l"]["f"]
        assert (value > rouge_l("p", prediction, answer)) is (harm != "nothing")


def test_rouge_l_of_punctuation_only_is_0():
    assert rouge_l("p", "?!", "?!") == 0


# -------------------------------------------------------------------------------------------------- edit_similarity


def test_edit_similarity_counts_a_replaced_letter_twice():
    assert edit_similarity("p", "return a", "return b") == pytest.approx(1 - 2 / 16)
    assert edit_similarity("p", "", "") == 1


def longest_common(a: str, b: str) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


@given(st.text("ab模 ", max_size=12), st.text("ab模 ", min_size=1, max_size=12))
def test_edit_similarity_is_twice_the_lcs_over_all_characters(prediction, answer):
    a, b = prediction.strip(), answer.strip()
    expected = 2 * longest_common(a, b) / (len(a) + len(b)) if a or b else 1
    assert edit_similarity("p", prediction, answer) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------- sari

SOURCE = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]


@pytest.mark.parametrize(
    ("prediction", "published"),
    [
        ("About 95 you now get in .", 26.953601953601954),  # the README of `evaluate`'s metric
        ("About 95 species are now agreed .", 61.709656084656075),  # huggingface/evaluate, issue 376
    ],
)
def test_sari_equals_published_values(prediction, published):
    assert sari_with_references(SOURCE, prediction, REFERENCES) == pytest.approx(published / 100, abs=1e-12)


def test_sari_uses_the_recall_of_the_paper_and_0_of_0_is_1():
    # The example of cocoxu/simplification, issue 6. Words: the kept "b" has precision 1/2 and recall 1/3, "a" is
    # deleted wrongly, and nothing had to be added. Pairs: "a b" is deleted, but one of two references keeps it, so the
    # precision is 1/2. There are no longer n-grams.
    one_word = (2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3) + 0 + 1) / 3
    two_words = (0 + 1 / 2 + 1) / 3
    assert sari_with_references("a b", "b", ["a b", "a"]) == pytest.approx((one_word + two_words + 1 + 1) / 4)


@given(words)
def test_sari_of_a_correct_copy_is_1(text):
    assert sari(text, text, text) == 1


@given(source=distinct_words, answer=words)
def test_sari_of_the_reference_is_1_if_the_source_has_no_repeats(source, answer):
    assert sari(source, answer, answer) == 1


def test_sari_of_the_reference_is_below_1_if_the_source_repeats():
    # One of two "a" is deleted, but the reference contains an "a": the deletion is wrong.
    assert sari("a a", "a", "a") == pytest.approx(((1 + 0 + 1) / 3 + 3) / 4)


def test_sari_of_a_wrong_copy_equals_a_value_by_hand():
    # Words: keep has precision 1/2 and recall 1, nothing is deleted, "c" is not added. Pairs: "a b" is kept wrongly,
    # "a c" is not added. There are no longer n-grams.
    one_word = (2 * (1 / 2) * 1 / (1 / 2 + 1) + 0 + 1) / 3
    two_words = (0 + 0 + 1) / 3
    assert sari("a b", "a b", "a c") == pytest.approx((one_word + two_words + 1 + 1) / 4)


@given(source=words, prediction=words, references=st.lists(words, min_size=1, max_size=3), times=st.integers(2, 4))
def test_sari_depends_on_the_share_of_references_that_agree(source, prediction, references, times):
    once = sari_with_references(source, prediction, references)
    assert sari_with_references(source, prediction, references * times) == pytest.approx(once)
    assert sari_with_references(source, prediction, references[::-1]) == pytest.approx(once)


def test_sari_ignores_case_and_splits_off_punctuation():
    assert sari("It melts, ICE.", "ice melts.", "Ice melts .") == 1
    prediction = "About 95 you now get in."
    assert sari_with_references(SOURCE.upper(), prediction, REFERENCES) == sari_with_references(
        SOURCE, prediction.replace(".", " ."), REFERENCES
    )


def test_sari_of_an_empty_prediction_counts_its_deletions():
    # Correct deletions: 4 of 5 words, all longer n-grams. "a" is not kept; no longer n-gram is to be kept. Nothing of
    # "x y z w" is added.
    assert sari("a b c d e", "", "a x y z w") == pytest.approx(((0 + 0 + 4 / 5) + 3 * (1 + 0 + 1)) / 3 / 4)
    # If nothing has to be added, the empty word still counts as a wrong addition, as in `evaluate`.
    assert sari("a b c d e", "", "a") == pytest.approx(((0 + 0 + 4 / 5) + 3 * (1 + 1 + 1)) / 3 / 4)


def test_literals_of_code_replace_their_placeholders():
    score = METRICS["code_edit_similarity"]
    assert score("", 'x = "<STR_LIT:a>" + <NUM_LIT:7>', 'x = "a" + 7') == 1
    assert score("", "f ( <NUM_LIT> , '<CHAR_LIT>' , \"<STR_LIT>\" )", "f ( 0 , '' , \"\" )") == 1
    assert score("", "x = <NUM_LIT:8>", "x = 7") < 1


# ------------------------------------------------------------------------------------------------------- OP, BWT


def test_op_and_bwt_equal_values_computed_by_hand():
    scores = [[0.9, 0.1, 0.0], [0.5, 0.8, 0.2], [0.4, 0.6, 0.7]]
    assert overall_performance(scores) == pytest.approx((0.4 + 0.6 + 0.7) / 3)
    assert backward_transfer(scores) == pytest.approx(((0.4 - 0.9) + (0.6 - 0.8)) / 2)


@given(matrices)
def test_bwt_is_0_if_nothing_is_forgotten_and_scales_hold(scores):
    assert 0 <= overall_performance(scores) <= 1
    assert -1 <= backward_transfer(scores) <= 1
    nothing_forgotten = [[scores[task][task] for task in range(len(scores))] for _ in scores]
    assert backward_transfer(nothing_forgotten) == 0


@pytest.mark.parametrize("scores", [[], [[1.0, 0.5]], [[1.0], [0.5]]])
def test_a_matrix_that_is_not_square_is_refused(scores):
    with pytest.raises(ValueError, match="a row and a column for each round"):
        overall_performance(scores)
    with pytest.raises(ValueError, match="a row and a column for each round"):
        backward_transfer(scores)


def test_bwt_of_a_single_round_is_refused():
    with pytest.raises(ValueError, match="two rounds or more"):
        backward_transfer([[0.5]])
