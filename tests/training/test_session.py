"""training/session.py: what a phase counts goes on from session to session."""

from __future__ import annotations

import pytest

from hft_cli.training.resume import Identity
from hft_cli.training.session import Losses, Projections, SessionState

IDENTITY = Identity("draw", "data", 2, 3, None)


def test_a_marker_carries_the_counts_to_the_next_session():
    state = SessionState(seconds_before=10.0, losses=Losses(8.0, 4), engines=[{"name": "zero3"}])
    state.projections, state.frozen = Projections(projected=3), [1, 2]
    state.start, state.end = 100.0, 102.5
    marker = state.marker(IDENTITY)
    assert marker | {"draw": "draw", "zero_stage": 3, "frozen_sums": [1, 2], "projected": 3, "seconds": 12.5} == marker
    resumed = SessionState.resumed(marker)
    assert resumed == SessionState(12.5, Losses(8.0, 4), Losses(8.0, 4), [{"name": "zero3"}])


def test_the_mean_loss_is_of_the_steps_of_all_sessions():
    state = SessionState.resumed({"losses": [8.0, 4]})
    state.first_step = 4
    assert state.mean_loss(session_mean=5.0, last_step=6) == pytest.approx((8 + 10) / 6)
    assert SessionState().mean_loss(session_mean=5.0, last_step=3) == 5.0


def test_speed_is_of_this_session():
    state = SessionState(seconds_before=1000.0, tokens=50, start=1.0, end=6.0)
    assert state.tokens_per_second() == 10.0
    assert state.seconds() == 1005.0
