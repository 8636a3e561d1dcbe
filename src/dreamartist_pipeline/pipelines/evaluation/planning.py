"""What an evaluation draws: every prompt with the base model and with the concept, and with parts of it left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dreamartist_pipeline.core import measures
from dreamartist_pipeline.core.captions import fill_negative_prompt, fill_template
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.strengths import Setting
from dreamartist_pipeline.params import EvaluationParams, StrengthParams, SweepParams
from dreamartist_pipeline.pipelines.evaluation.measuring import BASE, CONCEPT, LeftOut
from dreamartist_pipeline.pipelines.evaluation.prompt_words import (
    names_negative_word,
    negative_word_slots,
    subject_words,
    trigger_words,
    with_negative_words,
)

NEGATIVE_ADAPTER, NEGATIVE_WORD = "negative_adapter", "negative_word"
"""Parts of the negative branch whose effect is measured."""

SUBJECT, PRIOR = "subject", "prior"
"""Kinds of prompts: with the subject's slot, and without it."""


@dataclass(frozen=True)
class DrawnModel:
    """The conditions that images are drawn under.

    Attributes:
        name: BASE or CONCEPT.
        strength: of the concept's adapters.
        negative_prompt: filled.
        guidance_scale: of the sampler.
        step: of the training, of a kept concept; None: the concept itself.
    """

    name: str
    strength: StrengthParams
    negative_prompt: str
    guidance_scale: float
    step: int | None = None


