"""The sigmas of a diffusers scheduler in the form x₀ + σ·ε, for tools that use sigmas instead of timesteps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dreamartist_pipeline.core.sigmas import Segment, SigmaPath
from dreamartist_pipeline.params import SamplerParams
from dreamartist_pipeline.schedulers import SCHEDULERS, ComfyUISampler

_MIN_ALPHA_CUMPROD = 4.8973451890853435e-08  # of the last timestep with zero terminal SNR, as in ComfyUI and A1111
_KARRAS_RHO = 7.0
_FLOW_TIMESTEPS = 1000.0  # of a flow-matching model with ComfyUI's ModelSamplingSD3
_TIMESTEP_TOLERANCE = 0.01  # has no visible effect on a prediction
_NOISE_OF_SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""The noise schedule that tools based on k-diffusion use for every Stable Diffusion model; files cannot change it."""


def sigma_path(scheduler: Any, sampler: SamplerParams) -> SigmaPath:
    """Return the sigmas of a scheduler, and whether ComfyUI's sampler gives the same latents.

    Args:
        scheduler: a fresh diffusers scheduler, as `schedulers.make_scheduler` returns it.
        sampler: the parameters it was made from.

    Raises:
        ValueError: ComfyUI has no such scheduler.
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
        if scheduler.order > 1:  # each is repeated
            sigmas = sigmas.unique_consecutive()
        path = SigmaPath((Segment(_noise_scale(scheduler, sigmas[0]), tuple(sigmas.tolist())),))
    else:
        path = SigmaPath(())
    difference = _difference(scheduler, known.comfyui, path, table)
    return SigmaPath(path.segments, path.end_scale, _is_karras(path, table), difference)


def _sigmas_of(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Return σ = √((1 − ᾱ) / ᾱ) of every timestep."""
    alphas = alphas_cumprod.double().clamp(min=_MIN_ALPHA_CUMPROD)
    return ((1 - alphas) / alphas).sqrt()


def _noise_scale(scheduler: Any, sigma: torch.Tensor) -> float:
    """Return the factor of standard normal noise; `init_noise_sigma` is 1 for schedulers in the form of ᾱ."""
    stated = float(scheduler.init_noise_sigma)
    return stated if stated != 1.0 else float((1 + sigma.double() ** 2).sqrt())


# ------------------------------------------------------------------------------------------------- first order


@dataclass(frozen=True)
class _Step:
    """One first-order step. Both scales are relative to the model's input, which has unit variance.

    Attributes:
        begin: latents / input of the model, before the step.
        end: input of the model in the next step / latents, after the step.
        sigmas: before and after the step.
        is_flow: see `Segment`.
    """

    begin: float
    sigmas: tuple[float, float]
    end: float
    is_flow: bool = False


def _step(sigma: float, following: float) -> _Step:
    """Return an Euler step."""
    return _Step((1 + sigma**2) ** 0.5, (sigma, following), (1 + following**2) ** -0.5)


def _euler_path(scheduler: Any) -> SigmaPath:
    """Return the path of Euler, whose latents have the form x₀ + σ·ε."""
    first, last = (float(scheduler.sigmas[index].double()) for index in (0, -1))
    segments, end = _joined(
        _euler_steps(scheduler), _noise_scale(scheduler, scheduler.sigmas[0]) * (1 + first**2) ** -0.5
    )
    return SigmaPath(segments, end * (1 + last**2) ** 0.5)


def _ddim_steps(scheduler: Any, table: torch.Tensor) -> Iterator[_Step]:
    """Yield DDIM's steps.

    In diffusers, every step of DDIM ends at `timestep − 1000 // steps`, even if the next one starts at another timestep
    (`linspace`, and `trailing` if 1000 is not divisible by the number of steps).
    """
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    last = _sigmas_of(scheduler.final_alpha_cumprod)
    for timestep in scheduler.timesteps.tolist():
        yield _step(float(table[timestep]), float(table[timestep - stride] if timestep >= stride else last))


def _euler_steps(scheduler: Any) -> Iterator[_Step]:
    """Yield Euler's steps; those at fractional timesteps as flow-matching steps, see `_flow_step`."""
    sigmas = scheduler.sigmas.double().tolist()
    for timestep, sigma, following in zip(scheduler.timesteps.tolist(), sigmas, sigmas[1:], strict=False):
        if abs(timestep - round(timestep)) <= _TIMESTEP_TOLERANCE:
            yield _step(sigma, following)
        else:
            yield _flow_step(timestep, sigma, following, scheduler.config.prediction_type)


