"""The supported schedulers, with their names in diffusers and ComfyUI, and the unsupported ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ComfyUISampler:
    """The closest sampler in ComfyUI to a scheduler.

    Attributes:
        name: KSampler's sampler_name.
        equivalent_config: values of the scheduler's configuration that make both equivalent; None if they never are.
        schedule: KSampler's scheduler, for schedulers of diffusers without sigmas.
    """

    name: str
    equivalent_config: Mapping[str, Any] | None = None
    schedule: str = "normal"


@dataclass(frozen=True)
class Scheduler:
    """A supported scheduler.

    Attributes:
        class_name: class in diffusers.
        options: arguments of the class; all others have the default of the class or the value of the base model.
        comfyui: the closest sampler in ComfyUI, or the reason why a workflow cannot use one.
        draws_noise: whether it adds noise at every step; others do so only with an SDE as algorithm_type.
    """

    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    comfyui: ComfyUISampler | str = "ComfyUI has no equivalent"
    draws_noise: bool = False

    def options_for(self, zero_terminal_snr: bool) -> dict[str, Any]:
        """Return the options for a noise schedule with or without zero terminal SNR.

        With zero terminal SNR, Karras spacing would spend half of the steps beyond the noise of the last timestep.
        """
        spacing = {"use_karras_sigmas": False} if zero_terminal_snr and "use_karras_sigmas" in self.options else {}
        return {**self.options, **spacing}


_DPMSOLVER = {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}
_DDIM = ComfyUISampler("ddim", {"clip_sample": False, "thresholding": False})
_DPMPP_2M = ComfyUISampler(
    "dpmpp_2m",
    {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "final_sigmas_type": "zero",
        "thresholding": False,
    },
)
_EULER = ComfyUISampler("euler", {})
_UNIPC = (
    "ComfyUI's uni_pc is another solver, of third order: with the embedded base model its latents differ by "
    "0.4 to 13 % of their standard deviation at 20 steps, and by 3 to 24 % at 12"
)

SCHEDULERS = {
    # short names, with recommended options
    "ddim": Scheduler("DDIMScheduler", {"clip_sample": False}, _DDIM),
    "dpmsolver++": Scheduler("DPMSolverMultistepScheduler", _DPMSOLVER, _DPMPP_2M),
    "euler": Scheduler("EulerDiscreteScheduler", {}, _EULER),
    "euler_a": Scheduler("EulerAncestralDiscreteScheduler", {}, ComfyUISampler("euler_ancestral"), draws_noise=True),
    "unipc": Scheduler("UniPCMultistepScheduler", {}, _UNIPC),
} | {
    # classes of diffusers that support the noise schedule and prediction type of the base model, with default options
    scheduler.class_name: scheduler
    for scheduler in (
        Scheduler("DDIMParallelScheduler", {}, _DDIM),
        Scheduler("DDIMScheduler", {}, _DDIM),
        Scheduler("DDPMParallelScheduler", {}, ComfyUISampler("ddpm"), draws_noise=True),
        Scheduler("DDPMScheduler", {}, ComfyUISampler("ddpm"), draws_noise=True),
        Scheduler("DEISMultistepScheduler", {}, ComfyUISampler("deis")),
        Scheduler("DPMSolverMultistepScheduler", {}, _DPMPP_2M),
        Scheduler("DPMSolverSinglestepScheduler"),
        Scheduler("EulerAncestralDiscreteScheduler", {}, ComfyUISampler("euler_ancestral"), draws_noise=True),
        Scheduler("EulerDiscreteScheduler", {}, _EULER),
        Scheduler("HeunDiscreteScheduler", {}, ComfyUISampler("heun")),
        Scheduler("KDPM2AncestralDiscreteScheduler", {}, ComfyUISampler("dpm_2_ancestral"), draws_noise=True),
        Scheduler("KDPM2DiscreteScheduler", {}, ComfyUISampler("dpm_2")),
        Scheduler("LCMScheduler", {}, ComfyUISampler("lcm", schedule="sgm_uniform"), draws_noise=True),
        Scheduler("LMSDiscreteScheduler", {}, ComfyUISampler("lms")),
        Scheduler("PNDMScheduler"),
        Scheduler("SASolverScheduler", draws_noise=True),
        Scheduler("TCDScheduler", draws_noise=True),
        Scheduler("UniPCMultistepScheduler", {}, _UNIPC),
    )
}
"""Name in the configuration -> scheduler."""

SHORT_SCHEDULERS = tuple(name for name, scheduler in SCHEDULERS.items() if name != scheduler.class_name)

SPACING_OPTIONS = (
    *("interpolation_type", "set_alpha_to_one", "steps_offset", "timestep_spacing"),
    *("use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas"),
)
"""Scheduler options of diffusers that affect only the noise levels."""

ZERO_SNR = "rescale_betas_zero_snr"
"""Option of diffusers' schedulers for a noise schedule that ends without signal."""

ZERO_TERMINAL_SNR = {ZERO_SNR: True, "timestep_spacing": "trailing"}
"""Options for zero terminal SNR: sampling starts at the last timestep."""

OTHER_SCHEDULES = {
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
}
"""Reason -> classes of diffusers whose base models have another noise schedule than DDPM's."""

UNFIT_SCHEDULERS = OTHER_SCHEDULES | {
    "needs further inputs at every step": (*("CogVideoXDPMScheduler", "RFD4ProteinaScheduler", "RePaintScheduler"),),
    "goes from image to noise": ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
    "draws noise with torchsde instead of one generator per image (DPMSolverMultistepScheduler with "
    "scheduler_options {algorithm_type: sde-dpmsolver++} solves the same SDE)": ("DPMSolverSDEScheduler",),
}
"""Reason -> unsupported classes of diffusers."""
