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


def test_mean_pairwise_distance_of_orthogonal_and_equal_rows() -> None:
    assert metrics.mean_pairwise_distance(torch.eye(3)) == pytest.approx(1.0)
    assert metrics.mean_pairwise_distance(torch.ones(4, 2)) == pytest.approx(0.0, abs=1e-6)
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # pairs at distance 0, 1, 1
    assert metrics.mean_pairwise_distance(rows) == pytest.approx(2 / 3)


def test_mean_pairwise_distance_refuses_a_single_image() -> None:
    with pytest.raises(ValueError, match="2 embeddings, got 1"):
        metrics.mean_pairwise_distance(torch.ones(1, 2))


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
