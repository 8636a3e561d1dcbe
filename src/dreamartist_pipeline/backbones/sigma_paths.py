"""The path of a diffusers scheduler in the form x₀ + σ·ε, for tools that take sigmas in place of timesteps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dreamartist_pipeline.core.sigmas import Leg, SigmaPath
from dreamartist_pipeline.params import SamplerParams
from dreamartist_pipeline.schedulers import SCHEDULERS, ComfyUISampler

_LEAST_ALPHA = 4.8973451890853435e-08  # ᾱ of the last timestep without signal, as ComfyUI and the webuis set it
_KARRAS_RHO = 7.0
_FLOW_TIMESTEPS = 1000.0  # of a model of flow matching with ComfyUI's ModelSamplingSD3
_NO_STEP = 0.01  # a fraction of a timestep that no model tells from none
_NOISE_OF_SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""The noise schedule that k-diffusion's tools take for every Stable Diffusion model; no file tells them another."""


def sigma_path(scheduler: Any, sampler: SamplerParams) -> SigmaPath:
    """Return the sigmas that a scheduler's latents go through, and how far ComfyUI's sampler follows them.

    Args:
        scheduler: a fresh diffusers scheduler, as `schedulers.make_scheduler` returns it.
        sampler: what it was made of.

    Raises:
        ValueError: nothing in ComfyUI stands for the scheduler.
    """
    known = SCHEDULERS[sampler.scheduler]
    if not isinstance(known.comfyui, ComfyUISampler):
        raise ValueError(known.comfyui)
    scheduler.set_timesteps(sampler.num_inference_steps)
    table = _sigmas_of(scheduler.alphas_cumprod)
    if known.comfyui.name == "ddim":
        path = SigmaPath(*_joined(_ddim_steps(scheduler, table), 1.0))
    elif known.comfyui.name == "euler":
        path = _euler_path(scheduler)
    elif hasattr(scheduler, "sigmas"):
        sigmas = scheduler.sigmas.float()
        if scheduler.order > 1:  # repeats them
            sigmas = sigmas.unique_consecutive()
        path = SigmaPath((Leg(_noise_scale(scheduler, sigmas[0]), tuple(sigmas.tolist())),))
    else:
        path = SigmaPath(())
    difference = _difference(scheduler, known.comfyui, path, table)
    return SigmaPath(path.legs, path.end_scale, _is_karras(path, table), difference)


