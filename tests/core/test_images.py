"""Decoding to upright RGB or RGBA images, resizing, masks, tensors and grids."""

import io
import math
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, PngImagePlugin

from dreamartist_pipeline.core import images
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import BucketParams
from refusals import says

MAX_PIXELS = 1_000_000
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, file_format, **options)
    return data.getvalue()


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    return images.decode_image(data, "the picture", max_pixels)


def two_colored(left: object = RED, right: object = BLUE, mode: str = "RGB") -> Image.Image:
    """16 × 8 px: the left half in one colour, the right in another."""
    image = Image.new(mode, (16, 8), left)
    image.paste(right, (8, 0, 16, 8))
    return image


# --------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize(
    ("mode", "file_format"), [("RGB", "PNG"), ("P", "PNG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("RGBX", "TIFF")]
)
def test_color_modes_become_rgb_with_their_colors(mode: str, file_format: str) -> None:
    decoded = decode(encode(Image.new("RGB", (16, 8), RED).convert(mode), file_format))

    assert decoded.mode == "RGB"
    assert np.allclose(decoded.getpixel((3, 3)), RED, atol=2)


def test_lab_becomes_srgb() -> None:
    decoded = decode(encode(Image.new("LAB", (16, 8), (255, 128, 128)), "TIFF"))  # L* = 100, a* = b* = 0

    assert decoded.mode == "RGB"
    assert np.allclose(decoded.getpixel((3, 3)), WHITE, atol=3)


def test_a_cmyk_jpeg_keeps_its_color() -> None:
    decoded = decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))

    assert decoded.mode == "RGB"
    assert np.allclose(decoded.getpixel((8, 8)), RED, atol=4)


@pytest.mark.parametrize(
    ("mode", "value", "grey"),
    [("1", 1, 255), ("L", 77, 77), ("I;16", 65535, 255), ("I;16", 257 * 100, 100), ("I", 257 * 30, 30)],
)
def test_grey_modes_become_rgb_with_the_same_brightness(mode: str, value: int, grey: int) -> None:
    decoded = decode(encode(Image.new(mode, (9, 9), value), "TIFF" if mode == "I" else "PNG"))

    assert decoded.mode == "RGB"
    assert decoded.getpixel((4, 4)) == (grey, grey, grey)


@pytest.mark.parametrize(("value", "grey"), [(0.2, 51), (200.0, 200)])
def test_float_grey_is_read_as_0_to_1_or_0_to_255(value: float, grey: int) -> None:
    decoded = decode(encode(Image.new("F", (9, 9), value), "TIFF"))

    assert decoded.getpixel((4, 4)) == (grey, grey, grey)


