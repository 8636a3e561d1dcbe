"""The supported schedulers, with their names in diffusers and ComfyUI, and the unsupported ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scheduler:
    """A supported scheduler.

    Attributes:
        class_name: class in diffusers.
        options: arguments of the class; all others have the default of the class or the value of the base model.
        comfyui: sampler_name and scheduler of KSampler; None if ComfyUI has no equivalent.
        draws_noise: whether it adds noise at every step; others do so only with an SDE as algorithm_type.
    """

    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    comfyui: tuple[str, str] | None = None
    draws_noise: bool = False

    def options_for(self, zero_terminal_snr: bool) -> dict[str, Any]:
        """Return the options for a noise schedule with or without zero terminal SNR.

        With zero terminal SNR, Karras spacing would spend half of the steps beyond the noise of the last timestep.
        """
        spacing = {"use_karras_sigmas": False} if zero_terminal_snr and "use_karras_sigmas" in self.options else {}
        return {**self.options, **spacing}


_DPMSOLVER = {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}

SCHEDULERS = {
    # short names, with recommended options
    "ddim": Scheduler("DDIMScheduler", {"clip_sample": False}, ("ddim", "ddim_uniform")),
    "dpmsolver++": Scheduler("DPMSolverMultistepScheduler", _DPMSOLVER, ("dpmpp_2m", "karras")),
    "euler": Scheduler("EulerDiscreteScheduler", {}, ("euler", "normal")),
    "euler_a": Scheduler("EulerAncestralDiscreteScheduler", {}, ("euler_ancestral", "normal"), draws_noise=True),
    "unipc": Scheduler("UniPCMultistepScheduler", {}, ("uni_pc", "normal")),
} | {
    # classes of diffusers that support the noise schedule and prediction type of the base model, with default options
    scheduler.class_name: scheduler
    for scheduler in (
        Scheduler("DDIMParallelScheduler", {}, ("ddim", "ddim_uniform")),
        Scheduler("DDIMScheduler", {}, ("ddim", "ddim_uniform")),
        Scheduler("DDPMParallelScheduler", {}, ("ddpm", "normal"), draws_noise=True),
        Scheduler("DDPMScheduler", {}, ("ddpm", "normal"), draws_noise=True),
        Scheduler("DEISMultistepScheduler", {}, ("deis", "normal")),
        Scheduler("DPMSolverMultistepScheduler", {}, ("dpmpp_2m", "normal")),
        Scheduler("DPMSolverSinglestepScheduler"),
        Scheduler("EulerAncestralDiscreteScheduler", {}, ("euler_ancestral", "normal"), draws_noise=True),
        Scheduler("EulerDiscreteScheduler", {}, ("euler", "normal")),
        Scheduler("HeunDiscreteScheduler", {}, ("heun", "normal")),
        Scheduler("KDPM2AncestralDiscreteScheduler", {}, ("dpm_2_ancestral", "normal"), draws_noise=True),
        Scheduler("KDPM2DiscreteScheduler", {}, ("dpm_2", "normal")),
        Scheduler("LCMScheduler", {}, ("lcm", "sgm_uniform"), draws_noise=True),
        Scheduler("LMSDiscreteScheduler", {}, ("lms", "normal")),
        Scheduler("PNDMScheduler"),
        Scheduler("SASolverScheduler", draws_noise=True),
        Scheduler("TCDScheduler", draws_noise=True),
        Scheduler("UniPCMultistepScheduler", {}, ("uni_pc", "normal")),
    )
}
"""Name in the configuration -> scheduler."""

SHORT_SCHEDULERS = tuple(name for name, scheduler in SCHEDULERS.items() if name != scheduler.class_name)

COMFYUI_SPACINGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
"""Option in diffusers -> scheduler of KSampler."""

ZERO_TERMINAL_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""Options for zero terminal SNR: sampling starts at the last timestep."""

UNFIT_SCHEDULERS = {
    "is for flow-matching models or other probability paths": (
        *("FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
        *("FlowMatchLCMScheduler", "HeliosDMDScheduler", "HeliosScheduler", "LTXEulerAncestralRFScheduler"),
        *("MiniMaxH3Scheduler", "PiflowScheduler", "SCMScheduler"),
    ),
    "has a noise schedule of its own": (
        *("CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler", "CosineDPMSolverMultistepScheduler"),
        *("DDPMWuerstchenScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "IPNDMScheduler"),
        *("KarrasVeScheduler", "ScoreSdeVeScheduler", "UnCLIPScheduler"),
    ),
    "draws tokens instead of latents": (
        *("AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"),
        "VQDiffusionScheduler",
    ),
    "needs further inputs at every step": (*("CogVideoXDPMScheduler", "RFD4ProteinaScheduler", "RePaintScheduler"),),
    "goes from image to noise": ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
    "draws noise with torchsde instead of one generator per image (DPMSolverMultistepScheduler with "
    "scheduler_options {algorithm_type: sde-dpmsolver++} solves the same SDE)": ("DPMSolverSDEScheduler",),
}
"""Reason -> unsupported classes of diffusers."""
