"""Sample latents with one prediction per branch, combined as in training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dreamartist_pipeline.core.branches import POSITIVE, combine, repeat, split

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(latents `[2B, C, h, w]` as negative | positive, timesteps `[2B]`) -> prediction of the same shape."""

_NUM_BRANCHES = 2


class Scheduler(Protocol):
    """The interface of a diffusers scheduler; `order` is the number of predictions per step."""

    order: int
    timesteps: torch.Tensor
    init_noise_sigma: Any

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        """Set the timesteps."""

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return clean latents with the noise of timesteps added."""

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return the input of the model."""

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        """Run one denoising step; the result has `prev_sample`."""


@dataclass(frozen=True)
class KnownLatents:
    """The latents of an initial image.

    Attributes:
        latents: `[B, C, h, w]`, multiplied by the scaling factor.
        denoise: fraction of the steps that is run, in (0, 1].
        mask: `[1, 1, h, w]`, 1 where the image is redrawn and 0 where it is kept; None for redrawn everywhere.
    """

    latents: torch.Tensor
    denoise: float
    mask: torch.Tensor | None = None


def image_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per image, so that an image depends on its own seed only, on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def initial_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Return standard normal noise `[B, *shape]`, float32 on the CPU, one row per generator."""
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
    known: KnownLatents | None = None,
) -> torch.Tensor:
    """Return denoised latents `[B, C, h, w]`; at every step, the scheduler receives `neg + s · (pos − neg)`.

    With `known`, only the last steps are run, starting from the noised image (SDEdit, Meng et al. 2022). With a mask,
    the kept part is restored after every step, with the noise of the next timestep. Both as in diffusers.

    Args:
        denoise: predicts for both branches in one pass, rows stacked negative | positive.
        scheduler: a new diffusers scheduler.
        latents: `[B, C, h, w]` standard normal, float32, on the device of the model.
        guidance_scale: s; 1 is the positive branch alone.
        num_inference_steps: number of denoising steps.
        progress: called with the number of finished steps.
        generators: one per image, for schedulers that add noise.
        known: the initial image, or None.
    """
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    noise = latents
    timesteps = scheduler.timesteps if known is None else _last_timesteps(scheduler, num_inference_steps, known.denoise)
    latents = _first_latents(scheduler, noise, timesteps, known)
    options = _step_options(scheduler, generators)
    for index, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        prediction = denoise(repeat(scaled, _NUM_BRANCHES), timestep.expand(_NUM_BRANCHES * len(latents)))
        combined = _guided(prediction.float(), guidance_scale)
        latents = scheduler.step(combined, timestep, latents, **options).prev_sample
        if known is not None and known.mask is not None:
            kept = _noised(scheduler, known.latents, noise, timesteps[index + 1 : index + 2])
            latents = (1 - known.mask) * kept + known.mask * latents
        if progress:
            progress(index + 1)
    return latents


def _guided(prediction: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Return the combined prediction `[B, C, h, w]`; at a scale of 1, exactly the positive prediction."""
    if guidance_scale == 1:
        return split(prediction, _NUM_BRANCHES)[POSITIVE]
    guidance = torch.full((len(prediction) // _NUM_BRANCHES,), guidance_scale, device=prediction.device)
    return combine(prediction, guidance, _NUM_BRANCHES)


def _last_timesteps(scheduler: Scheduler, num_inference_steps: int, denoise: float) -> torch.Tensor:
    """Return the last fraction `denoise` of the timesteps, and set the first index of the scheduler."""
    num_skipped = num_inference_steps - int(num_inference_steps * denoise)
    begin = num_skipped * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    timesteps: torch.Tensor = scheduler.timesteps[begin:]
    return timesteps


def _first_latents(
    scheduler: Scheduler, noise: torch.Tensor, timesteps: torch.Tensor, known: KnownLatents | None
) -> torch.Tensor:
    """Return the first noisy latents: pure noise without an initial image, and for inpainting with all steps."""
    if known is None or (known.mask is not None and known.denoise == 1):
        pure_noise: torch.Tensor = noise * scheduler.init_noise_sigma
        return pure_noise
    return _noised(scheduler, known.latents, noise, timesteps[:1].repeat(len(noise)))


def _noised(scheduler: Scheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Return clean latents with the noise of timesteps `[1]` or `[B]`, or unchanged for no timestep."""
    return scheduler.add_noise(clean, noise, timesteps) if len(timesteps) else clean


def _step_options(scheduler: Scheduler, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Return the generators as an argument of `scheduler.step`, if it accepts one."""
    accepts = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": list(generators)} if accepts and generators else {}
