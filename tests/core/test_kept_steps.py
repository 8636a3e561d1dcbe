"""A kept step in place of the concept."""

from __future__ import annotations

import functools

import pytest

from dreamartist_pipeline.core.concept import Concept, ConceptMetadata
from dreamartist_pipeline.core.kept_steps import KeptSteps, check_step, concept_at
from dreamartist_pipeline.early_checks import PlannedConcept
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import GenerateParams
from refusals import says


def concept(identity: str | None, step: int | None = None) -> Concept:
    metadata = ConceptMetadata(
        base_model="tiny",
        base_model_fingerprint="sha256:0",
        num_branches=2,
        num_steps=400,
        words={},
        num_vectors=(1, 1),
        lora={},
        identity_sha256=identity,
        step=step,
    )
    return Concept({}, metadata)


KEPT = {step: functools.partial(concept, "a", step) for step in (80, 120)}


def test_a_step_is_read_and_none_is_the_concept_itself() -> None:
    chosen = concept("a", 120)
    assert concept_at(chosen, KEPT, None, "generate.step") is chosen
    assert concept_at(chosen, KEPT, 80, "generate.step").metadata.step == 80


def test_a_step_that_is_not_kept_is_refused_with_those_that_are() -> None:
    with pytest.raises(InputError, check=says(expected="generate.step", got="300")) as refused:
        concept_at(concept("a"), KEPT, 300, "generate.step")
    assert "80, 120" in refused.value.expected


@pytest.mark.parametrize("kept", [{}, {80: functools.partial(concept, "b", 80)}])
def test_steps_of_no_training_or_of_another_one_are_refused(kept: KeptSteps) -> None:
    with pytest.raises(InputError, check=says(expected="export.step", remedy="export.step")):
        concept_at(concept("a"), kept, 80, "export.step")


def test_a_step_is_checked_before_the_run_also_of_a_training_in_it() -> None:
    existing = PlannedConcept(False, False, {}, ())
    trained = PlannedConcept(True, False, {}, (), scored_steps=(80, 120))
    kept, missing, none = (GenerateParams(prompts=("a",), step=step) for step in (80, 300, None))
    check_step(missing, None, {})  # nothing is known of an imported concept
    check_step(none, existing, {})
    check_step(kept, existing, KEPT)
    check_step(kept, trained, {})
    for planned, steps in ((existing, KEPT), (trained, {})):
        with pytest.raises(InputError, check=says(expected="80, 120", got="300")):
            check_step(missing, planned, steps)
