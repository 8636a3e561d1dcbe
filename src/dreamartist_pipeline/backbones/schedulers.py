"""Schedulers of diffusers, by a short name or by their class's name, on the base model's own noise schedule."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler

from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.sampling import image_generators, sample_latents
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import SamplerParams
from dreamartist_pipeline.schedulers import SCHEDULERS

_ZERO_SNR = "rescale_betas_zero_snr"


def make_scheduler(backbone: Backbone, sampler: SamplerParams) -> Any:
    """Return a fresh diffusers scheduler with the base model's own noise schedule and prediction type.

    Raises:
        InputError: the scheduler does not take its options, or cannot follow a schedule that ends without signal.
    """
    return _build(backbone.scheduler_config, sampler)


def check_sampler(sampler: SamplerParams, zero_terminal_snr: bool = False) -> None:
    """Confirm, before a base model is loaded, that the scheduler takes its options and its number of steps.

    It takes all of its steps, on zeros: some options are first used then, and higher orders after a few steps only.

    Args:
        sampler: as configured.
        zero_terminal_snr: whether it has to follow a noise schedule that ends without signal.

    Raises:
        InputError: it does not.
    """
    scheduler = _build({**DDPMScheduler().config, _ZERO_SNR: zero_terminal_snr}, sampler)
    try:
        sample_latents(
            lambda latents, _: torch.zeros_like(latents),
            scheduler,
            torch.zeros(1, 4, 2, 2),
            sampler.guidance_scale,
            sampler.num_inference_steps,
            generators=image_generators([0]),
        )
    except Exception as error:  # an unfit value fails wherever it is first used, as an error of any kind
        raise _refused(sampler, error) from error


def draws_noise(scheduler: Any) -> bool:
    """Whether a scheduler adds noise on the way, so that its result depends on a generator."""
    is_sde = str(scheduler.config.get("algorithm_type", "")).startswith("sde")
    return is_sde or SCHEDULERS[type(scheduler).__name__].draws_noise


def _build(config: Mapping[str, Any], sampler: SamplerParams) -> Any:
    scheduler, zero_terminal_snr = SCHEDULERS[sampler.scheduler], bool(config.get(_ZERO_SNR))
    kind = getattr(diffusers, scheduler.class_name)
    known = [key for key in inspect.signature(kind.__init__).parameters if key not in ("self", "args", "kwargs")]
    _check_options(sampler, known)
    if zero_terminal_snr and _ZERO_SNR not in known:
        raise InputError(
            expected=(
                "a scheduler that can follow this concept's or base model's noise schedule, which ends without signal"
            ),
            got=f"{sampler.scheduler}, which would draw with another",
            remedy="choose ddim, dpmsolver++ or euler",
        )
    try:
        return kind.from_config(config, **scheduler.options_for(zero_terminal_snr) | sampler.scheduler_options)
    except Exception as error:  # see check_sampler
        raise _refused(sampler, error) from error


def _check_options(sampler: SamplerParams, known: list[str]) -> None:
    for option in sampler.scheduler_options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known)}"
            raise InputError(
                expected=f"scheduler_options that {sampler.scheduler} knows", got=f"'{option}'", remedy=hint
            )


def _refused(sampler: SamplerParams, error: Exception) -> InputError:
    options = f" with scheduler_options {sampler.scheduler_options}" if sampler.scheduler_options else ""
    said = str(error) or type(error).__name__
    return InputError(
        expected="a scheduler that can be set up",
        got=(f"{sampler.scheduler}{options} for {sampler.num_inference_steps} steps, to which diffusers says: {said}"),
        remedy="correct them, or choose another scheduler",
    )
