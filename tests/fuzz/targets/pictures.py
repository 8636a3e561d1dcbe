"""Pictures, masks and captions beside them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dreamartist_pipeline.core.init_picture import read_init_picture
from dreamartist_pipeline.datasets.image import CaptionDataset, ReferenceImageDataset
from dreamartist_pipeline.params import BucketParams, IngestionParams
from dreamartist_pipeline.pipelines.ingestion.nodes import check_pictures, prepare_reference
from fuzz.fuzzing import Target

_PARAMS = IngestionParams(bucket=BucketParams(side_px=32, multiple_px=8), max_pixels=1_000_000)
_SIDE_PX = 24
_FORMATS = {  # suffix -> Pillow's format and options
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "jpg": ("JPEG", {"quality": 90}),
    "webp": ("WEBP", {}),
    "avif": ("AVIF", {}),
    "dds": ("DDS", {}),
    "tif": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff": ("TIFF", {}),
    "jp2": ("JPEG2000", {}),
    "tga": ("TGA", {}),
    "qoi": ("QOI", {}),
    "ico": ("ICO", {}),
    "sgi": ("SGI", {}),
    "pcx": ("PCX", {}),
    "ppm": ("PPM", {}),
    "eps": ("EPS", {}),
    "icns": ("ICNS", {}),
}


def _encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _pictures() -> dict[str, bytes]:
    levels = np.random.default_rng(0).integers(0, 255, (_SIDE_PX, _SIDE_PX, 4), dtype=np.uint8)
    image = Image.fromarray(levels)
    rgb = image.convert("RGB")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    deep = levels[..., 0].astype(np.uint16) * 257
    return {
        **{f"rgb.{suffix}": _encoded(rgb, name, **options) for suffix, (name, options) in _FORMATS.items()},
        "exif.jpg": _encoded(rgb, "JPEG", exif=exif),
        "cmyk.jpg": _encoded(rgb.convert("CMYK"), "JPEG"),
        "alpha.png": _encoded(image, "PNG"),
        "alpha.webp": _encoded(image, "WEBP", lossless=True),
        "palette.png": _encoded(rgb.convert("P"), "PNG", transparency=0),
        "palette.gif": _encoded(rgb.convert("P"), "GIF"),
        "animated.gif": _encoded(rgb.convert("P"), "GIF", save_all=True, append_images=[rgb.convert("P").rotate(90)]),
        "deep.png": _encoded(Image.fromarray(deep), "PNG"),
        "deep.tif": _encoded(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        "float.tif": _encoded(Image.fromarray((deep / 65535).astype(np.float32)), "TIFF"),
    }


def _as_picture(file: Path) -> object:
    data = ReferenceImageDataset(filepath=str(file)).load()
    check_pictures(_PARAMS, None, data, None)
    return prepare_reference(data, None, _PARAMS)


def _as(read: Callable[[bytes, bytes], object]) -> Callable[[Path], object]:
    """Return a target's function for a file beside a valid picture of the same size."""
    valid = _encoded(Image.effect_noise((_SIDE_PX, _SIDE_PX), 50).convert("RGB"), "PNG")
    return lambda file: read(valid, file.read_bytes())


def _caption(file: Path) -> object:
    return CaptionDataset(filepath=str(file.with_suffix(".png"))).load()


TARGETS = [
    Target("picture", _pictures, _as_picture),
    Target("mask", _pictures, _as(lambda picture, mask: prepare_reference(picture, mask, _PARAMS))),
    Target("init picture", _pictures, _as(lambda picture, other: read_init_picture(other, picture, None, 20))),
    Target("init mask", _pictures, _as(lambda picture, mask: read_init_picture(picture, mask, None, 20))),
    Target("caption", lambda: {"a.txt": "a red cat, sofa, {warm:1.2} light\n".encode("utf-8-sig")}, _caption),
]
