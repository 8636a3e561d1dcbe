"""The one table of schedulers: what each is called here, in diffusers and in ComfyUI, and which cannot draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scheduler:
    """One scheduler that can be asked for.

    Attributes:
        class_name: its class in diffusers.
        options: arguments of that class; everything else is the class's own default, or the base model's.
        comfyui: KSampler's sampler_name and scheduler; None where ComfyUI has nothing like it.
        draws_noise: whether it adds noise at every step; others do only with an SDE as algorithm_type.
    """

    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    comfyui: tuple[str, str] | None = None
    draws_noise: bool = False

    def options_for(self, zero_terminal_snr: bool) -> dict[str, Any]:
        """Return the options under a noise schedule that does or does not end without signal.

        Karras' spacing would spend half of its steps beyond the last timestep's noise where that holds no signal.
        """
        spaced = {"use_karras_sigmas": False} if zero_terminal_snr and "use_karras_sigmas" in self.options else {}
        return {**self.options, **spaced}


_DPMSOLVER = {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}

SCHEDULERS = {
    # short names: settings that suit most
    "ddim": Scheduler("DDIMScheduler", {"clip_sample": False}, ("ddim", "ddim_uniform")),
    "dpmsolver++": Scheduler("DPMSolverMultistepScheduler", _DPMSOLVER, ("dpmpp_2m", "karras")),
    "euler": Scheduler("EulerDiscreteScheduler", {}, ("euler", "normal")),
    "euler_a": Scheduler("EulerAncestralDiscreteScheduler", {}, ("euler_ancestral", "normal"), draws_noise=True),
    "unipc": Scheduler("UniPCMultistepScheduler", {}, ("uni_pc", "normal")),
} | {
    # classes of diffusers with their own defaults: those that take the base model's noise schedule and prediction type
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
"""Option of diffusers' classes -> KSampler's scheduler."""

ZERO_TERMINAL_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""Options under a noise schedule that ends without signal: drawing then starts at the last timestep."""

UNFIT_SCHEDULERS = {
    "is for models trained by flow matching or on another path from noise to picture": (
        *("FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
        *("FlowMatchLCMScheduler", "HeliosDMDScheduler", "HeliosScheduler", "LTXEulerAncestralRFScheduler"),
        *("MiniMaxH3Scheduler", "PiflowScheduler", "SCMScheduler"),
    ),
    "has a noise schedule of its own in place of the base model's": (
        *("CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler", "CosineDPMSolverMultistepScheduler"),
        *("DDPMWuerstchenScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "IPNDMScheduler"),
        *("KarrasVeScheduler", "ScoreSdeVeScheduler", "UnCLIPScheduler"),
    ),
    "draws tokens, not latents": (
        *("AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"),
        "VQDiffusionScheduler",
    ),
    "needs inputs at every step that drawing does not have": (
        *("CogVideoXDPMScheduler", "RFD4ProteinaScheduler", "RePaintScheduler"),
    ),
    "goes from a picture to noise": ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
    "draws its noise with torchsde, not from one generator per image (DPMSolverMultistepScheduler with "
    "scheduler_options {algorithm_type: sde-dpmsolver++} solves the same equation)": ("DPMSolverSDEScheduler",),
}
"""Reason -> classes of diffusers that cannot draw here."""
