"""The plan of a training: what each branch will train, checked before any long work and without loading weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_outline, pick_device
from dreamartist_pipeline.backbones.concepts import NewConcept, skipped_layers, start_concept
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.families.clip_text import check_clip_skip
from dreamartist_pipeline.backbones.prompts import check_trigger_word
from dreamartist_pipeline.backbones.schedulers import check_sampler
from dreamartist_pipeline.core.branches import branches
from dreamartist_pipeline.core.captions import slot_names
from dreamartist_pipeline.core.embeddings import Vocabulary
from dreamartist_pipeline.core.optimizers import check_optimizer
from dreamartist_pipeline.core.starting import Start
from dreamartist_pipeline.core.training import ParameterGroup, branch_table, lr_factor, parameter_groups
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, TrainingParams
from dreamartist_pipeline.pipelines.training.data import template_prompts, training_prompts
from dreamartist_pipeline.pipelines.training.starting import begin_from
from dreamartist_pipeline.prompt_weights import parse_weights

_GENERAL_SLOTS = ("class", "caption")

log = logging.getLogger(__name__)


def make_plan(
    files: BaseModelFiles, params: TrainingParams, caption: str, device: DeviceParams, start: Start | None
) -> dict[str, Any]:
    """Check a training against its base model and return its plan.

    Args:
        files: of the base model.
        params: of the training.
        caption: of the reference image.
        device: where it will train.
        start: what it begins with; None starts fresh.

    Raises:
        InputError: the training cannot work; see the node `check_training`.
    """
    _check_without_model(params, caption, device)
    outline = load_outline(files)
    _check_timesteps(outline, params)
    _check_clip_skip(outline, params)
    planned = start_concept(outline, params, lr_factor(params), seed=0)
    _check_prompts(planned, params, caption)
    groups = parameter_groups(planned.stacks, planned.words, params.words.lr * lr_factor(params))
    begun = begin_from(start, planned.stacks, planned.words, params, outline)
    log.info("What each branch will train:\n%s", branch_table(groups, begun["start"]["taken_over"] if begun else None))
    return {
        "num_branches": params.num_branches,
        "num_steps": params.num_steps,
        "guidance_scale": str(params.guidance_scale),
        "rows": {"reference": params.batch_size, "regularization": params.regularization_batch_size},
        "lr_factor": lr_factor(params),
        **_what_trains(groups, begun),
    }


def check_plan(plan: Mapping[str, Any], groups: Sequence[ParameterGroup], begun: Mapping[str, Any]) -> None:
    """Confirm that a plan was made for what is about to train.

    Args:
        plan: from `make_plan`.
        groups: everything that trains.
        begun: what `begin_from` returned.

    Raises:
        InputError: it was made for other parameters, another base model or another concept to start from.
    """
    if {key: plan[key] for key in ("groups", "start") if key in plan} != _what_trains(groups, begun):
        raise InputError(
            expected="the plan of these parameters and this base model",
            got="another one, from an earlier run",
            remedy="run the node check_training again",
        )


def _what_trains(groups: Sequence[ParameterGroup], begun: Mapping[str, Any]) -> dict[str, Any]:
    return {"groups": _describe(groups), **begun}


def _check_without_model(params: TrainingParams, caption: str, device: DeviceParams) -> None:
    check_templates(params)
    _check_braces(params, caption)
    _warn_unused_options(params, caption)
    _check_optimizers(params, device)
    _check_preview(params)


def _check_optimizers(params: TrainingParams, device: DeviceParams) -> None:
    target = pick_device(device)
    if params.lora:
        check_optimizer(params.optimizer, target)
    if params.words.names:
        check_optimizer(params.words.optimizer, target)


def _check_timesteps(outline: Backbone, params: TrainingParams) -> None:
    outline.objective.check_limits(params.timesteps)
    if params.zero_terminal_snr:
        outline.objective.with_zero_terminal_snr()


def _check_clip_skip(outline: Backbone, params: TrainingParams) -> None:
    """Confirm that clip_skip fits the text encoders, and say which layers of the LoRA groups it leaves out.

    Raises:
        InputError: no layer of a text encoder remains.
    """
    for encoder in outline.tokenizers:
        check_clip_skip(outline.networks[encoder].config.num_hidden_layers, params.clip_skip)
        selectors = [selector for group in params.lora.get(encoder, ()) for selector in group.layers]
        if params.clip_skip and (skipped := skipped_layers(outline, encoder, selectors, params.clip_skip)):
            log.info("clip_skip=%d leaves these layers out of the plan: %s.", params.clip_skip, ", ".join(skipped))


def _check_braces(params: TrainingParams, caption: str) -> None:
    """Confirm that the weighted words of templates and caption can be read.

    Raises:
        InputError: naming the prompt.
    """
    for prompt in [prompt for pair in training_prompts(params, caption) for prompt in pair]:
        try:
            parse_weights(prompt)
        except InputError as error:
            source = "in a template or the reference image's caption"
            raise InputError(error.expected, error.got, f"{error.remedy}, {source}") from error


def _check_preview(params: TrainingParams) -> None:
    if params.preview.every:
        check_sampler(params.preview.sampler, params.zero_terminal_snr)


def check_templates(params: TrainingParams) -> None:
    """Confirm that every template holds a trigger word's slot, that every slot is used, and that none is unknown.

    Without trigger words any template will do; its word slots are filled with the class word.

    Raises:
        InputError: naming the template or slot.
    """
    names = set(params.words.names)
    if not names:
        return
    word_slots = " or ".join(f"{{{name}}}" for name in sorted(names))
    used: set[str] = set()
    for template in params.templates:
        slots = set(slot_names(template, names))
        if not slots & names:
            raise InputError(
                expected=f"the slot {word_slots} in every template",
                got=f"{template!r}",
                remedy="write it where it belongs",
            )
        if unknown := sorted(slots - names - set(_GENERAL_SLOTS)):
            raise InputError(
                expected=f"only the slots {word_slots}, {{class}} and {{caption}} in templates",
                got=f"{{{unknown[0]}}} in {template!r}",
                remedy="correct it, or give its trigger words in words.names",
            )
        used |= slots
    if unused := sorted(names - used):
        raise InputError(
            expected="every slot of words.names in some template",
            got=f"none with {{{unused[0]}}}",
            remedy="add it to a template, or remove its trigger words",
        )


def _check_prompts(planned: NewConcept, params: TrainingParams, caption: str) -> None:
    """Confirm that trigger words are new to the base model and stand whole in every prompt of the training."""
    for encoder, words in planned.words.items():
        for word in words.vocabulary.words:
            check_trigger_word(planned.backbone.tokenizers[encoder], word.name)
        _check_caption(caption, words.vocabulary)
    for pair in template_prompts(params, caption) if planned.words else ():
        for branch in branches(params.num_branches):
            planned.prompts.check_fits(pair[branch])


def _check_caption(caption: str, vocabulary: Vocabulary) -> None:
    """Confirm that trigger words come from templates alone: a caption is the same in both branches."""
    if found := [part.name for part in vocabulary.split_prompt(caption) if not isinstance(part, str)]:
        raise InputError(
            expected="a caption of what the picture shows beside the subject",
            got=f"{caption!r}, in which {found[0]} is a trigger word, which both branches would learn",
            remedy="take it out, templates say it",
        )


def _warn_unused_options(params: TrainingParams, caption: str) -> None:
    has_slot = any("caption" in slot_names(template) for template in params.templates)
    if caption and not has_slot:
        log.warning("The caption %r is not used: no template has {caption}.", caption)
    if params.caption_transforms and not (caption and has_slot):
        log.warning("caption_transforms change nothing: there is no caption, or no template has {caption}.")


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
