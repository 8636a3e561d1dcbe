"""When a training saves its state."""

from __future__ import annotations

import pytest

from dreamartist_pipeline.core import checkpoints
from dreamartist_pipeline.core.checkpoints import Pauses


class Clock:
    """Stands in for `time.monotonic`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let time pass only as a test says."""
    clock = Clock()
    monkeypatch.setattr(checkpoints, "time", clock)
    return clock


def test_a_checkpoint_is_due_after_its_minutes(clock: Clock) -> None:
    pauses = Pauses(lambda: False, checkpoint_minutes=1.0)
    clock.seconds = 59.0
    assert not pauses.checkpoint_is_due()
    clock.seconds = 60.0
    assert pauses.checkpoint_is_due()


@pytest.mark.parametrize(("minutes", "next_s"), [(1.0, 200.0), (10.0, 600.0)])
def test_checkpoints_that_take_long_are_rarer(clock: Clock, minutes: float, next_s: float) -> None:
    pauses = Pauses(lambda: False, minutes)
    with pauses.saving():
        clock.seconds = 10.0
    clock.seconds += next_s - 0.5
    assert not pauses.checkpoint_is_due()
    clock.seconds += 0.5
    assert pauses.checkpoint_is_due()


def test_one_slow_checkpoint_does_not_make_later_ones_rarer(clock: Clock) -> None:
    pauses = Pauses(lambda: False, checkpoint_minutes=1.0)
    with pauses.saving():
        clock.seconds = 60.0
    with pauses.saving():
        clock.seconds += 1.0
    clock.seconds += 60.0
    assert pauses.checkpoint_is_due()


def test_without_minutes_every_step_is_saved(clock: Clock) -> None:
    pauses = Pauses(lambda: False, checkpoint_minutes=0.0)
    with pauses.saving():
        clock.seconds = 10.0
    assert pauses.checkpoint_is_due()


def test_a_training_stops_by_a_request_or_when_its_minutes_are_over(clock: Clock) -> None:
    assert Pauses(lambda: True, 1.0).stops()
    pauses = Pauses(lambda: False, 1.0, max_minutes=2.0)
    assert not pauses.stops()
    clock.seconds = 120.0
    assert pauses.stops() and pauses.is_over
