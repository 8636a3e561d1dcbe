"""Checks that a node's function names."""

from __future__ import annotations

from typing import Any

from dreamartist_pipeline.early_checks import EarlyCheck, checked_early, early_check_of


def refuse_nothing(params: Any, training: Any) -> None:
    """Accept everything."""


def draw(x: int) -> int:
    """Return a number."""
    return x + 1


def test_a_function_names_its_check_and_stays_as_it_is() -> None:
    assert early_check_of(draw) is None
    assert checked_early("evaluation", refuse_nothing)(draw) is draw
    assert early_check_of(draw) == EarlyCheck("evaluation", refuse_nothing)
    assert draw(1) == 2
