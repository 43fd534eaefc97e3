"""Overall performance and backward transfer, by hand and by property."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hft_cli.evaluation.metrics import backward_transfer, overall_performance

matrices = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n, max_size=n)
)


def test_both_are_what_the_definition_gives_by_hand():
    scores = [[0.9, 0.1, 0.0], [0.5, 0.8, 0.2], [0.4, 0.6, 0.7]]
    assert overall_performance(scores) == pytest.approx((0.4 + 0.6 + 0.7) / 3)
    assert backward_transfer(scores) == pytest.approx(((0.4 - 0.9) + (0.6 - 0.8)) / 2)


@given(matrices)
def test_nothing_forgotten_is_a_transfer_of_zero_and_both_stay_on_their_scales(scores):
    assert 0 <= overall_performance(scores) <= 1
    assert -1 <= backward_transfer(scores) <= 1
    kept = [[scores[j][j] for j in range(len(scores))] for _ in scores]
    assert backward_transfer(kept) == 0


@pytest.mark.parametrize("scores", [[], [[1.0, 0.5]], [[1.0], [0.5]]])
def test_a_matrix_that_is_not_square_is_refused(scores):
    with pytest.raises(ValueError, match="a row and a column for each round"):
        overall_performance(scores)
    with pytest.raises(ValueError, match="a row and a column for each round"):
        backward_transfer(scores)


def test_one_round_has_nothing_to_forget():
    with pytest.raises(ValueError, match="two rounds or more"):
        backward_transfer([[0.5]])
