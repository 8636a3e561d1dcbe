"""The images of the base model that those of a concept are compared with, as a set that is drawn once.

They depend on the class word, not on the subject: all concepts that are evaluated alike share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise

from PIL.Image import Image

from dreamartist_pipeline.backbones.base_model import open_base_model
from dreamartist_pipeline.backbones.concepts import library_versions, with_schedule_of
from dreamartist_pipeline.backbones.fitting import check_base_model
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.image_set import ImageSet, ImagesToDraw, describe_images, json_sha256
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.disk_space import PNG_PIXEL_BYTES
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, EvaluationParams
from dreamartist_pipeline.pipelines.evaluation.drawing import batches_of_parts, draw_batches, drawings
from dreamartist_pipeline.pipelines.evaluation.measuring import Drawings
from dreamartist_pipeline.pipelines.evaluation.planning import base_parts

_MAX_NAMED = 5  # differences in a message


def base_image_set(
    base_model: ModelLocation, concept: Concept, params: EvaluationParams, device: DeviceParams
) -> ImagesToDraw:
    """Return the requested set: the subject's prompts with the class word, then those without the subject.

    A concept's images are compared with these one by one, so that all that changes rounding is in the manifest, too.

    Raises:
        InputError: an incomplete base model, or a concept for another one.
    """
    backbone = open_base_model(base_model, device)
    check_base_model(concept, backbone)
    parts = base_parts(concept, params).values()
    batches = batches_of_parts(parts, params)
    rows = [row for batch in batches for row in batch.rows]
    ends = accumulate([len(batch.rows) for batch in batches], initial=0)
    schedule = dict(with_schedule_of(concept, backbone).scheduler_config)
    manifest = describe_images(
        backbone.fingerprint,
        [prompt for prompt, _ in rows],
        batches[0].model.negative_prompt,
        params.sampler,
        params.seed,
        device,
        images_per_prompt=params.images_per_prompt,
        batches=[len(batch.rows) for batch in batches],
        clip_skip=concept.metadata.clip_skip,
        side_px=backbone.image_px,
        latent_scaling=backbone.autoencoder.config.scaling_factor,
        schedule_sha256=json_sha256({name: str(value) for name, value in schedule.items()}),
        device_type=backbone.device.type,
        versions=library_versions(),
    )
    return ImagesToDraw(
        captions=[f"{prompt} (seed {seed})" for prompt, seed in rows],
        batches=[range(start, end) for start, end in pairwise(ends)],
        manifest=manifest,
        draw=partial(_draw, base_model, concept, params, device),
        image_bytes=PNG_PIXEL_BYTES * backbone.image_px**2,
        to_draw_fewer="lower evaluation.images_per_prompt",
    )


def base_drawings(
    images: ImageSet, requested: ImagesToDraw, concept: Concept, params: EvaluationParams
) -> dict[str, Drawings]:
    """Return SUBJECT and PRIOR -> the images of a set.

    Raises:
        InputError: it is not the requested set; an image that cannot be read.
    """
    differing = [name for name, value in requested.manifest.items() if images.manifest.get(name) != value]
    if differing:
        named = [name for name in differing if name != "key"][:_MAX_NAMED]
        raise InputError(
            expected="the base model's images with the settings of this evaluation",
            got=f"images with another {', '.join(named)}",
            remedy="draw them first, with the same --params: kedro run --pipeline evaluation --params subject=NAME",
        )
    read = (load() for _, load in images)
    return {kind: drawings(part, read) for kind, part in base_parts(concept, params).items()}


def _draw(
    base_model: ModelLocation,
    concept: Concept,
    params: EvaluationParams,
    device: DeviceParams,
    chosen: Sequence[Sequence[int]],
) -> Iterator[Image]:
    """Yield the images of batches of indices."""
    batches = batches_of_parts(base_parts(concept, params).values(), params)
    starts = accumulate([len(batch.rows) for batch in batches], initial=0)
    by_start = dict(zip(starts, batches, strict=False))
    asked = [by_start[indices[0]] for indices in chosen]
    yield from draw_batches(asked, base_model, concept, params, device, title="base model's images")