def _sigmas_of(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Return σ = √((1 − ᾱ) / ᾱ) of every timestep."""
    alphas = alphas_cumprod.double().clamp(min=_LEAST_ALPHA)
    return ((1 - alphas) / alphas).sqrt()


def _noise_scale(scheduler: Any, sigma: torch.Tensor) -> float:
    """Return what standard normal noise is multiplied by: schedulers that keep ᾱ's form say 1, others say it."""
    stated = float(scheduler.init_noise_sigma)
    return stated if stated != 1.0 else float((1 + sigma.double() ** 2).sqrt())


# ------------------------------------------------------------------------------------------------- first order


@dataclass(frozen=True)
class _Step:
    """One step of first order. The model's input, of unit variance, is what both scales are about.

    Attributes:
        begin: latents / the model's input, before the step.
        end: the input of a model that is asked next / latents, after the step.
        sigmas: from where to where.
        is_flow: see `Leg`.
    """

    begin: float
    sigmas: tuple[float, float]
    end: float
    is_flow: bool = False


def _step(sigma: float, following: float) -> _Step:
    """Return an Euler step."""
    return _Step((1 + sigma**2) ** 0.5, (sigma, following), (1 + following**2) ** -0.5)


def _euler_path(scheduler: Any) -> SigmaPath:
    """Return Euler's path, whose latents are of the form x₀ + σ·ε."""
    first, last = (float(scheduler.sigmas[index].double()) for index in (0, -1))
    legs, end = _joined(_euler_steps(scheduler), _noise_scale(scheduler, scheduler.sigmas[0]) * (1 + first**2) ** -0.5)
    return SigmaPath(legs, end * (1 + last**2) ** 0.5)


def _ddim_steps(scheduler: Any, table: torch.Tensor) -> Iterator[_Step]:
    """Yield DDIM's steps.

    diffusers' DDIM ends every step at `timestep − 1000 // steps`, wherever the next one begins (`linspace`, and
    `trailing` where the steps do not divide 1000).
    """
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    last = _sigmas_of(scheduler.final_alpha_cumprod)
    for timestep in scheduler.timesteps.tolist():
        yield _step(float(table[timestep]), float(table[timestep - stride] if timestep >= stride else last))


def _euler_steps(scheduler: Any) -> Iterator[_Step]:
    """Yield Euler's steps; those at a fraction of a timestep as steps of flow matching, see `_flow_step`."""
    sigmas = scheduler.sigmas.double().tolist()
    for timestep, sigma, following in zip(scheduler.timesteps.tolist(), sigmas, sigmas[1:], strict=False):
        if abs(timestep - round(timestep)) <= _NO_STEP:
            yield _step(sigma, following)
        else:
            yield _flow_step(timestep, sigma, following, scheduler.config.prediction_type)


def _flow_step(timestep: float, sigma: float, following: float, prediction_type: str) -> _Step:
    """Return the step of flow matching that does to the model's input y what Euler's step does.

    With x = y · √(1 + σ²) and ε = p, or ε = (σ · y + v) / √(1 + σ²), Euler's x + (σ′ − σ) · ε is proportional to
    y + r · prediction; a step of flow matching from s to s + r is y + r · prediction.
    """
    size, delta = (1 + sigma**2) ** 0.5, following - sigma
    of_input, of_prediction = size, delta
    if prediction_type == "v_prediction":
        of_input, of_prediction = size + delta * sigma / size, delta / size
    flow = timestep / _FLOW_TIMESTEPS
    flow_end = flow + of_prediction / of_input
    end = (1 - flow_end) * of_input * (1 + following**2) ** -0.5
    return _Step(1 / (1 - flow), (flow, flow_end), end, is_flow=True)


def _joined(steps: Iterable[_Step], noise_scale: float) -> tuple[tuple[Leg, ...], float]:
    """Return legs, and what the latents after the last are multiplied by for the next input of a model.

    Args:
        steps: in order.
        noise_scale: the first input of the model / noise.
    """
    legs: list[Leg] = []
    end = noise_scale
    for step in steps:
        scale = end * step.begin
        if legs and not step.is_flow and not legs[-1].is_flow and legs[-1].sigmas[-1] == step.sigmas[0]:
            legs[-1] = Leg(legs[-1].scale, (*legs[-1].sigmas, step.sigmas[1]))
        else:
            legs.append(Leg(scale, step.sigmas, step.is_flow))
        end = step.end
    return tuple(legs), end


# ------------------------------------------------------------------------------------------------- in ComfyUI


def _is_karras(path: SigmaPath, table: torch.Tensor) -> bool:
    """Say whether a path is the spacing of Karras et al. (eq. 5) between the ends of the table, then 0."""
    if len(path.legs) != 1 or path.legs[0].sigmas[-1] != 0:
        return False
    found = torch.tensor(path.legs[0].sigmas[:-1], dtype=torch.double)
    ramp = torch.linspace(0, 1, len(found), dtype=torch.double)
    high, low = table[-1] ** (1 / _KARRAS_RHO), table[0] ** (1 / _KARRAS_RHO)
    sigmas = (high + ramp * (low - high)) ** _KARRAS_RHO
    full_noise = (1 + sigmas[:1] ** 2).sqrt() / path.legs[0].scale
    return bool(torch.allclose(found, sigmas, rtol=1e-5) and torch.allclose(full_noise, torch.ones(1).double()))


def _difference(scheduler: Any, comfyui: ComfyUISampler, path: SigmaPath, table: torch.Tensor) -> str:
    """Return why ComfyUI's latents differ, "" where they do not."""
    name, config = type(scheduler).__name__, scheduler.config
    if SCHEDULERS[name].draws_noise:
        return f"{name} and ComfyUI's {comfyui.name} draw noise of their own at every step"
    if comfyui.alike is None:
        return f"ComfyUI's {comfyui.name} was not compared with {name}"
    unlike = {key: config.get(key) for key, value in comfyui.alike.items() if config.get(key, value) != value}
    if unlike:
        said = ", ".join(f"{key}={value}" for key, value in unlike.items())
        return f"ComfyUI's {comfyui.name} has no {said}"
    if config.get("trained_betas") is not None or any(config[key] != value for key, value in _NOISE_OF_SD.items()):
        return "the base model's noise schedule is not Stable Diffusion's, which ComfyUI takes"
    if (error := _timestep_error(scheduler.timesteps, path, table)) > _NO_STEP:
        return (
            f"the model is asked about timesteps that are up to {error:.2f} away: ComfyUI takes the nearest of every "
            f"sigma, {name} with this spacing does not"
        )
    return ""


def _timestep_error(timesteps: torch.Tensor, path: SigmaPath, table: torch.Tensor) -> float:
    """Return how far the timesteps that a model is asked about on a path are from a scheduler's own."""
    asked: list[torch.Tensor] = []
    for leg in path.legs:
        sigmas = torch.tensor(leg.sigmas[:-1], dtype=torch.double)
        nearest = (sigmas.log()[:, None] - table.log()[None]).abs().argmin(dim=1).double()
        asked.append(sigmas * _FLOW_TIMESTEPS if leg.is_flow else nearest)
    return float((torch.cat(asked) - timesteps.double()).abs().max())
