"""Concepts of earlier steps of a training, which are kept beside the concept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dreamartist_pipeline.early_checks import PlannedConcept
from dreamartist_pipeline.errors import InputError

if TYPE_CHECKING:
    from dreamartist_pipeline.core.concept import Concept
    from dreamartist_pipeline.params import EvaluationParams, ExportParams, GenerateParams

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptSteps:
    """The kept steps of one training.

    Attributes:
        identity_sha256: of the training, as in the metadata of its concept; None without steps.
        read: step -> a function that reads its concept.
    """

    identity_sha256: str | None = None
    read: Mapping[int, Callable[[], Concept]] = field(default_factory=dict)

    def check(self, step: int, identity_sha256: str | None, option: str) -> None:
        """Check that a step of this training is kept.

        Args:
            step: of the training.
            identity_sha256: of the concept beside the steps.
            option: that names the step.

        Raises:
            InputError: it is not, or the steps are of another training than the concept.
        """
        expected = f"{option} to be a kept step of the training of the concept"
        if not self.read or self.identity_sha256 != identity_sha256:
            got = "steps of another training only" if self.read else f"{step}, and none is kept"
            remedy = f"leave {option} out, or train again with training.scoring: steps are kept when they are scored"
            raise InputError(expected, got, remedy)
        if step not in self.read:
            raise InputError(
                expected=f"{expected}: {', '.join(map(str, sorted(self.read)))}",
                got=str(step),
                remedy="choose one of these, or train again with another training.scoring.every",
            )


def check_step(
    params: GenerateParams | EvaluationParams | ExportParams, planned: PlannedConcept | None, concept_steps: KeptSteps
) -> None:
    """Check that the `step` of a section is kept; of a concept that the run makes, that is not known yet.

    Raises:
        InputError: see `KeptSteps.check`.
    """
    if params.step is not None and planned is not None and not planned.is_trained_here:
        concept_steps.check(params.step, planned.identity_sha256, "step")


def concept_at(concept: Concept, kept: KeptSteps | None, step: int | None, option: str) -> Concept:
    """Return the concept of a kept step; the concept itself for None.

    Args:
        concept: of the training.
        kept: beside it; None for no steps.
        step: the value of the option.
        option: that names the step.

    Raises:
        InputError: see `KeptSteps.check`.
    """
    if step is None:
        return concept
    kept = kept or KeptSteps()
    kept.check(step, concept.metadata.identity_sha256, option)
    log.info("The concept of step %d is used, in place of that of step %s.", step, concept.metadata.step)
    return kept.read[step]()