@pytest.mark.parametrize("value", [-1.0, 300.0, math.nan])
def test_float_grey_beyond_its_range_is_refused(value: float) -> None:
    with pytest.raises(InputError, check=says(expected="grey values 0…", got="mode F")):
        decode(encode(Image.new("F", (9, 9), value), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_modes_with_alpha_become_rgba(mode: str) -> None:
    decoded = decode(encode(Image.new("RGBA", (16, 8), (255, 255, 255, 0)).convert(mode)))

    assert decoded.mode == "RGBA"
    assert decoded.getpixel((0, 0)) == (255, 255, 255, 0)


def test_a_palette_with_a_transparent_entry_becomes_rgba() -> None:
    image = two_colored().convert("P", palette=Image.Palette.ADAPTIVE)
    transparent = image.getpixel((0, 0))

    decoded = decode(encode(image, transparency=transparent))

    assert decoded.mode == "RGBA"
    assert decoded.getpixel((0, 0))[3] == 0
    assert decoded.getpixel((12, 4)) == (*BLUE, 255)


def test_transparency_shows_the_background_color() -> None:
    image = Image.new("RGBA", (8, 8), (*RED, 0))
    image.putpixel((0, 0), (0, 0, 0, 128))

    flat = images.flatten_alpha(image, "lime")

    assert flat.mode == "RGB"
    assert flat.getpixel((4, 4)) == GREEN
    assert flat.getpixel((0, 0)) == (0, 127, 0)  # 255 · (1 − 128/255)


def test_an_unknown_background_color_is_refused_by_name() -> None:
    with pytest.raises(InputError, check=says(got="'whiteish'", remedy="ingestion.background_color")):
        images.flatten_alpha(Image.new("RGBA", (8, 8)), "whiteish")


def grey_tiff(levels: np.ndarray) -> bytes:
    return encode(Image.fromarray(levels), "TIFF")


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_integers_that_end_at_255_are_read_with_255_as_white_and_a_warning(
    dtype: type, caplog: pytest.LogCaptureFixture
) -> None:
    levels = np.arange(64, dtype=dtype).reshape(8, 8) * 4
    assert np.array_equal(np.asarray(decode(grey_tiff(levels)))[..., 0], levels)
    assert "the picture" in caplog.text
    assert "255" in caplog.text


def test_integers_of_12_bits_are_read_as_they_are_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    levels = np.full((8, 8), 4095, dtype=np.int32)
    assert decode(grey_tiff(levels)).getpixel((0, 0)) == (16, 16, 16)
    assert "4095 of 65535" in caplog.text


def test_integers_up_to_white_need_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    decode(grey_tiff(np.full((8, 8), 65535, dtype=np.int32)))
    assert not caplog.records


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_integers_that_would_be_clipped_are_refused(value: int) -> None:
    with pytest.raises(InputError, check=says(expected="0…65535", got="mode I", remedy="8 bits per channel")):
        decode(grey_tiff(np.full((8, 8), value, dtype=np.int32)))


# --------------------------------------------------------------------------------------------- HEIC


@pytest.fixture
def heic() -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    data = io.BytesIO()
    pillow_heif.from_pillow(two_colored().resize((64, 32))).save(data, quality=100)
    return data.getvalue()


def test_a_heic_picture_is_opened_where_pillow_heif_is_installed(heic: bytes) -> None:
    decoded = decode(heic)

    assert (decoded.mode, decoded.size) == ("RGB", (64, 32))
    assert np.allclose(decoded.getpixel((5, 16)), RED, atol=8)
    assert np.allclose(decoded.getpixel((60, 16)), BLUE, atol=8)


def test_of_several_pictures_in_a_heic_file_the_main_one_is_taken() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    file, data = pillow_heif.from_pillow(Image.new("RGB", (64, 64), RED)), io.BytesIO()
    file.add_from_pillow(Image.new("RGB", (64, 64), BLUE))
    file.save(data, quality=100, primary_index=1)

    assert np.allclose(decode(data.getvalue()).getpixel((30, 30)), BLUE, atol=8)


@pytest.mark.parametrize("length", [40, 300])
def test_a_truncated_heic_picture_is_called_so(heic: bytes, length: int) -> None:
    with pytest.raises(InputError, check=says(got="damaged or truncated")):
        decode(heic[:length])


@pytest.mark.parametrize(
    "brands",
    [
        b"heic\0\0\0\0mif1heic",
        b"mif1\0\0\0\0mif1heic",
        b"heix\0\0\0\0mif1heix",
        b"msf1\0\0\0\0msf1hevc",
        b"mif1\0\0\0\0mif1miaf",
    ],
)
def test_a_heic_picture_is_named_where_pillow_heif_is_missing(brands: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    file = (8 + len(brands)).to_bytes(4) + b"ftyp" + brands + b"\0" * 64
    with pytest.raises(InputError, check=says(expected="the picture", got="HEIC", remedy="pillow-heif")):
        decode(file)


def test_an_avif_picture_is_not_taken_for_a_heic_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    assert decode(encode(two_colored(), "AVIF", quality=100)).size == (16, 8)


# --------------------------------------------------------------------------------------------- what is made of it


@pytest.mark.parametrize(
    ("source", "size", "fit", "text"),
    [
        ((400, 6000), (64, 64), "crop", "400 × 6000 → middle 400 × 400 (7 %) → 64 × 64"),
        ((6000, 400), (64, 64), "crop", "6000 × 400 → middle 400 × 400 (7 %) → 64 × 64"),
        ((1024, 1024), (64, 64), "crop", "1024 × 1024 → 64 × 64"),
        ((64, 64), (64, 64), "crop", "64 × 64"),
        ((80, 64), (64, 64), "crop", "80 × 64 → middle 64 × 64 (80 %)"),
        ((8, 10000), (64, 64), "crop", "8 × 10000 → middle 8 × 8 (less than 1 %) → 64 × 64"),
        ((300, 200), (88, 48), "crop", "300 × 200 → middle 300 × 164 (82 %) → 88 × 48"),
        ((640, 320), (64, 64), "pad", "640 × 320 → 64 × 32 → padded to 64 × 64 (50 % of it is the picture)"),
        ((32, 32), (64, 64), "pad", "32 × 32 → 64 × 64"),
    ],
)
def test_what_is_made_of_a_picture_is_said_step_by_step(
    source: tuple[int, int], size: tuple[int, int], fit: str, text: str
) -> None:
    assert str(images.fitting(source, size, fit)) == text


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("source", [(50, 20), (20, 50), (33, 31)])
def test_the_sizes_that_are_said_are_those_of_the_result(source: tuple[int, int], fit: str) -> None:
    result = images.fit_to_size(Image.new("RGB", source, RED), (16, 16), fit, "blue")
    red = np.asarray(result)[..., 0] > 128
    said = images.fitting(source, (16, 16), fit)
    assert (int(red.any(axis=0).sum()), int(red.any(axis=1).sum())) == said.scaled_px


def test_the_visible_share_counts_what_differs_from_the_median_colour() -> None:
    image = Image.new("RGB", (10, 10), (200, 200, 200))
    assert images.visible_share(image) == 0
    image.paste((210, 200, 190), (0, 0, 10, 2))  # hardly to be seen
    image.paste((200, 200, 100), (0, 2, 10, 3))
    assert images.visible_share(image) == pytest.approx(0.1)


# --------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize(
    ("orientation", "size", "red_at"),
    [
        (1, (16, 8), (2, 4)),
        (2, (16, 8), (13, 4)),
        (3, (16, 8), (13, 4)),
        (4, (16, 8), (2, 4)),
        (5, (8, 16), (4, 2)),
        (6, (8, 16), (4, 2)),
        (7, (8, 16), (4, 13)),
        (8, (8, 16), (4, 13)),
    ],
)
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(
    orientation: int, size: tuple[int, int], red_at: tuple[int, int], file_format: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation

    decoded = decode(
        encode(two_colored(), file_format, exif=exif, **({"lossless": True} if file_format == "WEBP" else {}))
    )

    assert decoded.size == size
    assert decoded.getpixel(red_at) == RED


# --------------------------------------------------------------------------------------------- bad files


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="the picture", got="empty")):
        decode(b"")


def test_a_file_that_is_no_image_is_refused_with_its_first_bytes() -> None:
    with pytest.raises(InputError, check=says(expected="the picture", got="12 bytes")):
        decode(b"%PDF-1.7 abc")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_a_truncated_file_is_refused(file_format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, file_format)

    with pytest.raises(InputError, check=lambda error: "truncated" in error.got or "no image format" in error.got):
        decode(data[: len(data) // 2])


def test_a_damaged_png_is_refused() -> None:
    data = bytearray(encode(two_colored()))
    data[45] ^= 0xFF  # inside the compressed pixels

    with pytest.raises(InputError, check=says(got="PNG file")):
        decode(bytes(data))


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_a_picture_below_8_px_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, check=says(expected="8 px", got=f"{size[0]} × {size[1]} px")):
        decode(encode(Image.new("RGB", size)))


def test_a_huge_picture_is_refused_before_its_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("1", (20_000, 20_000)))  # 50 kB on disk, 1.2 GB as RGB
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))

    with pytest.raises(
        InputError, check=says(expected="100,000,000", got="20000 × 20000", remedy="ingestion.max_pixels")
    ):
        decode(data, max_pixels=100_000_000)


