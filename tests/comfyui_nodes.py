"""ComfyUI's sampling nodes, reimplemented for tests without its code.

The behaviour of ComfyUI (its public source, versions of 2025 and 2026): latents have the form x₀ + σ·ε; the model is
evaluated at the integer timestep with the closest log σ; an empty latent image gets noise · σ of the first sigma, and
noise · √(1 + σ²) if it is the largest sigma of the model; ManualSigmas reads numbers without exponents; AddNoise scales
noise by its sigma; `ddim` is `euler`. After ModelSamplingSD3 (shift 1) a model is treated as a flow-matching model and
evaluated at timestep 1000 · σ: latents are multiplied by 1 − σ before the sampler, and divided by it afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(latents in the form of ᾱ, one timestep) -> the guided prediction."""

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x₀ + σ·ε, σ) -> x₀."""

_PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class Model:
    """The base model in ComfyUI.

    Attributes:
        sigmas: of every timestep.
        predict: with guidance.
        predicts_v: whether the prediction is v, not ε.
        channels: of the latents.
    """

    sigmas: torch.Tensor
    predict: Predict
    predicts_v: bool
    channels: int = 4

    def denoised(self, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        timestep = (sigma.log() - self.sigmas.log()).abs().argmin()
        size = (sigma**2 + 1).sqrt()
        prediction = self.predict(latents / size, timestep)
        if self.predicts_v:
            return latents / size**2 - prediction * sigma / size
        return latents - sigma * prediction

    def denoised_as_flow(self, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return latents - sigma * self.predict(latents, 1000 * sigma)


def drawn_latents(workflow: dict[str, Any], model: Model) -> torch.Tensor:
    """Return the latents that are the input of a workflow's VAEDecode."""
    return _Run(workflow, model).latents(workflow["decoded"]["inputs"]["samples"])


