"""Let the base model draw the images that keep its behaviour in place while a concept is trained."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.core.image_set import ImagesToDraw
from dreamartist_pipeline.early_checks import PlannedConcept, checked_early
from dreamartist_pipeline.params import DeviceParams, RegularizationParams, SamplerParams, StrengthParams

if TYPE_CHECKING:
    from PIL.Image import Image

    from dreamartist_pipeline.backbones.base_model import BaseModelFiles

_EARLIER_FINGERPRINT = re.compile(r"[0-9a-f]{16}")  # of the base model's files, in place of its weights
_PATIENCE_S = 2.0  # a progress bar appears after this long


def check_regularization(params: RegularizationParams, planned: PlannedConcept | None) -> None:
    """Confirm that the scheduler can draw; whether it suits the base model shows when that is loaded.

    Raises:
        InputError: it cannot.
    """
    from dreamartist_pipeline.backbones.schedulers import check_sampler

    check_sampler(params.sampler)


@checked_early("regularization", check_regularization)
def make_regularization_set(
    base_model: str, regularization_prompts: list[str], params: RegularizationParams, device: DeviceParams
) -> ImagesToDraw:
    """Describe the requested set: one image per prompt, drawn by the base model where exactly this set is not there.

    Image i has the seed `params.seed` + i.

    Raises:
        InputError: the base model cannot be used, or the scheduler cannot be set up.
    """
    from dreamartist_pipeline.backbones.base_model import BaseModelFiles

    files = BaseModelFiles(base_model)
    files.check()
    manifest = describe_set(files.fingerprint(), regularization_prompts, params, device)
    return ImagesToDraw(
        key=manifest["key"],
        captions=regularization_prompts,
        batch_size=params.sampler.batch_size,
        manifest=manifest,
        draw=functools.partial(_draw, base_model, regularization_prompts, params, device),
        is_in=functools.partial(_is_same_set, files, manifest),
    )


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


def _is_same_set(files: BaseModelFiles, requested: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether an earlier version drew the requested set, named after its own fingerprint of the base model.

    That fingerprint takes as long as reading all files: it is only asked for where all else is the same.
    """
    named_apart = {"key", "base_model_fingerprint"}
    fingerprint = str(stored.get("base_model_fingerprint"))
    return (
        all(stored.get(name) == value for name, value in requested.items() if name not in named_apart)
        and _EARLIER_FINGERPRINT.fullmatch(fingerprint) is not None
        and fingerprint == files.old_fingerprint()
    )


def _sampler_fields(sampler: SamplerParams) -> dict[str, Any]:
    """Return what the sampler is told; a set of a scheduler without options has the name that it always had."""
    fields = sampler.model_dump(mode="json")
    return {name: value for name, value in fields.items() if name != "scheduler_options" or value}


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _draw(
    base_model: str,
    prompts: Sequence[str],
    params: RegularizationParams,
    device: DeviceParams,
    batches: Sequence[Sequence[int]],
) -> Iterator[Image]:
    """Draw the images of batches of prompt indices."""
    from tqdm import tqdm

    from dreamartist_pipeline.backbones.base_model import open_base_model
    from dreamartist_pipeline.backbones.concepts import attach, generate

    loaded = attach(open_base_model(base_model, device), None, StrengthParams())
    present = len(prompts) - sum(map(len, batches))  # of an earlier, interrupted run
    with tqdm(total=len(prompts), initial=present, desc="regularization set", unit="image", delay=_PATIENCE_S) as bar:
        for batch in batches:
            chosen, seeds = [prompts[i] for i in batch], [params.seed + i for i in batch]
            for image in generate(loaded.backbone, loaded, chosen, params.negative_prompt, seeds, params.sampler):
                bar.update()
                yield image