def test_pillows_own_pixel_limit_is_left_as_it_was() -> None:
    before = Image.MAX_IMAGE_PIXELS

    decode(encode(two_colored()))

    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused(file_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, GREEN, BLUE)]

    with pytest.raises(InputError, check=says(got="3 frames")):
        decode(encode(frames[0], file_format, save_all=True, append_images=frames[1:]))


def test_a_gif_of_one_frame_is_a_picture() -> None:
    assert decode(encode(Image.new("RGB", (16, 16), RED), "GIF")).getpixel((0, 0)) == RED


def test_a_phone_photo_with_a_second_picture_inside_gives_the_first() -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, BLUE)]

    decoded = decode(encode(frames[0], "MPO", save_all=True, append_images=frames[1:]))

    assert np.allclose(decoded.getpixel((8, 8)), RED, atol=4)


# --------------------------------------------------------------------------------------------- buckets


@pytest.mark.parametrize(
    ("size", "expected"),
    [((500, 500), (64, 64)), ((600, 300), (88, 40)), ((300, 600), (40, 88)), ((10, 1000), (8, 512))],
)
def test_keep_aspect_picks_the_nearest_size_of_at_most_the_area(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    # 2 : 1 in 64 cells of 8 × 8: 11 × 5 = 2.2 is nearer than 10 × 6 = 1.67 and 12 × 5 = 2.4
    assert images.bucket_size(size, BucketParams(side_px=64, multiple_px=8, keep_aspect=True)) == expected


def test_a_fixed_bucket_is_square_whatever_comes() -> None:
    assert images.bucket_size((600, 300), BucketParams(side_px=512)) == (512, 512)


def test_crop_keeps_the_middle() -> None:
    image = Image.new("RGB", (32, 8), RED)
    image.paste(GREEN, (12, 0, 20, 8))

    cropped = images.to_bucket(image, BucketParams(side_px=8, multiple_px=8), "crop", "white")

    assert cropped.size == (8, 8)
    assert cropped.getcolors() == [(64, GREEN)]


def test_pad_keeps_everything_and_fills_with_the_background() -> None:
    padded = images.to_bucket(Image.new("RGB", (16, 8), RED), BucketParams(side_px=16, multiple_px=16), "pad", "blue")

    assert padded.size == (16, 16)
    assert padded.getpixel((8, 8)) == RED
    assert padded.getpixel((8, 1)) == padded.getpixel((8, 14)) == BLUE


def test_a_small_picture_is_enlarged() -> None:
    assert images.to_bucket(Image.new("RGB", (8, 8)), BucketParams(side_px=64), "crop", "white").size == (64, 64)


# --------------------------------------------------------------------------------------------- attention mask


@pytest.mark.parametrize(("grey", "weight"), [(0, 0.0), (127, 1.0), (191, 3.0), (255, 5.0)])
def test_attention_is_0_to_1_up_to_the_middle_and_1_to_5_above(grey: int, weight: float) -> None:
    mask = images.attention_mask(Image.new("L", (8, 8), grey), (4, 2))

    assert mask.shape == (1, 2, 4)
    assert mask.dtype == torch.float32
    assert torch.allclose(mask, torch.full((1, 2, 4), weight))


def test_attention_averages_weights_and_not_greys() -> None:
    image = Image.new("L", (2, 1))
    image.putpixel((1, 0), 255)

    assert images.attention_mask(image, (1, 1)).item() == 2.5  # (0 + 5) / 2; grey 127.5 would weigh about 1


def test_a_mask_of_other_proportions_is_refused() -> None:
    images.check_mask_proportions((101, 50), (2000, 1000))
    with pytest.raises(InputError, check=says(expected="reference image (200 × 100 px)", got="100 × 100 px")):
        images.check_mask_proportions((100, 100), (200, 100))


# --------------------------------------------------------------------------------------------- tensors, grids


def test_images_become_tensors_between_minus_one_and_one() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 51))

    tensor = images.to_tensor([image, image])

    assert tensor.shape == (2, 3, 2, 3)
    assert torch.allclose(tensor[1, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))


