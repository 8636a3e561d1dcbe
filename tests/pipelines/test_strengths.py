"""Comparison of strengths and guidance scales: what is drawn, measured, recommended and shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import concept_metadata, start_concept
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.strengths import Setting
from dreamartist_pipeline.embedded.colors import COLORS
from dreamartist_pipeline.interop.drawn_pictures import read_pictures
from dreamartist_pipeline.params import DeviceParams, EvaluationParams, SamplerParams, TrainingParams
from dreamartist_pipeline.pipelines.evaluation import drawing
from dreamartist_pipeline.pipelines.evaluation.base_images import base_drawings, base_image_set
from dreamartist_pipeline.pipelines.evaluation.measuring import Drawings
from dreamartist_pipeline.pipelines.evaluation.nodes import compare_strengths, map_attention
from dreamartist_pipeline.pipelines.evaluation.strengths import (
    SettingJudge,
    adapted_branches,
    compare_settings,
    guidance_settings,
    shown_steps,
    strength_settings,
)
from image_sets import drawn

CPU = DeviceParams(device="cpu")
SWEEP = {
    "images": 1,
    "num_prompts": 2,
    "positive": (0.5,),
    "negative": (0.0,),
    "guidance_scales": (2.0,),
    "max_steps": 2,
}


def params(**changes: Any) -> EvaluationParams:
    values: dict[str, Any] = {
        "prompts": ("a {pt1}, blue background", "the {pt1}, green background", "a {pt1}"),
        "prior_prompts": ("a red cat",),
        "class_word": "fox",
        "sampler": SamplerParams(num_inference_steps=2, batch_size=4),
        "sweep": SWEEP,
        "attention_images": 2,
        "evaluators": (),
    }
    return EvaluationParams(**{**values, **changes})


def picture(background: str, inside: str) -> Image.Image:
    image = Image.new("RGB", (32, 32), COLORS[background])
    ImageDraw.Draw(image).rectangle((8, 8, 23, 23), fill=COLORS[inside])
    return image


@pytest.fixture(scope="module")
def concept(tiny_base_model: Path) -> Concept:
    """Return a concept of random values, so that strengths change the pictures."""
    training = TrainingParams(
        num_steps=0,
        words={"names": {"pt1": ("my-fox", "my-fox-neg")}, "num_vectors": (1, 2), "init_text": ("fox", "fox")},
        lora_unet=[{"lr": 1e-3, "rank": 2, "branch": b, "layers": [r"re:.*\.attn.?$"]} for b in "pn"],
    )
    backbone = load_backbone(BaseModelFiles(tiny_base_model), CPU)
    new = start_concept(backbone, training, 1, seed=0).snapshot(concept_metadata(backbone, training, 1))
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in new.tensors.items()}
    return Concept(tensors, new.metadata)


# --------------------------------------------------------------------------------------------- what is compared


def test_strengths_are_all_pairs_with_the_configured_ones_among_them() -> None:
    grid = strength_settings(params(strength={"positive": 0.8, "negative": 0.0}), {"positive", "negative"})
    assert [[(one.positive, one.negative) for one in row] for row in grid] == [[(0.5, 0.0)], [(0.8, 0.0)]]
    assert {one.guidance_scale for row in grid for one in row} == {4.0}


@pytest.mark.parametrize(
    ("adapted", "expected"),
    [({"positive"}, [(0.5, 1.0), (1.0, 1.0)]), (set(), [(1.0, 1.0)])],
)
def test_strengths_of_a_branch_without_an_adapter_are_not_compared(
    adapted: set[str], expected: list[tuple[float, float]]
) -> None:
    grid = strength_settings(params(), adapted)
    assert [(one.positive, one.negative) for row in grid for one in row] == expected


def test_guidance_scales_are_compared_at_given_strengths_for_every_step() -> None:
    grid = guidance_settings(params(), Setting(0.5, 0.0, 4.0), [100, None])
    assert grid == [[Setting(0.5, 0.0, scale, step) for scale in (2.0, 4.0)] for step in (100, None)]


def test_few_steps_are_shown_evenly_spread_with_that_of_the_concept() -> None:
    assert shown_steps([100, 200, 300, 400], own=300, most=10) == [100, 200, None, 400]
    assert shown_steps([100, 200, 300, 400, 500], own=600, most=4) == [100, 300, 500, None]
    assert shown_steps([100, 200], own=300, most=1) == [None]
    assert shown_steps([], own=300, most=4) == [None]


@pytest.mark.parametrize(
    ("branches", "expected"),
    [
        ((), set()),
        (("positive",), {"positive"}),
        (("negative", "positive"), {"negative", "positive"}),
        (("shared",), {"negative", "positive"}),
    ],
)
def test_a_shared_adapter_is_of_both_branches(concept: Concept, branches: tuple[str, ...], expected: set[str]) -> None:
    (group, _) = concept.metadata.lora["unet"]
    groups = tuple(group.model_copy(update={"branch": branch}) for branch in branches)
    changed = concept.metadata.model_copy(update={"lora": {"unet": groups}})
    assert set(adapted_branches(Concept({}, changed))) == expected


# --------------------------------------------------------------------------------------------- measuring


class Redness:
    """An image tower that sees how red the middle is."""

    label = "redness"

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        middles = [torch.tensor(image.getpixel((image.width // 2, image.height // 2))).float() for image in images]
        return torch.nn.functional.normalize(torch.stack(middles) + 1, dim=1)


def drawings(*images: Image.Image) -> Drawings:
    templates = ["a {pt1}, blue background"] * len(images)
    return Drawings(templates, templates, [0], [[image] for image in images])


def test_a_judge_measures_fidelity_agreement_and_copying_relative_to_the_base_model() -> None:
    reference, base = picture("white", "red"), drawings(picture("blue", "green"), picture("green", "green"))
    judge = SettingJudge(reference, "fox", base, Redness(), None, reads_colors=True)
    assert judge.base_agreement == 0.5
    good = judge(drawings(picture("blue", "red"), picture("blue", "red")))
    copies = judge(drawings(reference, reference))
    assert (good.agreement, copies.agreement) == (1.0, 0.0)
    assert good.mean_fidelity == pytest.approx(1) == copies.mean_fidelity
    assert good.copying == pytest.approx(0, abs=0.05)
    assert copies.copying == pytest.approx(1)
    assert judge(base).mean_fidelity < 0.9


def test_strengths_are_chosen_first_and_guidance_is_compared_at_them() -> None:
    asked: list[list[Setting | None]] = []

    def draw(settings: Sequence[Setting | None]) -> dict[Setting | None, Drawings]:
        asked.append(list(settings))
        images = {
            one: picture("blue", "red" if one and one.positive == 0.5 and one.guidance_scale == 2 else "brown")
            if one and one.positive == 0.5
            else picture("blue", "green")
            for one in settings
        }
        return {one: drawings(image) for one, image in images.items()}

    judge_of = partial(_judge, picture("white", "red"))
    strengths, guidance = compare_settings(draw, judge_of, [100, None], 200, {"positive", "negative"}, params())
    assert strengths.recommended.setting == Setting(0.5, 1.0, 4.0)  # nearest to the configured of two equal ones
    assert guidance.recommended.setting == Setting(0.5, 1.0, 2.0)
    assert list(guidance.rows) == ["step 100", "step 200, the concept"]
    first, second = asked
    assert first[0] is None
    assert len(first) == 1 + 4
    assert len(second) == 4 - 1  # one is drawn already
    table = [*strengths.table("strengths"), *guidance.table("guidance")]
    assert [row["sheet"] for row in table] == ["strengths"] * 4 + ["guidance"] * 4
    assert sum(row["recommended"] for row in table) == 2
    assert {row["images"] for row in table} == {1}


def _judge(reference: Image.Image, base: Drawings) -> SettingJudge:
    return SettingJudge(reference, "fox", base, Redness(), None, reads_colors=True)


# --------------------------------------------------------------------------------------------- the nodes


def test_the_node_draws_sheets_and_recommends_measured_values(tiny_base_model: Path, concept: Concept) -> None:
    strengths, guidance, table, recommended = compare_strengths(
        str(tiny_base_model), concept, picture("white", "red"), params(evaluators=("efficientnet-lite0",)), CPU
    )
    assert recommended == json.loads(json.dumps(recommended))
    row = table[(table["sheet"] == "guidance") & table["recommended"]].iloc[0]
    assert recommended["strength"] == {"positive": row["positive"], "negative": row["negative"]}
    assert recommended["guidance_scale"] == row["guidance_scale"]
    assert recommended["concept_sha256"] == concept.sha256()
    assert recommended["num_images"] == 2
    assert strengths.width >= 700
    assert guidance.tobytes() != strengths.tobytes()


def test_pictures_of_a_setting_are_those_of_generate_with_it(tiny_base_model: Path, concept: Concept) -> None:
    settings = [None, Setting(0.5, 0.0, 4.0), Setting(1.0, 1.0, 4.0), Setting(1.0, 1.0, 2.0)]
    by_setting = drawing.draw_settings(settings, str(tiny_base_model), concept, params(), CPU)
    assert [len(by_setting[one].flat()) for one in settings] == [2] * 4
    assert len({by_setting[one].flat()[0].tobytes() for one in settings}) == 4
    base_set = base_image_set(str(tiny_base_model), concept, params(), CPU)
    of_base = base_drawings(drawn(base_set), base_set, concept, params())
    images, _ = drawing.draw_images(str(tiny_base_model), concept, picture("white", "red"), of_base, params(), CPU)
    usual = images.subject
    for group, one in (("base", None), ("concept", Setting(1.0, 1.0, 4.0))):
        expected = [row[0].tobytes() for row in usual[group].images[:2]]
        assert [image.tobytes() for image in by_setting[one].flat()] == expected


def test_a_step_is_drawn_with_its_kept_concept(tiny_base_model: Path, concept: Concept) -> None:
    other = Concept({name: 2 * tensor for name, tensor in concept.tensors.items()}, concept.metadata)
    own, kept = Setting(1.0, 1.0, 4.0), Setting(1.0, 1.0, 4.0, step=100)
    ours = drawing.draw_settings([own, kept], str(tiny_base_model), concept, params(), CPU, {100: lambda: other})
    alone = drawing.draw_settings([own], str(tiny_base_model), other, params(), CPU)
    assert ours[kept].flat()[0].tobytes() == alone[own].flat()[0].tobytes() != ours[own].flat()[0].tobytes()


def test_nothing_is_drawn_without_images(
    tiny_base_model: Path, concept: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dreamartist_pipeline.pipelines.evaluation.drawing.generate", pytest.fail)
    off = params(sweep={"images": 0}, attention_images=0)
    strengths, guidance, table, recommended = compare_strengths(
        str(tiny_base_model), concept, picture("white", "red"), off, CPU
    )
    assert strengths.tobytes() == guidance.tobytes()
    assert list(table["left_out"]) == ["evaluation.sweep.images is 0"]
    assert recommended == {}
    sheet, pictures = map_attention(str(tiny_base_model), concept, off, CPU)
    assert sheet.height < 200
    assert read_pictures(pictures, "attention_pictures") == []


def test_attention_is_shown_of_the_first_prompts_with_the_subject(tiny_base_model: Path, concept: Concept) -> None:
    drawn = [map_attention(str(tiny_base_model), concept, params(attention_images=count), CPU) for count in (1, 2)]
    (one, _), (two, files) = drawn
    assert two.height > one.height
    assert two.width == one.width
    entries = [stored.entry for stored in read_pictures(files, "attention_pictures")]
    shown = list(dict.fromkeys((entry.group, entry.condition.partition(":")[0]) for entry in entries))
    maps = [("concept", ""), ("concept", "positive"), ("concept", "negative")]
    assert shown == [("base", ""), ("base", "positive"), *maps]
    assert [entry.prompt for entry in entries[-2:]] == ["a my-fox, blue background", "the my-fox, green background"]


def test_prompts_without_the_subject_as_a_word_have_no_map(tiny_base_model: Path, concept: Concept) -> None:
    def drawn(*prompts: str) -> Image.Image:
        return map_attention(str(tiny_base_model), concept, params(prompts=prompts), CPU)[0]

    assert drawn("two {pt1}es", "a cat", "a {pt1}").tobytes() == drawn("a {pt1}").tobytes()
    assert drawn("a cat").height < 200


def test_a_negative_word_beyond_the_end_of_what_is_read_has_no_map(tiny_base_model: Path, concept: Concept) -> None:
    long = params(prompts=("a {pt1}",), negative_prompt=", ".join(["blurry"] * 100))
    _, files = map_attention(str(tiny_base_model), concept, long, CPU)
    shown = [stored.entry.condition.partition(":")[0] for stored in read_pictures(files, "attention_pictures")]
    assert shown == ["", "positive", "", "positive"]


def test_kept_steps_are_as_many_as_asked_for(tiny_base_model: Path, concept: Concept) -> None:
    read = dict.fromkeys((100, 200, 300), lambda: concept)
    for most in (1, 2, 3):
        changed = params(sweep={**SWEEP, "max_steps": most})
        table = compare_strengths(str(tiny_base_model), concept, picture("white", "red"), changed, CPU, read)[2]
        assert (table["sheet"] == "guidance").sum() == most * 2
