"""The exported workflow gives the same latents in ComfyUI, whose nodes are reimplemented in comfyui_nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from comfyui_nodes import Model, drawn_latents, uni_pc
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone, with_zero_terminal_snr
from dreamartist_pipeline.backbones.concepts import attach
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.schedulers import make_scheduler
from dreamartist_pipeline.backbones.sigma_paths import sigma_path
from dreamartist_pipeline.core.branches import combine
from dreamartist_pipeline.core.sampling import image_generators, initial_noise, sample_latents
from dreamartist_pipeline.core.sigmas import SigmaPath
from dreamartist_pipeline.early_checks import PlannedConcept
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.comfyui import BranchInputs, Picture, build_workflow, comfyui_sampler
from dreamartist_pipeline.params import DeviceParams, ExportParams, SamplerParams, StrengthParams
from dreamartist_pipeline.pipelines.export.nodes import check_export
from refusals import says
from tiny_models import BUILDERS

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "data/01_raw/base_model"
LIMIT = 1e-3
"""Largest RMS difference between ComfyUI's latents and ours, relative to their standard deviation."""

GUIDANCE, SEED = 4.0, 0
WITHOUT_KARRAS = {"use_karras_sigmas": False}


@functools.cache
def load(folder: Path) -> Backbone:
    return load_backbone(BaseModelFiles(folder), DeviceParams(device="cpu"))


@pytest.fixture
def backbone(tiny_base_model: Path) -> Backbone:
    return load(tiny_base_model)


class Drawing:
    """One image, sampled by this project and by ComfyUI's nodes."""

    def __init__(self, backbone: Backbone, sampler: SamplerParams) -> None:
        self.backbone, self.sampler = backbone, sampler
        prompts = attach(backbone, None, StrengthParams()).prompts
        self.conditioning = prompts.encode(prompts.tokenize(["", "a red fox, blue background"]))
        side = backbone.image_px // backbone.latent_scale
        self.noise = initial_noise((backbone.latent_channels, side, side), image_generators([SEED]))
        self.scheduler = make_scheduler(backbone, sampler)

    @torch.no_grad()
    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.backbone.denoise(latents, timesteps, self.conditioning)

    def ours(self) -> torch.Tensor:
        return sample_latents(self.denoise, self.scheduler, self.noise, GUIDANCE, self.sampler.num_inference_steps)

    def model(self) -> Model:
        def guided(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            both = self.denoise(latents.repeat(2, 1, 1, 1), timestep.expand(2))
            return combine(both, torch.tensor([GUIDANCE]), 2)

        alphas = self.scheduler.alphas_cumprod.clamp(min=4.8973451890853435e-08)  # ComfyUI's for zero terminal SNR
        predicts_v = self.backbone.objective.prediction_type == "v_prediction"
        return Model(((1 - alphas) / alphas).sqrt(), guided, predicts_v, self.backbone.latent_channels)

    def theirs(self, path: SigmaPath) -> torch.Tensor:
        kind, rescaled = self.backbone.objective.prediction_type, self.scheduler.config["rescale_betas_zero_snr"]
        picture = Picture(self.noise.shape[-1] * 8, SEED, kind, zero_terminal_snr=rescaled)
        branch = BranchInputs("", None, 1.0)
        return drawn_latents(build_workflow(branch, branch, picture, self.sampler, path), self.model())


def draw(backbone: Backbone, sampler: SamplerParams) -> tuple[torch.Tensor, torch.Tensor, SigmaPath]:
    """Return our latents, ComfyUI's, and the path between them."""
    drawing = Drawing(backbone, sampler)
    path = sigma_path(make_scheduler(backbone, sampler), sampler)
    return drawing.ours(), drawing.theirs(path), path


def sampler_of(scheduler: str, num_steps: int = 12, **options: Any) -> SamplerParams:
    return SamplerParams(
        scheduler=scheduler,
        scheduler_options=options,
        num_inference_steps=num_steps,
        guidance_scale=GUIDANCE,
    )


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).square().mean().sqrt() / ours.std())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [12, 20])
@pytest.mark.parametrize(
    ("scheduler", "options"),
    [("dpmsolver++", {}), ("dpmsolver++", WITHOUT_KARRAS), ("euler", {}), ("ddim", {})],
)
def test_comfyui_draws_the_same_latents(
    backbone: Backbone, scheduler: str, options: dict[str, Any], num_steps: int, spacing: str
) -> None:
    ours, theirs, path = draw(backbone, sampler_of(scheduler, num_steps, timestep_spacing=spacing, **options))
    assert difference(ours, theirs) <= LIMIT
    assert not path.difference


