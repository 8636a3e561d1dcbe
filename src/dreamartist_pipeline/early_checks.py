"""Checks of a node's parameters before the first node of a run, so that hours of work do not end at a wrong option.

A node's function names its check; the hooks, which know no model library, call it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from dreamartist_pipeline.params import TrainingParams

_NAME = "early_check"
_Function = TypeVar("_Function", bound=Callable[..., Any])

Check = Callable[[Any, TrainingParams | None], None]
"""(a section's parameters, those of the training that this run begins with or None); raises InputError."""


@dataclass(frozen=True)
class EarlyCheck:
    """What to check, and the section of the parameters that it is about."""

    section: str
    check: Check


def checked_early(section: str, check: Check) -> Callable[[_Function], _Function]:
    """Have `params:<section>` checked before any node runs, in every run with the decorated node.

    The function itself stays as it is.
    """

    def mark(function: _Function) -> _Function:
        setattr(function, _NAME, EarlyCheck(section, check))
        return function

    return mark


def early_check_of(function: Callable[..., Any]) -> EarlyCheck | None:
    """Return the check that a node's function names, if any."""
    return getattr(function, _NAME, None)
