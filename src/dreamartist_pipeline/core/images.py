"""Decode image files, resize to buckets, convert between images and tensors, and lay out image grids."""

from __future__ import annotations

import io
import logging
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageColor, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from pydantic import TypeAdapter, ValidationError

from dreamartist_pipeline.core.first_bytes import kind_of
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import BucketParams

MIN_SIDE_PX = 8
NEUTRAL_GREY = 127  # grey of weight 1 in the attention mask
MAX_ATTENTION = 5.0  # weight of white in the attention mask

_STILL_FORMATS_WITH_FRAMES = ("MPO", "PSD", "HEIF")  # phone photos with others beside, layered files: use the main one
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}  # of the same container; Pillow reads them
_RUN_PROGRAMS = {"EPS"}  # formats that Pillow decodes by running another program: Ghostscript
_POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")

_LEAST_VISIBLE = 0.01  # of the pixels; below, the picture is nearly one colour
_VISIBLE_LEVELS = 16  # of 255: a pixel differs from a colour where a channel differs by more
_DARK_SHARE = 1 / 4  # of white: below, grey values were probably written for another white

log = logging.getLogger(__name__)


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
        InputError: the file is empty, damaged or not an image, is too small or too large, has several frames, or is
            HEIC and pillow-heif is not installed.
    """
    image = open_image(data, name, max_pixels, setting)
    with _decoding(name, f"{image.format} file", max_pixels):  # also limits images embedded in the file
        _check_still(image, name)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb_or_rgba(image, name)


@contextmanager
def _decoding(name: str, kind: str, max_pixels: int | None) -> Iterator[None]:
    """Turn whatever Pillow raises for a file into an InputError.

    Raises:
        InputError: the file is damaged, has more than `max_pixels` (None: no limit), or needs more memory than there
            is.
    """
    try:
        with _pillow_pixel_limit(max_pixels):
            yield
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            expected=f"{name} to have at most {max_pixels:,} pixels", got=f"more ({error})", remedy="scale it down"
        ) from error
    except MemoryError as error:
        raise InputError(
            expected=f"{name} that fits into memory", got=f"a {kind} that does not", remedy="scale it down"
        ) from error
    except Exception as error:  # decoders of some formats raise RuntimeError, KeyError, …
        raise _damaged(name, kind, error) from error


def open_image(data: bytes, name: str, max_pixels: int, setting: str | None = "ingestion.max_pixels") -> Image.Image:
    """Open an image without decoding its pixels; see `decode_image`.

    Raises:
        InputError: the file is empty or not an image, is too small or too large, or is HEIC and pillow-heif is not
            installed.
    """
    if not data:
        raise InputError(expected=f"a picture as {name}", got="an empty file", remedy="give a PNG, JPEG or WebP file")
    image = _open(data, name)
    _check_size(image, name, max_pixels, setting)
    return image


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
    is_heic = _is_heic(data)
    if is_heic:
        _register_heic(name)
    Image.init()  # all formats
    formats = [name for name in Image.ID if name not in _RUN_PROGRAMS]
    try:
        with _decoding(
            name, "HEIC file" if is_heic else "file", None
        ):  # `_check_size` names the setting in its message
            return Image.open(io.BytesIO(data), formats=formats)
    except InputError as error:
        if is_heic or not isinstance(error.__cause__, UnidentifiedImageError):
            raise
        raise _no_picture(data, name) from error


def _no_picture(data: bytes, name: str) -> InputError:
    if data.startswith(_POSTSCRIPT):
        return InputError(
            expected=f"a picture as {name}",
            got="a PostScript file (EPS), which Pillow would decode by running Ghostscript",
            remedy="export it as PNG or JPEG",
        )
    return InputError(
        expected=f"a picture as {name}",
        got=f"{kind_of(data)} in no image format that Pillow reads ({len(data):,} bytes, beginning with {data[:8]!r})",
        remedy="export it as PNG or JPEG",
    )


def _is_heic(data: bytes) -> bool:
    """Say whether a file names a brand of HEIC, and none of AVIF, in its first box (ISO/IEC 23008-12, `ftyp`)."""
    length = int.from_bytes(data[:4])
    brands = {data[start : start + 4] for start in range(8, min(length, len(data), 512), 4)}
    return data[4:8] == b"ftyp" and bool(brands & _HEIC_BRANDS) and not brands & _AVIF_BRANDS


def _register_heic(name: str) -> None:
    """Let Pillow open HEIC files.

    Raises:
        InputError: pillow-heif is not installed.
    """
    if find_spec("pillow_heif") is None:
        raise InputError(
            expected=f"a picture as {name} that Pillow reads by itself",
            got="a HEIC file",
            remedy="install pillow-heif (pip install -c constraints.txt -e '.[heif]'), or export it as JPEG or PNG",
        )
    from pillow_heif import register_heif_opener

    register_heif_opener()


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
    """Convert grey values to 8 bits.

    Integers range over 0…255, or over 0…65535 if any exceeds 255; floats over 0…1, or over 0…255 if any exceeds 1.
    """
    values = np.asarray(image)
    small, large = (1.0, 255.0) if image.mode == "F" else (255.0, 65535.0)
    darkest, brightest = float(values.min()), float(values.max())
    white = small if brightest <= small else large
    if not (darkest >= 0 and brightest <= white):  # also true for NaN
        raise InputError(
            expected=f"grey values 0…{large:g} in {name}",
            got=f"{darkest:g}…{brightest:g} (mode {image.mode})",
            remedy="export it with 8 bits per channel",
        )
    _warn_of_white_level(name, image.mode, brightest, white)
    levels = np.empty(values.shape, np.uint8)
    for row, line in enumerate(values):  # of float64, a large picture would take gigabytes
        levels[row] = np.rint(line.astype(np.float64) * (255 / white))
    return Image.fromarray(levels)


def _warn_of_white_level(name: str, mode: str, brightest: float, white: float) -> None:
    """Warn where the values do not show for certain which of them is white."""
    if mode == "F":
        return
    if white == 255:
        log.warning(
            "No grey value of %s is above %d, although it has more than 8 bits: 255 is taken for white.",
            name,
            brightest,
        )
    elif brightest < _DARK_SHARE * white:
        log.warning(
            "The brightest grey value of %s is %d of %d, so that it is dark; if it was written for another white, "
            "export it with 8 bits per channel.",
            name,
            brightest,
            white,
        )


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


@dataclass(frozen=True)
class Fitting:
    """How `fit_to_size` brings a picture to a size; all sizes are (width, height).

    Attributes:
        source_px: of the picture.
        used_px: of the part of it that is used: its middle, or with fit='pad' all of it.
        scaled_px: of that part in the result.
        size_px: of the result.
    """

    source_px: tuple[int, int]
    used_px: tuple[int, int]
    scaled_px: tuple[int, int]
    size_px: tuple[int, int]

    @property
    def used_share(self) -> float:
        """How much of the picture's area is used, 0…1."""
        return _area(self.used_px) / _area(self.source_px)

    @property
    def covered_share(self) -> float:
        """How much of the result's area shows the picture, 0…1."""
        return _area(self.scaled_px) / _area(self.size_px)

    @property
    def enlargement(self) -> float:
        """How many pixels wide one of the picture's is in the result."""
        return max(self.scaled_px) / max(self.used_px)

    def __str__(self) -> str:
        """Say each step: `400 × 6000 → middle 400 × 400 (7 %) → 64 × 64`."""
        steps = [size_text(self.source_px)]
        if self.used_px != self.source_px:
            steps.append(f"middle {size_text(self.used_px)} ({percent(self.used_share)})")
        if self.scaled_px != self.used_px:
            steps.append(size_text(self.scaled_px))
        if self.scaled_px != self.size_px:
            steps.append(f"padded to {size_text(self.size_px)} ({percent(self.covered_share)} of it is the picture)")
        return " → ".join(steps)


