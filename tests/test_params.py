"""The schema: what the configuration may say."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dreamartist_pipeline.params import (
    SECTIONS,
    TEMPLATE_PRESETS,
    BucketParams,
    EvaluationParams,
    ExportParams,
    GenerateParams,
    LoRAGroup,
    LossParams,
    TrainingParams,
    WordsParams,
)

GROUP = {"lr": 1e-4, "rank": 3, "layers": ["re:.*attn"]}
WORDS = {"names": {"pt1": ["my-cat", "my-cat-neg"]}}


def training(**values: Any) -> TrainingParams:
    return TrainingParams(**({"num_steps": 2, "words": WORDS} | values))


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_every_section_refuses_unknown_keys(section: str) -> None:
    with pytest.raises(ValidationError, match=r"no_such_key\s+Extra inputs are not permitted"):
        SECTIONS[section].model_validate({"no_such_key": 1})


def test_parameters_never_change_after_validation() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        training().num_steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "an integer rank is at least 1, got 0"),
        ({"rank": 1.5}, "a float rank is a fraction of out_features between 0 and 1, got 1.5"),
        ({"lr": -1e-4}, "greater than 0"),
        ({"branch": "pos"}, "'p' or 'n'"),
        ({"layers": []}, "at least 1 item"),
        ({"layers": ["re:(unclosed"]}, "is not a regular expression"),
        ({"dropout": 1.0}, "less than 1"),
        ({"timestep_min_rank": 0}, "an integer rank is at least 1, got 0"),
    ],
)
def test_a_lora_group_out_of_bounds_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LoRAGroup(**(GROUP | change))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"pt1": ["my-cat", "my-cat"]}, "same trigger word 'my-cat' in both branches"),
        ({"pt1": ["my-cat", ""]}, "needs a trigger word per branch"),
        ({"pt1": ["my cat", "my-cat-neg"]}, "contains a space; use a hyphen"),
    ],
)
def test_a_pair_of_trigger_words_that_cannot_work_is_refused(names: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WordsParams(names=names)


@pytest.mark.parametrize(
    ("scale", "num_branches"), [("1.0", 1), (1, 1), ("1-1", 1), ("3.0", 2), (3, 2), ("1-3:cos", 2), ("1.5-7:ln", 2)]
)
def test_only_a_guidance_scale_of_constantly_one_has_a_single_branch(scale: object, num_branches: int) -> None:
    assert training(guidance_scale=scale).num_branches == num_branches


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ("high", "is a number or 'low-high:curve', got 'high'"),
        ("1-3:sin", "one of ln, cos, cos2, got 'sin'"),
        ("0.5", "at least 1"),
        ("__import__('os')", "is a number or"),
    ],
)
def test_a_guidance_scale_that_says_nothing_is_refused(scale: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        training(guidance_scale=scale)


def test_caption_transforms_keep_their_order_and_survive_a_dump() -> None:
    params = training(caption_transforms=[{"tag_dropout": 0.1}, "tag_shuffle", {"tag_erase": 1}])
    kinds = [(transform.kind, transform.p) for transform in params.caption_transforms]
    assert kinds == [("tag_dropout", 0.1), ("tag_shuffle", 0.0), ("tag_erase", 1.0)]
    assert TrainingParams(**params.model_dump()) == params


@pytest.mark.parametrize("transform", ["tag_mix", {"tag_dropout": 1.5}, {"tag_shuffle": 0.5}, "tag_erase"])
def test_a_caption_transform_out_of_bounds_is_refused(transform: object) -> None:
    with pytest.raises(ValidationError, match="caption_transforms"):
        training(caption_transforms=[transform])


@pytest.mark.parametrize("name", sorted(TEMPLATE_PRESETS))
def test_a_preset_of_templates_says_the_word_and_the_caption(name: str) -> None:
    templates = training(templates=name).templates
    assert templates == TEMPLATE_PRESETS[name]
    assert all("{pt1}" in template and "{caption}" in template for template in templates)


def test_a_rank_by_timestep_is_refused_in_the_text_encoder() -> None:
    with pytest.raises(ValidationError, match="the text encoder does not know the timestep"):
        training(lora_text_encoder=[GROUP | {"timestep_min_rank": 1}])


def test_a_negative_clip_skip_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        training(clip_skip=-1)


def test_a_training_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="nothing to train"):
        training(words={})


def test_a_negative_group_without_a_negative_branch_is_refused() -> None:
    with pytest.raises(ValidationError, match="there is no negative branch, but a LoRA group has branch: n"):
        training(guidance_scale="1.0", lora_unet=[GROUP | {"branch": "n"}])


def test_a_branch_that_nothing_trains_is_refused() -> None:
    with pytest.raises(ValidationError, match="no LoRA group trains the negative branch"):
        training(words={}, lora_unet=[GROUP | {"branch": "p"}])


def test_a_side_off_the_grid_is_refused() -> None:
    with pytest.raises(ValidationError, match="side_px 100 is not a multiple of multiple_px 64"):
        BucketParams(side_px=100)


def test_a_single_prompt_may_stand_alone() -> None:
    assert GenerateParams(prompts="a red fox, blue background").prompts == ("a red fox, blue background",)  # type: ignore[arg-type]


def test_an_unknown_evaluator_is_refused_before_a_training_that_ends_with_it() -> None:
    with pytest.raises(ValidationError, match="an evaluator is efficientnet-lite0, clip:… or dinov2:…, got 'vgg16'"):
        EvaluationParams(prompts=("a",), prior_prompts=("b",), evaluators=("vgg16",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": "a/b"}, "should match pattern"),
        ({"formats": []}, "at least 1 item"),
        ({"formats": ["lycoris"]}, "'kohya', 'peft', 'toolkit' or 'embeddings'"),
        ({"dtype": "int8"}, "'float32', 'float16' or 'bfloat16'"),
    ],
)
def test_an_export_out_of_bounds_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExportParams(**({"title": "cat"} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": (0.5, 0.5)}, "low below high, got \\[0.5, 0.5\\]"),
        ({"timesteps": (0.0, 1.5)}, "less than or equal to 1"),
        ({"noise_offset": -0.1}, "greater than or equal to 0"),
        ({"ema_decay": 1.0}, "less than 1"),
        ({"optimizer": "lion"}, "'adamw', 'adamw8bit', 'prodigy' or 'schedule_free'"),
        ({"optimizer": "schedule_free", "lora_unet": [GROUP]}, "needs schedule.kind constant, got one_cycle"),
        ({"words": WORDS | {"optimizer": "schedule_free"}}, "needs words_schedule.kind constant, got one_cycle"),
        (
            {
                "words": WORDS | {"optimizer": "schedule_free"},
                "words_schedule": {"kind": "constant"},
                "ema_decay": 0.9,
            },
            "averages by itself; set ema_decay to 0, got 0.9",
        ),
        ({"optimizer": "prodigy", "lora_unet": [GROUP]}, r"takes lr as a factor, usually 1.0.* got \[0.0001\]"),
        ({"words": WORDS | {"optimizer": "prodigy", "lr": 1.0}, "scale_lr": True}, "set scale_lr to false"),
    ],
)
def test_an_objective_or_optimizer_that_cannot_work_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        training(**change)


@pytest.mark.parametrize(
    "change", [{"kind": "l1"}, {"huber_delta": 0}, {"reconstruction_weight": -1}, {"reconstruction_norm": "ssim"}]
)
def test_a_loss_out_of_bounds_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LossParams(**change)
