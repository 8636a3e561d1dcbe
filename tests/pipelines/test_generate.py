"""The generate node: prompts with slots, names and seeds, strengths."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import attach, concept_metadata, generate, start_concept
from dreamartist_pipeline.backbones.drawing import fill_prompt
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, GenerateParams, SamplerParams, StrengthParams, TrainingParams
from dreamartist_pipeline.pipelines.generate import create_pipeline
from dreamartist_pipeline.pipelines.generate.nodes import generate_images
from refusals import says

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


def test_prompts_without_a_trigger_word_are_named_in_one_line(
    tiny_base_model: Path, concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    params = GenerateParams(prompts=("two my-foxes", "a {pt1}", "a my_fox"), images_per_prompt=1, sampler=SAMPLER)
    generate_images(str(tiny_base_model), concept, params, CPU)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "2 of 3" in warning
    assert "'two my-foxes', 'a my_fox'" in warning


def test_a_prompt_in_another_spelling_draws_the_same(tiny_base_model: Path, concept: Concept) -> None:
    params = GenerateParams(prompts=("a my-fox", "a my\u2011fox"), images_per_prompt=1, seed=7, sampler=SAMPLER)
    plain, other = generate_images(str(tiny_base_model), concept, params, CPU)[0].values()
    assert plain.tobytes() == other.tobytes()


def test_an_image_has_its_settings_in_its_info(tiny_base_model: Path, concept: Concept) -> None:
    params = GenerateParams(
        prompts=("a {pt1}",), negative_prompt="blurry", images_per_prompt=1, seed=7, sampler=SAMPLER
    )
    (image,) = generate_images(str(tiny_base_model), concept, params, CPU)[0].values()
    prompt, negative_prompt, line = image.info["parameters"].splitlines()
    assert (prompt, negative_prompt) == ("a my-fox", "Negative prompt: blurry")
    values = {"Steps: 2", "Sampler: dpmsolver++", "CFG scale: 4.0", "Seed: 7", "Size: 32x32", "Model: tiny"}
    assert set(line.split(", ")) == values
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


@pytest.mark.parametrize("prompt", ["a {{pt1}:1.5}", "a {pt1:1.5}"])
def test_a_weighted_slot_weights_the_trigger_word_and_is_kept_in_the_image(
    tiny_base_model: Path, concept: Concept, prompt: str
) -> None:
    def draw(prompt: str, negative_prompt: str = "") -> tuple[bytes, dict[str, str]]:
        params = GenerateParams(
            prompts=(prompt,), negative_prompt=negative_prompt, images_per_prompt=1, sampler=SAMPLER
        )
        image = generate_images(str(tiny_base_model), concept, params, CPU)[0]["000_0"]
        return image.tobytes(), json.loads(image.info["dreamartist"])

    image, settings = draw(prompt, "{red:0.5} cat")
    assert image == draw("a {my-fox:1.5}", "{red:0.5} cat")[0]
    assert image != draw("a my-fox", "{red:0.5} cat")[0]
    assert image != draw(prompt, "red cat")[0]
    assert (settings["prompt"], settings["negative_prompt"]) == ("a {my-fox:1.5}", "{red:0.5} cat")


def test_a_slot_in_the_negative_prompt_is_the_negative_word(tiny_base_model: Path, concept: Concept) -> None:
    def draw(negative_prompt: str) -> tuple[bytes, Any]:
        params = GenerateParams(
            prompts=("a {pt1}",), negative_prompt=negative_prompt, images_per_prompt=1, sampler=SAMPLER
        )
        image = generate_images(str(tiny_base_model), concept, params, CPU)[0]["000_0"]
        return image.tobytes(), json.loads(image.info["dreamartist"])["negative_prompt"]

    assert draw("{pt1}, {red}") == draw("my-fox-neg, {red}") != draw("my-fox, {red}")
    assert draw("{pt1}, {red}")[1] == "my-fox-neg, {red}"


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


def test_a_concept_of_another_base_model_is_refused(other_layout: Path, concept: Concept) -> None:
    params = GenerateParams(prompts=("a {pt1}",), sampler=SAMPLER)
    with pytest.raises(InputError, check=says(got="prediction_type (epsilon, not v_prediction)")):
        generate_images(str(other_layout), concept, params, CPU)


def test_a_fine_tune_draws_the_concept_and_is_logged_once(
    other_tiny_base_model: Path, concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    params = GenerateParams(prompts=("a {pt1}",), images_per_prompt=1, sampler=SAMPLER)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            generate_images(str(other_tiny_base_model), concept, params, CPU)
    assert len([message for message in caplog.messages if "'other'" in message]) == 1


def test_the_reference_strengths_are_applied_logged_and_kept_in_the_image(
    tiny_base_model: Path, concept: Concept, caplog: pytest.LogCaptureFixture
) -> None:
    def draw(strength: object) -> Image.Image:
        params = GenerateParams.model_validate(
            {"prompts": ["a {pt1}"], "images_per_prompt": 1, "sampler": SAMPLER, "strength": strength}
        )
        return generate_images(str(tiny_base_model), concept, params, CPU)[0]["000_0"]

    with caplog.at_level(logging.INFO):
        reference = draw("reference")
    assert "Adapter strengths: 0.8 positive, 0.65 negative." in caplog.messages
    assert json.loads(reference.info["dreamartist"])["strength"] == {"positive": 0.8, "negative": 0.65}
    assert reference.tobytes() == draw({"positive": 0.8, "negative": 0.65}).tobytes()
    assert reference.tobytes() != draw({}).tobytes()


# --------------------------------------------------------------------------------------------- sizes and pictures


def png(color: str, size: tuple[int, int] = (32, 32), white: tuple[int, int, int, int] | None = None) -> bytes:
    """Return a picture of one colour, white in a box."""
    image, stream = Image.new("RGB", size, color), io.BytesIO()
    if white:
        image.paste("white", white)
    image.save(stream, "PNG")
    return stream.getvalue()


def one(tiny_base_model: Path, concept: Concept, *pictures: bytes | None, **values: object) -> Image.Image:
    params = GenerateParams.model_validate(
        {"prompts": ["a {pt1}"], "images_per_prompt": 1, "sampler": SAMPLER, **values}
    )
    return generate_images(str(tiny_base_model), concept, params, CPU, *pictures)[0]["000_0"]


def test_width_and_height_are_the_images(tiny_base_model: Path, concept: Concept) -> None:
    assert one(tiny_base_model, concept, width=48, height=24).size == (48, 24)


def test_picture_mask_and_denoise_shape_the_image(tiny_base_model: Path, concept: Concept) -> None:
    red, blue, mask = png("red"), png("blue"), png("black", white=(16, 0, 32, 32))
    drawn = [
        one(tiny_base_model, concept),
        one(tiny_base_model, concept, red, denoise=0.5),
        one(tiny_base_model, concept, red, denoise=1.0),
        one(tiny_base_model, concept, blue, denoise=0.5),
        one(tiny_base_model, concept, red, mask),
        one(tiny_base_model, concept, red, mask, denoise=0.5),
        one(tiny_base_model, concept, red, png("black", white=(0, 0, 16, 32))),
    ]
    assert len({image.tobytes() for image in drawn}) == len(drawn)
    assert one(tiny_base_model, concept, png("red", (64, 16))).size == (64, 16)


def test_the_sheet_shows_the_picture_that_was_started_from(tiny_base_model: Path, concept: Concept) -> None:
    params = GenerateParams(prompts=("a {pt1}",), images_per_prompt=1, sampler=SAMPLER)
    _, bare = generate_images(str(tiny_base_model), concept, params, CPU)
    _, sheet = generate_images(str(tiny_base_model), concept, params, CPU, png("red"))
    assert sheet.width > bare.width
    assert (255, 0, 0) in [color for _, color in sheet.getcolors(1 << 20) or []]


@pytest.mark.parametrize(
    ("pictures", "values", "parts"),
    [
        ((None, png("white")), {}, {"expected": "mask", "got": "none", "remedy": "init_image"}),
        ((png("red"), png("white", (32, 16))), {}, {"expected": "init_mask", "got": "32 × 16"}),
        ((png("red"), png("black")), {}, {"expected": "init_mask", "got": "white"}),
        ((b"text",), {}, {"expected": "init_image", "got": "b'text'"}),
        ((), {"denoise": 0.5}, {"expected": "denoise 0.5", "got": "none"}),
        ((png("red"),), {"sampler": {"num_inference_steps": 1}}, {"got": "denoise 0.8 of 1 steps"}),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_a_model_is_loaded(
    tmp_path: Path,
    concept: Concept,
    pictures: tuple[bytes | None, ...],
    values: dict[str, object],
    parts: dict[str, str],
) -> None:
    with pytest.raises(InputError, check=says(**parts)):
        one(tmp_path / "no base model", concept, *pictures, **values)


def test_one_seed_per_prompt_is_required(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        generate(backbone, attach(backbone, None, StrengthParams()), ["a", "b"], "", [1], SAMPLER)


def test_progress_counts_the_images_of_each_batch(backbone: Backbone) -> None:
    counts: list[int] = []
    base = attach(backbone, None, StrengthParams())
    generate(backbone, base, ["a red cat"] * 5, "", range(5), SAMPLER, counts.append)
    assert counts == [3, 2]


def test_the_pipeline_gives_images_and_a_grid() -> None:
    assert create_pipeline().all_outputs() == {"generated_images", "generated_grid"}


def test_recommended_settings_are_used_on_request_only(tiny_base_model: Path, concept: Concept) -> None:
    params = GenerateParams(prompts=("a {pt1}",), images_per_prompt=1, sampler=SAMPLER)
    strength = StrengthParams(positive=0.5, negative=0.25)
    recommended = {
        "strength": strength.model_dump(),
        "guidance_scale": 2.0,
        "concept_sha256": concept.sha256(),
        "reasons": ["strengths: …"],
        "fidelity": None,
        "agreement": None,
        "copying": None,
        "num_images": 1,
    }

    def drawn(params: GenerateParams) -> bytes:
        images, _ = generate_images(str(tiny_base_model), concept, params, CPU, recommended_settings=recommended)
        return images["000_0"].tobytes()

    usual, asked = drawn(params), drawn(params.model_copy(update={"recommended": True}))
    sampler = SAMPLER.model_copy(update={"guidance_scale": 2.0})
    assert asked == drawn(params.model_copy(update={"strength": strength, "sampler": sampler})) != usual
    assert usual == generate_images(str(tiny_base_model), concept, params, CPU)[0]["000_0"].tobytes()
