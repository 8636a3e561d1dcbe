"""The workflow: one adapter per branch, and valid links."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dreamartist_pipeline.core.sigmas import Segment, SigmaPath
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.comfyui import (
    BranchInputs,
    Picture,
    build_workflow,
    check_workflow,
    comfyui_sampler,
    embedding_prompt,
)
from dreamartist_pipeline.params import SamplerParams
from refusals import says

POSITIVE = BranchInputs("a embedding:my-fox", "fox.safetensors", 0.8)
NEGATIVE = BranchInputs("blurry", "fox-neg.safetensors", 0.65)
PICTURE = Picture(512, 3, "epsilon")
SAMPLER = SamplerParams(scheduler="dpmsolver++", num_inference_steps=9, guidance_scale=5.0)
KARRAS = SigmaPath((Segment(14.6, (14.6, 0.03, 0.0)),), is_karras=True)
TWO_SEGMENTS = SigmaPath((Segment(14.61464, (14.6, 3.0)), Segment(0.95, (2.75, 0.0291))), end_scale=0.99957)


def test_each_branch_has_its_own_hook_on_its_own_prompt() -> None:
    workflow = build_workflow(POSITIVE, NEGATIVE, PICTURE, SAMPLER, KARRAS)
    sampler = workflow["sampler"]["inputs"]
    for side, branch in (("positive", POSITIVE), ("negative", NEGATIVE)):
        prompt = workflow[sampler[side][0]]
        assert (prompt["class_type"], prompt["inputs"]["text"]) == ("CLIPTextEncode", branch.prompt)
        hooks = workflow[prompt["inputs"]["clip"][0]]
        assert (hooks["class_type"], hooks["inputs"]["apply_to_conds"]) == ("SetClipHooks", True)
        lora = workflow[hooks["inputs"]["hooks"][0]]
        assert lora["class_type"] == "CreateHookLora"
        assert lora["inputs"] == {
            "lora_name": branch.lora_file,
            "strength_model": branch.strength,
            "strength_clip": branch.strength,
        }
    assert sum(node["class_type"] == "KSampler" for node in workflow.values()) == 1


def test_sampler_and_picture_are_as_configured() -> None:
    workflow = build_workflow(POSITIVE, NEGATIVE, PICTURE, SAMPLER, KARRAS)
    inputs = workflow["sampler"]["inputs"]
    assert (inputs["sampler_name"], inputs["scheduler"]) == ("dpmpp_2m", "karras")
    assert (inputs["steps"], inputs["cfg"], inputs["seed"]) == (9, 5.0, 3)
    assert workflow["latents"]["inputs"] == {"width": 512, "height": 512, "batch_size": 1}
    assert inputs["model"] == ["base_model", 0]


def test_v_prediction_is_set_in_the_workflow() -> None:
    workflow = build_workflow(
        POSITIVE, NEGATIVE, dataclasses.replace(PICTURE, prediction_type="v_prediction"), SAMPLER, KARRAS
    )
    assert workflow["sampler"]["inputs"]["model"] == ["model_sampling", 0]
    assert workflow["model_sampling"]["inputs"]["sampling"] == "v_prediction"


def test_a_concept_that_skips_layers_reads_an_earlier_one_in_both_branches() -> None:
    workflow = build_workflow(POSITIVE, NEGATIVE, dataclasses.replace(PICTURE, clip_skip=1), SAMPLER, KARRAS)
    assert workflow["last_layer"]["inputs"] == {"clip": ["base_model", 1], "stop_at_clip_layer": -2}
    for branch in ("positive", "negative"):
        assert workflow[f"{branch}_text_encoder"]["inputs"]["clip"] == ["last_layer", 0]


def test_zero_terminal_snr_is_set_in_the_workflow() -> None:
    picture = dataclasses.replace(PICTURE, prediction_type="v_prediction", zero_terminal_snr=True)
    assert build_workflow(POSITIVE, NEGATIVE, picture, SAMPLER, KARRAS)["model_sampling"]["inputs"]["zsnr"] is True


def test_a_branch_without_an_adapter_has_no_hook() -> None:
    workflow = build_workflow(POSITIVE, BranchInputs("", None, 1.0), PICTURE, SAMPLER, KARRAS)
    assert workflow["negative_prompt"]["inputs"]["clip"] == ["base_model", 1]
    assert "negative_lora" not in workflow
    check_workflow(workflow, ["fox.safetensors"], "w")


def test_trigger_words_become_embeddings_only_as_separate_words() -> None:
    words = ["my-fox", "my-fox-neg"]
    assert embedding_prompt("a my-fox, blue", words) == "a embedding:my-fox, blue"
    assert embedding_prompt("my-fox-neg", words) == "embedding:my-fox-neg"
    assert embedding_prompt("a my-foxes", words) == "a my-foxes"
    assert embedding_prompt("a cat", []) == "a cat"


def test_a_prompt_is_written_so_that_comfyui_finds_its_embeddings_and_weights_nothing() -> None:
    words = ["my-Fox"]
    assert embedding_prompt("A MY-FOX.", words) == "A embedding:my-Fox ."
    assert embedding_prompt("photo,my-fox's den", words) == "photo, embedding:my-Fox 's den"
    assert embedding_prompt("my-fox (blue)", words) == r"embedding:my-Fox \(blue\)"
    assert embedding_prompt("embedding:my-Fox", words) == "embedding:my-Fox"


def test_a_word_is_found_for_comfyui_in_the_spellings_in_which_it_is_found_here() -> None:
    assert embedding_prompt("一只my\u2011fox在草地上", ["my-fox"]) == "一只 embedding:my-fox 在草地上"
    assert embedding_prompt("a my-fo\u0308x", ["my-föx"]) == "a embedding:my-föx"


def test_a_workflow_that_names_a_missing_file_or_node_is_refused() -> None:
    workflow = build_workflow(POSITIVE, NEGATIVE, PICTURE, SAMPLER, KARRAS)
    check_workflow(workflow, ["fox.safetensors", "fox-neg.safetensors"], "w")
    with pytest.raises(InputError, check=says(expected="'fox-neg.safetensors'", got="['fox.safetensors']")):
        check_workflow(workflow, ["fox.safetensors"], "w")
    del workflow["positive_lora"]
    with pytest.raises(InputError, check=says(expected="'positive_lora' in w, which positive_text_encoder.hooks")):
        check_workflow(workflow, ["fox.safetensors", "fox-neg.safetensors"], "w")


# --------------------------------------------------------------------------------------------- sampling


def node_inputs(workflow: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [node["inputs"] for node in workflow.values() if node["class_type"] == kind]


def test_sigmas_are_explicit_and_noise_has_the_scale_of_the_scheduler() -> None:
    path = SigmaPath((Segment(14.61464, (14.6, 3.0, 0.0)),))
    workflow = build_workflow(POSITIVE, NEGATIVE, PICTURE, SAMPLER, path)
    assert workflow["sampler"]["class_type"] == "SamplerCustom"
    assert workflow["sampler"]["inputs"]["add_noise"] is False
    assert workflow["sampler"]["inputs"]["cfg"] == 5.0
    assert workflow["solver"]["inputs"] == {"sampler_name": "dpmpp_2m"}
    assert workflow["sigmas"]["inputs"] == {"sigmas": "14.600000000, 3.000000000, 0.000000000"}
    assert workflow["noisy_latents"]["inputs"]["sigmas"] == ["noise_scale", 0]
    assert workflow["noise_scale"]["inputs"] == {"sigmas": "14.614640000"}
    assert workflow["noise"]["inputs"] == {"noise_seed": 3}
    assert workflow["decoded"]["inputs"]["samples"] == ["sampler", 0]
    check_workflow(workflow, ["fox.safetensors", "fox-neg.safetensors"], "w")


def test_latents_are_scaled_between_segments_and_at_the_end_by_multiples_of_a_hundredth() -> None:
    workflow = build_workflow(POSITIVE, NEGATIVE, PICTURE, SAMPLER, TWO_SEGMENTS)
    check_workflow(workflow, ["fox.safetensors", "fox-neg.safetensors"], "w")
    factors = [inputs["multiplier"] for inputs in node_inputs(workflow, "LatentMultiply")]
    assert len(node_inputs(workflow, "SamplerCustom")) == 2
    assert factors == [round(factor, 2) for factor in factors]
    assert factors[0] * factors[1] == pytest.approx(0.95, abs=1e-6)
    assert factors[2] * factors[3] == pytest.approx(0.99957, abs=5e-5)
    assert workflow["sampler_2"]["inputs"]["latent_image"] == ["scaled_2", 0]
    assert workflow["decoded"]["inputs"]["samples"] == ["scaled_4", 0]


def test_v_prediction_is_set_in_every_segment() -> None:
    picture = dataclasses.replace(PICTURE, prediction_type="v_prediction")
    workflow = build_workflow(POSITIVE, NEGATIVE, picture, SAMPLER, TWO_SEGMENTS)
    users = node_inputs(workflow, "SamplerCustom") + node_inputs(workflow, "AddNoise")
    assert [inputs["model"] for inputs in users] == [["model_sampling", 0]] * 3


def test_a_scheduler_without_sigmas_uses_the_spacing_of_comfyui() -> None:
    sampler = SamplerParams(scheduler="LCMScheduler")
    inputs = build_workflow(POSITIVE, NEGATIVE, PICTURE, sampler, SigmaPath(()))["sampler"]["inputs"]
    assert (inputs["sampler_name"], inputs["scheduler"]) == ("lcm", "sgm_uniform")


def test_what_comfyui_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, check=says(got="PNDMScheduler", remedy="export.sampler.scheduler")):
        comfyui_sampler(SamplerParams(scheduler="PNDMScheduler"))
    options = {"timestep_spacing": "trailing", "lower_order_final": False}
    with pytest.raises(InputError, check=says(expected="timestep_spacing", got="lower_order_final")):
        comfyui_sampler(SamplerParams(scheduler="dpmsolver++", scheduler_options=options))
