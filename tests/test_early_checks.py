"""Checks attached to the functions of nodes."""

from __future__ import annotations

from typing import Any

from dreamartist_pipeline.early_checks import EarlyCheck, checked_early, early_check_of


def accept(params: Any, training: Any) -> None:
    """Accept everything."""


def draw(x: int) -> int:
    """Return a number."""
    return x + 1


def test_a_check_is_attached_to_the_unchanged_function() -> None:
    assert early_check_of(draw) is None
    assert checked_early("evaluation", accept)(draw) is draw
    assert early_check_of(draw) == EarlyCheck("evaluation", accept)
    assert draw(1) == 2