@pytest.mark.parametrize("spacing", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_comfyui_draws_the_same_latents_for_euler_at_fractional_timesteps(backbone: Backbone, spacing: str) -> None:
    ours, theirs, path = draw(backbone, sampler_of("euler", **{spacing: True}))
    assert difference(ours, theirs) <= LIMIT
    assert not path.difference and any(segment.is_flow for segment in path.segments)


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "euler", "ddim"])
def test_comfyui_draws_the_same_latents_for_epsilon_prediction(other_layout: Path, scheduler: str) -> None:
    ours, theirs, path = draw(load(other_layout), sampler_of(scheduler, timestep_spacing="linspace"))
    assert difference(ours, theirs) <= LIMIT
    assert not path.difference


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "euler", "ddim"])
def test_comfyui_draws_the_same_latents_for_zero_terminal_snr(backbone: Backbone, scheduler: str) -> None:
    ours, theirs, path = draw(with_zero_terminal_snr(backbone), sampler_of(scheduler))
    assert difference(ours, theirs) <= LIMIT
    assert not path.difference


@pytest.mark.parametrize("name", BUILDERS)
def test_comfyui_draws_the_same_latents_with_every_family(tiny_model: Callable[[str], Path], name: str) -> None:
    ours, theirs, path = draw(load(tiny_model(name)), sampler_of("dpmsolver++", 5))
    assert difference(ours, theirs) <= LIMIT
    assert not path.difference


@pytest.mark.parametrize("overlay", ["base", "sd15", "sd21", "sdxl", "test"])
def test_the_defaults_of_every_overlay_are_equivalent_and_use_a_ksampler(backbone: Backbone, overlay: str) -> None:
    values: dict[str, Any] = {}
    for name in ("base/parameters_export.yml", f"{overlay}/parameters.yml"):
        values |= yaml.safe_load((ROOT / "conf" / name).read_text()).get("export", {}).get("sampler", {})
    params = ExportParams(title="fox", sampler=SamplerParams(**values))
    check_export(params, PlannedConcept(True, False, {}, ("pt1",)))
    ours, theirs, path = draw(backbone, params.sampler.model_copy(update={"guidance_scale": GUIDANCE}))
    assert difference(ours, theirs) <= LIMIT
    assert path.is_karras and not path.difference


@pytest.mark.parametrize(
    ("scheduler", "options", "reason"),
    [
        ("dpmsolver++", {**WITHOUT_KARRAS, "use_exponential_sigmas": True}, "by up to 1.00"),
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample=True"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order=3"),
        ("euler_a", {}, "random noise"),
        ("LCMScheduler", {}, "random noise"),
        ("HeunDiscreteScheduler", {}, "was not compared"),
    ],
)
def test_the_reason_for_different_latents_is_reported(
    backbone: Backbone, scheduler: str, options: dict[str, Any], reason: str
) -> None:
    sampler = sampler_of(scheduler, **options)
    assert reason in sigma_path(make_scheduler(backbone, sampler), sampler).difference


def test_a_base_model_with_another_noise_schedule_is_reported(backbone: Backbone) -> None:
    scheduler = make_scheduler(backbone, sampler_of("ddim"))
    other = type(scheduler).from_config(scheduler.config, beta_end=0.02)
    assert "noise schedule" in sigma_path(other, sampler_of("ddim")).difference


@pytest.mark.parametrize("name", ["unipc", "UniPCMultistepScheduler"])
def test_unipc_is_refused_with_the_measured_difference(name: str) -> None:
    params = ExportParams(title="fox", sampler=sampler_of(name))
    with pytest.raises(InputError, check=says(got="0.4 to 13 %", remedy="export.sampler.scheduler")):
        check_export(params, PlannedConcept(True, False, {}, ("pt1",)))
    with pytest.raises(InputError, check=says(got=name)):
        comfyui_sampler(params.sampler)


@pytest.mark.parametrize(
    ("num_steps", "spacing", "limits"), [(20, "linspace", (0.004, 0.13)), (12, "trailing", (0.03, 0.24))]
)
def test_the_difference_of_unipc_is_that_of_the_message(
    num_steps: int, spacing: str, limits: tuple[float, float]
) -> None:
    drawing = Drawing(load(EMBEDDED), sampler_of("unipc", num_steps, timestep_spacing=spacing))
    ours, sigmas = drawing.ours(), drawing.scheduler.sigmas
    theirs = uni_pc(drawing.model().denoised, drawing.noise * (1 + sigmas[0] ** 2).sqrt(), sigmas)
    assert limits[0] <= difference(ours, theirs) <= limits[1]


def test_the_reimplemented_unipc_equals_that_of_diffusers_in_comfyuis_order(backbone: Backbone) -> None:
    options = {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}
    drawing = Drawing(backbone, sampler_of("unipc", **options))
    ours, sigmas = drawing.ours(), drawing.scheduler.sigmas
    theirs = uni_pc(drawing.model().denoised, drawing.noise * (1 + sigmas[0] ** 2).sqrt(), sigmas)
    assert difference(ours, theirs / (1 + sigmas[-1] ** 2).sqrt()) <= 1e-5