def test_all_256_levels_survive_the_way_through_a_tensor() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels.T, levels[::-1]], axis=-1))

    assert images.to_images(images.to_tensor([image]))[0].tobytes() == image.tobytes()


def test_values_beyond_the_range_are_clipped() -> None:
    image = images.to_images(torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1))[0]

    assert image.getpixel((0, 0)) == (0, 128, 255)


def test_a_grid_lays_images_out_row_by_row() -> None:
    colors = [RED, GREEN, BLUE]
    grid = images.image_grid([Image.new("RGB", (10, 10), c) for c in colors], columns=2)

    assert grid.size == (4 + 2 * 14, 4 + 2 * 14)
    assert [grid.getpixel(at) for at in ((9, 9), (23, 9), (9, 23), (23, 23))] == [*colors, WHITE]


def test_small_images_are_enlarged_until_their_labels_can_be_read() -> None:
    cells = [Image.new("RGB", (64, 64), RED)] * 2
    assert images.image_grid(cells, columns=2, labels=["a label", ""]).width == 4 + 2 * (192 + 4)
    assert images.image_grid(cells, columns=2).width == 4 + 2 * (64 + 4)


def test_labels_are_below_their_images() -> None:
    cells = [Image.new("RGB", (64, 64), RED)] * 2
    grid = images.image_grid(cells, columns=2, labels=["a long label over lines", ""], cell_px=64)
    bare = images.image_grid(cells, columns=2)
    strip = np.asarray(grid)[4 + 64 + 2 :]

    assert grid.width == bare.width
    assert strip[:, : 4 + 64].min() < 100  # dark letters
    assert strip[:, 4 + 64 + 4 :].min() == 255


