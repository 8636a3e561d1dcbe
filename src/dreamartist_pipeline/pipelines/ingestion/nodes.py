"""Ingestion: the reference image, and its attention mask if there is one, become training data."""

from __future__ import annotations

from PIL import Image

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import IngestionParams


def prepare_reference(
    reference_image: bytes, attention_mask_image: bytes | None, params: IngestionParams
) -> tuple[Image.Image, Image.Image]:
    """Decode the reference image and bring it, and its attention mask the same way, to the bucket.

    Both are one node, so that a bad mask is found before anything of the picture is saved.

    Args:
        reference_image: bytes of an image file.
        attention_mask_image: bytes of a grey image file with the picture's proportions, or None.
        params: bucket, fit, background colour and size limit.

    Returns:
        The RGB image, and an L mask of the same size: 127 (weight 1) everywhere without a mask, 0 on padding.

    Raises:
        InputError: a picture that cannot be used, a mask of other proportions, or a mask that leaves nothing to learn.
    """
    from dreamartist_pipeline.core import images

    image = images.decode_image(reference_image, "the reference image", params.max_pixels)
    image = images.flatten_alpha(image, params.background_color)
    mask = _read_mask(attention_mask_image, image.size, params)
    prepared_image = images.to_bucket(image, params.bucket, params.fit, params.background_color)
    prepared_mask = images.fit_to_size(mask, prepared_image.size, params.fit, "black")
    _check_something_is_seen(prepared_mask)
    return prepared_image, prepared_mask


def _read_mask(data: bytes | None, image_size_px: tuple[int, int], params: IngestionParams) -> Image.Image:
    """Decode the mask at the picture's size; transparent parts weigh nothing. Without one, everything weighs 1."""
    from dreamartist_pipeline.core import images

    if data is None:
        return Image.new("L", image_size_px, images.NEUTRAL_GREY)
    mask = images.decode_image(data, "the attention mask", params.max_pixels)
    images.check_mask_proportions(mask.size, image_size_px)
    return images.flatten_alpha(mask, "black").convert("L").resize(image_size_px, Image.Resampling.BILINEAR)


def _check_something_is_seen(mask: Image.Image) -> None:
    if mask.getextrema() == (0, 0):
        raise InputError(
            expected="an attention mask with something brighter than black inside the bucket",
            got="black everywhere",
            remedy="paint what should be learned in grey or white",
        )