def _flow_step(timestep: float, sigma: float, following: float, prediction_type: str) -> _Step:
    """Return the flow-matching step with the same effect on the model's input y as Euler's step.

    With x = y · √(1 + σ²) and ε = p, or ε = (σ · y + v) / √(1 + σ²), Euler's x + (σ′ − σ) · ε is proportional to
    y + r · prediction; a flow-matching step from s to s + r is y + r · prediction.
    """
    size, delta = (1 + sigma**2) ** 0.5, following - sigma
    of_input, of_prediction = size, delta
    if prediction_type == "v_prediction":
        of_input, of_prediction = size + delta * sigma / size, delta / size
    flow = timestep / _FLOW_TIMESTEPS
    flow_end = flow + of_prediction / of_input
    end = (1 - flow_end) * of_input * (1 + following**2) ** -0.5
    return _Step(1 / (1 - flow), (flow, flow_end), end, is_flow=True)


def _joined(steps: Iterable[_Step], noise_scale: float) -> tuple[tuple[Segment, ...], float]:
    """Return the segments, and the factor from the latents after the last one to the model's next input.

    Args:
        steps: in order.
        noise_scale: first input of the model / noise.
    """
    segments: list[Segment] = []
    end = noise_scale
    for step in steps:
        scale = end * step.begin
        if segments and not step.is_flow and not segments[-1].is_flow and segments[-1].sigmas[-1] == step.sigmas[0]:
            segments[-1] = Segment(segments[-1].scale, (*segments[-1].sigmas, step.sigmas[1]))
        else:
            segments.append(Segment(scale, step.sigmas, step.is_flow))
        end = step.end
    return tuple(segments), end


# ------------------------------------------------------------------------------------------------- in ComfyUI


def _is_karras(path: SigmaPath, table: torch.Tensor) -> bool:
    """Return whether a path has the spacing of Karras et al. (eq. 5) between the ends of the table, then 0."""
    if len(path.segments) != 1 or path.segments[0].sigmas[-1] != 0:
        return False
    found = torch.tensor(path.segments[0].sigmas[:-1], dtype=torch.double)
    ramp = torch.linspace(0, 1, len(found), dtype=torch.double)
    high, low = table[-1] ** (1 / _KARRAS_RHO), table[0] ** (1 / _KARRAS_RHO)
    sigmas = (high + ramp * (low - high)) ** _KARRAS_RHO
    full_noise = (1 + sigmas[:1] ** 2).sqrt() / path.segments[0].scale
    return bool(torch.allclose(found, sigmas, rtol=1e-5) and torch.allclose(full_noise, torch.ones(1).double()))


def _difference(scheduler: Any, comfyui: ComfyUISampler, path: SigmaPath, table: torch.Tensor) -> str:
    """Return why ComfyUI's latents differ, or "" if they do not."""
    name, config = type(scheduler).__name__, scheduler.config
    if SCHEDULERS[name].draws_noise:
        return f"{name} and ComfyUI's {comfyui.name} draw different random noise at every step"
    if comfyui.equivalent_config is None:
        return f"ComfyUI's {comfyui.name} was not compared with {name}"
    different = {
        key: config.get(key) for key, value in comfyui.equivalent_config.items() if config.get(key, value) != value
    }
    if different:
        options = ", ".join(f"{key}={value}" for key, value in different.items())
        return f"ComfyUI's {comfyui.name} does not support {options}"
    if config.get("trained_betas") is not None or any(config[key] != value for key, value in _NOISE_OF_SD.items()):
        return "the base model's noise schedule is not Stable Diffusion's, which ComfyUI uses"
    if (error := _timestep_error(scheduler.timesteps, path, table)) > _TIMESTEP_TOLERANCE:
        return (
            f"ComfyUI rounds every sigma to the nearest timestep, which differs from the timestep of {name} with this "
            f"spacing by up to {error:.2f}"
        )
    return ""


def _timestep_error(timesteps: torch.Tensor, path: SigmaPath, table: torch.Tensor) -> float:
    """Return the largest difference between the model's timesteps on a path and those of the scheduler."""
    on_path: list[torch.Tensor] = []
    for segment in path.segments:
        sigmas = torch.tensor(segment.sigmas[:-1], dtype=torch.double)
        nearest = (sigmas.log()[:, None] - table.log()[None]).abs().argmin(dim=1).double()
        on_path.append(sigmas * _FLOW_TIMESTEPS if segment.is_flow else nearest)
    return float((torch.cat(on_path) - timesteps.double()).abs().max())