@dataclass(frozen=True)
class _Run:
    workflow: dict[str, Any]
    model: Model

    def node(self, link: list[Any], *kinds: str) -> tuple[str, dict[str, Any]]:
        node = self.workflow[link[0]]
        assert node["class_type"] in kinds and link[1] == 0
        return node["class_type"], node["inputs"]

    def latents(self, link: list[Any]) -> torch.Tensor:
        kinds = "EmptyLatentImage", "AddNoise", "LatentMultiply", "SamplerCustom", "KSampler"
        kind, inputs = self.node(link, *kinds)
        match kind:
            case "EmptyLatentImage":
                sides = (inputs[side] // _PIXELS_PER_LATENT for side in ("height", "width"))
                return torch.zeros(inputs["batch_size"], self.model.channels, *sides)
            case "AddNoise":
                latents = self.latents(inputs["latent_image"])
                seed = self.node(inputs["noise"], "RandomNoise")[1]["noise_seed"]
                scale = self.sigmas(inputs["sigmas"])
                assert len(scale) == 1
                return latents + noise_like(latents, seed) * scale[0]
            case "LatentMultiply":
                assert 0 < inputs["multiplier"] <= 10
                rounded = round(inputs["multiplier"], 2)  # like the editor
                return self.latents(inputs["samples"]) * rounded
            case "SamplerCustom":
                assert inputs["add_noise"] is False
                name = self.node(inputs["sampler"], "KSamplerSelect")[1]["sampler_name"]
                sigmas, latents = self.sigmas(inputs["sigmas"]), self.latents(inputs["latent_image"])
                if self.workflow[inputs["model"][0]]["class_type"] == "ModelSamplingSD3":
                    drawn = SAMPLERS[name](self.model.denoised_as_flow, latents * (1 - sigmas[0]), sigmas)
                    return drawn / (1 - sigmas[-1])
                return SAMPLERS[name](self.model.denoised, latents, sigmas)
        latents = self.latents(inputs["latent_image"])
        sigmas = SCHEDULES[inputs["scheduler"]](self.model.sigmas, inputs["steps"])
        is_full = math.isclose(sigmas[0], self.model.sigmas[-1], rel_tol=1e-5)
        scale = (1 + sigmas[0] ** 2).sqrt() if is_full else sigmas[0]
        return SAMPLERS[inputs["sampler_name"]](
            self.model.denoised, latents + noise_like(latents, inputs["seed"]) * scale, sigmas
        )

    def sigmas(self, link: list[Any]) -> torch.Tensor:
        written = self.node(link, "ManualSigmas")[1]["sigmas"].split(", ")
        assert all(set(number) <= set("-0123456789.") for number in written)
        return torch.tensor([float(number) for number in written])


def noise_like(latents: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------- schedules


def karras(table: torch.Tensor, num_steps: int, rho: float = 7.0) -> torch.Tensor:
    """Karras et al. 2022, eq. 5, and 0."""
    share = torch.linspace(0, 1, num_steps)
    roots = table[-1] ** (1 / rho), table[0] ** (1 / rho)
    return torch.cat([(roots[0] + share * (roots[1] - roots[0])) ** rho, torch.zeros(1)])


def normal(table: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Evenly spaced timesteps from the last to the first, with interpolated log σ, and 0."""
    at = torch.linspace(len(table) - 1, 0, num_steps)
    low, high = table.log()[at.floor().long()], table.log()[at.ceil().long()]
    return torch.cat([torch.lerp(low, high, at.frac()).exp(), torch.zeros(1)])


def ddim_uniform(table: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Every (timesteps // steps)-th σ from the second on, and 0; may have one step more than `num_steps`."""
    return torch.cat([torch.zeros(1), table[1 :: max(len(table) // num_steps, 1)]]).flip(0)


SCHEDULES = {"karras": karras, "normal": normal, "ddim_uniform": ddim_uniform}


# --------------------------------------------------------------------------------------------- samplers


def euler(denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    for sigma, following in pairwise(sigmas):
        slope = (latents - denoise(latents, sigma)) / sigma
        latents = latents + slope * (following - sigma)
    return latents


def dpmpp_2m(denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Lu et al. 2022, DPM-Solver++(2M)."""
    before, length_before = None, torch.zeros(())
    for sigma, following in pairwise(sigmas):
        denoised = denoise(latents, sigma)
        length = (sigma / following).log()
        if before is None or following == 0:
            towards = denoised
        else:
            towards = denoised + (denoised - before) * (length / length_before / 2)
        latents = latents * (following / sigma) - torch.expm1(-length) * towards
        before, length_before = denoised, length
    return latents


def uni_pc(denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Zhao et al. 2023, UniPC with data prediction and B(h) = h; third order and 0.001 for a final 0 are ComfyUI's."""
    sigmas = torch.cat([sigmas[:-1], sigmas[-1:].clamp(min=1e-3)]).double()
    num_steps = len(sigmas) - 1
    highest = min(3, num_steps - 1)
    data, lambdas = [denoise(latents, sigmas[0].float()).double()], -sigmas.log()
    latents = latents.double()
    for step in range(1, num_steps + 1):
        order = min(highest, step, num_steps + 1 - step)
        known = range(step - 1, step - 1 - order, -1)
        length = lambdas[step] - lambdas[step - 1]
        ratios = [(lambdas[i] - lambdas[step - 1]) / length for i in known[1:]]
        slopes = [(data[i] - data[step - 1]) / ratio for i, ratio in zip(known[1:], ratios, strict=True)]
        plain = latents * (sigmas[step] / sigmas[step - 1]) - torch.expm1(-length) * data[step - 1]
        predicted = plain + length * _weighted(slopes, _unipc_weights(ratios, length))
        if step == num_steps:
            return predicted.float()
        data.append(denoise(predicted.float(), sigmas[step].float()).double())
        slopes.append(data[step] - data[step - 1])
        latents = plain + length * _weighted(slopes, _unipc_weights([*ratios, torch.ones(()).double()], length))
    return latents.float()


def _unipc_weights(ratios: list[torch.Tensor], length: torch.Tensor) -> torch.Tensor:
    """Solve Σ_m a_m r_mⁿ⁻¹ = n! φₙ₊₁(−h) · (−h)ⁿ / B(−h); one unknown is 1/2, by the paper's simplification."""
    if len(ratios) < 2:
        return torch.full((len(ratios),), 0.5).double()
    phi = torch.expm1(-length) / -length - 1
    targets = []
    for n in range(1, len(ratios) + 1):
        targets.append(phi * math.factorial(n) / -length)
        phi = phi / -length - 1 / math.factorial(n + 1)
    powers = torch.stack([torch.stack(ratios) ** n for n in range(len(ratios))])
    return torch.linalg.solve(powers, torch.stack(targets))


def _weighted(slopes: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor | float:
    return sum((slope * weight for slope, weight in zip(slopes, weights, strict=True)), start=torch.zeros(()))


SAMPLERS = {"euler": euler, "ddim": euler, "dpmpp_2m": dpmpp_2m, "uni_pc": uni_pc}
