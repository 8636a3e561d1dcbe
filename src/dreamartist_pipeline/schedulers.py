"""The one table of schedulers: what each is called here, in diffusers and in ComfyUI, and which cannot draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ComfyUISampler:
    """What stands for a scheduler in a ComfyUI workflow.

    Attributes:
        name: KSampler's sampler_name.
        alike: values in the scheduler's configuration with which both take the same steps; None where they never do.
        schedule: KSampler's scheduler, for a scheduler of diffusers that has no sigmas to give.
    """

    name: str
    alike: Mapping[str, Any] | None = None
    schedule: str = "normal"


@dataclass(frozen=True)
class Scheduler:
    """One scheduler that can be asked for.

    Attributes:
        class_name: its class in diffusers.
        options: arguments of that class; everything else is the class's own default, or the base model's.
        comfyui: what is nearest in ComfyUI, or why nothing there will do.
        draws_noise: whether it adds noise at every step; others do only with an SDE as algorithm_type.
    """

    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    comfyui: ComfyUISampler | str = "ComfyUI has nothing like it"
    draws_noise: bool = False

    def options_for(self, zero_terminal_snr: bool) -> dict[str, Any]:
        """Return the options under a noise schedule that does or does not end without signal.

        Karras' spacing would spend half of its steps beyond the last timestep's noise where that holds no signal.
        """
        spaced = {"use_karras_sigmas": False} if zero_terminal_snr and "use_karras_sigmas" in self.options else {}
        return {**self.options, **spaced}


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
    "0.3 to 8 % of their deviation at 20 steps, by 0.7 to 11 % at 12"
)

SCHEDULERS = {
    # short names: settings that suit most
    "ddim": Scheduler("DDIMScheduler", {"clip_sample": False}, _DDIM),
    "dpmsolver++": Scheduler("DPMSolverMultistepScheduler", _DPMSOLVER, _DPMPP_2M),
    "euler": Scheduler("EulerDiscreteScheduler", {}, _EULER),
    "euler_a": Scheduler("EulerAncestralDiscreteScheduler", {}, ComfyUISampler("euler_ancestral"), draws_noise=True),
    "unipc": Scheduler("UniPCMultistepScheduler", {}, _UNIPC),
} | {
    # classes of diffusers with their own defaults: those that take the base model's noise schedule and prediction type
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
"""Options of diffusers' classes that choose noise levels and nothing else."""

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
