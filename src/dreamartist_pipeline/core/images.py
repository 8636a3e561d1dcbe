"""Decode image files, resize to buckets, convert between images and tensors, and lay out image grids."""

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
NEUTRAL_GREY = 127  # grey of weight 1 in the attention mask
MAX_ATTENTION = 5.0  # weight of white in the attention mask

_STILL_FORMATS_WITH_FRAMES = ("MPO", "PSD")  # phone photos with a depth or gain map, layered files: use frame 0
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


# ------------------------------------------------------------------------------------------------- decode


def decode_image(data: bytes, name: str, max_pixels: int, setting: str | None = "ingestion.max_pixels") -> Image.Image:
    """Decode one still image of any Pillow mode, and apply its EXIF orientation.

    Args:
        data: bytes of an image file.
        name: name of the image in messages.
        max_pixels: larger images are rejected before their pixels are decoded.
        setting: the option that sets `max_pixels`, if any.

    Returns:
        An RGBA image if the file has transparency, else an RGB image.

    Raises:
        InputError: the file is empty, damaged or not an image, is too small or too large, or has several frames.
    """
    if not data:
        raise InputError(expected=f"a picture as {name}", got="an empty file", remedy="give a PNG, JPEG or WebP file")
    with _pillow_pixel_limit(None):  # `_check_size` names the setting in its message
        image = _open(data, name)
    _check_size(image, name, max_pixels, setting)
    try:
        with _pillow_pixel_limit(max_pixels):  # also limits images embedded in the file
            _check_still(image, name)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            expected=f"{name} to have at most {max_pixels:,} pixels", got=f"more ({error})", remedy="scale it down"
        ) from error
    except _DECODE_ERRORS as error:
        raise _damaged(name, f"{image.format} file", error) from error
    return _to_rgb_or_rgba(image, name)


@contextmanager
def _pillow_pixel_limit(max_pixels: int | None) -> Iterator[None]:
    """Make Pillow raise for more than `max_pixels` (None: no limit) within this context."""
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
    except _DECODE_ERRORS as error:
        raise _damaged(name, "file", error) from error


