"""Base models that need other settings than most, by their files and names."""

from __future__ import annotations

from typing import Any

import pytest

from dreamartist_pipeline.backbones.known_models import FEW_STEP_KINDS, clip_skip_hint, few_step_hint, few_step_kind
from dreamartist_pipeline.params import SamplerParams

V1, V2 = "stable-diffusion-v1", "stable-diffusion-v2"


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("stabilityai/sd-turbo", "turbo"),
        ("sdturbo", "turbo"),
        ("DreamShaper-XL-Turbo-v2", "turbo"),
        ("SimianLuo/LCM_Dreamshaper_v7", "lcm"),
        ("Lykon/dreamshaper-8-lcm", "lcm"),
        ("RealisticVision_Lightning_4step", "lightning"),
    ],
)
def test_models_of_few_steps_are_known_by_name(name: str, word: str) -> None:
    kind = few_step_kind({}, {}, ["base", name], takes_guidance=False)
    assert kind is not None and kind.word == word


@pytest.mark.parametrize(
    "name", ["stable-diffusion-v1-5", "turbocharged", "lightning-ai/sd15", "dlcmx", "", "base_model"]
)
def test_other_models_are_not(name: str) -> None:
    assert few_step_kind({"scheduler": ["diffusers", "PNDMScheduler"]}, {}, [name], takes_guidance=False) is None


@pytest.mark.parametrize(
    ("index", "takes_guidance"),
    [
        ({"_class_name": "LatentConsistencyModelPipeline"}, False),
        ({"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "LCMScheduler"]}, False),
        ({"_class_name": "StableDiffusionPipeline"}, True),
    ],
)
def test_a_latent_consistency_model_is_known_by_its_files(index: dict[str, Any], takes_guidance: bool) -> None:
    kind = few_step_kind(index, {}, ["base"], takes_guidance)
    assert kind is not None and kind.word == "lcm"


@pytest.mark.parametrize(
    ("scheduler", "word"),
    [
        ({"_class_name": "LCMScheduler"}, "lcm"),
        ({"_class_name": "TCDScheduler"}, "hyper-?sd"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, "turbo"),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, "turbo"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, None),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
            None,
        ),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "prediction_type": "v_prediction"}, None),
    ],
)
def test_a_model_of_few_steps_is_known_by_its_scheduler(scheduler: dict[str, Any], word: str | None) -> None:
    kind = few_step_kind({}, scheduler, ["base"], takes_guidance=False)
    assert (kind.word if kind else None) == word


def test_the_hint_names_settings_that_a_sampler_takes() -> None:
    for kind in FEW_STEP_KINDS:
        hint = few_step_hint(kind, "my-model", takes_guidance=False)
        for part in ("my-model", kind.name, "guidance_scale=1", "num_inference_steps=4", "generate.sampler"):
            assert part in hint
        options = {key: value for key, value in kind.sampler.items() if "." not in key}
        assert SamplerParams(**options, guidance_scale=1).num_inference_steps == 4


def test_the_hint_says_that_a_guidance_scale_is_not_given_to_the_unet() -> None:
    kind = FEW_STEP_KINDS[0]
    assert few_step_hint(kind, "x", takes_guidance=True) != few_step_hint(kind, "x", takes_guidance=False)


@pytest.mark.parametrize(
    "name",
    ["anything-v5", "Linaqruf/anything-v3.0", "animefull-final-pruned", "nai", "AOM3A1", "AbyssOrangeMix3", "AnyLoRA",
     "Counterfeit-V3.0", "pastel-mix", "MeinaMix_V11", "hassaku-v13"],
)  # fmt: skip
def test_clip_skip_is_suggested_for_anime_models(name: str) -> None:
    hint = clip_skip_hint(["base", name], V1, 0, "training.clip_skip")
    assert name in hint and "training.clip_skip=1" in hint


@pytest.mark.parametrize("name", ["stable-diffusion-v1-5", "naive-model", "animatediff", "anime/sd15", "zaom3"])
def test_clip_skip_is_not_suggested_for_others(name: str) -> None:
    assert clip_skip_hint([name], V1, 0, "training.clip_skip") == ""


def test_clip_skip_is_not_suggested_where_it_is_set_or_the_text_encoder_is_shorter() -> None:
    assert clip_skip_hint(["anything-v5"], V1, 1, "training.clip_skip") == ""
    assert clip_skip_hint(["waifu-anime-v15"], V2, 0, "training.clip_skip") == ""
