"""What is said of the reference image: what was made of it, and what of that may be a mistake."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageColor

from dreamartist_pipeline.core.images import Fitting, fitting, is_nearly_one_color, percent, size_text
from dreamartist_pipeline.params import IngestionParams

_LEAST_USED = 0.5  # of the picture's area, and of the prepared image's

_OPAQUE, _TRANSPARENT = (255, 255), (0, 0)  # smallest and largest alpha

log = logging.getLogger(__name__)


def report_preparation(decoded: Image.Image, prepared: Image.Image, params: IngestionParams) -> str:
    """Log what was made of the picture, and warn of what may be a mistake.

    Args:
        decoded: the picture, RGB or RGBA.
        prepared: what was made of it.
        params: that did.

    Returns:
        What was made of it, such as `400 × 6000 → middle 400 × 400 (7 %) → 64 × 64`.
    """
    fitted = fitting(decoded.size, prepared.size, params.fit)
    on_background = f", transparent parts on {params.background_color}" if _alpha(decoded) != _OPAQUE else ""
    log.info("The reference image: %s%s.", fitted, on_background)
    for warning in (*_warnings_of_size(fitted), *_warnings_of_content(decoded, prepared, fitted, params)):
        log.warning("The reference image %s", warning)
    return f"{fitted}{on_background}"


def _warnings_of_size(fitted: Fitting) -> Iterator[str]:
    if fitted.used_share < _LEAST_USED:
        yield (
            f"is cropped to {percent(fitted.used_share)} of its area: what is outside its middle is not learned. "
            "Crop it to the subject, or set ingestion.fit=pad or ingestion.bucket.keep_aspect=true."
        )
    if fitted.covered_share < _LEAST_USED:
        yield (
            f"covers {percent(fitted.covered_share)} of the prepared image, the rest is padding. "
            "Crop it to the subject, or set ingestion.fit=crop or ingestion.bucket.keep_aspect=true."
        )
    if fitted.enlargement > 1:
        yield (
            f"is enlarged from {size_text(fitted.used_px)} to {size_text(fitted.scaled_px)}, which blurs it. "
            "Give a larger one, or lower ingestion.bucket.side_px."
        )


def _warnings_of_content(
    decoded: Image.Image, prepared: Image.Image, fitted: Fitting, params: IngestionParams
) -> Iterator[str]:
    if not is_nearly_one_color(_without_padding(prepared, fitted)):
        return
    if _alpha(decoded) == _TRANSPARENT:
        yield "is transparent everywhere: there is nothing to learn. Export it with its visible parts."
    elif _alpha(decoded) != _OPAQUE:
        yield (
            f"is nearly one colour on ingestion.background_color={params.background_color}, which its transparent "
            f"parts become: set it to another, such as {_contrast(params.background_color)}."
        )
    else:
        yield "is nearly one colour: there is little to learn. Open prepared_image.png to see what the training gets."


def _alpha(image: Image.Image) -> tuple[int, int]:
    """Return the smallest and the largest alpha of an RGB or RGBA image, 0…255."""
    if image.mode != "RGBA":
        return _OPAQUE
    levels = np.asarray(image.getchannel("A"))
    return int(levels.min()), int(levels.max())


def _without_padding(prepared: Image.Image, fitted: Fitting) -> Image.Image:
    left, top = ((size - scaled) // 2 for size, scaled in zip(fitted.size_px, fitted.scaled_px, strict=True))
    return prepared.crop((left, top, left + fitted.scaled_px[0], top + fitted.scaled_px[1]))


def _contrast(color: str) -> str:
    """Return black for a light colour, white for a dark one."""
    return "black" if sum(ImageColor.getrgb(color)[:3]) > 3 * 127 else "white"
