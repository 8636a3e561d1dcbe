"""Every option of the configuration has a test that fails if the option is ignored.

An option is a path into `params.SECTIONS`, such as `training.loss.snr_gamma`. The first tests walk the schema and fail
for an option without a proof. A proof is a test marked `@proves("<option>")` in this module, or a test in another
module that is listed in PROVEN_ELSEWHERE. `make proofs` ignores the options one by one and checks that the proof fails.

Models that are passed on as a whole (HANDED_ON) are proven in two parts: every place passes its model on
(`generate.sampler`), and each value of the model has an effect (`SamplerParams.scheduler`).
"""

from __future__ import annotations

import ast
import functools
import inspect
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from kedro.config import OmegaConfigLoader
from pandas import DataFrame
from PIL import Image
from pydantic import BaseModel, ValidationError

from dreamartist_pipeline import settings
from dreamartist_pipeline.backbones import concepts
from dreamartist_pipeline.backbones.base_model import open_base_model
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.devices import pick_device
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks import build_parameters, register_project_root
from dreamartist_pipeline.params import (
    SECTIONS,
    BucketParams,
    DeviceParams,
    EvaluationParams,
    GenerateParams,
    IngestionParams,
    LoRAGroup,
    RegularizationParams,
    SamplerParams,
    StrengthParams,
    TrainingParams,
)
from dreamartist_pipeline.pipelines.evaluation import drawing
from dreamartist_pipeline.pipelines.generate.nodes import generate_images
from dreamartist_pipeline.pipelines.ingestion.nodes import prepare_reference
from dreamartist_pipeline.pipelines.regularization.nodes import make_regularization_set
from dreamartist_pipeline.pipelines.training import reporting
from dreamartist_pipeline.pipelines.training.nodes import check_training, train_concept
from image_sets import evaluate, set_dataset
from refusals import says

TESTS = Path(__file__).resolve().parent
RECIPES = {"pretrain", "judge"}  # of the bundled models, not options of a user's run
HANDED_ON = (LoRAGroup, SamplerParams, StrengthParams)
TAKEN_APART = ("export.sampler", "export.strength")  # written to files value by value, and proven value by value

