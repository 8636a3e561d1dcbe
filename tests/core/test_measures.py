"""Measures of single pictures: hand-made pictures, of which the right value is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from dreamartist_pipeline.core import measures
from dreamartist_pipeline.core.measures import MEASURES, Measure, PictureEmbeddings, SubjectMeasures, metric_key
from dreamartist_pipeline.embedded.colors import COLORS

SIDE_PX = 32


class MeanColor:
    """An image tower whose embedding is the picture's mean colour."""

    label = "mean-color"

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        rows = [torch.tensor(image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))).float() for image in images]
        return torch.nn.functional.normalize(torch.stack(rows) + 1e-3, dim=1)


def picture(background: str, inside: str, left_px: int = 8) -> Image.Image:
    image = Image.new("RGB", (SIDE_PX, SIDE_PX), COLORS[background])
    ImageDraw.Draw(image).rectangle((left_px, 8, left_px + 15, 23), fill=COLORS[inside])
    return image


@pytest.fixture
def against_orange() -> SubjectMeasures:
    return SubjectMeasures.of(MeanColor(), picture("white", "orange"))


def test_the_object_on_another_ground_is_as_faithful_as_the_reference_and_the_whole_is_not(
    against_orange: SubjectMeasures,
) -> None:
    pictures = against_orange.embed([picture("white", "orange"), picture("blue", "orange", left_px=2)])
    values = against_orange.fidelity(pictures)
    assert values["similarity"].tolist() == pytest.approx([1, 1], abs=1e-6)
    pictures_alone = [picture("white", "orange"), picture("blue", "orange", left_px=2)]
    assert against_orange.object_similarity(pictures_alone).tolist() == values["similarity"].tolist()
    assert values["similarity_whole"][0].item() == pytest.approx(1, abs=1e-6)
    assert values["similarity_whole"][1].item() < 0.95
    assert values["similarity_colorless"].tolist() == pytest.approx([1, 1], abs=1e-6)


def test_an_object_of_another_color_and_equal_luminance_is_faithful_without_colors() -> None:
    red, green = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 101, 4))  # both of luminance 60
    against = SubjectMeasures.of(MeanColor(), red)
    values = against.fidelity(against.embed([green]))
    assert values["similarity_colorless"].item() == pytest.approx(1, abs=1e-6)
    assert values["similarity"].item() < 0.01


def test_the_side_that_a_prompt_names_is_what_counts(against_orange: SubjectMeasures) -> None:
    pair = picture("white", "orange", left_px=1)
    ImageDraw.Draw(pair).rectangle((18, 8, 30, 23), fill=COLORS["blue"])
    both, left = against_orange.embed([pair, pair], ["", "a {pt1} on the left and a car on the right"]).object
    assert float(left @ against_orange.reference.object[0]) > 0.999  # of another margin
    assert float(both @ against_orange.reference.object[0]) < 0.99


def test_fidelity_to_unseen_views_is_the_mean_over_them() -> None:
    reference, others = picture("white", "orange"), [picture("blue", "orange"), picture("pink", "blue")]
    against = SubjectMeasures.of(MeanColor(), reference, others)
    found = against.fidelity(against.embed([reference]))
    to_other = PictureEmbeddings.of(MeanColor(), others[1:]).object[0] @ against.reference.object[0]
    assert found["similarity_unseen"].item() == pytest.approx((1 + float(to_other)) / 2, abs=1e-6)
    alone = SubjectMeasures.of(MeanColor(), reference)
    assert "similarity_unseen" not in alone.fidelity(alone.embed([reference]))


def test_a_crop_of_the_reference_is_found_as_a_copy() -> None:
    reference = Image.new("RGB", (SIDE_PX, SIDE_PX), COLORS["blue"])
    reference.paste(COLORS["red"], (16, 16, 32, 32))
    against = SubjectMeasures.of(MeanColor(), reference)
    pictures = [reference, Image.new("RGB", (16, 16), COLORS["red"]), Image.new("RGB", (16, 16), COLORS["green"])]
    whole, corner, other = against.crop_distance(against.embed(pictures)).tolist()
    assert whole == pytest.approx(0, abs=1e-6)
    assert corner == pytest.approx(0, abs=1e-6)
    assert other > 0.1


def test_a_background_leaks_where_the_prompts_is_missing() -> None:
    reference = picture("white", "orange")
    values = measures.background_leakage([picture("white", "blue"), picture("teal", "orange")], reference)
    assert values.tolist() == pytest.approx([1, 0], abs=1e-5)


def test_drift_is_the_distance_of_pairs() -> None:
    white, blue = picture("white", "white"), picture("blue", "blue")
    same, moved = measures.drift(MeanColor(), [white, white], [white, blue]).tolist()
    assert same == pytest.approx(0, abs=1e-6)
    assert moved > 0.1


def test_pictures_are_compared_with_prompts_of_the_class_word() -> None:
    templates = ["a {pt1}, blue background", "a cat"]
    assert measures.prompt_texts(templates, "fox") == ["a fox, blue background", "a cat"]


class OneName:
    """A classifier that names the colour of the middle."""

    label = "colors"
    known = ("red", "blue", "green")

    def objects_in(self, images: Sequence[Image.Image]) -> list[tuple[str, ...]]:
        names = {rgb: word for word, rgb in COLORS.items()}
        return [(names[image.getpixel((16, 16))], "nothing else") for image in images]


@pytest.mark.parametrize(("class_word", "wanted", "values"), [("blue", "blue", [0, 1]), ("fox", "red", [1, 0])])
def test_recognition_is_of_the_class_word_or_of_what_the_reference_is_taken_for(
    class_word: str, wanted: str, values: list[float]
) -> None:
    pictures = [picture("white", "red"), picture("white", "blue")]
    found, shares = measures.recognized(OneName(), pictures, picture("pink", "red"), class_word)
    assert (found, shares.tolist()) == (wanted, values)


def test_the_names_of_metrics_are_those_of_their_measure() -> None:
    assert metric_key(measures.SIMILARITY, "concept", "dinov2") == "similarity/concept.dinov2"
    assert metric_key(measures.DIVERSITY, "base", "dinov2") == "variety/diversity.base.dinov2"
    assert metric_key(measures.PRIOR_DRIFT, "", "pixels") == "prior_drift/pixels"
    assert metric_key(measures.CLIP_SCORE, "base", "") == "prompt/clip_score.base"


def test_every_measure_is_defined_once_and_completely() -> None:
    assert len({measure.name for measure in MEASURES}) == len(MEASURES)
    assert len({measure.title for measure in MEASURES}) == len(MEASURES)
    for measure in MEASURES:
        assert all((measure.formula, measure.unit, measure.source, measure.needs, measure.caveat)), measure.name
        assert measure.bounds[0] < measure.bounds[1]


def test_the_documented_table_is_that_of_the_definitions() -> None:
    def row(measure: Measure) -> str:
        low, high = (f"{bound:g}" for bound in measure.bounds)
        facts = (measure.title, measure.formula, measure.better, f"{measure.unit}, {low} to {high}")
        cells = (f"`{measure.name}`", *facts, measure.source, measure.needs, measure.caveat)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    page = (Path(__file__).resolve().parents[2] / "docs" / "measures.md").read_text(encoding="utf-8")
    missing = [row(measure) for measure in MEASURES if row(measure) not in page]
    assert not missing, f"expected these rows in docs/measures.md: {missing}"
