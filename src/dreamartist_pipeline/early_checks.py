"""Checks before the first node of a run, so that a run fails at once on what would end it after minutes or hours.

A node's function names its check; the hooks, which know no model library, call it, and the node does not repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dreamartist_pipeline.params import LoRAGroup, TrainingParams

_NAME = "early_check"
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class PlannedConcept:
    """What is known of a run's concept before its first node: of one that it trains, or that is there already.

    Attributes:
        is_trained_here: whether the run trains it.
        zero_terminal_snr: whether it is drawn with a noise schedule that ends without signal.
        groups: network -> its LoRA groups.
        has_words: whether it has trigger words.
    """

    is_trained_here: bool
    zero_terminal_snr: bool
    groups: Mapping[str, Sequence[LoRAGroup]]
    has_words: bool

    @classmethod
    def of_training(cls, params: TrainingParams) -> PlannedConcept:
        """Return what a training will make."""
        return cls(True, params.zero_terminal_snr, params.lora, bool(params.words.names))


Check = Callable[[Any, PlannedConcept | None], None]
"""(a section's parameters, the run's concept or None where there is none yet, as in an import); raises InputError."""


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
