"""The base model's images of an evaluation: drawn once for all concepts that are evaluated alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import concept_metadata, start_concept
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.image_set import ImageSet
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, EvaluationParams, SamplerParams, StrengthParams, TrainingParams
from dreamartist_pipeline.pipelines.evaluation.base_images import base_drawings, base_image_set
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
        return [
            Image.new("RGB", (32, 32), (seed, PROMPTS.index(prompt), 0))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

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
    requested = base_image_set(str(tiny_base_model), concept, PARAMS, CPU)
    found = base_drawings(drawn(requested), requested, concept, PARAMS)
    for kind, numbers in ((SUBJECT, (0, 1)), (PRIOR, (2, 3))):
        drawings = found[kind]
        assert (drawings.prompts, drawings.seeds) == ([PROMPTS[number] for number in numbers], [40, 41, 42])
        assert [[image.getpixel((0, 0)) for image in row] for row in drawings.images] == [
            [(seed, number, 0) for seed in (40, 41, 42)] for number in numbers
        ]


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


OTHER: dict[str, Change] = {
    "another class word": changed(class_word="cat"),
    "other prompts": changed(prompts=("a {pt1}", "two {pt1}")),
    "the same prompts in other batches": changed(prompts=(*PARAMS.prompts, "a cat"), prior_prompts=("a dog",)),
    "fewer seeds": changed(images_per_prompt=2),
    "another seed": changed(seed=41),
    "no negative prompt": changed(negative_prompt=""),
    "more steps": changed(sampler=SamplerParams(num_inference_steps=2, batch_size=4)),
    "other batches": changed(sampler=SamplerParams(num_inference_steps=1, batch_size=3)),
    "clip_skip of the concept": lambda concept, params: (with_metadata(concept, clip_skip=1), params),
    "noise schedule of the concept": lambda concept, params: (with_metadata(concept, zero_terminal_snr=True), params),
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_what_changes_the_images_is_another_set_and_is_not_taken_for_it(
    tiny_base_model: Path, concept: Concept, change: Change
) -> None:
    usual = base_image_set(str(tiny_base_model), concept, PARAMS, CPU)
    other = base_image_set(str(tiny_base_model), *change(concept, PARAMS), CPU)
    assert usual.key != other.key
    stored = ImageSet([(caption, lambda: Image.new("RGB", (32, 32))) for caption in other.captions], other.manifest)
    with pytest.raises(InputError, check=says(got="images with another", remedy="--pipeline evaluation")):
        base_drawings(stored, usual, concept, PARAMS)


def test_one_prompt_twice_is_not_two_seeds(tiny_base_model: Path, concept: Concept) -> None:
    twice = {"prompts": ("a {pt1}", "a {pt1}"), "prior_prompts": ("a cat", "a cat"), "images_per_prompt": 1}
    seeds = {"prompts": ("a {pt1}",), "prior_prompts": ("a cat",), "images_per_prompt": 2}
    both = [PARAMS.model_copy(update=one) for one in (twice, seeds)]
    assert len({base_image_set(str(tiny_base_model), concept, one, CPU).key for one in both}) == 2


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"dtype": "float16"}])
def test_the_dtype_of_the_base_model_is_part_of_it(
    tiny_base_model: Path, concept: Concept, change: dict[str, Any]
) -> None:
    devices = (CPU, CPU.model_copy(update=change))
    assert len({base_image_set(str(tiny_base_model), concept, PARAMS, device).key for device in devices}) == 2


def test_the_configuration_of_the_base_model_is_part_of_it(
    tiny_base_model: Path, concept: Concept, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_base_model, tmp_path / "other")
    file = other / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02}))
    keys = {base_image_set(str(model), concept, PARAMS, CPU).key for model in (tiny_base_model, other)}
    assert len(keys) == 2


def test_words_and_strength_of_the_concept_are_no_part_of_it(tiny_base_model: Path, concept: Concept) -> None:
    weak = {"strength": StrengthParams(positive=0.5, negative=0.0), "branch_images": 0}
    with_slot = PARAMS.model_copy(update={"negative_prompt": "blurry, {pt1}"})
    other = with_metadata(concept, words={"pt1": ("her-fox", "her-fox-neg")})
    for pair in (
        [(concept, PARAMS), (concept, PARAMS.model_copy(update=weak))],
        [(concept, with_slot), (other, with_slot)],
    ):
        assert len({base_image_set(str(tiny_base_model), *one, CPU).key for one in pair}) == 1


def test_another_picture_or_base_model_is_refused(tiny_base_model: Path, concept: Concept) -> None:
    picture = Image.new("RGB", (32, 32))
    trained_on_another = with_metadata(concept, picture_sha256="0" * 64)
    with pytest.raises(InputError, check=says(expected="the prepared image of its training")):
        draw_base_images(str(tiny_base_model), trained_on_another, picture, PARAMS, CPU)
    of_another = with_metadata(concept, base_model_family="sdxl")
    with pytest.raises(InputError, check=says(got="family")):
        draw_base_images(str(tiny_base_model), of_another, picture, PARAMS, CPU)
