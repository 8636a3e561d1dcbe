"""Generation of prompts × seeds with a concept, with the settings embedded in every image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from dreamartist_pipeline.backbones.concepts import LoadedConcept, attach, generate
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.branches import POSITIVE
from dreamartist_pipeline.core.captions import check_slots, fill_negative_prompt, fill_template, slot_names
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.init_picture import InitPicture, fit_picture, picture_size
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import SamplerParams, StrengthParams


@dataclass(frozen=True)
class DrawingRequest:
    """A request for one image of every prompt with every seed.

    Attributes:
        prompts: with slots such as '{pt1}'.
        size_px: (width, height); None: the base model's size, with the proportions of `init`.
        init: a picture to start from, or None.
    """

    prompts: Sequence[str]
    negative_prompt: str
    seeds: Sequence[int]
    sampler: SamplerParams
    strength: StrengthParams
    size_px: tuple[int, int] | None = None
    init: InitPicture | None = None


@dataclass(frozen=True)
class Drawn:
    """The result of a request.

    Attributes:
        prompts: with their slots filled.
        images: all seeds of the first prompt, then of the second, …; settings in `info`.
        init: the picture to start from, at the size of the images, or None.
    """

    prompts: tuple[str, ...]
    images: tuple[Image.Image, ...]
    init: InitPicture | None


def draw(
    backbone: Backbone,
    concept: Concept | None,
    request: DrawingRequest,
    progress: Callable[[int], None] | None = None,
) -> Drawn:
    """Generate one image of every prompt with every seed.

    A slot is filled with the concept's positive trigger word (in the negative prompt, the negative one), or with the
    class word if the concept has no such slot. `info` of every image has the settings: `parameters` in A1111's format,
    `dreamartist` as JSON.

    Args:
        backbone: the base model.
        concept: trained on it; None: the base model alone.
        request: prompts, seeds and settings.
        progress: called with the number of new images after each batch.

    Raises:
        InputError: the concept does not fit the base model, an invalid size or scheduler, an unknown slot, a truncated
            trigger word, or settings that are not JSON.
    """
    loaded, request = attach_and_fill(backbone, concept, request)
    side_px = backbone.image_px
    default_px = (side_px, side_px) if request.init is None else picture_size(request.init, side_px)
    size_px = request.size_px or default_px
    init = None if request.init is None else fit_picture(request.init, size_px)
    rows = [(prompt, seed) for prompt in request.prompts for seed in request.seeds]
    infos = _image_infos(rows, backbone, concept, request, size_px)  # fails before an image is generated
    images = generate(
        backbone,
        loaded,
        [prompt for prompt, _ in rows],
        request.negative_prompt,
        [seed for _, seed in rows],
        request.sampler,
        progress,
        size_px=size_px,
        init=init,
    )
    for image, info in zip(images, infos, strict=True):
        image.info.update(info)
    return Drawn(tuple(request.prompts), tuple(images), init)


def attach_and_fill(
    backbone: Backbone, concept: Concept | None, request: DrawingRequest
) -> tuple[LoadedConcept, DrawingRequest]:
    """Return the concept on the base model, and the request with the slots of all its prompts filled.

    Raises:
        InputError: the concept does not fit the base model, an unknown slot, or a truncated trigger word.
    """
    loaded = attach(backbone, concept, request.strength)
    class_word = "" if concept is None else concept.metadata.class_word
    check_slots(request.prompts, loaded.trigger_words)
    prompts = tuple(fill_prompt(prompt, loaded, class_word) for prompt in request.prompts)
    negative_prompt = fill_negative_prompt(request.negative_prompt, loaded.negative_words)
    loaded.prompts.check_not_cut([*prompts, negative_prompt])
    loaded.prompts.warn_without_word(prompts)
    return loaded, replace(request, prompts=prompts, negative_prompt=negative_prompt)


def fill_prompt(prompt: str, loaded: LoadedConcept, class_word: str, branch: int = POSITIVE) -> str:
    """Fill a prompt's slots with the trigger words of a branch, other slots with the class word."""
    words = {slot: pair[0 if branch == POSITIVE else 1] for slot, pair in loaded.trigger_words.items()}
    return fill_template(prompt, dict.fromkeys(slot_names(prompt), class_word) | words)


def _image_infos(
    rows: Sequence[tuple[str, int]],
    backbone: Backbone,
    concept: Concept | None,
    request: DrawingRequest,
    size_px: tuple[int, int],
) -> list[dict[str, str]]:
    """Return `info` of the image of each (prompt, seed).

    Raises:
        InputError: a setting is not JSON.
    """
    try:
        common = _common_settings(backbone, concept, request, size_px)
        return [_image_info({"prompt": prompt, "seed": seed, **common}) for prompt, seed in rows]
    except (TypeError, ValueError) as error:  # of json and pydantic
        raise InputError(
            expected="settings that can be written as JSON",
            got=f"{error}",
            remedy="give plain numbers, texts and lists, also in scheduler_options",
        ) from error


def _common_settings(
    backbone: Backbone, concept: Concept | None, request: DrawingRequest, size_px: tuple[int, int]
) -> dict[str, Any]:
    """Return the settings that all images of a request share, as JSON types."""
    settings: dict[str, Any] = {
        "negative_prompt": request.negative_prompt,
        "size_px": list(size_px),
        "sampler": request.sampler.model_dump(mode="json", exclude={"batch_size"}),
        "strength": request.strength.model_dump(mode="json"),
        "base_model": backbone.name,
        "base_model_fingerprint": backbone.fingerprint,
        "config_sha256": "" if concept is None else concept.metadata.config_sha256 or "",
    }
    if request.init is not None:
        settings["denoise"] = request.init.denoise
        settings["init_image"] = _size_and_hash(request.init.image)
        if request.init.mask is not None:
            settings["init_mask"] = _size_and_hash(request.init.mask)
    return settings


def _size_and_hash(image: Image.Image) -> dict[str, Any]:
    """Return a picture's size and the SHA-256 of its pixels."""
    return {"size_px": list(image.size), "sha256": hashlib.sha256(image.tobytes()).hexdigest()}


def _image_info(settings: dict[str, Any]) -> dict[str, str]:
    sampler, negative_prompt = settings["sampler"], settings["negative_prompt"]
    shown = {
        "Steps": sampler["num_inference_steps"],
        "Sampler": sampler["scheduler"],
        "CFG scale": sampler["guidance_scale"],
        "Seed": settings["seed"],
        "Size": "{}x{}".format(*settings["size_px"]),
        "Model": settings["base_model"],
    }
    if "denoise" in settings:
        shown["Denoising strength"] = settings["denoise"]
    lines = [settings["prompt"], f"Negative prompt: {negative_prompt}"] if negative_prompt else [settings["prompt"]]
    lines.append(", ".join(f"{name}: {value}" for name, value in shown.items()))
    return {"parameters": "\n".join(lines), "dreamartist": json.dumps(settings, ensure_ascii=False)}
