"""A small concept, and its MLflow model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import concept_metadata, start_concept
from dreamartist_pipeline.backbones.served import ServedConcept, served_concept
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.params import DeviceParams, GenerateParams, SamplerParams, TrainingParams
from dreamartist_pipeline.serving.packaging import save_model

CPU = DeviceParams(device="cpu")
DEFAULTS = GenerateParams(prompts="a {pt1}", seed=7, sampler=SamplerParams(num_inference_steps=2, batch_size=3))


@pytest.fixture(scope="session")
def concept(tiny_base_model: Path, make_training_params: Callable[..., TrainingParams]) -> Concept:
    """A concept with adapters far from zero."""
    backbone, params = load_backbone(BaseModelFiles(tiny_base_model), CPU), make_training_params()
    new = start_concept(backbone, params, 1, 0)
    for layer in new.stacks["unet"].layers.values():
        for update in layer.updates:
            torch.nn.init.normal_(update.up, std=0.5, generator=torch.Generator().manual_seed(0))
    return new.snapshot(concept_metadata(backbone, params, 1))


@pytest.fixture
def serve(concept: Concept, tiny_base_model: Path) -> Callable[..., ServedConcept]:
    """Return what serves the concept with a base model, by default the tiny one, copied up to `max_copied_mb`."""

    def make(base_model: Path = tiny_base_model, max_copied_mb: int = 100) -> ServedConcept:
        return served_concept(concept, ModelLocation(str(base_model)), DEFAULTS, CPU, max_copied_mb, ("last",))

    return make


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, concept: Concept, tiny_base_model: Path) -> Path:
    """Return an MLflow model with a copied base model. Do not write into it."""
    folder = tmp_path_factory.mktemp("mlflow_model") / "last"
    save_model(served_concept(concept, ModelLocation(str(tiny_base_model)), DEFAULTS, CPU, 100, ("last",)), folder)
    return folder
