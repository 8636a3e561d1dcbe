"""Collect what an MLflow model of a concept needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.core.kept_steps import KeptSteps, of_its_training
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.early_checks import optional_inputs
from dreamartist_pipeline.params import DeviceParams, GenerateParams, RegistrationParams

if TYPE_CHECKING:
    from dreamartist_pipeline.backbones.served import ServedConcept
    from dreamartist_pipeline.core.concept import Concept
else:  # Kedro evaluates a node's annotations when it registers the pipelines; importing torch is slow
    Concept = ServedConcept = Any

BEST, LAST = "best", "last"
"""Aliases of the concept that was chosen by its scores (`training.choose: best`), and of that of the last step."""


@optional_inputs("recommended_settings")
def serve_concept(
    base_model: ModelLocation,
    concept: Concept,
    params: RegistrationParams,
    defaults: GenerateParams,
    device: DeviceParams,
    concept_steps: KeptSteps | None = None,
    recommended_settings: dict[str, Any] | None = None,
) -> tuple[ServedConcept, ...]:
    """Return the concepts to be registered, each with its aliases, base model and defaults; none if that is off.

    Recommended settings are those of the concept itself: another step of its training has the configured ones.

    Raises:
        InputError: no recommended settings for `defaults.recommended`.
    """
    if not params.enabled:
        return ()
    from dreamartist_pipeline.backbones.served import served_concept
    from dreamartist_pipeline.core.strengths import RecommendedSettings, with_recommended

    own = with_recommended(defaults, RecommendedSettings.read(recommended_settings, concept), "generate")
    return tuple(
        served_concept(each, base_model, own if each is concept else defaults, device, params.max_copied_mb, aliases)
        for aliases, each in with_aliases(concepts_of(concept, concept_steps or {}))
    )


def concepts_of(concept: Concept, kept: KeptSteps) -> dict[str, Concept]:
    """Return alias -> concept of a training: the chosen one, if there is one, and the last, if it is kept."""
    if concept.metadata.chosen is None:
        return {LAST: concept}
    steps = of_its_training(concept, kept)
    last = max(steps, default=concept.metadata.num_steps)  # earlier than that, if patience has stopped the training
    if concept.metadata.last_step == last:
        return {BEST: concept, LAST: concept}
    return {BEST: concept} | ({LAST: steps[last]()} if steps else {})


def with_aliases(concepts: Mapping[str, Concept]) -> list[tuple[tuple[str, ...], Concept]]:
    """Return each different concept with its aliases, the first of those that have the same tensors.

    Args:
        concepts: alias -> concept, of one training.
    """
    different: list[tuple[tuple[str, ...], Concept]] = []
    for alias, concept in concepts.items():
        for index, (aliases, other) in enumerate(different):
            if _are_equal(concept, other):
                different[index] = (*aliases, alias), other
                break
        else:
            different.append(((alias,), concept))
    return different


def _are_equal(concept: Concept, other: Concept) -> bool:
    import torch

    return concept.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[name]) for name, tensor in concept.tensors.items()
    )
