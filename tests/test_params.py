"""The schema of the configuration: bounds, cross-field checks, and short forms."""

from __future__ import annotations

from collections.abc import Callable
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
    MemoryParams,
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


def refuses(option: str = "", *parts: str) -> Callable[[ValidationError], bool]:
    """Return a check for `pytest.raises`: an error of this option ("": of the model) has all parts in its message."""

    def check(error: ValidationError) -> bool:
        return any(
            ".".join(map(str, each["loc"])) == option and all(part in each["msg"] for part in parts)
            for each in error.errors()
        )

    return check


Check = Callable[[ValidationError], bool]


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_every_section_refuses_unknown_keys(section: str) -> None:
    with pytest.raises(ValidationError, check=refuses("no_such_key", "Extra")):
        SECTIONS[section].model_validate({"no_such_key": 1})


@pytest.mark.parametrize(
    ("model", "values", "option"),
    [
        (GenerateParams, {"prompts": ["a {cat:big}"]}, "prompts.0"),
        (GenerateParams, {"prompts": ["a cat"], "negative_prompt": "{cat:big}"}, "negative_prompt"),
        (EvaluationParams, {"prompts": ["a {cat:big}"], "prior_prompts": ["a cat"]}, "prompts.0"),
        (EvaluationParams, {"prompts": ["a"], "prior_prompts": ["a {cat:big}"]}, "prior_prompts.0"),
        (
            EvaluationParams,
            {"prompts": ["a"], "prior_prompts": ["a"], "negative_prompt": "{cat:big}"},
            "negative_prompt",
        ),
        (RegularizationParams, {"sampler": {}, "negative_prompt": "{cat:big}"}, "negative_prompt"),
        (TrainingParams, {"num_steps": 1, "words": WORDS, "templates": "a {pt1} {cat:big}"}, "templates.0"),
        (TrainingParams, {"num_steps": 1, "words": WORDS, "preview": {"prompts": "a {cat:big}"}}, "preview.prompts.0"),
    ],
)
def test_weighted_words_are_parsed_with_the_configuration(model: Any, values: dict[str, Any], option: str) -> None:
    with pytest.raises(ValidationError, check=refuses(option, "'big'")):
        model(**values)
    assert model.model_validate(yaml.safe_load(yaml.safe_dump(values).replace("cat:big", "cat:1.5")))


@pytest.mark.parametrize("prompt", ["a {{pt1}:1.2}", "{pt1:1.2}", "a {red cat}"])
@pytest.mark.parametrize("key", ["prompt", "negative_prompt"])
def test_weighted_words_are_not_exported(key: str, prompt: str) -> None:
    with pytest.raises(ValidationError, check=refuses(key, repr(prompt))):
        ExportParams(**{"title": "fox", key: prompt})
    assert ExportParams(title="fox", prompt="a {pt1} {class}").prompt == "a {pt1} {class}"


def test_class_and_trigger_words_have_no_braces() -> None:
    with pytest.raises(ValidationError, check=refuses("class_word")):
        training(class_word="{cat:1.2}")
    with pytest.raises(ValidationError, check=refuses("words.names", "'{my-cat:2}'", "brace")):
        training(words={"names": {"pt1": ["{my-cat:2}", "my-cat-neg"]}})


def test_parameters_never_change_after_validation() -> None:
    with pytest.raises(ValidationError, check=refuses("num_steps", "frozen")):
        training().num_steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"rank": 0}, refuses("rank", "got 0")),
        ({"rank": 1.5}, refuses("rank", "got 1.5")),
        ({"lr": -1e-4}, refuses("lr", "greater than 0")),
        ({"branch": "pos"}, refuses("branch", "'pos'")),
        ({"layers": []}, refuses("layers", "at least 1")),
        ({"layers": ["re:(unclosed"]}, refuses("layers", "'re:(unclosed'")),
        ({"dropout": 1.0}, refuses("dropout", "less than 1")),
        ({"timestep_min_rank": 0}, refuses("timestep_min_rank", "got 0")),
        ({"timestep_min_rank": 1, "svd_init": True}, refuses("", "svd_init", "timestep_min_rank")),
        ({"orthogonal_init": "random", "svd_init": True}, refuses("", "svd_init", "orthogonal_init")),
        ({"orthogonal_init": "svd"}, refuses("orthogonal_init", "random")),
    ],
)
def test_a_lora_group_out_of_bounds_is_refused(change: dict[str, Any], check: Check) -> None:
    with pytest.raises(ValidationError, check=check):
        LoRAGroup(**(GROUP | change))


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ({"pt1": ["my-cat", "my-cat"]}, ("'pt1'", "same", "'my-cat'")),
        ({"pt1": ["my-cat", ""]}, ("'pt1'", "['my-cat', '']")),
        ({"pt1": ["my cat", "my-cat-neg"]}, ("'my cat'", "space")),
        ({"pt1": ["my/cat", "my-cat-neg"]}, ("'my/cat'", "slash")),
    ],
)
def test_a_pair_of_trigger_words_that_cannot_work_is_refused(names: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, check=refuses("names", *parts)):
        WordsParams(names=names)


