"""The options of an MLflow model: those it is saved with, and those of one call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dreamartist_pipeline.decoding.json_text import parse_json, reasons
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import BatchSize, DeviceParams, GenerateParams, Params


class ModelOptions(Params):
    """What an MLflow model knows of its base model; `load_model(…, model_config={…})` replaces single values.

    Attributes:
        base_model: a folder, a single file, or `hub:OWNER/NAME[/FILE][@REVISION]`.
        vae: the same for another autoencoder, or None.
        base_model_config: folder of configurations for a single file, or None.
        base_model_fingerprint: of its weights.
        device: where it runs.
        batch_size: images that are drawn at once.
    """

    base_model: str
    vae: str | None = None
    base_model_config: str | None = None
    base_model_fingerprint: str
    device: DeviceParams
    batch_size: BatchSize


def call_options(defaults: GenerateParams) -> dict[str, tuple[str, Any]]:
    """Return name -> (type in MLflow, default) of the options of a call."""
    sampler, strength = defaults.sampler, defaults.strength
    return {
        "negative_prompt": ("string", defaults.negative_prompt),
        "seed": ("long", defaults.seed),
        "images_per_prompt": ("long", 1),
        "positive_strength": ("double", strength.positive),
        "negative_strength": ("double", strength.negative),
        "scheduler": ("string", sampler.scheduler),
        "scheduler_options": ("string", json.dumps(sampler.scheduler_options)),
        "num_inference_steps": ("long", sampler.num_inference_steps),
        "guidance_scale": ("double", sampler.guidance_scale),
        "width": ("long", defaults.width),
        "height": ("long", defaults.height),
    }


def drawing_of(prompts: Sequence[str], options: Mapping[str, Any], batch_size: int) -> GenerateParams:
    """Return what a call draws.

    Args:
        prompts: one or several.
        options: as in `call_options`, all of them.
        batch_size: images that are drawn at once.

    Raises:
        InputError: a value is out of bounds, or `scheduler_options` is not JSON.
    """
    values = dict(options)
    try:
        sampler = {
            "scheduler": values.pop("scheduler"),
            "scheduler_options": parse_json(values.pop("scheduler_options")),
            "num_inference_steps": values.pop("num_inference_steps"),
            "guidance_scale": values.pop("guidance_scale"),
            "batch_size": batch_size,
        }
        strength = {branch: values.pop(f"{branch}_strength") for branch in ("positive", "negative")}
        return GenerateParams(prompts=tuple(prompts), sampler=sampler, strength=strength, **values)
    except ValidationError as error:
        got = reasons(error)
    except ValueError as error:
        got = f"scheduler_options that are not JSON: {error}"
    raise InputError(expected="valid prompts and params", got=got, remedy="correct them; the signature lists them")
