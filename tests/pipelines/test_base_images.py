"""The base model's images of an evaluation: drawn once for all concepts that are evaluated alike."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import concept_metadata, start_concept
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.image_set import CaptionedImages
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, EvaluationParams, SamplerParams, TrainingParams
from dreamartist_pipeline.pipelines.evaluation.base_images import base_drawings, base_image_set
from dreamartist_pipeline.pipelines.evaluation.measuring import Drawings
from dreamartist_pipeline.pipelines.evaluation.nodes import draw_base_images
from dreamartist_pipeline.pipelines.evaluation.planning import PRIOR, SUBJECT
from image_sets import drawn, set_dataset
from refusals import says

CPU = DeviceParams(device="cpu")
PARAMS = EvaluationParams(
    prompts=("a {pt1}, blue background", "two {pt1}"),
    prior_prompts=("a cat", "a dog"),
    class_word="fox",
    images_per_prompt=3,
    seed=40,
    negative_prompt="blurry",
    sampler=SamplerParams(num_inference_steps=1, batch_size=4),
)
PROMPTS = ("a fox, blue background", "two fox", "a cat", "a dog")


@pytest.fixture(scope="module")
def concept(tiny_base_model: Path) -> Concept:
    backbone = load_backbone(BaseModelFiles(tiny_base_model), CPU)
    params = TrainingParams(
        num_steps=0,
        words={"names": {"pt1": ("my-fox", "my-fox-neg")}, "num_vectors": (1, 2), "init_text": ("fox", "fox")},
        lora_unet=[{"lr": 1e-3, "rank": 2, "layers": [r"re:.*\.attn.?$"]}],
    )
    return start_concept(backbone, params, 1, seed=0).snapshot(concept_metadata(backbone, params, 1))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], list[int], str]]:
    """Replace `generate` by a stub, and return the prompts, seeds and negative prompt of its calls."""
    found: list[tuple[list[str], list[int], str]] = []

    def record(backbone: Any, loaded: Any, prompts: Any, negative_prompt: str, seeds: Any, sampler: Any) -> Any:
        found.append((list(prompts), list(seeds), negative_prompt))
        return [Image.new("RGB", (32, 32), (seed, 0, 0)) for seed in seeds]

    monkeypatch.setattr("dreamartist_pipeline.pipelines.evaluation.drawing.generate", record)
    return found


def with_metadata(concept: Concept, **changes: Any) -> Concept:
    return Concept(concept.tensors, concept.metadata.model_copy(update=changes))


def test_no_batch_has_prompts_with_and_without_the_subject(
    tiny_base_model: Path, concept: Concept, asked: list[tuple[list[str], list[int], str]]
) -> None:
    images = drawn(base_image_set(str(tiny_base_model), concept, PARAMS, CPU))
    rows = [(prompt, seed) for prompt in PROMPTS for seed in (40, 41, 42)]
    batches = [rows[0:4], rows[4:6], rows[6:10], rows[10:12]]
    expected = [([prompt for prompt, _ in batch], [seed for _, seed in batch], "blurry") for batch in batches]
    assert asked == expected
    assert [caption for caption, _ in images] == [f"{prompt} (seed {seed})" for prompt, seed in rows]


def test_they_come_back_by_prompt_and_seed(
    tiny_base_model: Path, concept: Concept, asked: list[tuple[list[str], list[int], str]]
) -> None:
    found = base_drawings(drawn(base_image_set(str(tiny_base_model), concept, PARAMS, CPU)), concept, PARAMS)
    for kind, prompts in ((SUBJECT, PROMPTS[:2]), (PRIOR, PROMPTS[2:])):
        drawings: Drawings = found[kind]
        assert (drawings.prompts, drawings.seeds) == (list(prompts), [40, 41, 42])
        assert [[image.getpixel((0, 0)) for image in row] for row in drawings.images] == [
            [(seed, 0, 0) for seed in (40, 41, 42)]
        ] * 2


def test_another_concept_of_the_class_has_the_same_set_and_draws_nothing(
    tiny_base_model: Path, concept: Concept, asked: list[tuple[list[str], list[int], str]], tmp_path: Path
) -> None:
    other = with_metadata(concept, words={"pt1": ("her-fox", "her-fox-neg")}, seed=3, num_steps=900)
    for subject, one in (("mine", concept), ("hers", other)):
        dataset = set_dataset(tmp_path / f"{subject}.json", tmp_path / "sets")
        dataset.save(base_image_set(str(tiny_base_model), one, PARAMS, CPU))
    assert len(asked) == 4
    assert (tmp_path / "mine.json").read_bytes() == (tmp_path / "hers.json").read_bytes()
    assert json.loads((tmp_path / "mine.json").read_text())["negative_prompt"] == "blurry"


Change = Callable[[Concept, EvaluationParams], tuple[Concept, EvaluationParams]]


def changed(**values: Any) -> Change:
    return lambda concept, params: (concept, params.model_copy(update=values))


@pytest.mark.parametrize(
    "change",
    [
        changed(class_word="cat"),
        changed(prompts=("a {pt1}", "two {pt1}")),
        changed(prompts=(*PARAMS.prompts, "a cat"), prior_prompts=("a dog",)),  # the same prompts in other batches
        changed(images_per_prompt=2),
        changed(seed=41),
        changed(negative_prompt=""),
        changed(sampler=SamplerParams(num_inference_steps=2, batch_size=4)),
        lambda concept, params: (with_metadata(concept, clip_skip=1), params),
        lambda concept, params: (with_metadata(concept, zero_terminal_snr=True), params),
    ],
)
def test_what_changes_the_images_is_another_set(tiny_base_model: Path, concept: Concept, change: Change) -> None:
    usual, other = (
        base_image_set(str(tiny_base_model), *one, CPU).key for one in ((concept, PARAMS), change(concept, PARAMS))
    )
    assert usual != other


def test_the_strength_of_the_concept_is_no_part_of_it(tiny_base_model: Path, concept: Concept) -> None:
    weak = PARAMS.model_copy(update={"strength": {"positive": 0.5, "negative": 0.0}, "branch_images": 0})
    assert len({base_image_set(str(tiny_base_model), concept, one, CPU).key for one in (PARAMS, weak)}) == 1


def grey_images(concept: Concept, params: EvaluationParams, base_model: Path) -> CaptionedImages:
    captions = base_image_set(str(base_model), concept, params, CPU).captions
    return [(caption, lambda: Image.new("RGB", (32, 32))) for caption in captions]


@pytest.mark.parametrize("value", [{"seed": 41}, {"class_word": "cat"}, {"images_per_prompt": 2}])
def test_images_of_another_evaluation_are_refused(
    tiny_base_model: Path, concept: Concept, value: dict[str, Any]
) -> None:
    images = grey_images(concept, PARAMS.model_copy(update=value), tiny_base_model)
    with pytest.raises(InputError, check=says(expected="the 12 prompts and seeds", remedy="draw_base_images")):
        base_drawings(images, concept, PARAMS)


def test_nothing_is_drawn_for_another_picture_or_base_model(
    tiny_base_model: Path, concept: Concept, asked: list[tuple[list[str], list[int], str]]
) -> None:
    trained_on_another = with_metadata(concept, picture_sha256="0" * 64)
    with pytest.raises(InputError, check=says(expected="the prepared image of its training")):
        draw_base_images(str(tiny_base_model), trained_on_another, Image.new("RGB", (32, 32)), PARAMS, CPU)
    wider = {name: tensor.repeat_interleave(2, -1) for name, tensor in concept.tensors.items()}
    with pytest.raises(InputError):
        draw_base_images(
            str(tiny_base_model), dataclasses.replace(concept, tensors=wider), Image.new("RGB", (32, 32)), PARAMS, CPU
        )
    assert asked == []