@pytest.mark.parametrize(
    ("scale", "num_branches"),
    [("1.0", 1), (1, 1), ("1-1", 1), ("1-1:cos", 1), ("3.0", 2), (3, 2), ("1-3:cos", 2), ("1.5-7:ln", 2)],
)
def test_only_a_guidance_scale_of_constantly_one_has_a_single_branch(scale: object, num_branches: int) -> None:
    assert training(guidance_scale=scale).num_branches == num_branches


@pytest.mark.parametrize(
    ("scale", "check"),
    [
        ("high", refuses("guidance_scale", "'high'")),
        ("1-3:sin", refuses("guidance_scale.curve", "'cos2'")),
        ("0.5", refuses("guidance_scale.low", "equal to 1")),
        ("3-0.5", refuses("guidance_scale.high", "equal to 1")),
        ("__import__('os')", refuses("guidance_scale", "__import__")),
        ("", refuses("guidance_scale", "''")),
        ("3-", refuses("guidance_scale", "'3-'")),
        ("-1", refuses("guidance_scale", "'-1'")),
        ("3.0 or 1", refuses("guidance_scale", "'3.0 or 1'")),
        ("9" * 400, refuses("guidance_scale.low", "finite")),
        (True, refuses("guidance_scale", "True")),
        (None, refuses("guidance_scale")),
    ],
)
def test_an_invalid_guidance_scale_is_refused(scale: object, check: Check) -> None:
    with pytest.raises(ValidationError, check=check):
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
        (1000, "1000.0"),
    ],
)
def test_a_guidance_scale_is_dumped_as_an_equivalent_text(written: object, read: str) -> None:
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
    with pytest.raises(ValidationError) as error:
        training(caption_transforms=[transform])
    assert {each["loc"][:2] for each in error.value.errors()} == {("caption_transforms", 0)}


@pytest.mark.parametrize("name", sorted(TEMPLATE_PRESETS))
def test_a_preset_of_templates_has_the_word_and_the_caption(name: str) -> None:
    templates = training(templates=name).templates
    assert templates == TEMPLATE_PRESETS[name]
    assert all("{pt1}" in template and "{caption}" in template for template in templates)


def test_a_rank_by_timestep_is_refused_in_the_text_encoder() -> None:
    with pytest.raises(ValidationError, check=refuses("", "lora_text_encoder", "timestep_min_rank")):
        training(lora_text_encoder=[GROUP | {"timestep_min_rank": 1}])


def test_a_negative_clip_skip_is_refused() -> None:
    with pytest.raises(ValidationError, check=refuses("clip_skip", "equal to 0")):
        training(clip_skip=-1)


def test_a_training_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, check=refuses("", "lora_unet", "words.names")):
        training(words={})


def test_a_negative_group_without_a_negative_branch_is_refused() -> None:
    with pytest.raises(ValidationError, check=refuses("", "guidance_scale", "branch: n")):
        training(guidance_scale="1.0", lora_unet=[GROUP | {"branch": "n"}])


def test_a_branch_that_nothing_trains_is_refused() -> None:
    with pytest.raises(ValidationError, check=refuses("", "branch: n", "words")):
        training(words={}, lora_unet=[GROUP | {"branch": "p"}])


def test_a_side_off_the_grid_is_refused() -> None:
    with pytest.raises(ValidationError, check=refuses("", "side_px 100", "multiple_px 64")):
        BucketParams(side_px=100)


def test_a_single_prompt_is_accepted() -> None:
    assert GenerateParams(prompts="a red fox, blue background").prompts == ("a red fox, blue background",)  # type: ignore[arg-type]


