"""Schedulers by name: each gives the same images as in diffusers' pipeline; invalid options are refused early."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pydantic import ValidationError

from dreamartist_pipeline.backbones.base_model import (
    Backbone,
    BaseModelFiles,
    load_backbone,
    with_zero_terminal_snr,
)
from dreamartist_pipeline.backbones.concepts import attach, draw_latents
from dreamartist_pipeline.backbones.schedulers import check_sampler, draws_noise, make_scheduler
from dreamartist_pipeline.core.sampling import image_generators
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import (
    DeviceParams,
    SamplerParams,
    StrengthParams,
)
from dreamartist_pipeline.schedulers import SCHEDULERS, UNFIT_SCHEDULERS
from refusals import says

PROMPTS, NEGATIVE_PROMPT, SEEDS = ["a red cat", "a blue dog"], "background", [5, 6]
SHORT = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
DRAWING_NOISE = {
    *("DDPMParallelScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("LCMScheduler", "SASolverScheduler", "TCDScheduler", "euler_a"),
}


@pytest.fixture(scope="module")
def backbone(tiny_base_model: Path) -> Backbone:
    return load_backbone(BaseModelFiles(tiny_base_model), DeviceParams(device="cpu"))


@pytest.fixture(scope="module")
def pipeline(tiny_base_model: Path) -> Any:
    plain = diffusers.StableDiffusionPipeline.from_pretrained(
        tiny_base_model, safety_checker=None, feature_extractor=None
    )
    plain.set_progress_bar_config(disable=True)
    return plain


@pytest.fixture(scope="module")
def scheduler_config(tiny_base_model: Path) -> Any:
    return diffusers.DDIMScheduler.from_pretrained(tiny_base_model, subfolder="scheduler").config


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_what_diffusers_draws(
    pipeline: Any, scheduler_config: Any, backbone: Backbone, name: str
) -> None:
    kind, options = SHORT.get(name, (name, {}))
    pipeline.scheduler = getattr(diffusers, kind).from_config(scheduler_config, **options)
    expected = pipeline(
        PROMPTS,
        negative_prompt=[NEGATIVE_PROMPT] * 2,
        generator=image_generators(SEEDS),
        guidance_scale=4.0,
        num_inference_steps=6,
        output_type="latent",
        **({"eta": 0.3} if name == "TCDScheduler" else {}),  # its own default, which the pipeline would replace by 0
    ).images
    sampler = SamplerParams(scheduler=name, num_inference_steps=6, guidance_scale=4.0)
    base = attach(backbone, None, StrengthParams())
    (latents,) = draw_latents(backbone, base, PROMPTS, NEGATIVE_PROMPT, SEEDS, sampler)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_known_to_draw_noise_when_generators_matter(backbone: Backbone, name: str) -> None:
    scheduler = make_scheduler(backbone, SamplerParams(scheduler=name))
    assert draws_noise(scheduler) == (name in DRAWING_NOISE)


def test_solving_the_stochastic_equation_draws_noise(backbone: Backbone) -> None:
    options = {"algorithm_type": "sde-dpmsolver++"}
    assert draws_noise(make_scheduler(backbone, SamplerParams(scheduler="dpmsolver++", scheduler_options=options)))


def test_every_scheduler_of_diffusers_is_offered_or_refused_with_a_reason() -> None:
    names = set(diffusers._import_structure["schedulers"])
    names = {name for name in names if name.endswith("Scheduler")} | {"DPMSolverSDEScheduler"}
    offered = {scheduler.class_name for scheduler in SCHEDULERS.values()}
    assert names >= offered
    assert offered <= SCHEDULERS.keys()  # each by its class's name too
    reasons = {name: reason for reason, unfit in UNFIT_SCHEDULERS.items() for name in unfit}
    for name in sorted(names - offered):
        with pytest.raises(ValidationError, match=re.escape(f"{name} {reasons[name]}")):
            SamplerParams(scheduler=name)


def test_options_reach_the_scheduler_over_those_of_a_short_name(backbone: Backbone) -> None:
    options = {"use_karras_sigmas": False, "solver_order": 3}
    scheduler = make_scheduler(backbone, SamplerParams(scheduler="dpmsolver++", scheduler_options=options))
    assert (scheduler.config.use_karras_sigmas, scheduler.config.solver_order) == (False, 3)
    assert scheduler.config.algorithm_type == "dpmsolver++"


def test_an_option_that_the_scheduler_does_not_know_is_refused_before_a_model_is_loaded() -> None:
    sampler = SamplerParams(scheduler="HeunDiscreteScheduler", scheduler_options={"use_karras_sigma": True})
    with pytest.raises(InputError, check=says(got="'use_karras_sigma'", remedy="use_karras_sigmas")):
        check_sampler(sampler)


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("DDIMScheduler", {"timestep_spacing": "sometimes"}, 4),
        ("dpmsolver++", {"algorithm_type": "nonsense"}, 4),
        ("LCMScheduler", {}, 80),  # has 50 timesteps by default
        ("DDPMScheduler", {"variance_type": "learned"}, 4),  # these fail in the steps
        ("SASolverScheduler", {"predictor_order": 9}, 20),  # not before the fifth
        ("ddim", {"clip_sample": True, "clip_sample_range": "x"}, 4),
        ("unipc", {"solver_order": 0}, 4),
    ],
)
def test_what_diffusers_rejects_is_refused_before_a_model_is_loaded(
    name: str, options: dict[str, Any], steps: int
) -> None:
    sampler = SamplerParams(scheduler=name, scheduler_options=options, num_inference_steps=steps)
    with pytest.raises(InputError, check=says(expected="scheduler", got=f"{steps} steps")) as error:
        check_sampler(sampler)
    assert error.value.got.startswith(name)


def test_an_error_without_message_is_named_by_its_type() -> None:
    sampler = SamplerParams(scheduler="SASolverScheduler", scheduler_options={"predictor_order": 9})
    with pytest.raises(InputError, check=says(got="AssertionError")):
        check_sampler(sampler)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_passes_with_its_own_settings(name: str) -> None:
    for steps in (4, 50):
        check_sampler(SamplerParams(scheduler=name, num_inference_steps=steps))


def test_a_zero_terminal_snr_schedule_needs_a_scheduler_that_supports_it(backbone: Backbone) -> None:
    sampler = SamplerParams(scheduler="HeunDiscreteScheduler")
    check_sampler(sampler)
    with pytest.raises(InputError, check=says(got="HeunDiscreteScheduler, which has no rescale_betas_zero_snr")):
        check_sampler(sampler, zero_terminal_snr=True)
    with pytest.raises(InputError, check=says(got="HeunDiscreteScheduler, which has no rescale_betas_zero_snr")):
        make_scheduler(with_zero_terminal_snr(backbone), sampler)