def fitting(source_px: tuple[int, int], size_px: tuple[int, int], fit: Literal["crop", "pad"]) -> Fitting:
    """Return what `fit_to_size` does with a picture of `source_px` (width, height); its sizes are rounded."""
    ratios = [size / source for size, source in zip(size_px, source_px, strict=True)]
    if fit == "crop":
        used = _scaled(size_px, 1 / max(ratios))
        return Fitting(source_px, used, size_px, size_px)
    return Fitting(source_px, source_px, _scaled(source_px, min(ratios)), size_px)


@dataclass(frozen=True)
class Framing:
    """Which part of an original picture an image shows; all are (width, height) or (left, top).

    Attributes:
        original_px: of the original.
        crop_px: what the resized original lost at its left and top.
        size_px: of the image.
    """

    original_px: tuple[int, int]
    crop_px: tuple[int, int]
    size_px: tuple[int, int]

    @classmethod
    def of_values(cls, values: object) -> Framing:
        """Return the framing in a JSON file, the fields of this class.

        Raises:
            InputError: the file is damaged.
        """
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise InputError(
                expected="original_px, crop_px and size_px in prepared_framing",
                got="a damaged file",
                remedy="run the pipeline ingestion again",
            ) from error

    def numbers(self) -> tuple[int, ...]:
        """Return original height and width, crop top and left, height and width: the order of SDXL's time ids."""
        return tuple(side for pair in (self.original_px, self.crop_px, self.size_px) for side in reversed(pair))


def framing(source_px: tuple[int, int], size_px: tuple[int, int], fit: Literal["crop", "pad"]) -> Framing:
    """Return the framing of a picture of `source_px` (width, height) after `fit_to_size`; padding crops nothing."""
    if fit == "pad":
        return Framing(source_px, (0, 0), size_px)
    resized = _scaled(source_px, max(size / source for size, source in zip(size_px, source_px, strict=True)))
    left, top = ((whole - kept) // 2 for whole, kept in zip(resized, size_px, strict=True))
    return Framing(source_px, (left, top), size_px)


def _scaled(size_px: tuple[int, int], factor: float) -> tuple[int, int]:
    width, height = (max(1, round(side * factor)) for side in size_px)
    return width, height


def _area(size_px: tuple[int, int]) -> int:
    return size_px[0] * size_px[1]


def size_text(size_px: tuple[int, int]) -> str:
    """Say a (width, height)."""
    return f"{size_px[0]} × {size_px[1]}"


def percent(share: float) -> str:
    """Say a share, 0…1, in whole percent."""
    return f"{100 * share:.0f} %" if share >= 0.005 else "less than 1 %"


def visible_share(image: Image.Image) -> float:
    """Return the share of an RGB image's pixels, 0…1, that differ visibly from its median colour."""
    levels = np.asarray(image, dtype=np.float32)  # [H, W, 3]
    distance = np.abs(levels - np.median(levels, axis=(0, 1))).max(axis=-1)  # [H, W]
    return float((distance > _VISIBLE_LEVELS).mean())


def is_nearly_one_color(image: Image.Image) -> bool:
    """Return whether less than 1 % of an RGB image's pixels differ visibly from its median colour."""
    return visible_share(image) < _LEAST_VISIBLE


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
