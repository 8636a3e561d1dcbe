"""The workflow: one adapter per branch, and valid links."""

from __future__ import annotations

import dataclasses

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.comfyui import (
    BranchInputs,
    Picture,
    build_workflow,
    check_workflow,
    embedding_prompt,
)
from dreamartist_pipeline.params import SamplerParams
from refusals import says

POSITIVE = BranchInputs("a embedding:my-fox", "fox.safetensors", 0.8)
NEGATIVE = BranchInputs("blurry", "fox-neg.safetensors", 0.65)
PICTURE = Picture(512, 3, "epsilon")
SAMPLER = SamplerParams(scheduler="euler_a", num_inference_steps=9, guidance_scale=5.0)


def test_each_branch_has_its_own_hook_on_its_own_prompt() -> None:
    workflow = build_workflow(POSITIVE, NEGATIVE, PICTURE, SAMPLER)
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
    workflow = build_workflow(POSITIVE, NEGATIVE, PICTURE, SAMPLER)
    inputs = workflow["sampler"]["inputs"]
    assert (inputs["sampler_name"], inputs["scheduler"]) == ("euler_ancestral", "normal")
    assert (inputs["steps"], inputs["cfg"], inputs["seed"]) == (9, 5.0, 3)
    assert workflow["latents"]["inputs"] == {"width": 512, "height": 512, "batch_size": 1}
    assert inputs["model"] == ["base_model", 0]


def test_v_prediction_is_set_in_the_workflow() -> None:
    workflow = build_workflow(POSITIVE, NEGATIVE, dataclasses.replace(PICTURE, prediction_type="v_prediction"), SAMPLER)
    assert workflow["sampler"]["inputs"]["model"] == ["model_sampling", 0]
    assert workflow["model_sampling"]["inputs"]["sampling"] == "v_prediction"


def test_a_concept_that_skips_layers_reads_an_earlier_one_in_both_branches() -> None:
    workflow = build_workflow(POSITIVE, NEGATIVE, dataclasses.replace(PICTURE, clip_skip=1), SAMPLER)
    assert workflow["last_layer"]["inputs"] == {"clip": ["base_model", 1], "stop_at_clip_layer": -2}
    for branch in ("positive", "negative"):
        assert workflow[f"{branch}_text_encoder"]["inputs"]["clip"] == ["last_layer", 0]


def test_zero_terminal_snr_is_set_in_the_workflow() -> None:
    picture = dataclasses.replace(PICTURE, prediction_type="v_prediction", zero_terminal_snr=True)
    assert build_workflow(POSITIVE, NEGATIVE, picture, SAMPLER)["model_sampling"]["inputs"]["zsnr"] is True


def test_a_branch_without_an_adapter_has_no_hook() -> None:
    workflow = build_workflow(POSITIVE, BranchInputs("", None, 1.0), PICTURE, SAMPLER)
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
    workflow = build_workflow(POSITIVE, NEGATIVE, PICTURE, SAMPLER)
    check_workflow(workflow, ["fox.safetensors", "fox-neg.safetensors"], "w")
    with pytest.raises(InputError, check=says(expected="'fox-neg.safetensors'", got="['fox.safetensors']")):
        check_workflow(workflow, ["fox.safetensors"], "w")
    del workflow["positive_lora"]
    with pytest.raises(InputError, check=says(expected="'positive_lora' in w, which positive_text_encoder.hooks")):
        check_workflow(workflow, ["fox.safetensors", "fox-neg.safetensors"], "w")


# --------------------------------------------------------------------------------------------- schedulers by class name


def sampler_of(scheduler: str, zero_terminal_snr: bool = False, **options: bool) -> tuple[str, str]:
    picture = dataclasses.replace(PICTURE, zero_terminal_snr=zero_terminal_snr)
    sampler = SamplerParams(scheduler=scheduler, scheduler_options=options)
    inputs = build_workflow(POSITIVE, NEGATIVE, picture, sampler)["sampler"]["inputs"]
    return inputs["sampler_name"], inputs["scheduler"]


def test_a_scheduler_of_diffusers_becomes_comfyuis_own_with_its_spacing() -> None:
    assert sampler_of("HeunDiscreteScheduler") == ("heun", "normal")
    assert sampler_of("HeunDiscreteScheduler", use_karras_sigmas=True) == ("heun", "karras")
    assert sampler_of("euler", use_exponential_sigmas=True) == ("euler", "exponential")
    assert sampler_of("DPMSolverMultistepScheduler") == ("dpmpp_2m", "normal")
    assert sampler_of("dpmsolver++", use_karras_sigmas=False) == ("dpmpp_2m", "normal")
    assert sampler_of("euler", zero_terminal_snr=True) == ("euler", "sgm_uniform")


def test_what_comfyui_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, check=says(got="PNDMScheduler", remedy="export.sampler.scheduler")):
        sampler_of("PNDMScheduler")
    with pytest.raises(InputError, check=says(expected="use_karras_sigmas", got="lower_order_final")):
        sampler_of("dpmsolver++", lower_order_final=False)
