"""Checks attached to the functions of nodes."""

from __future__ import annotations

from typing import Any

from dreamartist_pipeline.early_checks import EarlyCheck, checked_early, early_checks_of


def accept(params: Any, training: Any) -> None:
    """Accept everything."""


def draw(x: int) -> int:
    """Return a number."""
    return x + 1


def test_a_check_is_attached_to_the_unchanged_function() -> None:
    assert early_checks_of(draw) == ()
    assert checked_early("evaluation", accept)(draw) is draw
    assert early_checks_of(draw) == (EarlyCheck("evaluation", accept),)
    assert draw(1) == 2


def test_several_checks_are_kept_from_the_top() -> None:
    @checked_early("device", accept)
    @checked_early("generate", accept)
    def function() -> None: ...

    assert [check.section for check in early_checks_of(function)] == ["device", "generate"]
