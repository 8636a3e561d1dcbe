"""The node of the registration: which concepts are registered, under which aliases, with which base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import concept_metadata, start_concept
from dreamartist_pipeline.backbones.served import served_concept
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.core.strengths import RecommendedSettings
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, GenerateParams, RegistrationParams, StrengthParams, TrainingParams
from dreamartist_pipeline.pipelines.registration.nodes import concepts_of, serve_concept, with_aliases
from refusals import says

CPU = DeviceParams(device="cpu")
DEFAULTS = GenerateParams(prompts="a {pt1}", seed=7)


@pytest.fixture(scope="module")
def concept(tiny_base_model: Path, make_training_params: Callable[..., TrainingParams]) -> Concept:
    backbone, params = load_backbone(BaseModelFiles(tiny_base_model), CPU), make_training_params()
    return start_concept(backbone, params, 1, 0).snapshot(concept_metadata(backbone, params, 1))


def test_the_last_concept_is_registered_with_its_base_model(concept: Concept, tiny_base_model: Path) -> None:
    (served,) = serve_concept(ModelLocation(str(tiny_base_model)), concept, RegistrationParams(), DEFAULTS, CPU)
    assert (served.aliases, served.concept, served.defaults, served.device) == (("last",), concept, DEFAULTS, CPU)
    assert served.fingerprint == BaseModelFiles(tiny_base_model).fingerprint()
    assert {"model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"} <= served.copied.keys()


def test_the_concept_that_was_measured_has_the_recommended_settings_and_another_step_the_configured_ones(
    concept: Concept, tiny_base_model: Path
) -> None:
    chosen, last = at_step(concept, 2, chosen="it has the highest fidelity"), at_step(concept, 4)
    last = dataclasses.replace(last, tensors={name: tensor + 1 for name, tensor in last.tensors.items()})
    settings = RecommendedSettings(
        strength=StrengthParams(positive=0.75, negative=0.5),
        guidance_scale=6.0,
        concept_sha256=chosen.sha256(),
        reasons=("measured",),
        fidelity=0.5,
        agreement=None,
        copying=None,
        num_images=4,
    ).model_dump(mode="json")
    wanted = DEFAULTS.model_copy(update={"recommended": True})
    given = ModelLocation(str(tiny_base_model)), chosen, RegistrationParams(), wanted, CPU, {4: lambda: last}
    best, other = serve_concept(*given, settings)
    assert (best.aliases, other.aliases) == (("best",), ("last",))
    assert (best.defaults.strength.negative, best.defaults.sampler.guidance_scale) == (0.5, 6.0)
    assert other.defaults == wanted
    with pytest.raises(InputError, check=says(expected="generate.recommended")):
        serve_concept(*given)


def test_nothing_is_registered_if_it_is_off(concept: Concept, tiny_base_model: Path) -> None:
    off = RegistrationParams(enabled=False)
    assert serve_concept(ModelLocation(str(tiny_base_model)), concept, off, DEFAULTS, CPU) == ()


def test_a_base_model_above_the_limit_is_referred_to(concept: Concept, tiny_base_model: Path) -> None:
    off = RegistrationParams(max_copied_mb=0)
    (served,) = serve_concept(ModelLocation(str(tiny_base_model)), concept, off, DEFAULTS, CPU)
    assert served.copied == {}
    assert served.base_model.path == str(tiny_base_model)


def test_a_base_model_with_another_autoencoder_is_referred_to_by_absolute_paths(
    concept: Concept, tiny_base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_base_model.parent)
    location = ModelLocation(tiny_base_model.name, vae=f"{tiny_base_model.name}/vae")
    served = served_concept(concept, location, DEFAULTS, CPU, 100)
    assert served.copied == {}
    assert served.base_model == ModelLocation(str(tiny_base_model), vae=str(tiny_base_model / "vae"))


def test_a_chosen_concept_is_the_best_beside_that_of_the_last_step(concept: Concept) -> None:
    chosen = at_step(concept, 2, chosen="it has the highest fidelity")
    last = at_step(concept, 4)
    assert concepts_of(concept, {4: lambda: last}) == {"last": concept}
    assert concepts_of(chosen, {2: lambda: chosen, 4: lambda: last}) == {"best": chosen, "last": last}
    assert concepts_of(chosen, {}) == {"best": chosen}
    assert concepts_of(at_step(concept, 4, chosen="it is the last"), {}).keys() == {"best", "last"}


def test_the_last_concept_is_that_of_the_step_at_which_patience_has_stopped_the_training(concept: Concept) -> None:
    first, second = (at_step(concept, step, chosen="it has the highest fidelity") for step in (1, 2))
    assert concepts_of(first, {1: lambda: first, 2: lambda: second}) == {"best": first, "last": second}
    assert concepts_of(second, {1: lambda: first, 2: lambda: second}) == {"best": second, "last": second}


def test_kept_steps_of_another_training_are_not_registered(concept: Concept) -> None:
    other = at_step(concept, 4, identity_sha256="of another training")
    assert concepts_of(at_step(concept, 2, chosen="best"), {4: lambda: other}).keys() == {"best"}


def at_step(concept: Concept, step: int, **changed: str) -> Concept:
    """Return the concept as that of a step of a training of four steps."""
    facts = {"num_steps": 4, "step": step, "identity_sha256": "of the training", **changed}
    return dataclasses.replace(concept, metadata=concept.metadata.model_copy(update=facts))


def test_aliases_of_one_concept_stand_together(concept: Concept) -> None:
    same = dataclasses.replace(concept, tensors={name: tensor.clone() for name, tensor in concept.tensors.items()})
    assert with_aliases({"last": concept, "best": same}) == [(("last", "best"), concept)]


def test_different_concepts_have_an_alias_each(concept: Concept) -> None:
    other = dataclasses.replace(concept, tensors={name: tensor + 1 for name, tensor in concept.tensors.items()})
    assert [aliases for aliases, _ in with_aliases({"last": concept, "best": other})] == [("last",), ("best",)]
