"""Base models that need other settings than most, known by their files and names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreamartist_pipeline.schedulers import ZERO_SNR

_ANIME = re.compile(
    r"anime(?!diff)|novelai|(?<![a-z])nai(?![a-z])|anything|anylora|counterfeit|orangemix|(?<![a-z])aom\d"
    r"|pastel[-_ ]?mix|meina|hassaku|cetus[-_ ]?mix|mistoon"
)
_SAMPLERS = (
    *("generate.sampler", "evaluation.sampler", "regularization.sampler", "training.preview.sampler"),
    "export.sampler",
)


@dataclass(frozen=True)
class FewStepKind:
    """A kind of model that was distilled to draw in few steps.

    Attributes:
        name: what it is called.
        word: which names of such models have in them, a regular expression.
        steps: how many it draws in, as a text.
        sampler: options of the sampler that it needs; guidance_scale 1 is no guidance (0 or 1 in diffusers).
    """

    name: str
    word: str
    steps: str
    sampler: Mapping[str, Any]


_EULER_CLASSES = {"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"}
_EULER_TRAILING = {"scheduler": "euler", "scheduler_options.timestep_spacing": "trailing"}
LCM = FewStepKind(
    "a latent consistency model (LCM)", "lcm", "4 to 8", {"scheduler": "LCMScheduler", "num_inference_steps": 4}
)
TURBO = FewStepKind("a Turbo model", "turbo", "1 to 4", {**_EULER_TRAILING, "num_inference_steps": 4})
# Sources: the model cards of SD-Turbo, SDXL-Lightning and Hyper-SD, and diffusers' guide to LCM.
FEW_STEP_KINDS = (
    LCM,
    TURBO,
    FewStepKind("a Hyper-SD model", "hyper-?sd", "1 to 8", {"scheduler": "TCDScheduler", "num_inference_steps": 4}),
    FewStepKind("a Lightning model", "lightning", "4 or 8", {**_EULER_TRAILING, "num_inference_steps": 4}),
)


def few_step_kind(
    index: Mapping[str, Any], scheduler: Mapping[str, Any], names: Sequence[str], takes_guidance: bool
) -> FewStepKind | None:
    """Return the kind of a model that draws in few steps, None for any other.

    Args:
        index: its model_index.json.
        scheduler: its scheduler_config.json.
        names: what it is called.
        takes_guidance: whether its UNet takes the guidance scale as an input, as LCMs do.
    """
    classes = {*index.get("scheduler", ()), scheduler.get("_class_name")}
    is_lcm_pipeline = index.get("_class_name") == "LatentConsistencyModelPipeline"
    if is_lcm_pipeline or "LCMScheduler" in classes or takes_guidance:
        return LCM
    if named := next((kind for kind in FEW_STEP_KINDS if any(_has_word(name, kind.word) for name in names)), None):
        return named
    if of_scheduler := next((kind for kind in FEW_STEP_KINDS if kind.sampler["scheduler"] in classes), None):
        return of_scheduler
    return TURBO if classes & _EULER_CLASSES and _is_turbo_schedule(scheduler) else None


def _is_turbo_schedule(scheduler: Mapping[str, Any]) -> bool:
    """Return whether a scheduler of ε begins at the last timestep, as those of SD-Turbo and SDXL-Turbo do."""
    predicts_noise = scheduler.get("prediction_type", "epsilon") == "epsilon"
    return predicts_noise and scheduler.get("timestep_spacing") == "trailing" and not scheduler.get(ZERO_SNR)


def _has_word(name: str, word: str) -> bool:
    return re.search(rf"(?<![a-z])(sd|sdxl)?{word}(?![a-z])", name.rpartition("/")[2].lower()) is not None


def few_step_hint(kind: FewStepKind, name: str, takes_guidance: bool) -> str:
    """Return what users should know about a base model that draws in few steps.

    Args:
        kind: of the model.
        name: its name.
        takes_guidance: whether its UNet takes the guidance scale as an input.
    """
    settings = ", ".join(f"{key}={value}" for key, value in {**kind.sampler, "guidance_scale": 1}.items())
    own = " Its UNet takes a guidance scale as an input, which is not given here." if takes_guidance else ""
    return (
        f"{name} is {kind.name}, by its name or files: it draws in {kind.steps} steps without guidance, and worse with "
        "more of either. Set "
        f"{settings} in {', '.join(_SAMPLERS)}. Without guidance the negative branch acts on nothing: train on the "
        f"model that it was distilled from.{own}"
    )


def clip_skip_hint(names: Sequence[str], architecture: str, clip_skip: int, option: str) -> str:
    """Return a suggestion of the clip_skip that anime models are usually used with, "" where there is none.

    Args:
        names: what the base model is called.
        architecture: as modelspec names it; those of Stable Diffusion 2.x have a shorter text encoder instead.
        clip_skip: what is configured.
        option: where to set it.
    """
    found = [name for name in names if _ANIME.search(name.rpartition("/")[2].lower())]
    if clip_skip or not found or architecture != "stable-diffusion-v1":
        return ""
    return (
        f"{found[0]} is an anime model, by its name: most are used with the text states of the layer before the last "
        f"('clip skip 2' in other tools), which is {option}=1"
    )
