"""Denoising in the form x₀ + σ·ε (Karras et al. 2022), as k-diffusion and the tools built on it describe it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Leg:
    """Denoising along falling sigmas, without a break.

    Attributes:
        scale: what the latents are multiplied by before; of the first leg: the noise.
        sigmas: every step goes from one to the next.
        is_flow: whether the model is read as one of flow matching, whose step is `x + (σ′ − σ) · prediction`, x being
            (1 − σ) · latents before and after. Such a model is asked about timestep 1000 · σ, whole or not.
    """

    scale: float
    sigmas: tuple[float, ...]
    is_flow: bool = False


@dataclass(frozen=True)
class SigmaPath:
    """How a scheduler goes from noise to latents.

    Attributes:
        legs: in order. More than one where the noise level that a step ends at is not the one that the next step
            assumes, which amounts to a scaling of the latents; none for a scheduler without sigmas.
        end_scale: what the latents are multiplied by after the last leg.
        is_karras: whether it is Karras' spacing (ρ = 7) of the whole noise schedule, in one leg from full noise.
        difference: why k-diffusion's sampler of that name does not give the same latents on this path; "" where it
            does.
    """

    legs: tuple[Leg, ...]
    end_scale: float = 1.0
    is_karras: bool = False
    difference: str = ""
