"""Let the base model draw the images that keep its behaviour in place while a concept is trained."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dreamartist_pipeline.params import DeviceParams, RegularizationParams, SamplerParams, StrengthParams

if TYPE_CHECKING:
    from PIL.Image import Image
    from tqdm import tqdm

    from dreamartist_pipeline.backbones.base_model import BaseModelFiles

_OLD_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
_PATIENCE_S = 2.0  # a progress bar appears after this long

log = logging.getLogger(__name__)

DrawBatch = Callable[[Sequence[int]], Iterable["Image"]]
"""Indices of some images -> those images, in the same order."""


class ImageStore(Protocol):
    """What drawing a set needs of the store that keeps it."""

    def has(self, key: str) -> bool:
        """Whether the set is complete."""

    def manifests(self) -> Iterable[dict[str, Any]]:
        """What made each of the complete sets."""

    def num_present(self, key: str) -> int:
        """How many images of an unfinished set are there already."""

    def write(
        self, key: str, captions: Sequence[str], draw_batch: DrawBatch, batch_size: int, manifest: Mapping[str, Any]
    ) -> None:
        """Draw what is missing, batch by batch, and publish the set when it is complete."""


def make_regularization_set(
    base_model: str,
    regularization_prompts: list[str],
    image_store: ImageStore,
    params: RegularizationParams,
    device: DeviceParams,
) -> dict[str, Any]:
    """Draw one image per prompt with the base model, unless exactly this set is already there.

    Image i has the seed `params.seed` + i. The images stream into `image_store`; an interrupted set is continued.

    Returns:
        The set's manifest: its key in the store, and what made it.

    Raises:
        InputError: the base model cannot be used, or the scheduler cannot be set up.
    """
    from dreamartist_pipeline.backbones.base_model import BaseModelFiles
    from dreamartist_pipeline.backbones.schedulers import check_sampler

    check_sampler(params.sampler)
    files = BaseModelFiles(base_model)
    files.check()
    manifest = describe_set(files.fingerprint(), regularization_prompts, params, device)
    manifest = _of_earlier_versions(files, manifest, image_store) or manifest
    key, num_images = manifest["key"], manifest["num_images"]
    if image_store.has(key):
        log.info("The regularization set %s (%d images) is complete and is used again.", key, num_images)
        return manifest
    log.info(
        "Drawing the regularization set %s: %d images, %d of them already there.",
        key,
        num_images,
        image_store.num_present(key),
    )
    with _progress_bar(num_images) as bar:
        draw_batch = _base_model_draws(files, regularization_prompts, params, device, bar)
        image_store.write(key, regularization_prompts, draw_batch, params.sampler.batch_size, manifest)
    return manifest


def _of_earlier_versions(
    files: BaseModelFiles, manifest: Mapping[str, Any], image_store: ImageStore
) -> dict[str, Any] | None:
    """Return the manifest of the same set as an earlier version drew it, named after another fingerprint.

    That fingerprint takes as long as reading all files: it is only asked for where such a set may be there.
    """
    if image_store.has(manifest["key"]):
        return None
    named = {"key", "base_model_fingerprint"}
    ingredients = {name: value for name, value in manifest.items() if name not in named}
    stored = [each for each in image_store.manifests() if ingredients.items() <= each.items()]
    if not any(_OLD_FINGERPRINT.fullmatch(each["base_model_fingerprint"]) for each in stored):
        return None
    old = files.old_fingerprint()
    return next((each for each in stored if each["base_model_fingerprint"] == old), None)


def describe_set(
    fingerprint: str, prompts: Sequence[str], params: RegularizationParams, device: DeviceParams
) -> dict[str, Any]:
    """Say what makes a regularization set, and name it after that.

    The key is the SHA-256 of all else in the manifest, which holds everything that shapes the images; their size is the
    base model's own, so its fingerprint stands for it.
    """
    manifest = {
        "base_model_fingerprint": fingerprint,
        "num_images": len(prompts),
        "prompts_sha256": _sha256(list(prompts)),
        "negative_prompt": params.negative_prompt,
        "sampler": _sampler_fields(params.sampler),
        "seed": params.seed,
        "dtype": device.dtype,
    }
    return {"key": _sha256(manifest)[:16], **manifest}


def _sampler_fields(sampler: SamplerParams) -> dict[str, Any]:
    """Return what the sampler is told; a set of a scheduler without options has the name that it always had."""
    fields = sampler.model_dump(mode="json")
    return {name: value for name, value in fields.items() if name != "scheduler_options" or value}


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _progress_bar(num_images: int) -> tqdm:
    from tqdm import tqdm

    return tqdm(total=num_images, desc="regularization set", unit="image", delay=_PATIENCE_S)


def _base_model_draws(
    files: BaseModelFiles, prompts: Sequence[str], params: RegularizationParams, device: DeviceParams, bar: tqdm
) -> DrawBatch:
    """Return what draws the images of some prompt indices; the base model is loaded when the first are asked for."""
    from dreamartist_pipeline.backbones.base_model import open_base_model
    from dreamartist_pipeline.backbones.concepts import LoadedConcept, attach, generate

    @functools.cache
    def load() -> LoadedConcept:
        loaded = attach(open_base_model(files.path, device), None, StrengthParams())
        bar.unpause()  # its rate is that of drawing, without the loading
        return loaded

    def draw_batch(indices: Sequence[int]) -> Iterator[Image]:
        bar.update(indices[0] - bar.n)  # images of an earlier, interrupted run
        chosen, seeds = [prompts[i] for i in indices], [params.seed + i for i in indices]
        loaded = load()
        for image in generate(loaded.backbone, loaded, chosen, params.negative_prompt, seeds, params.sampler):
            bar.update()
            yield image

    return draw_batch
