"""Sampling latents with one prediction per branch, combined as in training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from dreamartist_pipeline.core.branches import combine, repeat

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(latents `[2B, C, h, w]` as negative | positive, timesteps `[2B]`) -> the model's prediction, same shape."""

_NUM_BRANCHES = 2


class Scheduler(Protocol):
    """What sampling needs of a diffusers scheduler."""

    timesteps: torch.Tensor
    init_noise_sigma: Any

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        """Choose the timesteps."""

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return what the model gets to see."""

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        """Take one denoising step; the result has `prev_sample`."""


def image_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per image, so that an image depends on its own seed only, on any device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def initial_noise(shape: Sequence[int], seeds: Sequence[int] | Sequence[torch.Generator]) -> torch.Tensor:
    """Return standard normal noise `[B, *shape]`, float32 on the CPU, one row per seed (or per generator)."""
    generators = [torch.Generator().manual_seed(s) if isinstance(s, int) else s for s in seeds]
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


@torch.no_grad()
def sample_latents(
    denoise: Denoise,
    scheduler: Scheduler,
    latents: torch.Tensor,
    guidance_scale: float,
    num_inference_steps: int,
    progress: Callable[[int], None] | None = None,
    generators: Sequence[torch.Generator] = (),
) -> torch.Tensor:
    """Return denoised latents `[B, C, h, w]`: at every step `neg + s · (pos − neg)` goes to the scheduler.

    Args:
        denoise: both branches' prediction in one pass, rows stacked negative | positive.
        scheduler: a fresh diffusers scheduler; its timesteps are set here.
        latents: `[B, C, h, w]` standard normal, float32, on the device of the model.
        guidance_scale: s; 1 is the positive branch alone.
        num_inference_steps: how many denoising steps.
        progress: called with the number of finished denoising steps.
        generators: one per image, for schedulers that add noise on the way.
    """
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    latents = latents * scheduler.init_noise_sigma
    rows = len(latents)
    guidance = torch.full((rows,), guidance_scale, device=latents.device)
    options = _step_options(scheduler, generators)
    for index, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        prediction = denoise(repeat(scaled, _NUM_BRANCHES), timestep.expand(_NUM_BRANCHES * rows))
        combined = combine(prediction.float(), guidance, _NUM_BRANCHES)
        latents = scheduler.step(combined, timestep, latents, **options).prev_sample
        if progress:
            progress(index + 1)
    return latents


def _step_options(scheduler: Scheduler, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Hand the generators to the schedulers that draw noise; the deterministic ones do not know the argument."""
    accepts = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": list(generators)} if accepts and generators else {}
