"""Metrics: hand-derived values first, then what must hold for every picture."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageDraw

from dreamartist_pipeline.core import metrics
from dreamartist_pipeline.embedded.colors import COLORS


def _picture(background: str, inside: str, box: tuple[int, int, int, int] = (16, 16, 47, 47)) -> Image.Image:
    image = Image.new("RGB", (64, 64), COLORS[background])
    ImageDraw.Draw(image).rectangle(box, fill=COLORS[inside])
    return image


def test_object_mask_is_exactly_the_object_on_a_plain_background() -> None:
    mask = metrics.object_mask(_picture("teal", "orange", box=(10, 20, 19, 24)))
    assert int(mask.sum()) == 10 * 5
    assert bool(mask[20:25, 10:20].all())


def test_object_mask_of_an_empty_plain_picture_is_everything() -> None:
    assert bool(metrics.object_mask(Image.new("RGB", (8, 8), "white")).all())


def test_object_mask_of_a_picture_without_a_plain_border_is_everything() -> None:
    noise = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert bool(metrics.object_mask(Image.fromarray(noise.numpy())).all())


def test_object_region_does_not_depend_on_background_or_place() -> None:
    first = metrics.object_region(_picture("blue", "red", box=(4, 4, 23, 23)))
    second = metrics.object_region(_picture("green", "red", box=(30, 36, 49, 55)))
    assert first.size == (23, 23)  # 20 px and a margin of 15 %
    assert first.tobytes() == second.tobytes()
    assert first.getpixel((0, 0)) == (255, 255, 255)
    assert first.getpixel((11, 11)) == COLORS["red"]


def test_subject_part_is_the_half_that_the_prompt_names() -> None:
    image = Image.new("RGB", (8, 4), "white")
    image.paste((0, 0, 0), (4, 0, 8, 4))
    left = metrics.subject_part(image, "a {pt1} on the left and a yellow car on the right, pink background")
    right = metrics.subject_part(image, "a dog on the left and a small {pt1} on the right")
    assert (left.size, left.getpixel((3, 0))) == ((4, 4), (255, 255, 255))
    assert (right.size, right.getpixel((0, 0))) == ((4, 4), (0, 0, 0))
    assert metrics.subject_part(image, "a {pt1}, noto style") is image


def test_similarity_is_the_cosine() -> None:
    values = metrics.similarity(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([1.0, 0.0]))
    assert torch.allclose(values, torch.tensor([1.0, 0.0, 0.5**0.5]))


def test_clip_score_is_two_and_a_half_times_the_cosine_and_never_negative() -> None:
    images = torch.tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    texts = torch.tensor([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert torch.allclose(metrics.clip_score(images, texts), torch.tensor([2.5, 1.5, 0.0]))


def test_siglip_score_is_the_probability_of_a_match() -> None:
    images, texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    values = metrics.siglip_score(images, texts, scale=2.0, bias=-2.0)
    assert torch.allclose(values, torch.tensor([0.5, 1 / (1 + 2.718281828**2)]))


def test_distances_of_orthogonal_equal_and_opposite_rows() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]])
    assert torch.allclose(metrics.embedding_distance(rows, rows[[0, 0, 0]]), torch.tensor([0.0, 1.0, 2.0]))
    expected = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
    assert torch.allclose(metrics.pairwise_distances(rows), expected, atol=1e-6)
    assert torch.allclose(metrics.pairwise_distances(rows[None].repeat(2, 1, 1))[1], expected, atol=1e-6)
    assert torch.allclose(metrics.nearest_distance(rows, rows[:2]), torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)


def test_crops_are_the_whole_and_nine_of_each_smaller_size() -> None:
    image = Image.new("RGB", (8, 4), "white")
    image.putpixel((7, 3), (0, 0, 0))
    found = metrics.crops(image)
    assert [crop.size for crop in found] == [(8, 4)] + [(6, 3)] * 9 + [(4, 2)] * 9
    assert found[0] is image
    blackened = [index for index, crop in enumerate(found) if crop.getextrema()[0][0] == 0]
    assert blackened == [0, 9, 18]  # the whole, and the last crop of each size: that of the lower right corner
    assert found[18].getpixel((3, 1)) == (0, 0, 0)


def test_the_background_is_what_is_not_the_object_or_else_a_frame() -> None:
    mask = metrics.background_mask(_picture("teal", "orange"))
    assert int(mask.sum()) == 64 * 64 - 32 * 32
    assert not mask[16:48, 16:48].any()
    frame = metrics.background_mask(Image.new("RGB", (32, 16), "white"))  # nothing differs from the border
    assert int(frame.sum()) == 32 * 16 - (32 - 2 * 4) * (16 - 2 * 2)


def test_histograms_of_backgrounds_have_in_common_what_both_show() -> None:
    def common(first: Image.Image, second: Image.Image) -> float:
        return metrics.histogram_intersection(*map(metrics.background_histogram, (first, second)))

    blue, red = _picture("blue", "orange"), _picture("red", "orange")
    assert common(blue, blue) == pytest.approx(1, abs=1e-5)
    assert common(blue, _picture("blue", "green", box=(4, 4, 23, 23))) == pytest.approx(1, abs=1e-5)
    assert common(blue, red) == pytest.approx(0, abs=1e-5)
    noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    half = noise.copy()
    half[:, :32] = COLORS["blue"]
    assert common(Image.fromarray(half), blue) == pytest.approx(0.5, abs=0.03)
    nearly = Image.new("RGB", (64, 64), tuple(value + 4 for value in COLORS["blue"]))
    assert common(nearly, blue) > 0.6  # of three channels, each 4 / 32 of a bin away


def test_a_histogram_sums_to_one_at_any_size_and_color() -> None:
    for size, color in (((8, 8), "white"), ((700, 300), "black"), ((64, 64), (130, 1, 254))):
        histogram = metrics.background_histogram(Image.new("RGB", size, color))
        assert histogram.sum().item() == pytest.approx(1, abs=1e-4)


def test_luminance_is_the_same_in_all_channels() -> None:
    red = metrics.luminance(Image.new("RGB", (2, 2), (200, 0, 0)))
    assert red.getpixel((0, 0)) == (60, 60, 60)  # 0.299 · 200


def test_image_distance_is_zero_for_equal_and_one_for_black_against_white() -> None:
    white, black = Image.new("RGB", (4, 4), "white"), Image.new("RGB", (4, 4), "black")
    assert metrics.image_distance(white, white) == 0
    assert metrics.image_distance(white, black) == 1
    half = black.copy()
    half.paste((255, 255, 255), (0, 0, 2, 4))
    assert metrics.image_distance(half, black) == pytest.approx(0.5)


def test_image_distance_refuses_different_sizes() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(8, 4\)"):
        metrics.image_distance(Image.new("RGB", (4, 4)), Image.new("RGB", (8, 4)))