def _damaged(name: str, kind: str, error: Exception) -> InputError:
    return InputError(
        expected=f"a complete image as {name}",
        got=f"a damaged or truncated {kind} ({error})",
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
    """Convert grey values to 8 bits: integers range over 0…65535, floats over 0…1, or over 0…255 if any exceeds 1."""
    values = np.asarray(image).astype(np.float64)
    white = 65535.0
    if image.mode == "F":
        white = 1.0 if values.max() <= 1 else 255.0
    if not (values.min() >= 0 and values.max() <= white):  # also true for NaN
        raise InputError(
            expected=f"grey values 0…{white:g} in {name}",
            got=f"{values.min():g}…{values.max():g} (mode {image.mode})",
            remedy="export it with 8 bits per channel",
        )
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


# ------------------------------------------------------------------------------------------------- prepare


def flatten_alpha(image: Image.Image, background_color: str) -> Image.Image:
    """Composite the image over a background colour and return RGB.

    Raises:
        InputError: Pillow does not know the colour.
    """
    try:
        color = ImageColor.getrgb(background_color)[:3]
    except ValueError as error:
        raise InputError(
            expected="a colour name such as 'white' or a code such as '#f5f5f5'",
            got=f"{background_color!r}",
            remedy="correct ingestion.background_color",
        ) from error
    if image.mode != "RGBA":
        return image.convert("RGB")
    background = Image.new("RGB", image.size, color).convert("RGBA")
    return Image.alpha_composite(background, image).convert("RGB")


def bucket_size(size_px: tuple[int, int], bucket: BucketParams) -> tuple[int, int]:
    """Return the bucket (width, height) of an image of `size_px` (width, height).

    With `keep_aspect`, the candidates are all long sides in multiples of `multiple_px`, each with the longest short
    side that keeps the area within `side_px`². The nearest aspect ratio is chosen, and the larger of equal sizes.
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
    """Resize an image to its bucket; see `bucket_size` and `fit_to_size`."""
    return fit_to_size(image, bucket_size(image.size, bucket), fit, background_color)


def fit_to_size(image: Image.Image, size_px: tuple[int, int], fit: str, background_color: str) -> Image.Image:
    """Resize an image to (width, height) and keep its aspect ratio.

    Args:
        image: RGB or L.
        size_px: (width, height).
        fit: 'crop' fills the size and crops the sides; 'pad' keeps the whole image and pads it.
        background_color: of the padding.
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
    """Check that mask and image have the same aspect ratio, within 2 % for rounded sizes.

    Raises:
        InputError: the aspect ratios differ.
    """
    mask_aspect, image_aspect = mask_size_px[0] / mask_size_px[1], image_size_px[0] / image_size_px[1]
    if not 1 / 1.02 <= mask_aspect / image_aspect <= 1.02:
        raise InputError(
            expected=f"{mask_name} with the proportions of {image_name} ({image_size_px[0]} × {image_size_px[1]} px)",
            got=f"{mask_size_px[0]} × {mask_size_px[1]} px",
            remedy="paint the mask over the image and save it at the same size",
        )


def attention_mask(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Convert a grey image to loss weights, averaged to (width, height).

    Grey v ≤ 127 has the weight v/127; above, the weight rises linearly from 1 to 5 (scale of the reference toolkit).

    Returns:
        float32 `[1, height, width]` in 0…5.
    """
    grey = torch.from_numpy(np.array(image.convert("L"), dtype=np.float32))
    above = 1 + (MAX_ATTENTION - 1) * (grey - NEUTRAL_GREY) / (255 - NEUTRAL_GREY)
    weights = torch.where(grey <= NEUTRAL_GREY, grey / NEUTRAL_GREY, above)
    return F.adaptive_avg_pool2d(weights[None], (size[1], size[0]))  # [1, H, W]


# ------------------------------------------------------------------------------------------------- tensors


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """Convert RGB images of equal size to float32 `[B, 3, H, W]` in [-1, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(tensor: torch.Tensor) -> list[Image.Image]:
    """Convert `[B, 3, H, W]`, clipped to [-1, 1], of any float dtype and device, to RGB images."""
    levels = ((tensor.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(pixels) for pixels in levels.permute(0, 2, 3, 1).cpu().numpy()]


# ------------------------------------------------------------------------------------------------- grids


_GAP_PX = 4
_MIN_LABELLED_CELL_PX = 192  # so that labels are readable


def image_grid(
    images: Sequence[Image.Image],
    columns: int,
    labels: Sequence[str] | None = None,
    cell_px: int | None = None,
) -> Image.Image:
    """Lay out images row by row on white.

    Args:
        images: at least one; padded to square cells.
        columns: images per row.
        labels: a text below each image ('' for none), wrapped to the width of the cell.
        cell_px: side of a cell; by default the largest side of all images, with labels at least 192 px.

    Raises:
        ValueError: there are no images, or the number of labels differs.
    """
    if not images or columns < 1:
        raise ValueError(f"expected at least one image and one column, got {len(images)} and {columns}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"expected a label per image, got {len(labels)} for {len(images)}")
    side = cell_px or max(*(max(image.size) for image in images), _MIN_LABELLED_CELL_PX if labels else 0)
    font = ImageFont.load_default(size=max(10, side // 14))
    texts = [_wrap(label, font, side) for label in labels or []]
    text_px = max((_text_height(text, font) for text in texts), default=0)
    pitch = (side + _GAP_PX, side + text_px + _GAP_PX)
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * pitch[0] + _GAP_PX, rows * pitch[1] + _GAP_PX), "white")
    for index, image in enumerate(images):
        x, y = _GAP_PX + index % columns * pitch[0], _GAP_PX + index // columns * pitch[1]
        sheet.paste(ImageOps.pad(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS, color="white"), (x, y))
        if texts:
            ImageDraw.Draw(sheet).multiline_text((x, y + side + 2), texts[index], fill="black", font=font, spacing=2)
    return sheet


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _wrap(text: str, font: _Font, width_px: int) -> str:
    num_letters = max(4, int(width_px / max(1.0, font.getlength("n"))))
    return "\n".join(textwrap.wrap(text, num_letters))


def _text_height(text: str, font: _Font) -> int:
    if not text:
        return 0
    canvas = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return int(canvas.multiline_textbbox((0, 0), text, font=font, spacing=2)[3]) + 6
