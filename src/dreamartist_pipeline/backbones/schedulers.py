"""Schedulers of diffusers, by short name or class name, with the base model's own noise schedule."""

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
from dreamartist_pipeline.schedulers import SCHEDULERS, ZERO_SNR


def make_scheduler(backbone: Backbone, sampler: SamplerParams) -> Any:
    """Return a fresh diffusers scheduler with the base model's own noise schedule and prediction type.

    Raises:
        InputError: the scheduler does not take its options, or cannot follow a zero-terminal-SNR schedule.
    """
    return _build(backbone.scheduler_config, sampler)


def check_sampler(sampler: SamplerParams, zero_terminal_snr: bool = False) -> None:
    """Check, without a base model, that the scheduler takes its options and its number of steps.

    All steps are run, on zeros: some options are first read in a step, higher orders only after a few.

    Args:
        sampler: as configured.
        zero_terminal_snr: whether the noise schedule has zero terminal SNR.

    Raises:
        InputError: it does not.
    """
    scheduler = _build({**DDPMScheduler().config, ZERO_SNR: zero_terminal_snr}, sampler)
    try:
        sample_latents(
            lambda latents, _: torch.zeros_like(latents),
            scheduler,
            torch.zeros(1, 4, 2, 2),
            sampler.guidance_scale,
            sampler.num_inference_steps,
            generators=image_generators([0]),
        )
    except Exception as error:  # an invalid value fails where it is first used, with any error
        raise _rejected(sampler, error) from error


def draws_noise(scheduler: Any) -> bool:
    """Return whether a scheduler adds noise in its steps, so that its result depends on a generator."""
    is_sde = str(scheduler.config.get("algorithm_type", "")).startswith("sde")
    return is_sde or SCHEDULERS[type(scheduler).__name__].draws_noise


def _build(config: Mapping[str, Any], sampler: SamplerParams) -> Any:
    scheduler, zero_terminal_snr = SCHEDULERS[sampler.scheduler], bool(config.get(ZERO_SNR))
    kind = getattr(diffusers, scheduler.class_name)
    known = [key for key in inspect.signature(kind.__init__).parameters if key not in ("self", "args", "kwargs")]
    for option in sorted(sampler.scheduler_options.keys() - set(known)):
        near = difflib.get_close_matches(option, known, n=1)
        raise InputError(
            expected=f"scheduler_options of {sampler.scheduler}",
            got=f"{option!r}",
            remedy=f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}",
        )
    if zero_terminal_snr and ZERO_SNR not in known:
        raise InputError(
            expected="a scheduler that supports zero terminal SNR, a noise schedule that ends without signal",
            got=f"{sampler.scheduler}, which has no {ZERO_SNR}",
            remedy="choose ddim, dpmsolver++ or euler",
        )
    try:
        return kind.from_config(config, **scheduler.options_for(zero_terminal_snr) | sampler.scheduler_options)
    except Exception as error:  # see check_sampler
        raise _rejected(sampler, error) from error


def _rejected(sampler: SamplerParams, error: Exception) -> InputError:
    options = f" with scheduler_options {sampler.scheduler_options}" if sampler.scheduler_options else ""
    steps, reason = sampler.num_inference_steps, str(error) or type(error).__name__
    return InputError(
        expected="a scheduler that can be set up",
        got=f"{sampler.scheduler}{options} for {steps} steps, which diffusers rejects: {reason}",
        remedy="correct the options, or choose another scheduler",
    )
