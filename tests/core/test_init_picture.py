"""The initial image: defaults, invalid combinations, sizes, and the mask of the latents."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from dreamartist_pipeline.core.init_picture import (
    InitPicture,
    fit_picture,
    init_picture,
    picture_size,
    read_init_picture,
    redrawn,
    tint_redrawn,
)
from dreamartist_pipeline.errors import InputError
from refusals import says

RED = Image.new("RGB", (32, 16), "red")
WHITE = Image.new("L", (32, 16), 255)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def half_white(size: tuple[int, int]) -> Image.Image:
    """Return a mask that is white on the right."""
    pixels = np.zeros((size[1], size[0]), dtype=np.uint8)
    pixels[:, size[0] // 2 :] = 255
    return Image.fromarray(pixels)


def test_without_a_picture_there_is_none() -> None:
    assert init_picture(None, None, None, 20) is None
    assert read_init_picture(None, None, None, 20) is None


def test_denoise_is_by_default_that_of_diffusers() -> None:
    alone, masked, given = (init_picture(RED, m, d, 20) for m, d in ((None, None), (WHITE, None), (WHITE, 0.3)))
    assert alone and masked and given
    assert (alone.denoise, masked.denoise, given.denoise) == (0.8, 1.0, 0.3)


def test_files_are_decoded() -> None:
    read = read_init_picture(png(RED), png(WHITE), 0.5, 20)
    assert read is not None and read.mask is not None
    assert (read.image.getpixel((0, 0)), read.mask.getpixel((0, 0)), read.denoise) == ((255, 0, 0), 255, 0.5)


def test_transparent_parts_are_white_in_the_picture_and_kept_by_the_mask() -> None:
    clear = Image.new("RGBA", (32, 16), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 8, 16))
    read = init_picture(Image.new("RGBA", (32, 16), (9, 9, 9, 0)), clear, None, 20)
    assert read is not None and read.mask is not None
    assert read.image.getpixel((0, 0)) == (255, 255, 255)
    assert (read.mask.getpixel((0, 0)), read.mask.getpixel((31, 0))) == (255, 0)


@pytest.mark.parametrize(
    ("image", "mask", "denoise", "check"),
    [
        (None, WHITE, None, says(expected="beside a mask", remedy="init_image")),
        (None, None, 0.5, says(expected="denoise 0.5", remedy="init_image")),
        (RED, None, 0.04, says(got="denoise 0.04 of 20 steps")),
        (RED, None, 0.0, says(expected="denoise above 0", got="0")),
        (RED, None, 1.5, says(expected="denoise above 0 and at most 1", got="1.5")),
        (RED, Image.new("L", (32, 32), 255), None, says(expected="init_image (32 × 16 px)", got="32 × 32 px")),
        (RED, Image.new("L", (32, 16), 127), None, says(expected="init_mask", got="127")),
    ],
)
def test_what_does_not_go_together_is_refused(
    image: Image.Image | None, mask: Image.Image | None, denoise: float | None, check: Callable[[InputError], bool]
) -> None:
    with pytest.raises(InputError, check=check):
        init_picture(image, mask, denoise, 20)


def test_an_unreadable_file_is_called_by_its_setting() -> None:
    with pytest.raises(InputError, check=says(expected="init_image", got="4 bytes")):
        read_init_picture(b"text", None, None, 20)
    with pytest.raises(InputError, check=says(expected="init_mask", got="empty")):
        read_init_picture(png(RED), b"", None, 20)


def test_a_picture_keeps_its_proportions_at_the_base_models_area() -> None:
    def size(width: int, height: int, side_px: int) -> tuple[int, int]:
        return picture_size(InitPicture(Image.new("RGB", (width, height)), None, 1.0), side_px)

    assert size(100, 100, 64) == (64, 64)
    assert size(400, 100, 64) == (128, 32)
    assert size(100, 400, 64) == (32, 128)
    assert size(3000, 2000, 512) == (624, 416)  # 3:2 exactly


def test_picture_and_mask_are_cut_alike() -> None:
    wide = InitPicture(Image.new("RGB", (64, 16)), half_white((64, 16)), 1.0)
    fitted = fit_picture(wide, (16, 16))
    assert fitted.mask is not None
    assert fitted.image.size == fitted.mask.size == (16, 16)
    assert [fitted.mask.getpixel((x, 8)) for x in (2, 13)] == [0, 255]  # the middle is kept


def test_the_mask_is_decided_in_pixels_and_read_at_each_latents_corner() -> None:
    pixels = np.zeros((8, 16), dtype=np.uint8)
    pixels[:, 4:8], pixels[:, 8:12], pixels[:, 13:] = 127, 128, 255
    assert redrawn(Image.fromarray(pixels), (4, 2))[0, 0].tolist() == [[0.0, 0.0, 1.0, 0.0]] * 2


def test_white_spots_that_no_latent_sees_are_refused() -> None:
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[1, 1] = 255
    with pytest.raises(InputError, check=says(expected="2 × 2 latents")):
        redrawn(Image.fromarray(pixels), (2, 2))


def test_a_sheet_shows_the_redrawn_part_tinted() -> None:
    tinted = tint_redrawn(InitPicture(RED, half_white((32, 16)), 1.0))
    assert tinted.getpixel((0, 0)) == (255, 0, 0)
    assert tinted.getpixel((31, 0))[2] > 80  # type: ignore[index]
    assert tint_redrawn(InitPicture(RED, None, 1.0)) is RED
