"""The generate node: prompts with slots, names and seeds, strengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dreamartist_pipeline.backbones.base_model import Backbone, BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import attach, concept_metadata, generate, start_concept
from dreamartist_pipeline.backbones.drawing import fill_prompt
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.params import DeviceParams, GenerateParams, SamplerParams, StrengthParams, TrainingParams
from dreamartist_pipeline.pipelines.generate import create_pipeline
from dreamartist_pipeline.pipelines.generate.nodes import generate_images

CPU = DeviceParams(device="cpu")
SAMPLER = SamplerParams(num_inference_steps=2, batch_size=3)


@pytest.fixture(scope="module")
def backbone(tiny_base_model: Path) -> Backbone:
    return load_backbone(BaseModelFiles(tiny_base_model), CPU)


@pytest.fixture(scope="module")
def concept(backbone: Backbone, make_training_params: Callable[..., TrainingParams]) -> Concept:
    """A concept with adapters far from zero."""
    params = make_training_params()
    new = start_concept(backbone, params, 1, 0)
    for layer in new.stacks["unet"].layers.values():
        for update in layer.updates:
            torch.nn.init.normal_(update.up, std=0.5, generator=torch.Generator().manual_seed(0))
    return new.snapshot(concept_metadata(backbone, params, 1))


def test_every_prompt_gets_its_images_by_number_and_seed(tiny_base_model: Path, concept: Concept) -> None:
    params = GenerateParams(prompts=("a {pt1}", "a red cat"), images_per_prompt=2, seed=7, sampler=SAMPLER)
    images, grid = generate_images(str(tiny_base_model), concept, params, CPU)
    assert list(images) == ["000_7", "000_8", "001_7", "001_8"]
    assert {image.size for image in images.values()} == {(32, 32)}
    assert grid.width >= 2 * 32 and grid.height >= 2 * 32


def test_an_image_says_how_it_was_drawn(tiny_base_model: Path, concept: Concept) -> None:
    params = GenerateParams(
        prompts=("a {pt1}",), negative_prompt="blurry", images_per_prompt=1, seed=7, sampler=SAMPLER
    )
    (image,) = generate_images(str(tiny_base_model), concept, params, CPU)[0].values()
    assert image.info["parameters"].splitlines() == [
        "a my-fox",
        "Negative prompt: blurry",
        "Steps: 2, Sampler: dpmsolver++, CFG scale: 4.0, Seed: 7, Size: 32x32, Model: tiny",
    ]
    settings = json.loads(image.info["dreamartist"])
    assert (settings["prompt"], settings["seed"], settings["strength"]) == (
        "a my-fox",
        7,
        {"positive": 1.0, "negative": 1.0},
    )


def test_a_slot_becomes_the_positive_trigger_word(tiny_base_model: Path, concept: Concept) -> None:
    def draw(prompt: str) -> bytes:
        params = GenerateParams(prompts=(prompt,), images_per_prompt=1, sampler=SAMPLER)
        return generate_images(str(tiny_base_model), concept, params, CPU)[0]["000_0"].tobytes()

    assert draw("a {pt1}, blue background") == draw("a my-fox, blue background")
    assert draw("a {pt1}, blue background") != draw("a my-fox-neg, blue background")


def test_a_concept_without_a_trigger_word_is_asked_for_by_its_class_word(
    backbone: Backbone, make_training_params: Callable[..., TrainingParams]
) -> None:
    params = make_training_params(words={}, templates=("a {class}",), class_word="fox")
    without_words = start_concept(backbone, params, 1, 0).snapshot(concept_metadata(backbone, params, 1))
    loaded = attach(backbone, without_words, StrengthParams())
    assert fill_prompt("a {pt1}, blue background", loaded, "fox") == "a fox, blue background"
    assert fill_prompt("a {class}", loaded, "fox") == "a fox"


def test_strengths_reach_the_adapters(tiny_base_model: Path, backbone: Backbone, concept: Concept) -> None:
    strength = StrengthParams(positive=0.0, negative=0.0)
    params = GenerateParams(prompts=("a red cat",), images_per_prompt=1, sampler=SAMPLER, strength=strength)
    images, _ = generate_images(str(tiny_base_model), concept, params, CPU)
    base = attach(backbone, None, StrengthParams())
    (expected,) = generate(backbone, base, ["a red cat"], "", [0], SAMPLER)
    assert images["000_0"].tobytes() == expected.tobytes()


def test_a_concept_of_another_base_model_is_refused(other_tiny_base_model: Path, concept: Concept) -> None:
    params = GenerateParams(prompts=("a {pt1}",), sampler=SAMPLER)
    with pytest.raises(InputError, match="expected the base model that the concept was trained on"):
        generate_images(str(other_tiny_base_model), concept, params, CPU)


def test_one_seed_per_prompt_is_required(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="one seed per prompt, got 2 prompts and 1 seeds"):
        generate(backbone, attach(backbone, None, StrengthParams()), ["a", "b"], "", [1], SAMPLER)


def test_progress_counts_the_images_of_each_batch(backbone: Backbone) -> None:
    counts: list[int] = []
    base = attach(backbone, None, StrengthParams())
    generate(backbone, base, ["a red cat"] * 5, "", range(5), SAMPLER, counts.append)
    assert counts == [3, 2]


def test_the_pipeline_gives_images_and_a_grid() -> None:
    assert create_pipeline().all_outputs() == {"generated_images", "generated_grid"}
