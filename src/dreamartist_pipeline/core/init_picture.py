"""The picture that drawing starts from (img2img), and the part of it that is drawn anew (inpainting)."""

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

DENOISE = 0.8  # without a mask; diffusers' default of StableDiffusionImg2ImgPipeline
MASKED_DENOISE = 1.0  # with one; that of StableDiffusionInpaintPipeline
MAX_PIXELS = 100_000_000

_GRID_PX = 8  # sides of a picture whose size nobody chose are multiples of it
_TINT, _TINT_SHARE = "#3457d5", 0.45
_WHITE_FROM = 127.5  # the grey from which a mask counts as white


@dataclass(frozen=True)
class InitPicture:
    """A picture to start from.

    image: RGB. mask: L, of the same size, white where the picture is drawn anew; None: everywhere.
    denoise: the share of the steps that is taken, 0 < denoise ≤ 1: what diffusers calls `strength`.
    """

    image: Image.Image
    mask: Image.Image | None
    denoise: float


def read_init_picture(
    init_image: bytes | None, init_mask: bytes | None, denoise: float | None, num_inference_steps: int
) -> InitPicture | None:
    """Decode the user's files; see `init_picture`.

    Raises:
        InputError: a file that is no picture, or pictures that do not go together.
    """
    image, mask = (
        None if data is None else decode_image(data, name, MAX_PIXELS, setting=None)
        for data, name in ((init_image, "init_image"), (init_mask, "init_mask"))
    )
    return init_picture(image, mask, denoise, num_inference_steps)


def init_picture(
    image: Image.Image | None, mask: Image.Image | None, denoise: float | None, num_inference_steps: int
) -> InitPicture | None:
    """Return picture and mask as drawing takes them: transparent parts are white in the picture, kept by the mask.

    Args:
        image: to start from; None for none.
        mask: of the picture's proportions, white where it is drawn anew; None: everywhere.
        denoise: see `InitPicture`; None: 0.8, and 1 with a mask.
        num_inference_steps: of which `denoise` leaves a part.

    Raises:
        InputError: a mask or `denoise` without a picture, a mask of other proportions or without any white, or no step
            left.
    """
    if image is None:
        _check_nothing_is_alone(mask, denoise)
        return None
    if denoise is None:
        denoise = DENOISE if mask is None else MASKED_DENOISE
    _check_denoise(denoise, num_inference_steps)
    return InitPicture(flatten_alpha(image, "white"), _as_mask(mask, image.size), denoise)


def _check_nothing_is_alone(mask: Image.Image | None, denoise: float | None) -> None:
    if mask is None and denoise is None:
        return
    lonely, name = ("a mask", "the mask") if mask is not None else (f"denoise {denoise:g}", "denoise")
    raise InputError(
        expected=f"a picture to start from beside {lonely}",
        got="none",
        remedy=f"give it too (--params init_image=PATH, or `image` in Python), or leave {name} out",
    )


def _check_denoise(denoise: float, num_inference_steps: int) -> None:
    if not 0 < denoise <= 1:
        raise InputError(
            expected="denoise above 0 and at most 1", got=f"{denoise:g}", remedy="1 keeps the least of the picture"
        )
    try:
        check_denoise(denoise, num_inference_steps)
    except ValueError as error:
        raise InputError(
            expected="a part of the steps to be left", got=f"{error}", remedy="raise denoise or num_inference_steps"
        ) from error


def _as_mask(mask: Image.Image | None, image_size_px: tuple[int, int]) -> Image.Image | None:
    """Return the mask at the picture's size."""
    if mask is None:
        return None
    check_mask_proportions(mask.size, image_size_px, "init_mask", "init_image")
    grey = flatten_alpha(mask, "black").convert("L").resize(image_size_px, Image.Resampling.BILINEAR)
    if np.asarray(grey).max() < _WHITE_FROM:
        raise InputError(
            expected="init_mask to be white where init_image is drawn anew",
            got="nothing white",
            remedy="paint that part white",
        )
    return grey


def picture_size(picture: InitPicture, side_px: int) -> tuple[int, int]:
    """Return (width, height) with the area of `side_px`², in the picture's proportions and multiples of 8."""
    side_px = max(side_px // _GRID_PX, 1) * _GRID_PX
    return bucket_size(picture.image.size, BucketParams(side_px=side_px, multiple_px=_GRID_PX, keep_aspect=True))


def fit_picture(picture: InitPicture, size_px: tuple[int, int]) -> InitPicture:
    """Bring picture and mask to (width, height) alike: scaled to fill it, what stands out at the sides is cut off."""
    image, mask = (
        part if part is None or part.size == size_px else fit_to_size(part, size_px, "crop", "white")
        for part in (picture.image, picture.mask)
    )
    assert image is not None
    return dataclasses.replace(picture, image=image, mask=mask)


def tint_redrawn(picture: InitPicture) -> Image.Image:
    """Return the picture for a sheet: the part that is drawn anew is tinted blue."""
    if picture.mask is None:
        return picture.image
    tinted = Image.blend(picture.image, Image.new("RGB", picture.image.size, _TINT), _TINT_SHARE)
    white = picture.mask.point([255 * (level >= _WHITE_FROM) for level in range(256)])
    return Image.composite(tinted, picture.image, white)


def redrawn(mask: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Return 1 where the mask is white, else 0, at latents of (width, height): float32 `[1, 1, h, w]`.

    Halves are decided in pixels, and latents take their upper left pixel, as in diffusers.

    Raises:
        InputError: the white parts are so small, or so far outside, that no latent is drawn anew.
    """
    white = torch.from_numpy(np.array(mask.convert("L"), dtype=np.float32)) >= _WHITE_FROM
    latents = F.interpolate(white.float()[None, None], size=(size[1], size[0]))  # [1, 1, h, w], nearest
    if not latents.any():
        raise InputError(
            expected=f"init_mask to be white over at least one of the {size[0]} × {size[1]} latents of the image",
            got="smaller spots, or white in the margins that are cut off",
            remedy="paint a larger part white",
        )
    return latents
