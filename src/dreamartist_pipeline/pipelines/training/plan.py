"""The plan of a training: what each branch trains, checked before the run and without loading weights."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_outline
from dreamartist_pipeline.backbones.concepts import NewConcept, skipped_layers, start_concept
from dreamartist_pipeline.backbones.evaluators import check_evaluator
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.known_models import clip_skip_hint
from dreamartist_pipeline.backbones.prompts import check_trigger_word
from dreamartist_pipeline.backbones.schedulers import check_sampler
from dreamartist_pipeline.core.branches import BRANCH_NAMES, branches
from dreamartist_pipeline.core.captions import check_slots, slot_names
from dreamartist_pipeline.core.choosing import scored_steps
from dreamartist_pipeline.core.devices import pick_device, pick_dtype
from dreamartist_pipeline.core.embeddings import Vocabulary
from dreamartist_pipeline.core.optimizers import check_optimizer
from dreamartist_pipeline.core.parameter_groups import ParameterGroup, branch_table, parameter_groups
from dreamartist_pipeline.core.starting import Start
from dreamartist_pipeline.core.step_graph import check_backend
from dreamartist_pipeline.core.training_step import lr_factor
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, ScheduleParams, TrainingParams
from dreamartist_pipeline.pipelines.training.data import fill_prompt, template_prompts, training_prompts
from dreamartist_pipeline.pipelines.training.disk import check_disk
from dreamartist_pipeline.pipelines.training.memory import plan_memory, step_shape
from dreamartist_pipeline.pipelines.training.ranks import num_training_processes
from dreamartist_pipeline.pipelines.training.starting import apply_start
from dreamartist_pipeline.prompt_weights import parse_weights

_GENERAL_SLOTS = ("class", "caption")
_QUOTED_CHARACTERS = 80  # of a caption in a log line; the plan has all of it

log = logging.getLogger(__name__)


def make_plan(
    files: BaseModelFiles,
    params: TrainingParams,
    caption: str,
    device: DeviceParams,
    start: Start | None,
    side_px: int | None,
) -> dict[str, Any]:
    """Check a training against its base model and return its plan.

    Args:
        files: of the base model.
        params: of the training.
        caption: of the reference image.
        device: of the training.
        start: concept to start from, or None.
        side_px: side of a square with the area of the reference image; None for the size of the base model.

    Raises:
        InputError: invalid options; see the node `check_training`.
    """
    _check_options(params, caption, device)
    base_model = load_outline(files, pick_dtype(device, pick_device(device)), quantize=device.quantize == "int8")
    base_model.objective.check_limits(params.timesteps)
    if params.zero_terminal_snr:
        base_model.objective.with_zero_terminal_snr()
    _check_clip_skip(base_model, params)
    if start is None:
        _suggest_clip_skip(files, base_model, params)
    planned = start_concept(base_model, params, lr_factor(params), seed=0)
    _check_prompts(planned, params, caption)
    read = _report_caption(planned, params, caption)
    groups = parameter_groups(planned.stacks, planned.words, params.words.lr * lr_factor(params))
    start_entry = apply_start(start, planned.stacks, planned.words, params, base_model)
    taken_over = start_entry["start"]["taken_over"] if start_entry else None
    num_processes = num_training_processes(params, device)
    shape = step_shape(planned, params, caption, side_px, num_processes)
    log.info("Trained parameters by branch:\n%s", branch_table(groups, taken_over))
    plan = {
        **read,
        "num_branches": params.num_branches,
        "num_steps": params.num_steps,
        "guidance_scale": str(params.guidance_scale),
        "rows": {"reference": params.batch_size, "regularization": params.regularization_batch_size},
        "lr_factor": lr_factor(params),
        "groups": _describe(groups),
        **start_entry,
        **plan_memory(files, planned, params, device, shape, num_processes),
    }
    check_disk(plan, params, base_model.image_px)
    return plan


def check_plan(plan: Mapping[str, Any], groups: Sequence[ParameterGroup], start_entry: Mapping[str, Any]) -> None:
    """Check that a plan belongs to this training.

    Args:
        plan: from `make_plan`.
        groups: the trained parameters.
        start_entry: from `apply_start`.

    Raises:
        InputError: a plan for other parameters, another base model or another start concept.
    """
    if not isinstance(plan, Mapping) or {key: plan[key] for key in ("groups", "start") if key in plan} != {
        "groups": _describe(groups),
        **start_entry,
    }:
        raise InputError(
            expected="training_plan for these parameters, base_model and start concept",
            got="the plan of another run",
            remedy="run the node check_training again",
        )


def _check_options(params: TrainingParams, caption: str, device: DeviceParams) -> None:
    """Check what does not depend on the base model."""
    check_templates(params)
    _check_braces(params, caption)
    _warn_unused_options(params, caption)
    check_backend(params.backend, pick_device(device))
    num_training_processes(params, device)
    if params.lora:
        check_optimizer(params.optimizer, pick_device(device))
    if params.words.names:
        check_optimizer(params.words.optimizer, pick_device(device))
    if params.preview.every:
        check_slots(params.preview.prompts, params.words.names)
        check_sampler(params.preview.sampler, params.zero_terminal_snr)
    if scored_steps(params):
        _check_scoring(params)
    elif params.needs_scores:
        log.info("The last step becomes the concept: %d steps are too few to score some.", params.num_steps)


def _check_scoring(params: TrainingParams) -> None:
    """Check what a training is scored with, and log when."""
    scoring = params.scoring
    check_slots(scoring.prompts, params.words.names)
    check_sampler(scoring.sampler, params.zero_terminal_snr)
    for name in (scoring.evaluator, scoring.text_image_model):
        if name not in (None, "auto"):
            check_evaluator(name)
    steps = ", ".join(map(str, scored_steps(params)))
    log.info(
        "The training is scored after the steps %s.", textwrap.shorten(steps, _QUOTED_CHARACTERS, placeholder=" …")
    )


def _check_clip_skip(base_model: Backbone, params: TrainingParams) -> None:
    """Check clip_skip against every text encoder, and log the selected layers that are not read.

    Raises:
        InputError: no layer of a text encoder remains.
    """
    base_model.check_clip_skip(params.clip_skip)
    for encoder in base_model.tokenizers:
        selectors = [selector for group in params.lora.get(encoder, ()) for selector in group.layers]
        if skipped := skipped_layers(base_model, encoder, selectors, params.clip_skip):
            log.info(
                "These layers of %s are not trained, because its text states are read before them (clip_skip=%d): %s.",
                encoder,
                params.clip_skip,
                ", ".join(skipped),
            )


def _suggest_clip_skip(files: BaseModelFiles, base_model: Backbone, params: TrainingParams) -> None:
    architecture = base_model.file_names.architecture
    if hint := clip_skip_hint(files.names(), architecture, params.clip_skip, "training.clip_skip"):
        log.warning("%s.", hint)


def _check_braces(params: TrainingParams, caption: str) -> None:
    """Check the syntax of weighted words in templates and caption.

    Raises:
        InputError: a prompt that cannot be parsed.
    """
    for prompt in [prompt for pair in training_prompts(params, caption) for prompt in pair]:
        try:
            parse_weights(prompt)
        except InputError as error:
            remedy = f"{error.remedy}, in a template or the reference image's caption"
            raise InputError(error.expected, error.got, remedy) from error


def check_templates(params: TrainingParams) -> None:
    """Check that every template has a word slot, that every slot of words.names is used, and that none is unknown.

    Without trigger words every template is valid; its word slots are filled with the class word.

    Raises:
        InputError: a template without a slot, an unused slot or an unknown one.
    """
    names = set(params.words.names)
    if not names:
        return
    word_slots = " or ".join(f"{{{name}}}" for name in sorted(names))
    used: set[str] = set()
    for template in params.templates:
        slots = set(slot_names(template, names))
        if not slots & names:
            raise InputError(expected=f"the slot {word_slots} in every template", got=f"{template!r}", remedy="add it")
        if unknown := sorted(slots - names - set(_GENERAL_SLOTS)):
            raise InputError(
                expected=f"only the slots {word_slots}, {{class}} and {{caption}} in templates",
                got=f"{{{unknown[0]}}} in {template!r}",
                remedy="correct it, or add its trigger words to words.names",
            )
        used |= slots
    if unused := sorted(names - used):
        raise InputError(
            expected="every slot of words.names in at least one template",
            got=f"none with {{{unused[0]}}}",
            remedy="add it to a template, or remove its trigger words",
        )


def _check_prompts(planned: NewConcept, params: TrainingParams, caption: str) -> None:
    """Check that trigger words are new to the base model and are not cut off in any prompt."""
    for encoder, words in planned.words.items():
        for word in words.vocabulary.words:
            check_trigger_word(planned.backbone.tokenizers[encoder], word.name)
        _check_caption(caption, words.vocabulary)
    for pair in template_prompts(params, caption) if planned.words else ():
        for branch in branches(params.num_branches):
            planned.prompts.check_fits(pair[branch])
    if params.preview.every:
        planned.prompts.warn_without_word([fill_prompt(prompt, params) for prompt in params.preview.prompts])
    if scored_steps(params):
        planned.prompts.warn_without_word([fill_prompt(prompt, params) for prompt in params.scoring.prompts])


def _check_caption(caption: str, vocabulary: Vocabulary) -> None:
    """Check that the caption has no trigger word, because it is the same in both branches."""
    if found := [part.name for part in vocabulary.split_prompt(caption) if not isinstance(part, str)]:
        raise InputError(
            expected="a caption without trigger words, which would be trained in both branches",
            got=f"{caption!r} with {found[0]}",
            remedy="remove it; templates add the trigger words",
        )


def _report_caption(planned: NewConcept, params: TrainingParams, caption: str) -> dict[str, Any]:
    """Log the caption, and what of the prompts with it lies beyond the text encoder's context.

    Returns:
        The plan's part: the caption and, where something is cut off, branch -> the longest text that is.
    """
    if caption:
        log.info("The picture's caption: %r.", textwrap.shorten(caption, _QUOTED_CHARACTERS, placeholder=" …"))
    else:
        log.info('The picture has no caption: no text file beside it, and no --params caption="…".')
    cut_off: dict[str, str] = {}
    for branch in branches(params.num_branches):
        ends = [planned.prompts.cut_off(pair[branch]) for pair in template_prompts(params, caption)]
        if longest := max(ends, key=len, default=""):
            cut_off[BRANCH_NAMES[branch]] = longest
    for name, text in cut_off.items():
        beginning = textwrap.shorten(text, _QUOTED_CHARACTERS, placeholder=" …")
        log.warning("The prompt is too long for the text encoder: the %s branch does not read %r.", name, beginning)
    return {"caption": caption} | ({"cut_off": cut_off} if cut_off else {})


def _warn_unused_options(params: TrainingParams, caption: str) -> None:
    has_slot = any("caption" in slot_names(template) for template in params.templates)
    if caption and not has_slot:
        log.warning("The caption %r is not used: no template has {caption}.", caption)
    if params.caption_transforms and not (caption and has_slot):
        log.warning("caption_transforms are not used: there is no caption, or no template has {caption}.")
    if params.lora:
        _warn_long_warmup("schedule", params.schedule, params.num_steps)
    if params.words.names:
        _warn_long_warmup("words_schedule", params.words_schedule, params.num_steps)


def _warn_long_warmup(name: str, schedule: ScheduleParams, num_steps: int) -> None:
    if 0 < num_steps <= schedule.warmup_steps:
        log.warning(
            "The learning rate only rises: training.%s.warmup_steps=%d is not below training.num_steps=%d.",
            name,
            schedule.warmup_steps,
            num_steps,
        )


def _describe(groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    return [
        {
            "name": group.name,
            "kind": group.kind,
            "branch": group.branch,
            "num_layers": group.num_layers,
            "num_parameters": group.num_parameters,
            "num_vectors": sum(len(p) for p in group.parameters) if group.kind == "words" else 0,
            "lr": group.lr,
        }
        for group in groups
    ]
