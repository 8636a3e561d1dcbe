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
from dreamartist_pipeline.params import DeviceParams, GenerateParams, RegistrationParams, TrainingParams
from dreamartist_pipeline.pipelines.registration.nodes import serve_concept, with_aliases

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


def test_aliases_of_one_concept_stand_together(concept: Concept) -> None:
    same = dataclasses.replace(concept, tensors={name: tensor.clone() for name, tensor in concept.tensors.items()})
    assert with_aliases({"last": concept, "best": same}) == [(("last", "best"), concept)]


def test_different_concepts_have_an_alias_each(concept: Concept) -> None:
    other = dataclasses.replace(concept, tensors={name: tensor + 1 for name, tensor in concept.tensors.items()})
    assert [aliases for aliases, _ in with_aliases({"last": concept, "best": other})] == [("last",), ("best",)]
