"""Concepts of earlier steps of a training, which are kept beside the concept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from dreamartist_pipeline.early_checks import PlannedConcept
from dreamartist_pipeline.errors import InputError

if TYPE_CHECKING:
    from dreamartist_pipeline.core.concept import Concept
    from dreamartist_pipeline.params import EvaluationParams, ExportParams, GenerateParams

KeptSteps = Mapping[int, Callable[[], "Concept"]]
"""Step -> a function that reads its concept."""

log = logging.getLogger(__name__)


def check_step(
    params: GenerateParams | EvaluationParams | ExportParams, planned: PlannedConcept | None, concept_steps: KeptSteps
) -> None:
    """Check that the `step` of a section is kept; of a training in the same run, that it will be scored.

    Raises:
        InputError: it is not.
    """
    if params.step is not None and planned is not None:
        _check_is_among(planned.scored_steps if planned.is_trained_here else concept_steps, params.step, "step")


def concept_at(concept: Concept, kept: KeptSteps, step: int | None, option: str) -> Concept:
    """Return the concept of a kept step; the concept itself for None.

    Args:
        concept: of the training.
        kept: beside it.
        step: the value of the option.
        option: that names the step.

    Raises:
        InputError: the step is not kept, or the kept steps are of another training.
    """
    if step is None:
        return concept
    _check_is_among(kept, step, option)
    earlier = kept[step]()
    if earlier.metadata.identity_sha256 != concept.metadata.identity_sha256:
        raise InputError(
            expected=f"{option} to be a step of the training of the concept",
            got=f"{step}, which is of another training",
            remedy=f"leave {option} out, or train again: the steps beside a concept are replaced with it",
        )
    log.info("The concept of step %d is used, in place of that of step %d.", step, concept.metadata.last_step)
    return earlier


def of_its_training(concept: Concept, kept: KeptSteps) -> KeptSteps:
    """Return the kept steps; none if they are of another training than the concept, which was imported, for example."""
    first = next(iter(kept.values()), None)
    same = first is not None and first().metadata.identity_sha256 == concept.metadata.identity_sha256
    return kept if same else {}


def _check_is_among(steps: Collection[int], step: int, option: str) -> None:
    if step in steps:
        return
    known = ", ".join(map(str, sorted(steps))) or "none"
    raise InputError(
        expected=f"{option} to be a scored step of the training ({known})",
        got=str(step),
        remedy="choose one of these, or train again with another training.scoring.every"
        if steps
        else f"leave {option} out, or train again with training.choose=best or training.scoring.every=STEPS",
    )
