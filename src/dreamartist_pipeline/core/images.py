"""Pictures in, pictures out: decode whatever a user has, bring it to a bucket, turn images into tensors and back."""

from __future__ import annotations

import io
import struct
import textwrap
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageColor, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import BucketParams

MIN_SIDE_PX = 8
NEUTRAL_GREY = 127  # the attention mask's grey that weighs exactly 1
MAX_ATTENTION = 5.0  # the weight of white

_STILL_FORMATS_WITH_FRAMES = ("MPO", "PSD")  # phone photos with a depth or gain map, layered files: take frame 0
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


# ------------------------------------------------------------------------------------------------- decode


def decode_image(data: bytes, name: str, max_pixels: int, setting: str | None = "ingestion.max_pixels") -> Image.Image:
    """Decode one still picture of any Pillow mode, upright.

    Args:
        data: the bytes of an image file.
        name: what the picture is called in messages.
        max_pixels: refuse larger pictures before their pixels are decoded.
        setting: the configuration's name of `max_pixels`, if it has one.

    Returns:
        An RGBA image when the file has transparency, else an RGB one; turned as its EXIF orientation says.

    Raises:
        InputError: empty, no image, damaged, too small, too large, or several frames.
    """
    if not data:
        raise InputError(expected=f"a picture as {name}", got="an empty file", remedy="give a PNG, JPEG or WebP file")
    with _pillow_pixel_limit(None):  # the size is checked below, with a message that names the setting
        image = _open(data, name)
    _check_size(image, name, max_pixels, setting)
    try:
        with _pillow_pixel_limit(max_pixels):  # holds for pictures inside the file, too
            _check_still(image, name)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            expected=f"{name} to have at most {max_pixels:,} pixels", got=f"more ({error})", remedy="scale it down"
        ) from error
    except _DAMAGE as error:
        raise _damaged(name, f"{image.format} file", error) from error
    return _to_rgb_or_rgba(image, name)


