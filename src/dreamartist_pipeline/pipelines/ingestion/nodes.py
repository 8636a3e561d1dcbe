"""Prepare the reference image and its optional attention mask."""

from __future__ import annotations

import dataclasses

from PIL import Image

from dreamartist_pipeline.core.tracking import NoTracker, Tracker
from dreamartist_pipeline.early_checks import PlannedConcept, checked_early
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import IngestionParams

_NO_TRACKER = NoTracker()
_PICTURE, _MASK = "the reference image", "the attention mask"  # in messages


def check_pictures(
    params: IngestionParams, planned: PlannedConcept | None, reference_image: bytes, attention_mask_image: bytes | None
) -> None:
    """Check that the reference image and its mask are images of an accepted size.

    Raises:
        InputError: one is not.
    """
    from dreamartist_pipeline.core.images import open_image

    open_image(reference_image, _PICTURE, params.max_pixels)
    if attention_mask_image is not None:
        open_image(attention_mask_image, _MASK, params.max_pixels)


@checked_early("ingestion", check_pictures, "reference_image", "attention_mask_image")
def prepare_reference(
    reference_image: bytes,
    attention_mask_image: bytes | None,
    params: IngestionParams,
    tracker: Tracker = _NO_TRACKER,
) -> tuple[Image.Image, Image.Image, dict[str, tuple[int, int]]]:
    """Decode the reference image and its attention mask, and fit both to the bucket.

    One node for both: an invalid mask fails before the image is saved. What was made of the image is logged, and is the
    run's tag `reference_image`; possible mistakes are warnings.

    Args:
        reference_image: bytes of an image file.
        attention_mask_image: bytes of a grey image file with the image's aspect ratio, or None.
        params: bucket, fit, background colour and size limit.
        tracker: of the run.

    Returns:
        The RGB image; an L mask of the same size: 127 (weight 1) everywhere without a mask, 0 on padding; and which
        part of the picture the image shows, the fields of `images.Framing`.

    Raises:
        InputError: an invalid image, a mask of another aspect ratio, or a mask that is black everywhere.
    """
    from dreamartist_pipeline.core import images
    from dreamartist_pipeline.pipelines.ingestion.reporting import report_preparation

    decoded = images.decode_image(reference_image, _PICTURE, params.max_pixels)
    image = images.flatten_alpha(decoded, params.background_color)
    mask = _read_mask(attention_mask_image, image.size, params)
    prepared_image = images.to_bucket(image, params.bucket, params.fit, params.background_color)
    prepared_mask = images.fit_to_size(mask, prepared_image.size, params.fit, "black")
    if prepared_mask.getextrema() == (0, 0):
        raise InputError(
            expected="an attention mask brighter than black somewhere in the bucket",
            got="black everywhere",
            remedy="paint what should be learned in grey or white",
        )
    tracker.set_tag("reference_image", report_preparation(decoded, prepared_image, params))
    framing = images.framing(image.size, prepared_image.size, params.fit)
    return prepared_image, prepared_mask, dataclasses.asdict(framing)


def _read_mask(data: bytes | None, image_size_px: tuple[int, int], params: IngestionParams) -> Image.Image:
    """Decode the mask at the image's size; transparent parts have weight 0. Without a mask, all weights are 1."""
    from dreamartist_pipeline.core import images

    if data is None:
        return Image.new("L", image_size_px, images.NEUTRAL_GREY)
    mask = images.decode_image(data, _MASK, params.max_pixels)
    images.check_mask_proportions(mask.size, image_size_px)
    return images.flatten_alpha(mask, "black").convert("L").resize(image_size_px, Image.Resampling.BILINEAR)