@dataclass(frozen=True)
class Part:
    """Prompts to draw with one model.

    Attributes:
        model: what they are drawn with.
        templates: prompts with unfilled slots.
        words: slot -> what fills it; none for prompts whose images must not change.
        prompts: the templates, filled.
        seeds: of each prompt.
    """

    model: DrawnModel
    templates: Sequence[str]
    words: Mapping[str, str]
    prompts: Sequence[str]
    seeds: Sequence[int]

    def rows(self) -> list[tuple[str, int]]:
        """Return (prompt, seed) of each image: every prompt from every seed."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]


@dataclass(frozen=True)
class Plan:
    """The images of a concept; those of the base model are `base_parts`.

    Attributes:
        subject: prompts with the subject's slot.
        prior: prompts without it.
        branches: part of the negative branch -> the subject's prompts with it, if the concept is drawn without it
            otherwise, else without it.
        guidance: guidance scale -> the subject's prompts; not for that of the sampler.
        has_negative_word: whether the concept is drawn with its negative words in the negative prompt.
        words: the positive trigger word of each slot.
        left_out: (measure, condition) whose images are not drawn -> why.
    """

    subject: Part
    prior: Part
    branches: Mapping[str, Part]
    guidance: Mapping[float, Part]
    has_negative_word: bool
    words: dict[str, str]
    left_out: LeftOut

    @classmethod
    def of(cls, concept: Concept, params: EvaluationParams, negative_words: Mapping[str, str]) -> Plan:
        """Plan the images of a concept.

        Args:
            concept: to draw with.
            params: of the evaluation.
            negative_words: see `LoadedConcept.negative_words`.
        """
        ours = _model(CONCEPT, params, negative_words)
        _, words = subject_words(concept, params)
        subject = _filled(ours, params.prompts, words, params)
        changed = _without_parts(ours, concept, params, negative_words)
        scales = [scale for scale in params.guidance_scales if scale != ours.guidance_scale]
        return cls(
            subject,
            _filled(ours, params.prior_prompts, {}, params),
            {name: _first_seeds(subject, each, params.branch_images) for name, each in changed.items()},
            {
                scale: _first_seeds(subject, replace(ours, guidance_scale=scale), params.guidance_images)
                for scale in (scales if params.guidance_images else ())
            },
            names_negative_word(concept, params),
            trigger_words(concept),
            _left_out(concept, params, changed),
        )

    def parts(self) -> dict[tuple[str, str], Part]:
        """Return all parts by their kind and name, in the order in which they are drawn."""
        return {
            (SUBJECT, ""): self.subject,
            (PRIOR, ""): self.prior,
            **{("branches", name): part for name, part in self.branches.items()},
            **{("guidance", str(scale)): part for scale, part in self.guidance.items()},
        }


def base_parts(concept: Concept, params: EvaluationParams) -> dict[str, Part]:
    """Return SUBJECT and PRIOR -> the prompts of the base model, which has the class word in place of trigger words."""
    base = _model(BASE, params, {})
    words, _ = subject_words(concept, params)
    return {
        SUBJECT: _filled(base, params.prompts, words, params),
        PRIOR: _filled(base, params.prior_prompts, {}, params),
    }


def first_rows(part: Part, sweep: SweepParams) -> Part:
    """Return the prompts and seeds of a part that settings are compared with."""
    templates, prompts = part.templates[: sweep.num_prompts], part.prompts[: sweep.num_prompts]
    seeds = [part.seeds[0] + index for index in range(sweep.images)]
    return replace(part, templates=templates, prompts=prompts, seeds=seeds)


def with_setting(part: Part, setting: Setting) -> Part:
    """Return a part to draw with a setting."""
    model = replace(part.model, strength=setting.strength, guidance_scale=setting.guidance_scale, step=setting.step)
    return replace(part, model=model)


def _model(name: str, params: EvaluationParams, negative_words: Mapping[str, str]) -> DrawnModel:
    negative_prompt = fill_negative_prompt(params.negative_prompt, negative_words)
    return DrawnModel(name, params.strength, negative_prompt, params.sampler.guidance_scale)


def _filled(model: DrawnModel, templates: Sequence[str], words: Mapping[str, str], params: EvaluationParams) -> Part:
    """Fill the slots of templates with `words`."""
    prompts = [fill_template(template, {"class": params.class_word, **words}) for template in templates]
    seeds = [params.seed + i for i in range(params.images_per_prompt)]
    return Part(model, templates, words, prompts, seeds)


def _first_seeds(part: Part, model: DrawnModel, count: int) -> Part:
    """Return the first seeds of each prompt with another model."""
    return replace(part, model=model, seeds=part.seeds[:count])


def _without_parts(
    ours: DrawnModel, concept: Concept, params: EvaluationParams, words: Mapping[str, str]
) -> dict[str, DrawnModel]:
    """Return part of the negative branch -> the concept without it; or with it, if `ours` is without it."""
    if not params.branch_images:
        return {}
    changed = {}
    if _has_negative_adapter(concept) and params.strength.negative:
        off = params.strength.model_copy(update={"negative": 0.0})
        changed[NEGATIVE_ADAPTER] = replace(ours, strength=off)
    if negative_word_slots(concept):
        other = with_negative_words(concept, params, words)
        if names_negative_word(concept, params):
            other = fill_negative_prompt(params.negative_prompt, dict.fromkeys(words, ""))
        changed[NEGATIVE_WORD] = replace(ours, negative_prompt=other)
    return changed


def _has_negative_adapter(concept: Concept) -> bool:
    return "negative" in concept.metadata.group_branches


def _left_out(concept: Concept, params: EvaluationParams, drawn: Mapping[str, DrawnModel]) -> LeftOut:
    """Return why the images of parts of the negative branch, and of guidance scales, are not drawn."""
    effects = (measures.EFFECT_DISTANCE, measures.EFFECT_SIMILARITY, measures.EFFECT_AGREEMENT)
    sweeps = (measures.GUIDANCE_SIMILARITY, measures.GUIDANCE_AGREEMENT)
    lacks = {
        NEGATIVE_ADAPTER: "evaluation.strength.negative is 0"
        if _has_negative_adapter(concept)
        else "the concept has no negative adapter",
        NEGATIVE_WORD: "the concept has no negative word",
    }
    left_out: dict[tuple[str, str], str] = {}
    for part in lacks.keys() - drawn.keys():
        reason = lacks[part] if params.branch_images else "evaluation.branch_images is 0"
        left_out |= {(one.name, part): reason for one in effects}
    if not (params.guidance_images and params.guidance_scales):
        reason = "evaluation.guidance_images is 0, or evaluation.guidance_scales is empty"
        left_out |= {(one.name, ""): reason for one in sweeps}
    return dict(sorted(left_out.items()))
