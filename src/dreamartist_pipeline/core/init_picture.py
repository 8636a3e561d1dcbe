"""The initial image of img2img, and the mask of inpainting."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dreamartist_pipeline.core.images import (
    bucket_size,
    check_mask_proportions,
    decode_image,
    fit_to_size,
    flatten_alpha,
)
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import BucketParams, check_denoise

DENOISE = 0.8  # without a mask; default of StableDiffusionImg2ImgPipeline
MASKED_DENOISE = 1.0  # with a mask; default of StableDiffusionInpaintPipeline
MAX_PIXELS = 100_000_000

_MULTIPLE_PX = 8  # of the sides, if no size is given
_TINT, _TINT_ALPHA = "#3457d5", 0.45
_WHITE_FROM = 127.5  # smallest grey that counts as white in a mask


@dataclass(frozen=True)
class InitPicture:
    """An image to start from.

    Attributes:
        image: RGB.
        mask: L, of the same size, white where the image is redrawn; None for everywhere.
        denoise: fraction of the steps that is run, in (0, 1]; `strength` in diffusers.
    """

    image: Image.Image
    mask: Image.Image | None
    denoise: float


def read_init_picture(
    init_image: bytes | None, init_mask: bytes | None, denoise: float | None, num_inference_steps: int
) -> InitPicture | None:
    """Decode the image files and call `init_picture`.

    Raises:
        InputError: a file is not an image, or the arguments are inconsistent.
    """
    image, mask = (
        None if data is None else decode_image(data, name, MAX_PIXELS, setting=None)
        for data, name in ((init_image, "init_image"), (init_mask, "init_mask"))
    )
    return init_picture(image, mask, denoise, num_inference_steps)


def init_picture(
    image: Image.Image | None, mask: Image.Image | None, denoise: float | None, num_inference_steps: int
) -> InitPicture | None:
    """Return the prepared image and mask. Transparent pixels become white in the image, and black in the mask.

    Args:
        image: to start from, or None.
        mask: with the aspect ratio of the image, white where it is redrawn; None for everywhere.
        denoise: see `InitPicture`; None for 0.8, or 1 with a mask.
        num_inference_steps: total number of steps.

    Raises:
        InputError: mask or `denoise` without an image, a mask with another aspect ratio or without white, or a
            `denoise` that leaves no step.
    """
    if image is None:
        _check_unused(mask, denoise)
        return None
    if denoise is None:
        denoise = DENOISE if mask is None else MASKED_DENOISE
    _check_denoise(denoise, num_inference_steps)
    return InitPicture(flatten_alpha(image, "white"), _as_mask(mask, image.size), denoise)


def _check_unused(mask: Image.Image | None, denoise: float | None) -> None:
    """Check that neither option is given without an image."""
    if mask is None and denoise is None:
        return
    option, name = ("a mask", "the mask") if mask is not None else (f"denoise {denoise:g}", "denoise")
    raise InputError(
        expected=f"a picture to start from beside {option}",
        got="none",
        remedy=f"give it too (--params init_image=PATH, or `image` in Python), or leave {name} out",
    )


def _check_denoise(denoise: float, num_inference_steps: int) -> None:
    if not 0 < denoise <= 1:
        raise InputError(
            expected="denoise above 0 and at most 1", got=f"{denoise:g}", remedy="1 redraws the most, 0.1 the least"
        )
    try:
        check_denoise(denoise, num_inference_steps)
    except ValueError as error:
        raise InputError(
            expected="at least one step", got=f"{error}", remedy="raise denoise or num_inference_steps"
        ) from error


def _as_mask(mask: Image.Image | None, image_size_px: tuple[int, int]) -> Image.Image | None:
    """Return the mask at the size of the image."""
    if mask is None:
        return None
    check_mask_proportions(mask.size, image_size_px, "init_mask", "init_image")
    grey = flatten_alpha(mask, "black").convert("L").resize(image_size_px, Image.Resampling.BILINEAR)
    if (brightest := np.asarray(grey).max()) < _WHITE_FROM:
        raise InputError(
            expected="init_mask with white (128 to 255) where init_image is redrawn",
            got=f"nothing white (at most {brightest})",
            remedy="paint this part white",
        )
    return grey


def picture_size(picture: InitPicture, side_px: int) -> tuple[int, int]:
    """Return (width, height) with the area `side_px`² and the aspect ratio of the image, in multiples of 8."""
    side_px = max(side_px // _MULTIPLE_PX, 1) * _MULTIPLE_PX
    return bucket_size(picture.image.size, BucketParams(side_px=side_px, multiple_px=_MULTIPLE_PX, keep_aspect=True))


def fit_picture(picture: InitPicture, size_px: tuple[int, int]) -> InitPicture:
    """Resize image and mask to fill (width, height), and crop the sides."""
    image, mask = (
        part if part is None or part.size == size_px else fit_to_size(part, size_px, "crop", "white")
        for part in (picture.image, picture.mask)
    )
    assert image is not None
    return dataclasses.replace(picture, image=image, mask=mask)


def tint_redrawn(picture: InitPicture) -> Image.Image:
    """Return the image with the redrawn part tinted blue."""
    if picture.mask is None:
        return picture.image
    tinted = Image.blend(picture.image, Image.new("RGB", picture.image.size, _TINT), _TINT_ALPHA)
    white = picture.mask.point([255 * (level >= _WHITE_FROM) for level in range(256)])
    return Image.composite(tinted, picture.image, white)


def redrawn(mask: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Return 1 where the mask is white, else 0, for latents of size (width, height): float32 `[1, 1, h, w]`.

    The mask is thresholded in pixels; a latent has the value of its upper left pixel, as in diffusers.

    Raises:
        InputError: no latent is redrawn.
    """
    white = torch.from_numpy(np.array(mask.convert("L"), dtype=np.float32)) >= _WHITE_FROM
    latents = F.interpolate(white.float()[None, None], size=(size[1], size[0]))  # [1, 1, h, w], nearest
    if not latents.any():
        raise InputError(
            expected=f"init_mask to be white over at least one of the {size[0]} × {size[1]} latents of the image",
            got="smaller spots, or white only in the cropped margins",
            remedy="paint a larger part white",
        )
    return latents