PROVEN_ELSEWHERE: dict[str, dict[str, tuple[str, ...]]] = {
    "backbones/test_base_model.py": {
        "test_the_base_model_draws_what_diffusers_draws": ("SamplerParams.num_inference_steps",),
    },
    "backbones/test_concepts.py": {
        "test_what_bias_and_start_by_svd_have_learned_is_attached_as_it_was_trained": (
            "LoRAGroup.svd_init",
            "LoRAGroup.orthogonal_init",
        ),
        "test_every_bias_is_learned_and_acts": ("LoRAGroup.bias",),
        "test_a_half_precision_base_trains_float32_adapters": ("device.dtype",),
        "test_training_gives_no_gradient_to_ranks_that_no_row_used": ("LoRAGroup.timestep_min_rank",),
        "test_strength_zero_of_both_branches_is_the_base_model": ("StrengthParams.positive",),
        "test_strengths_act_on_their_own_branch": ("StrengthParams.negative",),
    },
    "core/test_choosing.py": {
        "test_a_given_interval_is_taken_with_the_last_step": ("training.scoring.every",),
        "test_bounds_of_agreement_are_relative_to_the_base_model": (
            "training.scoring.agreement_loss",
            "training.scoring.max_drift",
            "training.scoring.max_copying",
        ),
    },
    "core/test_divergence.py": {
        "test_half_the_rates_go_on_from_the_last_good_state": ("training.on_divergence",),
    },
    "core/test_images.py": {
        "test_keep_aspect_picks_the_nearest_size_of_at_most_the_area": (
            "ingestion.bucket.multiple_px",
            "ingestion.bucket.keep_aspect",
        ),
    },
    "core/test_training.py": {
        "test_each_distinct_prompt_of_a_batch_is_encoded_once": ("training.batch_size",),
        "test_row_weights_are_a_mean_over_the_reference_plus_a_weighted_mean_over_the_regularization": (
            "training.regularization_batch_size",
        ),
        "test_adapters_and_words_have_optimizers_of_their_own": (
            "training.words.optimizer",
            "training.optimizer",
        ),
        "test_previews_and_the_end_hold_averages_where_they_are_asked_for": ("training.ema_decay",),
        "test_timesteps_stay_within_their_limits": ("training.timesteps",),
        "test_a_noise_offset_shifts_whole_channels_and_nothing_else": ("training.noise_offset",),
        "test_the_huber_loss_is_what_trains_when_asked_for": (
            "training.loss.kind",
            "training.loss.huber_delta",
        ),
        "test_the_reconstruction_adds_its_weighted_part_of_the_reference_rows": (
            "training.loss.reconstruction_weight",
        ),
    },
    "pipelines/test_strengths.py": {
        "test_strengths_are_all_pairs_with_the_configured_ones_among_them": (
            "evaluation.sweep.positive",
            "evaluation.sweep.negative",
        ),
        "test_guidance_scales_are_compared_at_given_strengths_for_every_step": ("evaluation.sweep.guidance_scales",),
        "test_kept_steps_are_as_many_as_asked_for": ("evaluation.sweep.max_steps",),
        "test_pictures_of_a_setting_are_those_of_generate_with_it": ("evaluation.sweep.num_prompts",),
        "test_nothing_is_drawn_without_images": ("evaluation.sweep.images",),
        "test_attention_is_shown_of_the_first_prompts_with_the_subject": ("evaluation.attention_images",),
    },
    "core/test_strengths.py": {
        "test_the_bound_of_agreement_is_relative_to_the_base_model": (
            "evaluation.sweep.agreement_loss",
            "evaluation.sweep.max_copying",
        ),
    },
    "pipelines/test_evaluation.py": {
        "test_towers_beside_the_base_model_score_prompts_and_colours_are_read": (
            "evaluation.text_image_model",
            "evaluation.color_agreement",
        ),
        "test_the_node_returns_sheet_metrics_and_table_and_tracks_the_sheet": (
            "evaluation.prompts",
            "evaluation.prior_prompts",
            "evaluation.class_word",
        ),
        "test_another_picture_than_that_of_the_training_is_refused": ("evaluation.other_picture",),
        "test_images_without_a_part_of_the_negative_branch_are_drawn_from_the_first_seeds": (
            "evaluation.branch_images",
        ),
        "test_images_at_other_guidance_scales_are_drawn_from_the_first_seeds": (
            "evaluation.guidance_images",
            "evaluation.guidance_scales",
        ),
        "test_further_pictures_reach_the_measures": ("evaluation.views",),
        "test_recognition_without_a_judge_is_refused_if_it_is_asked_for": ("evaluation.recognition",),
        "test_a_missing_evaluator_is_refused_before_the_concept_is_drawn": ("evaluation.evaluators",),
    },
    "pipelines/test_registration.py": {
        "test_nothing_is_registered_if_it_is_off": ("registration.enabled",),
        "test_a_base_model_above_the_limit_is_referred_to": ("registration.max_copied_mb",),
    },
    "pipelines/test_export.py": {
        "test_the_script_draws_with_a_scheduler_of_diffusers_and_its_options": ("export.sampler.scheduler_options",),
        "test_the_title_names_files_and_metadata": ("export.title",),
        "test_recommended_settings_are_stated_and_used_on_request": ("export.recommended",),
        "test_only_the_chosen_formats_are_written": ("export.formats",),
        "test_what_is_read_back_is_the_concept_to_the_dtypes_precision": ("export.dtype",),
        "test_prompts_seed_sampler_and_strengths_reach_the_workflow": (
            "export.prompt",
            "export.negative_prompt",
            "export.seed",
            "export.strength.positive",
            "export.strength.negative",
            "export.sampler.scheduler",
            "export.sampler.num_inference_steps",
            "export.sampler.guidance_scale",
        ),
        "test_the_script_draws_in_batches_from_the_seed_on": ("export.sampler.batch_size",),
    },
    "pipelines/test_generate.py": {
        "test_picture_mask_and_denoise_shape_the_image": ("generate.denoise",),
        "test_recommended_settings_are_used_on_request_only": ("generate.recommended",),
        "test_width_and_height_are_the_images": (
            "generate.width",
            "generate.height",
        ),
        "test_every_prompt_gets_its_images_by_number_and_seed": (
            "generate.prompts",
            "generate.images_per_prompt",
            "generate.seed",
        ),
        "test_strengths_reach_the_adapters": ("generate.strength",),
        "test_progress_counts_the_images_of_each_batch": ("SamplerParams.batch_size",),
    },
    "pipelines/test_ingestion.py": {
        "test_without_a_mask_everything_weighs_one": ("ingestion.bucket.side_px",),
        "test_padding_weighs_nothing": ("ingestion.fit",),
        "test_transparent_pixels_take_the_background_color": ("ingestion.background_color",),
    },
    "pipelines/test_prompts.py": {
        "test_a_column_is_chosen_by_name_or_number": ("prompts.column",),
        "test_no_prompts_may_be_requested": ("prompts.num_prompts",),
        "test_another_seed_draws_others": ("prompts.seed",),
    },
    "pipelines/test_regularization.py": {
        "test_image_i_is_the_base_models_image_of_prompt_i_and_seed_i": ("regularization.seed",),
        "test_images_are_squares_of_the_configured_side_or_of_the_references": ("regularization.side_px",),
    },
    "backbones/test_quantization.py": {
        "test_a_base_model_opens_with_int8_weights": ("device.quantize",),
    },
    "backbones/test_determinism.py": {
        "test_a_base_model_is_opened_with_deterministic_algorithms": ("device.deterministic",),
    },
    "core/test_devices.py": {
        "test_more_processes_than_gpus_are_refused": ("device.processes",),
    },
    "pipelines/test_training_memory.py": {
        "test_a_backend_reaches_the_loop_and_the_denoiser": ("training.backend",),
        "test_a_training_computes_its_steps_by_the_plan": (
            "training.memory.checkpointing",
            "training.memory.micro_batch",
            "training.memory.limit_gib",
        ),
    },
    "pipelines/test_resuming.py": {
        "test_never_starts_anew_with_any_configuration": (
            "training.resume",
            "training.checkpoints",
            "training.checkpoint_minutes",
        ),
        "test_the_minutes_of_a_training_end_it": ("training.max_minutes",),
    },
    "pipelines/test_scoring.py": {
        "test_choose_last_takes_the_last_step_and_scores_if_asked": ("training.choose",),
        "test_patience_stops_a_training": ("training.scoring.patience",),
        "test_prompts_seeds_and_sampler_are_those_of_the_images": (
            "training.scoring.prompts",
            "training.scoring.prior_prompts",
            "training.scoring.images_per_prompt",
            "training.scoring.seed",
            "training.scoring.sampler",
        ),
        "test_named_models_judge_in_place_of_the_usual_ones": (
            "training.scoring.evaluator",
            "training.scoring.text_image_model",
        ),
        "test_validation_draws_nothing_of_the_training_and_is_the_same_at_every_step": (
            "training.scoring.validation_rows",
        ),
        "test_images_are_drawn_from_a_kept_step": ("generate.step",),
        "test_evaluation_and_export_take_a_kept_step": ("evaluation.step", "export.step"),
    },
    "pipelines/test_training.py": {
        "test_before_the_first_step_a_concept_predicts_as_the_one_it_starts_from": ("training.start_from",),
        "test_zero_steps_give_a_concept_and_an_empty_history": ("training.num_steps",),
        "test_templates_become_prompts_of_both_branches_and_captions_stay_alike": (
            "training.words.names",
            "training.templates",
            "training.class_word",
        ),
        "test_caption_transforms_change_the_caption_alike_in_both_branches": (
            "training.caption_transforms.kind",
            "training.caption_transforms.p",
        ),
        "test_a_concept_draws_with_the_noise_schedule_it_was_trained_with": ("training.zero_terminal_snr",),
    },
    "backbones/test_schedulers.py": {
        "test_options_reach_the_scheduler_over_those_of_a_short_name": ("SamplerParams.scheduler_options",),
    },
    "test_hooks.py": {
        "test_an_existing_concept_is_replaced_only_on_request": ("import.replace",),
    },
    "datasets/test_subject_list.py": {
        "test_pictures_in_a_folder_are_subjects_by_their_names": ("personalize.subjects",),
    },
    "pipelines/test_personalize.py": {
        "test_the_export_can_be_left_out": ("personalize.export",),
        "test_columns_are_parameters_and_take_precedence_over_those_of_all_runs": ("personalize.params",),
        "test_what_executes_the_runs_reaches_the_starter": (
            "personalize.workers",
            "personalize.threads",
            "personalize.ray",
        ),
    },
    "core/test_halving.py": {
        "test_the_first_one_goes_on_and_then_the_best_third": (
            "training.scoring.halving.folder",
            "training.scoring.halving.run",
            "training.scoring.halving.first",
            "training.scoring.halving.factor",
        ),
    },
    "pipelines/test_sweep.py": {
        "test_values_are_within_the_space_and_the_same_at_every_call": ("sweep.space", "sweep.search", "sweep.seed"),
        "test_a_grid_has_every_combination_once": ("sweep.trials",),
        "test_a_trial_has_a_run_for_each_subject_and_seed_and_the_mean_is_its_score": (
            "sweep.subjects",
            "sweep.seeds",
            "sweep.images",
            "sweep.objective",
            "sweep.params",
        ),
        "test_trials_that_were_stopped_early_are_neither_chosen_nor_forgotten": (
            "sweep.halving.first",
            "sweep.halving.factor",
            "sweep.folder",
        ),
        "test_what_executes_the_runs_reaches_the_starter": (
            "sweep.name",
            "sweep.workers",
            "sweep.threads",
            "sweep.ray",
        ),
    },
    "pipelines/test_compare.py": {
        "test_every_method_runs_on_every_subject_with_every_seed": (
            "compare.methods.method",
            "compare.subjects",
            "compare.seeds",
            "compare.images",
        ),
        "test_parameters_of_a_method_take_precedence_over_those_of_all_runs": (
            "compare.methods.params",
            "compare.params",
        ),
        "test_rows_can_be_left_out": ("compare.only",),
        "test_what_executes_the_runs_reaches_the_starter": ("compare.workers", "compare.threads", "compare.ray"),
        "test_the_table_has_means_over_subjects_and_seeds_and_paired_differences": ("compare.reference",),
        "test_the_table_has_the_columns_that_are_asked_for": ("compare.columns",),
        "test_plots_mark_the_front_and_show_intervals": (
            "compare.methods.title",
            "compare.measures.fidelity",
            "compare.measures.controllability",
            "compare.measures.drift",
        ),
        "test_every_setting_runs_on_the_subjects_of_the_tuning": ("tune.settings", "tune.subjects", "tune.seeds"),
        "test_the_setting_with_the_highest_weighted_sum_is_chosen_unless_its_steps_are_slow_or_a_run_failed": (
            "tune.objective",
            "tune.max_step_cost",
        ),
    },
    "pipelines/test_importing.py": {
        "test_a_step_of_the_toolkits_folder_can_be_named": ("import.step",),
        "test_a_toolkits_folder_is_the_concept_that_the_python_call_reads": ("import.toolkit",),
        "test_names_class_word_and_clip_skip_are_those_given": (
            "import.names",
            "import.class_word",
            "import.clip_skip",
        ),
        "test_an_embedding_alone_is_a_concept": ("import.words",),
        "test_an_exported_pair_draws_as_the_concept_does": ("import.negative",),
        "test_a_positive_lora_may_act_on_the_positive_branch_alone": (
            "import.positive",
            "import.positive_acts_on",
        ),
    },
}
"""File in tests/ -> test -> options that it proves."""