def test_a_grid_needs_a_label_per_image() -> None:
    with pytest.raises(ValueError, match="got 1 for 2"):
        images.image_grid([Image.new("RGB", (8, 8))] * 2, columns=2, labels=["one"])


# --------------------------------------------------------------------------------------------- framing


@pytest.mark.parametrize(
    ("source_px", "size_px", "fit", "numbers"),
    [
        ((400, 200), (64, 64), "crop", (200, 400, 0, 32, 64, 64)),  # of 128 × 64
        ((300, 900), (96, 64), "crop", (900, 300, 112, 0, 64, 96)),  # of 96 × 288
        ((64, 64), (64, 64), "crop", (64, 64, 0, 0, 64, 64)),
        ((400, 200), (64, 64), "pad", (200, 400, 0, 0, 64, 64)),
    ],
)
def test_the_framing_says_what_was_cropped_of_the_resized_picture(
    source_px: tuple[int, int], size_px: tuple[int, int], fit: Literal["crop", "pad"], numbers: tuple[int, ...]
) -> None:
    assert images.framing(source_px, size_px, fit).numbers() == numbers


# ------------------------------------------------------------------------------------------------- malicious files


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(added: bytes, size: tuple[int, int] = (16, 16)) -> bytes:
    """Return a PNG with chunks after its header, which states another size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + added + encode(Image.new("RGB", (16, 16)))[33:]


BOMB = zlib.compress(bytes(100_000_000), 9)


@pytest.mark.parametrize(
    "added",
    [
        chunk(b"zTXt", b"k\0\0" + BOMB),
        chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB),
        chunk(b"iCCP", b"k\0\0" + BOMB),
        b"".join(chunk(b"tEXt", b"k%d\0" % number + bytes(900_000)) for number in range(100)),
    ],
    ids=["zTXt", "iTXt", "iCCP", "many tEXt"],
)
def test_a_text_or_profile_that_expands_is_refused_before_it_fills_the_memory(added: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(InputError, check=says(expected="picture")):
        decode(png_with(added))
    assert tracemalloc.get_traced_memory()[1] < 300_000_000
    tracemalloc.stop()


def test_a_picture_that_states_a_huge_size_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="pixels", got="200000 × 200000")):
        decode(png_with(b"", (200_000, 200_000)))


def test_postscript_is_refused_without_running_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gs", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho run >> {tmp_path}/ran\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(InputError, check=says(got="PostScript", remedy="PNG")):
        decode(encode(two_colored(), "EPS"))
    assert not (tmp_path / "ran").exists()


def test_a_damaged_avif_is_refused() -> None:
    data = encode(two_colored(), "AVIF")
    with pytest.raises(InputError, check=says(got="damaged")):
        decode(data.replace(b"av01", b"xxxx"))


def test_a_dds_of_an_unknown_pixel_format_is_refused() -> None:
    data = bytearray(encode(two_colored(), "DDS"))
    data[80:84] = bytes(4)  # flags of the pixel format
    with pytest.raises(InputError, check=says(got="pixel format")):
        decode(bytes(data))


@pytest.mark.parametrize("error", [RuntimeError, KeyError, AttributeError, OverflowError, AssertionError])
def test_whatever_a_decoder_raises_is_a_damaged_file(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise error("of the decoder")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(InputError, check=says(got="of the decoder")):
        decode(encode(two_colored()))


def test_a_picture_that_does_not_fit_into_memory_is_not_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(InputError, check=says(expected="memory", remedy="scale it down")):
        decode(encode(two_colored()))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"PAR1" + bytes(100), "parquet table"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"just a text", "a text"),
        (bytes(range(256)), "unknown kind"),
    ],
)
def test_a_file_of_another_kind_is_named(data: bytes, kind: str) -> None:
    with pytest.raises(InputError, check=says(got=kind)):
        decode(data)


def test_a_framing_is_read_back_and_a_damaged_one_refused() -> None:
    values = {"original_px": [64, 48], "crop_px": [8, 0], "size_px": [48, 48]}
    assert images.Framing.of_values(values) == images.Framing((64, 48), (8, 0), (48, 48))
    for damaged in ([], {}, values | {"crop_px": [1]}, values | {"size_px": None}):
        with pytest.raises(InputError, check=says(expected="prepared_framing", remedy="ingestion")):
            images.Framing.of_values(damaged)
