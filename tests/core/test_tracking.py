"""Node functions with a bound tracker."""

from __future__ import annotations

import inspect

from kedro.pipeline import node

from dreamartist_pipeline.core.tracking import NoTracker, Tracker, tracked


def _count(words: str, times: int, tracker: Tracker) -> int:
    assert isinstance(tracker, NoTracker)
    return len(words) * times


def test_the_signature_is_that_of_the_other_arguments() -> None:
    bound = tracked(_count, NoTracker())

    assert list(inspect.signature(bound).parameters) == ["words", "times"]
    assert bound("ab", times=3) == 6


def test_inputs_by_name_may_have_any_order() -> None:
    counting = node(tracked(_count, NoTracker()), inputs={"times": "params:times", "words": "text"}, outputs="number")

    assert counting.inputs == ["text", "params:times"]
