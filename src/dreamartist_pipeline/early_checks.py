"""Checks that run before the first node, so that invalid options fail before hours of work.

A check is attached to the function of a node and called by the hooks; the node does not repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dreamartist_pipeline.params import LoRAGroup, TrainingParams

_NAME = "early_check"
_OPTIONAL = "optional_inputs"
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class PlannedConcept:
    """The properties of a run's concept that are known before the first node.

    Attributes:
        is_trained_here: whether the run trains it; otherwise it exists already.
        zero_terminal_snr: whether its noise schedule has zero terminal SNR.
        groups: network -> its LoRA groups.
        slots: its slots with trigger words.
        needs_regularization: whether its training has rows of the regularization set.
        scored_steps: of its training, if the run trains it.
    """

    is_trained_here: bool
    zero_terminal_snr: bool
    groups: Mapping[str, Sequence[LoRAGroup]]
    slots: Collection[str]
    needs_regularization: bool = False
    scored_steps: Collection[int] = ()

    @classmethod
    def of_training(cls, params: TrainingParams, scored_steps: Collection[int]) -> PlannedConcept:
        """Return the properties of a concept to be trained."""
        return cls(
            is_trained_here=True,
            zero_terminal_snr=params.zero_terminal_snr,
            groups=params.lora,
            slots=tuple(params.words.names),
            needs_regularization=bool(params.regularization_batch_size),
            scored_steps=scored_steps,
        )


Check = Callable[..., None]
"""(parameters of a section, concept of the run or None if unknown, as in an import, inputs) -> None.

It raises an InputError.
"""


@dataclass(frozen=True)
class EarlyCheck:
    """A check of one section of the parameters, and of input files of users."""

    section: str
    check: Check
    inputs: tuple[str, ...] = ()


def checked_early(section: str, check: Check, *inputs: str) -> Callable[[_Function], _Function]:
    """Return a decorator: `params:<section>` is checked before the first node, in every run with the decorated node.

    The decorator returns the function itself. Checks of several decorators are run from the top.

    Args:
        section: of the parameters.
        check: called with the section, the concept of the run, and the inputs.
        inputs: datasets of users' files that are loaded for the check.
    """

    def decorate(function: _Function) -> _Function:
        setattr(function, _NAME, (EarlyCheck(section, check, inputs), *early_checks_of(function)))
        return function

    return decorate


def early_checks_of(function: Callable[..., Any]) -> tuple[EarlyCheck, ...]:
    """Return the checks attached to the function of a node."""
    checks: tuple[EarlyCheck, ...] = getattr(function, _NAME, ())
    return checks


def optional_inputs(*names: str) -> Callable[[_Function], _Function]:
    """Return a decorator: the decorated node gets None for each of these datasets that is not there.

    A dataset is not there either if it belongs to another concept than the run's; see `ReportHooks`.
    """

    def decorate(function: _Function) -> _Function:
        setattr(function, _OPTIONAL, frozenset(names))
        return function

    return decorate


def optional_inputs_of(function: Callable[..., Any]) -> frozenset[str]:
    """Return the datasets that the function of a node can do without."""
    names: frozenset[str] = getattr(function, _OPTIONAL, frozenset())
    return names