_proven_here: dict[str, str] = {}


def proves(*options: str) -> Callable[[Any], Any]:
    """Mark a test that fails if one of these options is ignored."""

    def register(test: Any) -> Any:
        _proven_here.update(dict.fromkeys(options, test.__name__))
        return test

    return register


def proofs() -> dict[str, str]:
    """Return option -> its proof, "<file in tests/>::<test>"."""
    elsewhere = {
        option: f"{file}::{test}"
        for file, tests in PROVEN_ELSEWHERE.items()
        for test, proven in tests.items()
        for option in proven
    }
    return elsewhere | {option: f"{Path(__file__).name}::{test}" for option, test in _proven_here.items()}


# --------------------------------------------------------------------------------------------- the schema


def options(path: str, model: type[BaseModel]) -> Iterator[str]:
    """Yield the path of every value in a model; a model in HANDED_ON is one value."""
    for name, field in model.model_fields.items():
        here, nested = f"{path}.{name}", model_in(field.annotation)
        if nested is None or (nested in HANDED_ON and here not in TAKEN_APART):
            yield here
        else:
            yield from options(here, nested)


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation such as `Model`, `tuple[Model, ...]` or `Model | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(model_in, get_args(annotation))), None)


def roots() -> dict[str, type[BaseModel]]:
    """Return the first part of an option's path -> model: the sections, and the models in HANDED_ON."""
    sections = {name: model for name, model in SECTIONS.items() if name not in RECIPES}
    return sections | {model.__name__: model for model in HANDED_ON}


def all_options() -> set[str]:
    return {option for path, model in roots().items() for option in options(path, model)}


def without_proof(required: set[str]) -> str:
    """Return instructions for every option without a proof."""
    return "".join(
        f"\n{option} has no test that fails if it is ignored: write one, and either mark it in "
        f'tests/test_every_option.py with @proves("{option}"), or list it in PROVEN_ELSEWHERE as\n'
        f'    "<file in tests/>": {{"<test>": ("{option}",)}},'
        for option in sorted(required - proofs().keys())
    )


def test_every_option_has_a_test_that_fails_when_it_is_ignored() -> None:
    assert not without_proof(all_options()), without_proof(all_options())


def test_every_proof_is_of_an_existing_option() -> None:
    assert proofs().keys() <= all_options()


@pytest.mark.parametrize("file", sorted(PROVEN_ELSEWHERE))
def test_every_named_proof_is_a_test(file: str) -> None:
    module = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    functions = {statement.name for statement in module.body if isinstance(statement, ast.FunctionDef)}
    missing = sorted(PROVEN_ELSEWHERE[file].keys() - functions)
    assert not missing, f"expected the tests {missing} in tests/{file}: were they renamed?"
    assert all(name.startswith("test_") for name in PROVEN_ELSEWHERE[file])


def test_a_new_option_is_reported_with_instructions() -> None:
    class Inner(BaseModel):
        new_value: int = 0

    class Section(BaseModel):
        inner: tuple[Inner, ...] = ()
        maybe: Inner | None = None
        sampler: SamplerParams = SamplerParams()

    found = set(options("toy", Section))
    assert found == {"toy.inner.new_value", "toy.maybe.new_value", "toy.sampler"}
    assert '@proves("toy.maybe.new_value")' in without_proof(found)
    assert '("toy.sampler",)' in without_proof(found)


# --------------------------------------------------------------------------------------------- a tiny training

CPU = DeviceParams(device="cpu")
CAPTION = "white background"
WORDS = {"names": {"pt1": ("my-fox", "my-fox-neg")}, "num_vectors": (2, 3), "lr": 1e-2}
LAYERS = {"unet": [r"re:.*\.attn1$"], "text_encoder": [r"re:.*self_attn$"]}
NETWORKS = tuple(LAYERS)
CONSTANT = {"kind": "constant"}
LR = 1e-2
FIRST_TIMESTEP, LAST_TIMESTEP = (0.0, 0.001), (0.999, 1.0)


class Tracker:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...

    def log_image(self, image: Image.Image, key: str, step: int) -> None:
        self.steps.append(step)

    def log_image_file(self, image: Image.Image, file: str) -> None: ...

    def set_tag(self, name: str, text: str) -> None: ...


@dataclass(frozen=True, eq=False)
class Run:
    """The results of a training; `steps_shown` are the steps with a preview."""

    concept: Concept
    history: DataFrame
    steps_shown: list[int]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.concept.tensors[name]

    def of(self, ending: str) -> list[torch.Tensor]:
        """The tensors whose name ends with this text, for example "0.positive.up"."""
        found = [tensor for name, tensor in self.concept.tensors.items() if name.endswith(ending)]
        assert found
        return found

    def largest(self, ending: str) -> float:
        return max(tensor.abs().max().item() for tensor in self.of(ending))

    def first(self, column: str) -> float:
        return float(self.history[column].iloc[0])


Train = Callable[..., Run]


@pytest.fixture(scope="module")
def backbone(tiny_base_model: Path) -> Backbone:
    return open_base_model(tiny_base_model, CPU)


@pytest.fixture(scope="module")
def train(tiny_base_model: Path) -> Train:
    """Return a function that trains for one step with the base values and its keywords; results are cached.

    At a constant rate, the first step of AdamW changes a value by lr · g / (|g| + 1e-8), almost exactly lr.
    """
    done: dict[str, Run] = {}

    def run(color: str = "blue", **changes: Any) -> Run:
        groups = {f"lora_{network}": lora(network) for network in NETWORKS}
        values = {
            "num_steps": 1,
            "batch_size": 2,
            "regularization_batch_size": 1,
            "templates": ("a {pt1}, {caption}",),
            "words": WORDS,
            "schedule": CONSTANT,
            "words_schedule": CONSTANT,
            "weight_decay": 0.0,
            **groups,
        }
        key = repr((color, sorted(changes.items())))
        if key not in done:
            done[key] = run_training(tiny_base_model, TrainingParams(**(values | changes)), color)
        return done[key]

    return run


def lora(network: str, **changes: Any) -> list[dict[str, Any]]:
    """Return a network's group of each branch; keywords replace values of the positive one."""
    group = {"lr": LR, "rank": 2, "layers": LAYERS[network]}
    return [group | {"branch": "p"} | changes, group | {"branch": "n"}]


def only(network: str, **changes: Any) -> dict[str, Any]:
    """Return the parameters of a training with adapters in one network."""
    return {f"lora_{other}": lora(other, **changes) if other == network else () for other in NETWORKS}


def run_training(model: Path, params: TrainingParams, color: str = "blue") -> Run:
    params = params.model_copy(update={"checkpoints": None})
    tracker, image = Tracker(), Image.new("RGB", (32, 32), "orange")
    image.paste("purple", (8, 0, 16, 32))
    concept, history, *_ = train_concept(
        base_model=str(model),
        prepared_image=image,
        prepared_mask=Image.new("L", (32, 32), 127),
        regularization_set=[("a red cat", functools.partial(Image.new, "RGB", (32, 32), color))],
        training_plan=check_training(str(model), params, CAPTION),
        params=params,
        caption=CAPTION,
        device=CPU,
        tracker=tracker,
    )
    return Run(concept, history, tracker.steps)


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


# --------------------------------------------------------------------------------------------- LoRA groups

each_network = pytest.mark.parametrize("network", NETWORKS)


@proves("training.lora_unet", "training.lora_text_encoder", "LoRAGroup.lr")
@each_network
def test_a_groups_rate_is_the_length_of_its_first_step(train: Train, network: str) -> None:
    run = train(**only(network, lr=3 * LR))
    assert run.largest("0.positive.up") == pytest.approx(3 * LR, rel=1e-2)
    assert run.largest("1.negative.up") == pytest.approx(LR, rel=1e-2)
    assert {name.split(".")[0] for name in run.concept.tensors} == {network, "words"}


@proves("LoRAGroup.rank")
@pytest.mark.parametrize(("rank", "in_16", "in_24", "in_32"), [(3, 3, 3, 3), (0.25, 4, 6, 8)])
@each_network
def test_a_groups_rank_is_that_of_its_tensors(
    train: Train, network: str, rank: int | float, in_16: int, in_24: int, in_32: int
) -> None:
    layers = {"unet": [r"re:.*\.attn.?$", "down_blocks.0.resnets.0"], "text_encoder": ["re:.*self_attn$"]}
    run = train(**only(network, rank=rank, layers=layers[network]))
    ranks = {len(up): len(down) for down, up in zip(run.of("0.positive.down"), run.of("0.positive.up"), strict=True)}
    assert ranks == {"unet": {16: in_16, 24: in_24}, "text_encoder": {32: in_32}}[network]
    assert {len(down) for down in run.of("1.negative.down")} == {2}


@proves("LoRAGroup.layers")
@each_network
def test_a_group_adapts_its_layers(train: Train, network: str) -> None:
    layer = {"unet": "attn1.to_q", "text_encoder": "self_attn.q_proj"}[network]
    run = train(**only(network, layers=[f"re:.*{layer}$"]))
    assert all(name.endswith(f"{layer}.0.positive.up") for name in run.concept.tensors if name.endswith("positive.up"))
    assert len(run.of("1.negative.up")) > len(run.of("0.positive.up"))


@proves("LoRAGroup.branch")
@pytest.mark.parametrize(("branch", "name"), [("p", "positive"), ("n", "negative"), (None, "shared")])
@each_network
def test_a_group_belongs_to_its_branch(train: Train, network: str, branch: str | None, name: str) -> None:
    run = train(**only(network, branch=branch))
    assert run.largest(f"0.{name}.up") == pytest.approx(LR, rel=1e-2)
    assert f"grad_norm/{name}/adapters" in run.history


@proves("LoRAGroup.alpha")
@each_network
def test_a_groups_alpha_scales_its_update_and_so_its_gradient(train: Train, network: str) -> None:
    plain, doubled = train(**only(network)), train(**only(network, alpha=2.0))
    norm = "grad_norm/{}/adapters"
    assert doubled.first(norm.format("positive")) == pytest.approx(2 * plain.first(norm.format("positive")), rel=1e-4)
    assert doubled.first(norm.format("negative")) == pytest.approx(plain.first(norm.format("negative")), rel=1e-4)


@proves("LoRAGroup.dropout")
@each_network
def test_a_groups_dropout_changes_its_gradient_alone(train: Train, network: str) -> None:
    plain, dropped = train(**only(network)), train(**only(network, dropout=0.5))
    norm = "grad_norm/{}/adapters"
    assert dropped.first(norm.format("positive")) != pytest.approx(plain.first(norm.format("positive")), rel=1e-3)
    assert dropped.first(norm.format("negative")) == pytest.approx(plain.first(norm.format("negative")), rel=1e-4)
    assert dropped.first("loss") == pytest.approx(plain.first("loss"))  # an update of zero has nothing to drop


# --------------------------------------------------------------------------------------------- words


@proves("training.words.lr")
def test_the_words_rate_is_the_length_of_their_first_step(train: Train) -> None:
    start, end = train(num_steps=0), train(words=WORDS | {"lr": 5e-2})
    for word in ("words.positive.pt1", "words.negative.pt1"):
        assert (end[word] - start[word]).abs().max().item() == pytest.approx(5e-2, rel=1e-2)


@proves("training.words.weight_decay")
def test_the_words_weight_decay_shrinks_them_by_rate_times_decay(train: Train) -> None:
    start, plain, decayed = train(num_steps=0), train(), train(words=WORDS | {"weight_decay": 10.0})
    for word in ("words.positive.pt1", "words.negative.pt1"):
        torch.testing.assert_close(plain[word] - decayed[word], 0.1 * start[word], rtol=1e-3, atol=1e-6)
    assert same(plain.of(".up"), decayed.of(".up"))


@proves("training.words.num_vectors")
def test_each_branchs_word_has_its_number_of_vectors(train: Train) -> None:
    run = train(words=WORDS | {"num_vectors": (4, 1)}, num_steps=0)
    assert (len(run["words.positive.pt1"]), len(run["words.negative.pt1"])) == (4, 1)


@proves("training.words.init_text")
def test_each_branchs_word_starts_from_its_init_text(train: Train, backbone: Backbone) -> None:
    run = train(words=WORDS | {"init_text": ("cat", "*[0.5]")}, num_steps=0)
    (cat,) = backbone.tokenizer("cat", add_special_tokens=False).input_ids
    assert torch.equal(run["words.positive.pt1"], backbone.text_encoder.get_input_embeddings().weight[[cat, cat]])
    assert run["words.negative.pt1"].std().item() == pytest.approx(0.5, rel=0.2)


# --------------------------------------------------------------------------------------------- the optimisation


@proves("training.seed")
def test_another_seed_starts_from_other_values_and_draws_other_batches(train: Train) -> None:
    words = WORDS | {"init_text": ("cat", "cat")}  # with adapters of zero effect, the first loss is the batch's alone
    first, other = train(words=words), train(words=words, seed=1)
    assert not any(map(torch.equal, first.of(".down"), other.of(".down")))
    assert first.first("loss") != other.first("loss")
    start, other_start = train(num_steps=0), train(num_steps=0, seed=1)
    assert not torch.equal(start["words.positive.pt1"], other_start["words.positive.pt1"])


@proves("training.weight_decay")
def test_the_weight_decay_shrinks_adapters_by_rate_times_decay(train: Train) -> None:
    plain, decayed = train(), train(weight_decay=10.0)  # the first step's gradient of down is zero: up is
    for before, after in zip(plain.of(".down"), decayed.of(".down"), strict=True):
        torch.testing.assert_close(after, 0.9 * before, rtol=1e-5, atol=0)
    assert same(plain.of("pt1"), decayed.of("pt1"))


@proves("training.scale_lr")
def test_scale_lr_multiplies_every_rate_by_the_rows_of_a_batch(train: Train) -> None:
    run = train(scale_lr=True)  # 2 rows of the reference and 1 of the regularization set
    rates = run.history.filter(like="lr/").iloc[0]
    assert rates.tolist() == pytest.approx([3 * LR] * 6)
    assert run.largest(".up") == pytest.approx(3 * LR, rel=1e-2)


@proves(
    "training.schedule.kind",
    "training.schedule.warmup_steps",
    "training.words_schedule.kind",
    "training.words_schedule.warmup_steps",
)
@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({"kind": "constant", "warmup_steps": 2}, [1 / 3, 2 / 3, 1]),
        ({"kind": "cosine", "warmup_steps": 1}, [1 / 2, 1, 0]),
        ({"kind": "one_cycle", "warmup_steps": 2}, [1 / 25, 1, 1 / 25e4]),
        ({"kind": "one_cycle"}, [0.75, 0.25, 0]),
    ],
)
def test_adapters_and_words_each_follow_their_own_schedule(
    train: Train, schedule: dict[str, Any], factors: list[float]
) -> None:
    expected = pytest.approx([LR * factor for factor in factors], abs=1e-7)
    for key, follows, stays in (
        ("schedule", "lr/unet.0.positive", "lr/words.negative.pt1"),
        ("words_schedule", "lr/words.negative.pt1", "lr/unet.0.positive"),
    ):
        history = train(num_steps=3, **{key: schedule}).history
        assert history[follows].tolist() == expected
        assert history[stays].tolist() == pytest.approx([LR] * 3)


@proves("training.max_grad_norm")
def test_a_clipped_gradient_moves_less(train: Train) -> None:
    plain, clipped = train(), train(max_grad_norm=1e-9)
    # |g| is at most 1e-9 then, and AdamW moves a value by lr · |g| / (|g| + 1e-8)
    assert 0 < clipped.largest(".up") <= LR / 11 * 1.001
    assert clipped.first("grad_norm/positive/adapters") == plain.first("grad_norm/positive/adapters")


@proves("training.clip")
def test_adapters_and_words_are_clipped_together_or_apart(train: Train) -> None:
    def norms(run: Run) -> dict[str, float]:
        parts = ("negative", "positive")
        return {
            kind: math.hypot(*(run.first(f"grad_norm/{part}/{kind}") for part in parts))
            for kind in ("adapters", "words")
        }

    small = 1e-9  # a gradient g is clipped to g · small / norm, and AdamW moves a value by lr · |g| / (|g| + 1e-8)
    start, together, apart = train(num_steps=0), *(train(max_grad_norm=small, clip=c) for c in ("together", "apart"))
    assert norms(together) == norms(apart)  # before clipping
    moved = {
        run: torch.cat([(run[w] - start[w]).flatten() for w in ("words.negative.pt1", "words.positive.pt1")]).norm()
        for run in (together, apart)
    }
    share = norms(apart)["words"] / math.hypot(*norms(apart).values())
    assert share < 0.5
    assert (moved[together] / moved[apart]).item() == pytest.approx(share, rel=0.1)  # nearly linear for so small a g


# --------------------------------------------------------------------------------------------- the objective


@proves("training.guidance_scale.low", "training.guidance_scale.high", "training.guidance_scale.curve")
@pytest.mark.parametrize(
    ("scale", "timesteps", "expected"),
    [
        ("5", (0.0, 1.0), 5),
        ("2.0-4.0", FIRST_TIMESTEP, 2),
        ("2.0-4.0", LAST_TIMESTEP, 4),
        ("2.0-4.0:ln", (0.333, 0.334), 2 + 2 / 3),  # timestep 333 of 0 to 999
        ("2.0-4.0:cos", (0.333, 0.334), 2 + 2 * math.cos(-2 / 3 * math.pi / 2)),
        ("2.0-4.0:cos2", (0.333, 0.334), 2 + 2 * (1 - math.cos(math.pi / 6))),
    ],
)
def test_the_guidance_scale_follows_its_curve(
    train: Train, scale: str, timesteps: tuple[float, float], expected: float
) -> None:
    run = train(guidance_scale=scale, timesteps=timesteps)
    assert run.first("guidance_scale") == pytest.approx(expected, rel=1e-5)
    assert run.first("loss") != train(guidance_scale="7", timesteps=timesteps).first("loss")


@proves("training.clip_skip")
def test_a_skipped_text_layer_is_not_trained(train: Train) -> None:
    skipped = train(clip_skip=1)
    trained = {name for name, tensor in skipped.concept.tensors.items() if name.endswith(".up") and tensor.any()}
    assert any(".layers.0." in name for name in trained)
    assert not any(".layers.1." in name for name in trained)  # the last of two
    assert skipped.first("loss") != train().first("loss")


@proves("training.loss.weighting", "training.loss.snr_gamma")
@pytest.mark.parametrize("gamma", [2.0, 7.0])
def test_the_loss_is_weighted_by_the_signal_to_noise_ratio(train: Train, backbone: Backbone, gamma: float) -> None:
    def loss(weighting: str) -> float:
        values = {"weighting": weighting, "snr_gamma": gamma}
        return train(loss=values, timesteps=FIRST_TIMESTEP).first("loss_reference")

    snr = backbone.objective.snr(torch.tensor([0])).item()
    assert snr > gamma
    assert loss("min_snr") / loss("none") == pytest.approx(gamma / (snr + 1), rel=1e-4)  # of a model that predicts v
    soft = gamma**3 / (snr**2 + gamma**3) * snr / (snr + 1)
    assert loss("soft_min_snr") / loss("none") == pytest.approx(soft, rel=1e-4)


@proves("training.loss.regularization_weight")
def test_regularization_rows_count_by_their_weight_and_not_at_all_at_zero(train: Train) -> None:
    run = train(loss={"regularization_weight": 0.25})
    expected = run.first("loss_reference") + 0.25 * run.first("loss_regularization")
    assert run.first("loss") == pytest.approx(expected, rel=1e-5)
    blue, red = (train(color, loss={"regularization_weight": 0.0}) for color in ("blue", "red"))
    assert blue.first("loss_regularization") != red.first("loss_regularization")
    assert same(list(blue.concept.tensors.values()), list(red.concept.tensors.values()))
    assert not same(train("blue").of(".up"), train("red").of(".up"))


@proves("training.loss.reconstruction_norm")
def test_the_reconstruction_is_measured_in_its_norm(train: Train) -> None:
    absolute, squared = (
        train(loss={"reconstruction_weight": 0.5, "reconstruction_norm": norm}).first("loss_reconstruction")
        for norm in ("l1", "l2")
    )
    assert absolute != pytest.approx(squared)
    assert absolute**2 <= squared  # the mean of squares is at least the square of the mean


# --------------------------------------------------------------------------------------------- what is drawn


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace `generate` by a stub where it is called, and return the list of the arguments of its calls."""
    signature, calls = inspect.signature(concepts.generate), []

    def record(*args: Any, **keywords: Any) -> list[Image.Image]:
        call = signature.bind(*args, **keywords).arguments
        calls.append(call)
        return [Image.new("RGB", (32, 32), "gray")] * len(call["prompts"])

    for module in (concepts, reporting, drawing):
        monkeypatch.setattr(module, "generate", record)
    return calls


SAMPLER = SamplerParams(scheduler="ddim", num_inference_steps=3, guidance_scale=2.5, batch_size=5)


@proves("training.preview.every", "training.preview.prompts", "training.preview.seed", "training.preview.sampler")
def test_previews_are_drawn_as_configured(train: Train, drawings: list[dict[str, Any]]) -> None:
    preview = {"every": 2, "prompts": ("a {pt1}", "one cat"), "seed": 7, "sampler": SAMPLER}
    run = train(num_steps=5, preview=preview)
    assert run.steps_shown == [0, 2, 4, 5]
    assert [(list(call["prompts"]), list(call["seeds"]), call["sampler"]) for call in drawings] == [
        (["a my-fox", "one cat"], [7, 8], SAMPLER)
    ] * 4


@proves("generate.negative_prompt", "generate.sampler")
def test_images_are_generated_as_configured(train: Train, tiny_base_model: Path, backbone: Backbone) -> None:
    concept, prompts, negative_prompt = train(num_steps=0).concept, ["a cat"], "a blue dog"
    params = GenerateParams(prompts=prompts, negative_prompt=negative_prompt, sampler=SAMPLER, images_per_prompt=1)
    images, _ = generate_images(str(tiny_base_model), concept, params, CPU)
    loaded = concepts.attach(backbone, concept, StrengthParams())
    (expected,) = concepts.generate(backbone, loaded, prompts, negative_prompt, [0], SAMPLER)
    assert [image.tobytes() for image in images.values()] == [expected.tobytes()]


@proves("regularization.negative_prompt", "regularization.sampler")
def test_the_regularization_set_is_drawn_as_configured(
    tiny_base_model: Path, tmp_path: Path, drawings: list[dict[str, Any]]
) -> None:
    params = RegularizationParams(sampler=SAMPLER, negative_prompt="blurry")
    ingestion = IngestionParams(bucket=BucketParams(side_px=32, multiple_px=8))
    sets = set_dataset(tmp_path / "fox.json", tmp_path)
    sets.save(make_regularization_set(str(tiny_base_model), ["a cat"] * 6, params, ingestion, CPU))
    assert [(call["negative_prompt"], call["sampler"]) for call in drawings] == [("blurry", SAMPLER)] * 2
    assert [len(call["prompts"]) for call in drawings] == [5, 1]


@proves(
    "evaluation.images_per_prompt",
    "evaluation.seed",
    "evaluation.negative_prompt",
    "evaluation.sampler",
    "evaluation.strength",
)
def test_a_concept_is_evaluated_as_configured(
    train: Train, tiny_base_model: Path, drawings: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    attach, strengths = concepts.attach, []
    monkeypatch.setattr(drawing, "attach", lambda *args: (strengths.append(args[2]), attach(*args))[1])
    strength = StrengthParams(positive=0.25, negative=0.5)
    params = EvaluationParams(
        prompts=("a {pt1}",),
        prior_prompts=("a cat",),
        images_per_prompt=3,
        seed=40,
        negative_prompt="blurry",
        sampler=SAMPLER,
        strength=strength,
        evaluators=(),
        other_picture=True,
    )
    picture, concept = Image.new("RGB", (32, 32)), train(num_steps=0).concept
    ingestion = IngestionParams(bucket=BucketParams(side_px=32, multiple_px=8))
    evaluate(
        str(tiny_base_model),
        concept,
        picture,
        params=params,
        ingestion=ingestion,
        device=CPU,
        tracker=Tracker(),
    )
    expected = ([40, 41, 42], "blurry", SAMPLER)  # the base model and the concept, with and without the subject
    assert [(list(c["seeds"]), c["negative_prompt"], c["sampler"]) for c in drawings] == [expected] * 4
    assert set(strengths) == {strength}


def draw(backbone: Backbone, negative_prompt: str = "", **values: Any) -> bytes:
    sampler = SamplerParams(**{"num_inference_steps": 3} | values)
    base = concepts.attach(backbone, None, StrengthParams())
    return concepts.generate(backbone, base, ["a red cat"], negative_prompt, [0], sampler)[0].tobytes()


@proves("SamplerParams.scheduler")
def test_every_scheduler_draws_in_its_own_way(backbone: Backbone) -> None:
    names = ("ddim", "dpmsolver++", "euler", "euler_a", "unipc")
    assert len({draw(backbone, scheduler=name) for name in names}) == len(names)


@proves("SamplerParams.guidance_scale")
def test_at_a_guidance_scale_of_one_the_negative_prompt_has_no_effect(backbone: Backbone) -> None:
    assert draw(backbone, "a blue dog", guidance_scale=1.0) == draw(backbone, guidance_scale=1.0)
    assert draw(backbone, "a blue dog", guidance_scale=3.0) != draw(backbone, guidance_scale=3.0)


# --------------------------------------------------------------------------------------------- device, ingestion


@proves("device.device")
def test_the_device_is_the_configured_one_and_auto_is_the_gpu_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for available, auto in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert pick_device(DeviceParams(device="auto")).type == auto
        assert pick_device(DeviceParams(device="cpu")).type == "cpu"
    with pytest.raises(InputError, check=says(expected="device.device=cuda")):
        pick_device(DeviceParams(device="cuda"))


@proves("ingestion.max_pixels")
def test_the_limit_of_pixels_holds_for_picture_and_mask() -> None:
    def png(side_px: int) -> bytes:
        data = io.BytesIO()
        Image.new("L", (side_px, side_px), 200).save(data, "PNG")
        return data.getvalue()

    params = IngestionParams(bucket=BucketParams(side_px=16, multiple_px=8), max_pixels=400)
    prepare_reference(png(20), png(20), params)
    for picture, mask in ((21, None), (20, 21)):
        with pytest.raises(InputError, check=says(expected="400", got="21 × 21 px")):
            prepare_reference(png(picture), png(mask) if mask else None, params)


# --------------------------------------------------------------------------------------------- as YAML writes it

TUTORIAL = r"""
lora_unet:
  - lr: 1e-4
    rank: 3
    branch: p # positive branch
    layers:
      - 're:.*\.attn.?$'
      #- 're:.*\.ff\.net\.0$' # Increases the fitness, but potentially reduces generalizability and controllability
  - lr: 2e-5 # Low negative unet lr prevents image collapse
    rank: 3
    branch: n # negative branch
    layers:
      - 're:.*\.attn.?$'
      #- 're:.*\.ff\.net\.0$'

lora_text_encoder:
  - lr: 1e-5
    rank: 1
    branch: p
    layers:
      - 're:.*self_attn$'
      - 're:.*mlp$'
  - lr: 1e-5
    rank: 1
    branch: n
    layers:
      - 're:.*self_attn$'
      - 're:.*mlp$'
"""

VARIANTS = r"""
words: {lr: 25e-4, weight_decay: 1e-3}
loss: {snr_gamma: 5e0}
lora_unet:
  - lr: 1e-4
    rank: 0.01875
    branch: p
    layers:
      - 're:.*\.to_k$'
      - 're:.*\.ff$'
  - lr: 2e-5
    rank: 0.25
    branch: n
    layers:
      - 'cls(Attention):re:.*attn1$'
      - 'cls(FeedForward):re:.*'
lora_text_encoder:
  - lr: 1e-5
    rank: 2
    alpha: 5e-1
    layers:
      - 'cls(CLIPMLP):re:.*'
"""


def paste(block: str, folder: Path) -> TrainingParams:
    """Return the parameters of a user who pastes a block below `training:` in conf/local/parameters.yml."""
    register_project_root(TESTS.parent)
    (folder / "base").symlink_to(TESTS.parent / "conf" / "base")
    (folder / "local").mkdir()
    pasted = "training:\n  num_steps: 1\n" + textwrap.indent(block, "  ")
    (folder / "local" / "parameters.yml").write_text(pasted)
    loader = OmegaConfigLoader(conf_source=str(folder), env="local", **settings.CONFIG_LOADER_ARGS)
    params: TrainingParams = build_parameters(loader["parameters"])["training"]
    return params


def layers_of(run: Run, network: str, group: str) -> set[str]:
    """Return the ends of the names of a group's layers that differ, such as "attn1.to_q"."""
    names = [name for name in run.concept.tensors if name.startswith(network) and name.endswith(f".{group}.up")]
    return {re.sub(r".*?((attn\d|self_attn|mlp|ff)\..*)\.\d\.\w+\.up", r"\1", name) for name in names}


ATTENTION = {f"attn{number}.to_{part}" for number in (1, 2) for part in ("q", "k", "v", "out.0")}
TEXT = {*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"}
FEED_FORWARD = {"ff.net.0.proj", "ff.net.2"}


def test_the_reference_tutorials_block_can_be_pasted_and_trains_what_it_names(
    tiny_base_model: Path, tmp_path: Path
) -> None:
    params = paste(TUTORIAL, tmp_path)
    groups = params.lora_unet + params.lora_text_encoder  # YAML 1.1 reads 1e-4, which has no dot, as text
    assert [(group.branch, group.rank, group.lr) for group in groups] == [
        ("positive", 3, 1e-4),
        ("negative", 3, 2e-5),
        ("positive", 1, 1e-5),
        ("negative", 1, 1e-5),
    ]
    run = run_training(tiny_base_model, params)
    for group in ("0.positive", "1.negative"):
        assert layers_of(run, "unet", group) == ATTENTION
        assert layers_of(run, "text_encoder", group) == TEXT
    assert all(up.any() for up in run.of(".up"))


def test_relative_ranks_classes_and_rates_without_a_dot_are_parsed(tiny_base_model: Path, tmp_path: Path) -> None:
    params = paste(VARIANTS, tmp_path)
    assert (params.words.lr, params.words.weight_decay, params.loss.snr_gamma) == (2.5e-3, 1e-3, 5.0)
    assert (params.lora_text_encoder[0].lr, params.lora_text_encoder[0].alpha) == (1e-5, 0.5)
    run = run_training(tiny_base_model, params)
    assert layers_of(run, "unet", "0.positive") == {"attn1.to_k", "attn2.to_k"} | FEED_FORWARD
    assert layers_of(run, "unet", "1.negative") == {name for name in ATTENTION if "attn1" in name} | FEED_FORWARD
    assert layers_of(run, "text_encoder", "0.shared") == {"mlp.fc1", "mlp.fc2"}
    for group, fraction in (("0.positive", 0.01875), ("1.negative", 0.25)):
        for down, up in zip(run.of(f"{group}.down"), run.of(f"{group}.up"), strict=True):
            assert len(down) == max(1, round(fraction * len(up)))
    assert all(up.any() for up in run.of(".up"))


def test_a_rate_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValidationError, match="lora_unet.0.lr"):
        TrainingParams(num_steps=1, lora_unet=[{"lr": "1e-4x", "rank": 1, "layers": ["re:.*"]}])
