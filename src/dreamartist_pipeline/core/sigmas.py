"""Denoising in the form x₀ + σ·ε (Karras et al. 2022), the parameterisation of k-diffusion and tools based on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Denoising along consecutive decreasing sigmas.

    Attributes:
        scale: factor applied to the latents before the segment; in the first segment, to the noise.
        sigmas: each step goes from one to the next.
        is_flow: whether the model is treated as a flow-matching model, whose step is `x + (σ′ − σ) · prediction` with
            x = (1 − σ) · latents before and after. It is evaluated at timestep 1000 · σ, which may be fractional.
    """

    scale: float
    sigmas: tuple[float, ...]
    is_flow: bool = False


@dataclass(frozen=True)
class SigmaPath:
    """The sigmas of a scheduler from noise to latents.

    Attributes:
        segments: in order. A new one starts if a step ends at another noise level than the next step assumes, which is
            equivalent to scaling the latents. Empty for a scheduler without sigmas.
        end_scale: factor applied to the latents after the last segment.
        is_karras: whether it is Karras spacing (ρ = 7) of the complete noise schedule, in one segment from full noise.
        difference: why k-diffusion's sampler of that name gives other latents on this path; "" if it gives the same.
    """

    segments: tuple[Segment, ...]
    end_scale: float = 1.0
    is_karras: bool = False
    difference: str = ""
