"""Recognition: hand-derived ranks and intervals, and the cut-outs."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image, ImageDraw

from dreamartist_pipeline.core.metrics import luminance, pixels
from one_shot.gallery import GROUND, Gallery, cut_out, cut_out_drawings, recognize


def _direction(degrees: float) -> list[float]:
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


@pytest.fixture
def gallery() -> Gallery:
    """Drawings in a plane: two of a fox, at 0° and 90°, an owl at 30°, a snail at 60° and one at 180°."""
    embeddings = torch.tensor([_direction(angle) for angle in (0, 90, 30, 60, 180)])
    return Gallery(embeddings, ("fox", "fox", "owl", "snail", "snail"), ("flat", "noto", "flat", "flat", "noto"))


def test_an_object_is_ranked_by_its_nearest_drawing(gallery: Gallery) -> None:
    pictures = torch.tensor([_direction(angle) for angle in (80, 40, 20)])
    found = recognize(pictures, gallery, "fox")
    # 80°: fox 10°, snail 20°, owl 50° · 40°: owl 10°, snail 20°, fox 40° · 20°: owl 10°, fox 20°, snail 40°
    assert found.ranks == (1, 3, 2)
    assert found.nearest == ("fox", "owl", "owl")


def test_objects_are_counted_and_not_drawings(gallery: Gallery) -> None:
    """Both foxes are nearer than the snail, which is second all the same."""
    pair = Gallery(gallery.embeddings[[2, 3, 4]], ("fox", "fox", "snail"), ("flat", "noto", "flat"))
    assert recognize(torch.tensor([_direction(45)]), pair, "snail").ranks == (2,)


def test_the_style_of_the_reference_is_left_out_of_the_gallery(gallery: Gallery) -> None:
    picture = torch.tensor([_direction(85)])
    assert recognize(picture, gallery, "fox").nearest == ("fox",)
    others = gallery.without_style("noto")
    assert (others.objects, set(others.styles)) == (("fox", "owl", "snail"), {"flat"})
    assert recognize(picture, others, "fox").nearest == ("snail",)
    assert recognize(picture, others, "fox").ranks == (3,)


def test_a_smaller_gallery_has_fewer_objects(gallery: Gallery) -> None:
    fewer = gallery.of_objects({"fox", "snail"})
    assert fewer.objects == ("fox", "fox", "snail", "snail")
    assert recognize(torch.tensor([_direction(20)]), fewer, "fox").ranks == (1,)


def test_an_object_without_a_drawing_cannot_be_recognized(gallery: Gallery) -> None:
    with pytest.raises(ValueError, match="'rocket'"):
        recognize(torch.tensor([_direction(0)]), gallery, "rocket")


def _disc(color: tuple[int, int, int], background: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), background)
    ImageDraw.Draw(image).ellipse((12, 20, 43, 51), fill=color)
    return image


def test_a_cut_out_is_the_object_on_grey_whatever_was_behind_it() -> None:
    red = (220, 40, 40)
    first, second = cut_out(_disc(red, "white")), cut_out(_disc(red, "blue"))
    assert first.tobytes() == second.tobytes()
    assert first.size == (37, 37)  # 32 px and a margin of 15 %
    assert (first.getpixel((0, 0)), first.getpixel((18, 18))) == (GROUND, red)


def test_luminance_is_independent_of_hue() -> None:
    red, green = (200, 0, 0), (0, 101, 4)  # 0.299 R + 0.587 G + 0.114 B: 59.8 and 59.7
    first, second = cut_out(_disc(red, "white")), cut_out(_disc(green, "yellow"))
    assert first.tobytes() != second.tobytes()
    assert luminance(first).tobytes() == luminance(second).tobytes()
    assert luminance(first).getpixel((18, 18)) == (60, 60, 60)
    assert luminance(first).getpixel((0, 0)) == GROUND


def _opaque(*colors: tuple[int, int, int]) -> torch.Tensor:
    sprites = torch.full((len(colors), 4, 72, 72), 255, dtype=torch.uint8)
    sprites[:, :3] = torch.tensor(colors, dtype=torch.uint8)[:, :, None, None]
    return sprites


def test_a_drawing_is_cut_out_as_the_same_object_of_a_picture_is() -> None:
    (drawing,) = cut_out_drawings(_opaque((220, 40, 40)), 40)
    picture = Image.new("RGB", (40, 40), GROUND)
    picture.paste((220, 40, 40), (2, 2, 38, 38))  # 36 px: 0.9 of the side
    assert drawing.size == (41, 41)  # and the margin
    assert drawing.tobytes() == cut_out(picture).tobytes()


def test_a_grey_drawing_is_cut_out_completely() -> None:
    sprites = _opaque((130, 130, 130))
    sprites[:, :, :, :8] = torch.tensor([255, 0, 0, 255], dtype=torch.uint8)[
        :, None, None
    ]  # all that differs from grey
    (drawing,) = cut_out_drawings(sprites, 40)
    assert drawing.size == (41, 41)
    assert drawing.getpixel((20, 20)) == (130, 130, 130)


def test_every_drawing_in_a_picture_of_its_own_is_recognized_as_itself() -> None:
    """Pixels stand in for a network: the same drawing in front of another background is the nearest."""
    sprites = torch.randint(0, 256, (4, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sprites[:, 3] = 255
    drawings = cut_out_drawings(sprites, 40)
    gallery = Gallery(torch.stack([_pixel_embedding(drawing) for drawing in drawings]), tuple("abcd"), ("flat",) * 4)
    for drawing, word in zip(drawings, gallery.objects, strict=True):
        picture = Image.new("RGB", (64, 64), "blue")
        picture.paste(drawing.crop((2, 2, 38, 38)).resize((30, 30)), (20, 10))
        found = recognize(_pixel_embedding(cut_out(picture))[None], gallery, word)
        assert (found.ranks, found.nearest) == ((1,), (word,))


def _pixel_embedding(image: Image.Image) -> torch.Tensor:
    return torch.nn.functional.normalize((pixels(image.resize((16, 16))) - 0.5).flatten(), dim=0)