def test_an_unknown_evaluator_is_refused_before_a_training_that_ends_with_it() -> None:
    with pytest.raises(ValidationError, check=refuses("evaluators", "'vgg16'")):
        EvaluationParams(prompts=("a",), prior_prompts=("b",), evaluators=("vgg16",))


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"title": "a/b"}, refuses("title", "pattern")),
        ({"formats": []}, refuses("formats", "at least 1")),
        ({"formats": ["lycoris"]}, refuses("formats.0", "'toolkit'")),
        ({"dtype": "int8"}, refuses("dtype", "'bfloat16'")),
    ],
)
def test_an_export_out_of_bounds_is_refused(change: dict[str, Any], check: Check) -> None:
    with pytest.raises(ValidationError, check=check):
        ExportParams(**({"title": "cat"} | change))


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"timesteps": (0.5, 0.5)}, refuses("timesteps", "[0.5, 0.5]")),
        ({"timesteps": (0.0, 1.5)}, refuses("timesteps.1", "equal to 1")),
        ({"noise_offset": -0.1}, refuses("noise_offset", "equal to 0")),
        ({"ema_decay": 1.0}, refuses("ema_decay", "less than 1")),
        ({"optimizer": "lion"}, refuses("optimizer", "'schedule_free'")),
        (
            {"optimizer": "schedule_free", "lora_unet": [GROUP]},
            refuses("", "optimizer: ", " schedule.kind", "one_cycle"),
        ),
        (
            {"words": WORDS | {"optimizer": "schedule_free"}},
            refuses("", "words.optimizer: ", "words_schedule.kind", "one_cycle"),
        ),
        (
            {
                "words": WORDS | {"optimizer": "schedule_free"},
                "words_schedule": {"kind": "constant"},
                "ema_decay": 0.9,
            },
            refuses("", "words.optimizer: ", "ema_decay", "0.9"),
        ),
        ({"optimizer": "prodigy", "lora_unet": [GROUP]}, refuses("", "optimizer: ", "[0.0001]")),
        (
            {"words": WORDS | {"optimizer": "prodigy", "lr": 1.0}, "scale_lr": True},
            refuses("", "words.optimizer: ", "scale_lr"),
        ),
    ],
)
def test_an_objective_or_optimizer_that_cannot_work_is_refused(change: dict[str, Any], check: Check) -> None:
    with pytest.raises(ValidationError, check=check):
        training(**change)


@pytest.mark.parametrize(
    "change", [{"kind": "l1"}, {"huber_delta": 0}, {"reconstruction_weight": -1}, {"reconstruction_norm": "ssim"}]
)
def test_a_loss_out_of_bounds_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, check=refuses(*change)):
        LossParams(**change)


# --------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("HeunDiscreteSheduler", ("HeunDiscreteScheduler",)),
        ("eular", ("euler",)),
        ("xyz", ("ddim", "UniPCMultistepScheduler")),
        ("FlowMatchEulerDiscreteScheduler", ("FlowMatchEulerDiscreteScheduler", "flow-matching")),
        ("DPMSolverSDEScheduler", ("torchsde", "sde-dpmsolver++")),
        ("RePaintScheduler", ("RePaintScheduler", "inputs")),
    ],
)
def test_a_scheduler_that_cannot_draw_is_refused_with_what_to_do(name: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, check=refuses("scheduler", *parts)):
        SamplerParams(scheduler=name)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"prediction_type": "epsilon", "beta_start": 0.1}, "beta_start, prediction_type"),
        ({"rescale_betas_zero_snr": False}, "rescale_betas_zero_snr"),
        ({"timestep_type": "continuous"}, "timestep_type"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
    ],
)
def test_scheduler_options_cannot_contradict_the_base_model(options: dict[str, Any], refused: str) -> None:
    with pytest.raises(ValidationError, check=refuses("scheduler_options", refused)):
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
    with pytest.raises(ValidationError, check=refuses("", "reference", "'referenc'")):
        StrengthParams.model_validate("referenc")


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"width": 64}, refuses("", "width", "height")),
        ({"width": 60, "height": 64}, refuses("width", "multiple of 8")),
        ({"denoise": 0.0}, refuses("denoise", "greater than 0")),
        ({"denoise": 1.1}, refuses("denoise", "equal to 1")),
        ({"denoise": 0.04}, refuses("", "denoise 0.04 of 20 steps", "0.05")),
    ],
)
def test_sizes_and_denoise_that_cannot_be_drawn_are_refused(change: dict[str, Any], check: Check) -> None:
    with pytest.raises(ValidationError, check=check):
        GenerateParams(**{"prompts": ("a {pt1}",), **change})


@pytest.mark.parametrize(("option", "value"), [("svd_init", True), ("orthogonal_init", "weight")])
def test_start_from_cannot_be_combined_with_another_start(option: str, value: object) -> None:
    group = {"lr": 1e-3, "rank": 1, "layers": ["a"], option: value}
    with pytest.raises(ValidationError, check=refuses("", "start_from", option)):
        TrainingParams(num_steps=1, guidance_scale="1", lora_unet=[group], start_from="concept.safetensors")


def test_an_import_accepts_a_single_file_or_name() -> None:
    params = ImportParams(positive="cat.safetensors", words={"pt1": "my-cat.pt"}, names={"pt1": "my-own-cat"})
    assert params.positive == ("cat.safetensors",)
    assert (params.words, params.names) == ({"pt1": ("my-cat.pt",)}, {"pt1": ("my-own-cat",)})


