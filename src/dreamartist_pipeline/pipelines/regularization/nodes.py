"""Draw the images for prior preservation with the base model."""

from __future__ import annotations

import functools
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.core.devices import check_device
from dreamartist_pipeline.core.image_set import ImagesToDraw, batches_of, describe_images
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.disk_space import PNG_PIXEL_BYTES
from dreamartist_pipeline.early_checks import PlannedConcept, checked_early
from dreamartist_pipeline.params import DeviceParams, IngestionParams, RegularizationParams, StrengthParams

if TYPE_CHECKING:
    from PIL.Image import Image

    from dreamartist_pipeline.backbones.base_model import BaseModelFiles

_OLD_FINGERPRINT = re.compile(r"[0-9a-f]{16}|hub:.*")  # in sets of earlier versions: of the files, or the hub id
_PROGRESS_DELAY_S = 2.0
_COST_ABOVE_S = 10.0

log = logging.getLogger(__name__)


def check_regularization(params: RegularizationParams, planned: PlannedConcept | None) -> None:
    """Check the scheduler and its options; the base model's configuration is checked when it is loaded.

    Raises:
        InputError: an invalid scheduler.
    """
    from dreamartist_pipeline.backbones.schedulers import check_sampler

    check_sampler(params.sampler)


@checked_early("device", check_device)
@checked_early("regularization", check_regularization)
def make_regularization_set(
    base_model: ModelLocation,
    regularization_prompts: list[str],
    params: RegularizationParams,
    ingestion: IngestionParams,
    device: DeviceParams,
) -> ImagesToDraw:
    """Return the requested set, one square image per prompt; its dataset draws it if no equal set exists.

    Image i has the seed `params.seed` + i.

    Raises:
        InputError: an incomplete base model.
    """
    from dreamartist_pipeline.backbones.base_model import files_for, load_outline

    files = files_for(base_model, device)
    files.check()
    side_px = params.side_px or ingestion.bucket.side_px
    is_usual = side_px == load_outline(files).image_px  # the size of all sets of earlier versions, which do not name it
    manifest = describe_images(
        files.fingerprint(),
        regularization_prompts,
        params.negative_prompt,
        params.sampler,
        params.seed,
        device,
        side_px=None if is_usual else side_px,
    )
    return ImagesToDraw(
        captions=regularization_prompts,
        batches=batches_of(len(regularization_prompts), params.sampler.batch_size),
        manifest=manifest,
        draw=functools.partial(_draw, base_model, regularization_prompts, params, device, side_px),
        image_bytes=PNG_PIXEL_BYTES * side_px**2,
        to_draw_fewer="lower prompts.num_prompts",
        is_in=functools.partial(_is_same_set, files, manifest),
    )


def _is_same_set(files: BaseModelFiles, requested: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Return whether a stored set is the requested one, drawn by an earlier version with another fingerprint.

    The old fingerprint reads all files of the base model, so it is computed only if everything else is equal.
    """
    fingerprinted = {"key", "base_model_fingerprint"}
    fingerprint = str(stored.get("base_model_fingerprint"))
    return (
        all(stored.get(name) == value for name, value in requested.items() if name not in fingerprinted)
        and _OLD_FINGERPRINT.fullmatch(fingerprint) is not None
        and fingerprint == files.old_fingerprint()
    )


def _draw(
    base_model: ModelLocation,
    prompts: Sequence[str],
    params: RegularizationParams,
    device: DeviceParams,
    side_px: int,
    batches: Sequence[Sequence[int]],
) -> Iterator[Image]:
    """Draw the images of batches of prompt indices; after the first batch, log how long the others take.

    The batches are spread over all processes. Each image has the same seed and the same batch on any number of them.
    """
    from tqdm import tqdm

    from dreamartist_pipeline.core.devices import num_processes
    from dreamartist_pipeline.core.processes import spread

    count = min(num_processes(device), len(batches))
    drawn = spread(_draw_batches, batches, count, base_model, prompts, params, device, side_px)
    num_images = sum(map(len, batches))
    with tqdm(total=num_images, desc="regularization set", unit="image", delay=_PROGRESS_DELAY_S) as bar:
        for index, (images, seconds) in enumerate(drawn):
            if index == 0:
                _log_cost(sum(map(len, batches[1:])), seconds / len(images) / count, side_px)
            for image in images:
                bar.update()
                yield image


def _draw_batches(
    rank: int,
    batches: Sequence[Sequence[int]],
    base_model: ModelLocation,
    prompts: Sequence[str],
    params: RegularizationParams,
    device: DeviceParams,
    side_px: int,
) -> Iterator[tuple[list[Image], float]]:
    """Draw the batches of one process; yield the images of each, and the seconds that they took."""
    from dreamartist_pipeline.backbones.base_model import open_base_model
    from dreamartist_pipeline.backbones.concepts import attach, generate
    from dreamartist_pipeline.core.devices import device_of_rank

    loaded = attach(open_base_model(base_model, device_of_rank(device, rank)), None, StrengthParams())
    for batch in batches:
        chosen, seeds = [prompts[i] for i in batch], [params.seed + i for i in batch]
        started_s = time.monotonic()
        images = generate(
            loaded.backbone,
            loaded,
            chosen,
            params.negative_prompt,
            seeds,
            params.sampler,
            size_px=(side_px, side_px),
        )
        yield images, time.monotonic() - started_s


def _log_cost(num_images: int, seconds: float, side_px: int) -> None:
    """Log how long the remaining images take, each `seconds` as in the first batch, with all processes at work."""
    if num_images * seconds > _COST_ABOVE_S:
        duration = str(timedelta(seconds=round(num_images * seconds)))
        log.info(
            "The other %d images of %d px take about %s (hours:minutes:seconds), %.2g s each as in the first batch. "
            "prompts.num_prompts sets their number, regularization.side_px their size.",
            num_images,
            side_px,
            duration,
            seconds,
        )