@contextmanager
def _pillow_pixel_limit(max_pixels: int | None) -> Iterator[None]:
    """Make Pillow raise above `max_pixels` (None: never), and restore its global limit afterwards."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _open(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise InputError(
            expected=f"a picture as {name}",
            got=f"{len(data):,} bytes in no image format that Pillow reads (they begin with {data[:8]!r})",
            remedy="export it as PNG or JPEG",
        ) from error
    except _DAMAGE as error:
        raise _damaged(name, "file", error) from error


def _damaged(name: str, what: str, error: Exception) -> InputError:
    return InputError(
        expected=f"a whole picture as {name}",
        got=f"a damaged or truncated {what} ({error})",
        remedy="download or export it again",
    )


def _check_size(image: Image.Image, name: str, max_pixels: int, setting: str | None) -> None:
    width, height = image.size
    if width * height > max_pixels:
        remedy = f"scale it down, or raise {setting} if you trust the file" if setting else "scale it down"
        raise InputError(
            expected=f"{name} to have at most {max_pixels:,} pixels", got=f"{width} × {height} px", remedy=remedy
        )
    if min(width, height) < MIN_SIDE_PX:
        raise InputError(
            expected=f"{name} to be at least {MIN_SIDE_PX} px wide and high",
            got=f"{width} × {height} px",
            remedy="give a larger picture",
        )


def _check_still(image: Image.Image, name: str) -> None:
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1 and image.format not in _STILL_FORMATS_WITH_FRAMES:
        raise InputError(
            expected=f"one still picture as {name}",
            got=f"{num_frames} frames ({image.format})",
            remedy="export one frame as PNG",
        )


def _to_rgb_or_rgba(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _deep_grey(image, name).convert("RGB")
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode == "LAB":
        to_srgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        converted = ImageCms.applyTransform(image, to_srgb)
        assert converted is not None  # only in-place transforms return nothing
        return converted
    return image.convert("RGB")


def _deep_grey(image: Image.Image, name: str) -> Image.Image:
    """Bring grey values of more than 8 bits to 8: integers are 0…65535, floats 0…1 or, if larger ones occur, 0…255."""
    values = np.asarray(image).astype(np.float64)
    white = 65535.0
    if image.mode == "F":
        white = 1.0 if values.max() <= 1 else 255.0
    if not (values.min() >= 0 and values.max() <= white):  # also false for NaN
        raise InputError(
            expected=f"{name} to hold grey values 0…{white:g}",
            got=f"{values.min():g}…{values.max():g} (mode {image.mode})",
            remedy="export it with 8 bits per channel",
        )
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


# ------------------------------------------------------------------------------------------------- prepare


def flatten_alpha(image: Image.Image, background_color: str) -> Image.Image:
    """Lay the image over a background colour: RGB, whatever comes in.

    Raises:
        InputError: the colour is none that Pillow knows.
    """
    color = parse_color(background_color)
    if image.mode != "RGBA":
        return image.convert("RGB")
    background = Image.new("RGBA", image.size, (*color, 255))
    return Image.alpha_composite(background, image).convert("RGB")


def parse_color(text: str) -> tuple[int, int, int]:
    """Read a colour name or a code such as '#f5f5f5' as (red, green, blue) in 0…255.

    Raises:
        InputError: it is neither.
    """
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise InputError(
            expected="a colour name such as 'white' or a code such as '#f5f5f5'",
            got=f"{text!r}",
            remedy="correct ingestion.background_color",
        ) from error
    return red, green, blue


def bucket_size(size_px: tuple[int, int], bucket: BucketParams) -> tuple[int, int]:
    """Choose the (width, height) that a picture of `size_px` (width, height) is brought to.

    With `keep_aspect`: for every length of the long side, in multiples of `multiple_px`, the short side is the longest
    that keeps the area within `side_px`²; of these sizes, the one nearest in aspect ratio (the larger of equal ones).
    """
    if not bucket.keep_aspect:
        return bucket.side_px, bucket.side_px
    area = (bucket.side_px // bucket.multiple_px) ** 2  # in cells of multiple_px × multiple_px
    aspect = max(size_px) / min(size_px)
    sizes = [(long, area // long) for long in range(bucket.side_px // bucket.multiple_px, area + 1)]
    best = min(sizes, key=lambda size: (round(abs(np.log(size[0] / size[1] / aspect)), 6), -size[0] * size[1]))
    long_px, short_px = best[0] * bucket.multiple_px, best[1] * bucket.multiple_px
    return (long_px, short_px) if size_px[0] >= size_px[1] else (short_px, long_px)


def to_bucket(image: Image.Image, bucket: BucketParams, fit: str, background_color: str) -> Image.Image:
    """Bring a picture to its bucket's size; see `bucket_size` and `fit_to_size`."""
    return fit_to_size(image, bucket_size(image.size, bucket), fit, background_color)


def fit_to_size(image: Image.Image, size_px: tuple[int, int], fit: str, background_color: str) -> Image.Image:
    """Resize a picture to (width, height) without stretching it.

    Args:
        image: RGB or L.
        size_px: (width, height).
        fit: 'crop' keeps the middle and fills the size; 'pad' keeps everything and fills up with the background.
        background_color: what is padded.
    """
    if fit == "crop":
        return ImageOps.fit(image, size_px, Image.Resampling.LANCZOS)
    return ImageOps.pad(image, size_px, Image.Resampling.LANCZOS, color=background_color)


# ------------------------------------------------------------------------------------------------- attention mask


