"""The images of the base model that those of a concept are compared with, as a set that is drawn once.

They depend on the class word, not on the subject: all concepts that are evaluated alike share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from PIL.Image import Image

from dreamartist_pipeline.backbones.base_model import open_base_model
from dreamartist_pipeline.backbones.fitting import check_base_model
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.image_set import CaptionedImages, ImagesToDraw, batches_of, describe_images
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.disk_space import PNG_PIXEL_BYTES
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, EvaluationParams
from dreamartist_pipeline.pipelines.evaluation.drawing import Batch, draw_batches, drawings
from dreamartist_pipeline.pipelines.evaluation.measuring import Drawings
from dreamartist_pipeline.pipelines.evaluation.planning import Part, base_parts


def base_image_set(
    base_model: ModelLocation, concept: Concept, params: EvaluationParams, device: DeviceParams
) -> ImagesToDraw:
    """Return the requested set: the subject's prompts with the class word, then those without the subject.

    Raises:
        InputError: an incomplete base model, or a concept for another one.
    """
    backbone = open_base_model(base_model, device)
    check_base_model(concept, backbone)
    parts = list(base_parts(concept, params).values())
    sizes = [len(part.rows()) for part in parts]
    manifest = describe_images(
        backbone.fingerprint,
        [prompt for part in parts for prompt, _ in part.rows()],
        parts[0].model.negative_prompt,
        params.sampler,
        params.seed,
        device,
        images_per_prompt=params.images_per_prompt,
        part_sizes=sizes,  # no batch has images of two parts, so that those of a concept have the same batches
        clip_skip=concept.metadata.clip_skip,
        zero_terminal_snr=concept.metadata.zero_terminal_snr,
    )
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return ImagesToDraw(
        captions=[caption for part in parts for caption in _captions(part)],
        batches=[
            range(start + batch.start, start + batch.stop)
            for start, size in zip(starts, sizes, strict=True)
            for batch in batches_of(size, params.sampler.batch_size)
        ],
        manifest=manifest,
        draw=partial(_draw, base_model, concept, params, device),
        image_bytes=PNG_PIXEL_BYTES * backbone.image_px**2,
        to_draw_fewer="lower evaluation.images_per_prompt",
    )


def base_drawings(images: CaptionedImages, concept: Concept, params: EvaluationParams) -> dict[str, Drawings]:
    """Return SUBJECT and PRIOR -> the images of a set.

    Raises:
        InputError: they have other prompts or seeds than this evaluation; an image that cannot be read.
    """
    parts = base_parts(concept, params)
    captions = [caption for part in parts.values() for caption in _captions(part)]
    if captions != (found := [caption for caption, _ in images]):
        other = next((one for one in found if one not in captions), f"{len(found)} images")
        raise InputError(
            expected=f"images of the base model from the {len(captions)} prompts and seeds of this evaluation",
            got=f"others, such as {other}",
            remedy="draw them again (kedro run --nodes draw_base_images --params subject=NAME)",
        )
    read = (load() for _, load in images)
    return {kind: drawings(part, read) for kind, part in parts.items()}


def _captions(part: Part) -> list[str]:
    return [f"{prompt} (seed {seed})" for prompt, seed in part.rows()]


def _draw(
    base_model: ModelLocation,
    concept: Concept,
    params: EvaluationParams,
    device: DeviceParams,
    batches: Sequence[Sequence[int]],
) -> Iterator[Image]:
    """Yield the images of batches of indices."""
    rows = [(part.model, row) for part in base_parts(concept, params).values() for row in part.rows()]
    chosen = [Batch(rows[batch[0]][0], [rows[index][1] for index in batch]) for batch in batches]
    yield from draw_batches(chosen, base_model, concept, params, device, title="base model")
