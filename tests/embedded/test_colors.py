"""Colour words: hand-derived values first, then what pictures show and prompts ask for."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageDraw

from dreamartist_pipeline.embedded import colors
from dreamartist_pipeline.embedded.colors import COLORS


def _picture(background: str, inside: str, box: tuple[int, int, int, int] = (16, 16, 47, 47)) -> Image.Image:
    image = Image.new("RGB", (64, 64), COLORS[background])
    ImageDraw.Draw(image).rectangle(box, fill=COLORS[inside])
    return image


def test_lab_of_white_black_and_red_is_the_published_value() -> None:
    lab = colors.to_lab(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    expected = torch.tensor([[100.0, 0.0, 0.0], [0.0, 0.0, 0.0], [53.24, 80.09, 67.20]])
    assert torch.allclose(lab, expected, atol=0.02)


@pytest.mark.parametrize("name", COLORS)
def test_every_named_colour_is_its_own_nearest(name: str) -> None:
    assert colors.background_color(Image.new("RGB", (8, 8), COLORS[name])) == name


def test_a_dark_red_is_red_and_not_brown() -> None:
    assert colors.background_color(Image.new("RGB", (8, 8), (150, 20, 20))) == "red"


def test_background_is_named_by_the_border_and_object_by_what_differs_from_it() -> None:
    image = _picture("blue", "yellow")
    assert colors.background_color(image) == "blue"
    assert colors.object_color(image) == "yellow"


def test_a_few_border_pixels_of_the_object_do_not_change_the_background() -> None:
    assert colors.background_color(_picture("green", "pink", box=(20, 0, 40, 63))) == "green"


def test_white_highlights_do_not_outvote_the_objects_colour() -> None:
    image = _picture("blue", "red", box=(10, 10, 49, 49))  # 1600 pixels
    ImageDraw.Draw(image).rectangle((10, 10, 49, 34), fill="white")  # 1000 of them
    assert colors.object_color(image) == "red"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a {pt1}, noto style, blue background", ("blue",)),
        ("a {pt1}, green background with white dots, flat style", ("green",)),
        ("a {pt1}, red and white striped background", ("red", "white")),
        ("a {pt1}, pink and black checkered background", ("pink", "black")),
        ("a red {pt1}, noto style", ()),
    ],
)
def test_asked_backgrounds_are_read_from_the_prompt(prompt: str, expected: tuple[str, ...]) -> None:
    assert colors.asked_backgrounds(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red {pt1}, noto style, blue background", "red"),
        ("a small purple {pt1}, noto style, blue background", "purple"),
        ("an orange {pt1}", "orange"),
        ("a {pt1}, noto style, blue background", None),
        ("a {pt1} on the left and a yellow car on the right, pink background", None),
        ("red background, a {pt1}", None),
        ("red", None),
    ],
)
def test_asked_object_colour_is_that_of_the_first_object(prompt: str, expected: str | None) -> None:
    assert colors.asked_object_color(prompt) == expected