@pytest.mark.parametrize(
    ("values", "check"),
    [
        ({"toolkit": "ckpts", "positive": "cat.safetensors"}, refuses("", "toolkit", "positive, negative")),
        ({"positive": "cat.safetensors", "step": 3}, refuses("", "toolkit", "step 3")),
        (
            {"words": {"pt1": ["a.pt", "b.pt"]}, "names": {"pt1": "a"}},
            refuses("", "'pt1'", "['a']", "['a.pt', 'b.pt']"),
        ),
        ({"names": {"pt2": "a"}}, refuses("", "'pt2'", "['a']", "[]")),
        ({"words": {"pt1": ["a.pt", "b.pt", "c.pt"]}}, refuses("words.pt1", "at most 2")),
        ({"words": {"pt1": []}}, refuses("words.pt1", "at least 1")),
    ],
)
def test_an_import_that_contradicts_itself_is_refused(values: dict[str, Any], check: Check) -> None:
    with pytest.raises(ValidationError, check=check):
        ImportParams(**values)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValidationError, check=refuses("lr", "finite")):
        LoRAGroup.model_validate({"lr": value, "rank": 1, "layers": ["re:.*"]})


def test_a_single_word_is_no_template_but_a_misspelt_preset() -> None:
    with pytest.raises(ValidationError, check=refuses("templates", "object, style, caption")):
        TrainingParams.model_validate({"num_steps": 1, "templates": "styel"})


def test_options_that_do_not_change_the_concept_are_no_result_values() -> None:
    plain = training()
    preview = {"every": 5, "prompts": ["a {pt1}"], "seed": 3}
    others = {"memory": {"micro_batch": 1}, "backend": "compile"}
    others |= {"resume": "never", "checkpoints": "states", "checkpoint_minutes": 5.0, "max_minutes": 60.0}
    scoring = {"every": 4, "prompts": ["a {pt1}"], "prior_prompts": ["a cat"]}
    others |= {"on_divergence": "halve_lr", "scoring": scoring}
    assert training(preview=preview, start_from="start.safetensors", **others).result_values() == plain.result_values()
    assert training(seed=1).result_values() != plain.result_values()
    run_only = {"preview", "start_from", *others}
    assert plain.result_values().keys() == TrainingParams.model_fields.keys() - run_only
    for needed in ({"choose": "best", "scoring": scoring}, {"scoring": scoring | {"patience": 2}}):
        assert training(**needed).result_values()["scoring"]["every"] == 4


def test_memory_is_auto_or_values() -> None:
    assert training(memory="auto").memory == MemoryParams()
    assert training(memory={"checkpointing": True}).memory == MemoryParams(checkpointing=True)
    with pytest.raises(ValidationError, check=refuses("memory", "auto")):
        training(memory="low")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"guidance_scale": 99999999999}, "guidance_scale"),
        ({"guidance_scale": "1-1e300:cos"}, "guidance_scale"),
        ({"words": {**WORDS, "lr": 1e9}}, "words.lr"),
        ({"words": {**WORDS, "num_vectors": [2**31, 1]}}, "words.num_vectors"),
        ({"words": {"names": {"pt1": ["m" * 101, "n"]}}}, "words.names"),
        ({"words": {"names": {"": ["m-y", "n-n"]}}}, "words.names"),
        ({"words": {**WORDS, "init_text": ["x" * 501, "y"]}}, "words.init_text"),
        ({"batch_size": 10**8}, "batch_size"),
        ({"num_steps": 10**30}, "num_steps"),
        ({"lora_unet": [{"lr": 1.0, "rank": 2**31, "layers": ["a"]}]}, "rank"),
        ({"lora_unet": [{"lr": 1e300, "rank": 1, "layers": ["a"]}]}, "lr"),
        ({"lora_unet": [{"lr": 1.0, "rank": 1, "alpha": 1e300, "layers": ["a"]}]}, "alpha"),
        ({"lora_unet": [{"lr": 1.0, "rank": 1, "layers": ["re:(?!a)"]}]}, "layers"),
    ],
)
def test_numbers_that_no_training_can_use_are_refused_by_name(values: dict[str, object], key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        training(**values)
    assert any(key in ".".join(map(str, error["loc"])) for error in caught.value.errors())


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"images_per_prompt": 10**8}, "images_per_prompt"),
        ({"sampler": {"num_inference_steps": 10**9}}, "num_inference_steps"),
        ({"sampler": {"guidance_scale": 1e11}}, "guidance_scale"),
        ({"strength": {"positive": 1e30}}, "positive"),
    ],
)
def test_numbers_that_no_generation_can_use_are_refused_by_name(values: dict[str, object], key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        GenerateParams.model_validate({"prompts": "a {pt1}", **values})
    assert any(key in ".".join(map(str, error["loc"])) for error in caught.value.errors())