def check_mask_proportions(
    mask_size_px: tuple[int, int],
    image_size_px: tuple[int, int],
    mask_name: str = "an attention mask",
    image_name: str = "the reference image",
) -> None:
    """Refuse a mask that was not drawn over the picture: its aspect ratio may differ by 2 % (rounded sizes).

    Raises:
        InputError: another aspect ratio.
    """
    mask_aspect, image_aspect = mask_size_px[0] / mask_size_px[1], image_size_px[0] / image_size_px[1]
    if not 1 / 1.02 <= mask_aspect / image_aspect <= 1.02:
        raise InputError(
            expected=f"{mask_name} with the proportions of {image_name} ({image_size_px[0]} × {image_size_px[1]} px)",
            got=f"{mask_size_px[0]} × {mask_size_px[1]} px",
            remedy="draw the mask over the picture and save it at the same size",
        )


def attention_mask(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Read a grey picture as loss weights, averaged down to (width, height).

    Grey v ≤ 127 weighs v/127 (0…1), above it rises linearly from 1 to 5 (the reference toolkit's scale).

    Returns:
        float32 `[1, height, width]` in 0…5.
    """
    grey = torch.from_numpy(np.array(image.convert("L"), dtype=np.float32))
    above = 1 + (MAX_ATTENTION - 1) * (grey - NEUTRAL_GREY) / (255 - NEUTRAL_GREY)
    weights = torch.where(grey <= NEUTRAL_GREY, grey / NEUTRAL_GREY, above)
    return F.adaptive_avg_pool2d(weights[None], (size[1], size[0]))  # [1, H, W]


# ------------------------------------------------------------------------------------------------- tensors


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """Stack RGB images of one size: float32 `[B, 3, H, W]` in [-1, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(tensor: torch.Tensor) -> list[Image.Image]:
    """Turn `[B, 3, H, W]` in [-1, 1] (any float type and device, values beyond are clipped) into RGB images."""
    levels = ((tensor.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(pixels) for pixels in levels.permute(0, 2, 3, 1).cpu().numpy()]


# ------------------------------------------------------------------------------------------------- grids


_LABELLED_CELL_PX = 192


def image_grid(
    images: Sequence[Image.Image],
    columns: int,
    labels: Sequence[str] | None = None,
    cell_px: int | None = None,
    gap_px: int = 4,
) -> Image.Image:
    """Lay images out row by row on white.

    Args:
        images: at least one; fitted into square cells where their size differs.
        columns: images per row; the last row may be shorter.
        labels: a text under each image ('' for none), wrapped to the cell's width.
        cell_px: side of a cell; by default the largest side among the images, and wide enough to read under when there
            are labels.
        gap_px: white space around every cell.

    Raises:
        ValueError: no images, or not one label per image.
    """
    if not images or columns < 1:
        raise ValueError(f"expected at least one image and one column, got {len(images)} and {columns}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"expected a label per image, got {len(labels)} for {len(images)}")
    side = cell_px or max(*(max(image.size) for image in images), _LABELLED_CELL_PX if labels else 0)
    font = ImageFont.load_default(size=max(10, side // 14))
    texts = [_wrap(label, font, side) for label in labels or []]
    text_px = max((_text_height(text, font) for text in texts), default=0)
    pitch = (side + gap_px, side + text_px + gap_px)
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * pitch[0] + gap_px, rows * pitch[1] + gap_px), "white")
    for index, image in enumerate(images):
        x, y = gap_px + index % columns * pitch[0], gap_px + index // columns * pitch[1]
        sheet.paste(ImageOps.pad(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS, color="white"), (x, y))
        if texts:
            ImageDraw.Draw(sheet).multiline_text((x, y + side + 2), texts[index], fill="black", font=font, spacing=2)
    return sheet


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _wrap(text: str, font: _Font, width_px: int) -> str:
    letters = max(4, int(width_px / max(1.0, font.getlength("n"))))
    return "\n".join(textwrap.wrap(text, letters))


def _text_height(text: str, font: _Font) -> int:
    if not text:
        return 0
    canvas = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return int(canvas.multiline_textbbox((0, 0), text, font=font, spacing=2)[3]) + 6
