"""The schema: what the configuration may say."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dreamartist_pipeline.params import (
    SECTIONS,
    TEMPLATE_PRESETS,
    BucketParams,
    EvaluationParams,
    ExportParams,
    GenerateParams,
    GuidanceScale,
    ImportParams,
    LoRAGroup,
    LossParams,
    RegularizationParams,
    SamplerParams,
    StrengthParams,
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


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (GenerateParams, {"prompts": ["a {cat:big}"]}),
        (GenerateParams, {"prompts": ["a cat"], "negative_prompt": "{cat:big}"}),
        (EvaluationParams, {"prompts": ["a {cat:big}"], "prior_prompts": ["a cat"]}),
        (EvaluationParams, {"prompts": ["a"], "prior_prompts": ["a {cat:big}"]}),
        (EvaluationParams, {"prompts": ["a"], "prior_prompts": ["a"], "negative_prompt": "{cat:big}"}),
        (RegularizationParams, {"sampler": {}, "negative_prompt": "{cat:big}"}),
        (TrainingParams, {"num_steps": 1, "words": WORDS, "templates": "a {pt1} {cat:big}"}),
        (TrainingParams, {"num_steps": 1, "words": WORDS, "preview": {"prompts": "a {cat:big}"}}),
    ],
)
def test_weighted_words_are_read_with_the_configuration(model: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="expected a weight such as {cat:1.2} .* got 'big'"):
        model(**values)
    assert model.model_validate(yaml.safe_load(yaml.safe_dump(values).replace("cat:big", "cat:1.5")))


@pytest.mark.parametrize("prompt", ["a {{pt1}:1.2}", "{pt1:1.2}", "a {red cat}"])
@pytest.mark.parametrize("key", ["prompt", "negative_prompt"])
def test_weighted_words_are_not_exported(key: str, prompt: str) -> None:
    with pytest.raises(ValidationError, match="weighted words cannot be exported, because ComfyUI weights by another"):
        ExportParams(**{"title": "fox", key: prompt})
    assert ExportParams(title="fox", prompt="a {pt1} {class}").prompt == "a {pt1} {class}"


def test_class_and_trigger_words_have_no_braces() -> None:
    with pytest.raises(ValidationError, match="class_word"):
        training(class_word="{cat:1.2}")
    with pytest.raises(ValidationError, match="contains a brace; weights belong into templates"):
        training(words={"names": {"pt1": ["{my-cat:2}", "my-cat-neg"]}})


def test_parameters_never_change_after_validation() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        training().num_steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "an integer rank is at least 1, got 0"),
        ({"rank": 1.5}, "a float rank is a fraction of out_features between 0 and 1, got 1.5"),
        ({"lr": -1e-4}, "greater than 0"),
        ({"branch": "pos"}, "a branch is p or n, .* got"),
        ({"layers": []}, "at least 1 item"),
        ({"layers": ["re:(unclosed"]}, "is not a regular expression"),
        ({"dropout": 1.0}, "less than 1"),
        ({"timestep_min_rank": 0}, "an integer rank is at least 1, got 0"),
        ({"timestep_min_rank": 1, "svd_init": True}, "svd_init and timestep_min_rank exclude each other"),
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
        ({"pt1": ["my/cat", "my-cat-neg"]}, "contains a slash; it names a file"),
    ],
)
def test_a_pair_of_trigger_words_that_cannot_work_is_refused(names: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WordsParams(names=names)


@pytest.mark.parametrize(
    ("scale", "num_branches"),
    [("1.0", 1), (1, 1), ("1-1", 1), ("1-1:cos", 1), ("3.0", 2), (3, 2), ("1-3:cos", 2), ("1.5-7:ln", 2)],
)
def test_only_a_guidance_scale_of_constantly_one_has_a_single_branch(scale: object, num_branches: int) -> None:
    assert training(guidance_scale=scale).num_branches == num_branches


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ("high", "is a number or 'low-high:curve', got 'high'"),
        ("1-3:sin", "guidance_scale.curve\n.*'ln', 'cos' or 'cos2'.*'sin'"),
        ("0.5", "guidance_scale.low\n.*greater than or equal to 1.*0.5"),
        ("3-0.5", "guidance_scale.high\n.*greater than or equal to 1.*0.5"),
        ("__import__('os')", "is a number or"),
        ("", "is a number or"),
        ("3-", "is a number or"),
        ("-1", "is a number or"),
        ("3.0 or 1", "is a number or"),
        ("9" * 400, "guidance_scale.low\n.*finite number"),
        (True, "is a number or"),
        (None, "guidance_scale"),
    ],
)
def test_a_guidance_scale_that_says_nothing_is_refused(scale: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        training(guidance_scale=scale)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("3.0", "3.0"),
        (3, "3.0"),
        (" 3.0", "3.0"),
        ("1.5-4", "1.5-4.0:ln"),
        ("4-1.5:cos", "4.0-1.5:cos"),
        ("2-2:cos2", "2.0"),
        (10**19, "1e+19"),
    ],
)
def test_a_guidance_scale_is_parsed_once_and_dumped_as_a_text_that_means_the_same(written: object, read: str) -> None:
    scale = training(guidance_scale=written).guidance_scale
    assert (str(scale), scale.model_dump()) == (read, read)
    assert str(GuidanceScale.model_validate(read)) == read


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


# --------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("HeunDiscreteSheduler", "there is no scheduler of this name .* did you mean HeunDiscreteScheduler"),
        ("eular", "did you mean euler"),
        ("xyz", "choose one of ddim, "),
        ("FlowMatchEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler is for models trained by flow matching"),
        ("DPMSolverSDEScheduler", "draws its noise with torchsde.* sde-dpmsolver\\+\\+"),
        ("RePaintScheduler", "needs inputs at every step"),
    ],
)
def test_a_scheduler_that_cannot_draw_is_refused_with_what_to_do(name: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplerParams(scheduler=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "epsilon", "beta_start": 0.1}, "beta_start, prediction_type are fixed by the base model"),
        ({"rescale_betas_zero_snr": False}, "rescale_betas_zero_snr are fixed by the base model"),
        ({"timestep_type": "continuous"}, "timestep_type are fixed by the base model"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is for models trained by flow matching"),
    ],
)
def test_scheduler_options_cannot_contradict_the_base_model(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplerParams(scheduler_options=options)


def test_the_reference_preset_of_strengths_is_known_by_name_everywhere() -> None:
    expected = StrengthParams(positive=0.8, negative=0.65)
    assert StrengthParams.model_validate("reference") == expected
    prompts: dict[str, Any] = {"prompts": ["a {pt1}"]}
    assert GenerateParams(**prompts, strength="reference").strength == expected  # type: ignore[arg-type]
    assert EvaluationParams(**prompts, prior_prompts=("a cat",), strength="reference").strength == expected  # type: ignore[arg-type]
    assert ExportParams(title="fox", strength="reference").strength == expected  # type: ignore[arg-type]
    assert StrengthParams() == StrengthParams(positive=1.0, negative=1.0)


def test_an_unknown_preset_of_strengths_is_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"a strength is \{positive: …, negative: …\} or reference, got 'referenc'"
    ):
        StrengthParams.model_validate("referenc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 64}, "width and height belong together"),
        ({"width": 60, "height": 64}, "multiple of 8"),
        ({"denoise": 0.0}, "greater than 0"),
        ({"denoise": 1.1}, "less than or equal to 1"),
        ({"denoise": 0.04}, "denoise 0.04 of 20 steps leaves none; raise denoise to at least 0.05, or take more steps"),
    ],
)
def test_sizes_and_denoise_that_cannot_be_drawn_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GenerateParams(**{"prompts": ("a {pt1}",), **change})


def test_a_training_has_one_beginning() -> None:
    group = {"lr": 1e-3, "rank": 1, "layers": ["a"], "svd_init": True}
    with pytest.raises(ValidationError, match="start_from cannot be combined with svd_init"):
        TrainingParams(num_steps=1, guidance_scale="1", lora_unet=[group], start_from="concept.safetensors")


def test_one_file_or_name_may_stand_alone_in_an_import() -> None:
    params = ImportParams(positive="cat.safetensors", words={"pt1": "my-cat.pt"}, names={"pt1": "my-own-cat"})
    assert params.positive == ("cat.safetensors",)
    assert (params.words, params.names) == ({"pt1": ("my-cat.pt",)}, {"pt1": ("my-own-cat",)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"toolkit": "ckpts", "positive": "cat.safetensors"}, "either toolkit, or positive, negative and words"),
        ({"positive": "cat.safetensors", "step": 3}, "step is for toolkit"),
        ({"words": {"pt1": ["a.pt", "b.pt"]}, "names": {"pt1": "a"}}, "names of slot 'pt1' need as many files"),
        ({"names": {"pt2": "a"}}, r"names of slot 'pt2' need as many files in words; got \['a'\] for \[\]"),
        ({"words": {"pt1": ["a.pt", "b.pt", "c.pt"]}}, "at most 2 items"),
        ({"words": {"pt1": []}}, "at least 1 item"),
    ],
)
def test_an_import_that_contradicts_itself_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ImportParams(**values)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        LoRAGroup.model_validate({"lr": value, "rank": 1, "layers": ["re:.*"]})


def test_a_single_word_is_no_template_but_a_misspelt_preset() -> None:
    with pytest.raises(ValidationError, match="a template or a preset out of object, style, caption"):
        TrainingParams.model_validate({"num_steps": 1, "templates": "styel"})


def test_what_only_says_how_a_training_runs_is_not_part_of_what_can_change_the_concept() -> None:
    plain = training()
    preview = {"every": 5, "prompts": ["a {pt1}"], "seed": 3}
    assert training(preview=preview, start_from="start.safetensors").result_values() == plain.result_values()
    assert training(seed=1).result_values() != plain.result_values()
    assert plain.result_values().keys() == TrainingParams.model_fields.keys() - {"preview", "start_from"}
