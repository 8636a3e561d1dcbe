"""The images of an evaluation: every prompt with the base model and with the concept, and with parts of it left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from tqdm import tqdm

from dreamartist_pipeline.backbones.base_model import open_base_model, reconstruct
from dreamartist_pipeline.backbones.concepts import LoadedConcept, attach, attach_base, generate
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core import measures
from dreamartist_pipeline.core.captions import fill_negative_prompt, fill_template, without_weights
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.devices import device_of_rank, num_processes
from dreamartist_pipeline.core.kept_steps import KeptSteps
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.core.processes import spread
from dreamartist_pipeline.core.strengths import Setting
from dreamartist_pipeline.params import DeviceParams, EvaluationParams, StrengthParams, SweepParams
from dreamartist_pipeline.pipelines.evaluation.measuring import (
    BASE,
    CONCEPT,
    Ablation,
    Drawings,
    EvaluationImages,
    LeftOut,
)
from dreamartist_pipeline.pipelines.evaluation.prompt_words import (
    names_negative_word,
    negative_word_slots,
    subject_words,
    trigger_words,
    with_negative_words,
)

NEGATIVE_ADAPTER, NEGATIVE_WORD = "negative_adapter", "negative_word"
"""Parts of the negative branch whose effect is measured."""

_PROGRESS_DELAY_S = 2.0
_MOST_ATTACHED = 4  # concepts with their strengths, each with a copy of its adapters

NO_STEPS: KeptSteps = {}


@dataclass(frozen=True)
class _Model:
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
class _Part:
    """Prompts to draw with one model.

    Attributes:
        model: what they are drawn with.
        templates: prompts with unfilled slots.
        words: slot -> what fills it; none for prompts whose images must not change.
        prompts: the templates, filled.
        seeds: of each prompt.
    """

    model: _Model
    templates: Sequence[str]
    words: Mapping[str, str]
    prompts: Sequence[str]
    seeds: Sequence[int]


@dataclass(frozen=True)
class _Batch:
    """Images of one model that are generated together.

    Attributes:
        model: what they are drawn with.
        rows: (prompt, seed) of each image.
    """

    model: _Model
    rows: Sequence[tuple[str, int]]


class _Models:
    """The base model, and the concepts attached at the strengths that were drawn with last."""

    def __init__(self, backbone: Backbone, concept: Concept, steps: KeptSteps = NO_STEPS) -> None:
        self.backbone = backbone
        self._concept, self._steps = concept, steps
        self._loaded: dict[tuple[int | None, StrengthParams | None], LoadedConcept] = {}

    def __getitem__(self, model: _Model) -> LoadedConcept:
        """Return a model to generate images with."""
        key = model.step, None if model.name == BASE else model.strength
        if key not in self._loaded:
            while len(self._loaded) >= _MOST_ATTACHED:
                del self._loaded[next(iter(self._loaded))]
            self._loaded[key] = self._attached(*key)
        return self._loaded[key]

    def _attached(self, step: int | None, strength: StrengthParams | None) -> LoadedConcept:
        if strength is None:
            return attach_base(self.backbone, self._concept)
        return attach(self.backbone, self._concept if step is None else self._steps[step](), strength)


def draw_images(
    base_model: ModelLocation,
    concept: Concept,
    reference: Image.Image,
    params: EvaluationParams,
    device: DeviceParams,
    views: Sequence[Image.Image] = (),
) -> tuple[EvaluationImages, dict[str, str]]:
    """Draw all prompts with the base model and with the concept, on all processes.

    Returns:
        The images, and the positive trigger word of each slot.
    """
    models = _Models(open_base_model(base_model, device), concept)
    plan = _Plan.of(models, concept, params)
    for part in plan.subject.values():  # the others draw what must not change
        if part.words:
            models[part.model].prompts.warn_without_word(part.prompts)
    drawn = _draw_parts(plan.parts(), base_model, concept, params, device)
    subject, prior = ({model: drawn[kind, model] for model in (BASE, CONCEPT)} for kind in ("subject", "prior"))
    images = EvaluationImages(
        reference,
        reconstruct(models.backbone, reference),
        subject,
        prior,
        params.class_word,
        views,
        {name: _ablation(name, drawn, plan) for name in plan.branches},
        _by_guidance(drawn, plan, params),
        plan.left_out,
    )
    return images, plan.words


def draw_settings(
    settings: Sequence[Setting | None],
    base_model: ModelLocation,
    concept: Concept,
    params: EvaluationParams,
    device: DeviceParams,
    steps: KeptSteps = NO_STEPS,
) -> dict[Setting | None, Drawings]:
    """Draw the first prompts and seeds of an evaluation with every setting, on all processes.

    Args:
        settings: None for the base model with the class word.
        base_model: its location.
        concept: of the settings without a step.
        params: of the evaluation; `sweep` has the numbers of prompts and seeds.
        device: of the run.
        steps: of the other settings.
    """
    plan = _Plan.of(_Models(open_base_model(base_model, device), concept), concept, params)
    base, ours = (_first_rows(plan.subject[name], params.sweep) for name in (BASE, CONCEPT))
    parts = {("settings", str(index)): _with_setting(ours, one) if one else base for index, one in enumerate(settings)}
    drawn = _draw_parts(parts, base_model, concept, params, device, steps)
    return dict(zip(settings, drawn.values(), strict=True))


def _first_rows(part: _Part, sweep: SweepParams) -> _Part:
    templates, prompts = part.templates[: sweep.num_prompts], part.prompts[: sweep.num_prompts]
    seeds = [part.seeds[0] + index for index in range(sweep.images)]
    return replace(part, templates=templates, prompts=prompts, seeds=seeds)


def _with_setting(part: _Part, setting: Setting) -> _Part:
    model = replace(part.model, strength=setting.strength, guidance_scale=setting.guidance_scale, step=setting.step)
    return replace(part, model=model)


# ------------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class _Plan:
    """What is drawn.

    Attributes:
        subject: BASE or CONCEPT -> prompts with the subject's slot.
        prior: the same -> prompts without it.
        branches: part of the negative branch -> the concept's prompts with it, if the concept is drawn without it
            otherwise, else without it.
        guidance: guidance scale -> the concept's prompts; not for that of the sampler.
        has_negative_word: whether the concept is drawn with its negative words in the negative prompt.
        words: the positive trigger word of each slot.
        left_out: (measure, condition) whose images are not drawn -> why.
    """

    subject: Mapping[str, _Part]
    prior: Mapping[str, _Part]
    branches: Mapping[str, _Part]
    guidance: Mapping[float, _Part]
    has_negative_word: bool
    words: dict[str, str]
    left_out: LeftOut

    @classmethod
    def of(cls, models: _Models, concept: Concept, params: EvaluationParams) -> _Plan:
        """Plan the images of a concept."""
        negative_words = models[_model(CONCEPT, params)].negative_words
        class_words, concept_words = subject_words(concept, params)
        base, ours = (_model(name, params, each) for name, each in ((BASE, {}), (CONCEPT, negative_words)))
        subject = {
            BASE: _filled(base, params.prompts, class_words, params),
            CONCEPT: _filled(ours, params.prompts, concept_words, params),
        }
        prior = {each.name: _filled(each, params.prior_prompts, {}, params) for each in (base, ours)}
        changed = _without_parts(ours, concept, params, negative_words)
        scales = [scale for scale in params.guidance_scales if scale != ours.guidance_scale]
        return cls(
            subject,
            prior,
            {name: _first_seeds(subject[CONCEPT], each, params.branch_images) for name, each in changed.items()},
            {
                scale: _first_seeds(subject[CONCEPT], replace(ours, guidance_scale=scale), params.guidance_images)
                for scale in (scales if params.guidance_images else ())
            },
            names_negative_word(concept, params),
            trigger_words(concept),
            _left_out(concept, params, changed),
        )

    def parts(self) -> dict[tuple[str, str], _Part]:
        """Return all parts by their kind and name, in the order in which they are drawn."""
        kinds: dict[str, Mapping[Any, _Part]] = {
            "subject": self.subject,
            "prior": self.prior,
            "branches": self.branches,
            "guidance": self.guidance,
        }
        return {(kind, str(name)): part for kind, parts in kinds.items() for name, part in parts.items()}


def _model(name: str, params: EvaluationParams, negative_words: Mapping[str, str] | None = None) -> _Model:
    negative_prompt = fill_negative_prompt(params.negative_prompt, negative_words or {})
    return _Model(name, params.strength, negative_prompt, params.sampler.guidance_scale)


def _filled(model: _Model, templates: Sequence[str], words: Mapping[str, str], params: EvaluationParams) -> _Part:
    """Fill the slots of templates with `words`."""
    prompts = [fill_template(template, {"class": params.class_word, **words}) for template in templates]
    seeds = [params.seed + i for i in range(params.images_per_prompt)]
    return _Part(model, templates, words, prompts, seeds)


def _first_seeds(part: _Part, model: _Model, count: int) -> _Part:
    """Return the first seeds of each prompt with another model."""
    return replace(part, model=model, seeds=part.seeds[:count])


def _without_parts(
    ours: _Model, concept: Concept, params: EvaluationParams, words: Mapping[str, str]
) -> dict[str, _Model]:
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


def _left_out(concept: Concept, params: EvaluationParams, drawn: Mapping[str, _Model]) -> LeftOut:
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


# ------------------------------------------------------------------------------------------- drawing


def _draw_parts(
    parts: Mapping[tuple[str, str], _Part],
    base_model: ModelLocation,
    concept: Concept,
    params: EvaluationParams,
    device: DeviceParams,
    steps: KeptSteps = NO_STEPS,
) -> dict[tuple[str, str], Drawings]:
    batches = [batch for part in parts.values() for batch in _batches(part, params)]
    images: list[Image.Image] = []
    num_images = sum(len(batch.rows) for batch in batches)
    with tqdm(total=num_images, desc="evaluation", unit="image", delay=_PROGRESS_DELAY_S) as bar:
        for drawn in spread(_draw, batches, num_processes(device), base_model, concept, params, device, steps):
            images += drawn
            bar.update(len(drawn))
    remaining = iter(images)
    return {key: _drawings(part, remaining) for key, part in parts.items()}


def _batches(part: _Part, params: EvaluationParams) -> Iterator[_Batch]:
    """Yield the images of every prompt from every seed, in batches that depend on no number of processes."""
    rows = [(prompt, seed) for prompt in part.prompts for seed in part.seeds]
    for start in range(0, len(rows), params.sampler.batch_size):
        yield _Batch(part.model, rows[start : start + params.sampler.batch_size])


def _draw(
    rank: int,
    batches: Sequence[_Batch],
    base_model: ModelLocation,
    concept: Concept,
    params: EvaluationParams,
    device: DeviceParams,
    steps: KeptSteps,
) -> Iterator[list[Image.Image]]:
    """Draw the batches of one process."""
    models = _Models(open_base_model(base_model, device_of_rank(device, rank)), concept, steps)
    for batch in batches:
        loaded = models[batch.model]
        sampler = params.sampler.model_copy(update={"guidance_scale": batch.model.guidance_scale})
        prompts, seeds = [prompt for prompt, _ in batch.rows], [seed for _, seed in batch.rows]
        yield generate(loaded.backbone, loaded, prompts, batch.model.negative_prompt, seeds, sampler)


def _drawings(part: _Part, images: Iterator[Image.Image]) -> Drawings:
    """Take the images of a part from those of all; metrics use the templates without weights."""
    rows = [[next(images) for _ in part.seeds] for _ in part.prompts]
    return Drawings([without_weights(each, part.words) for each in part.templates], part.prompts, part.seeds, rows)


def _ablation(name: str, drawn: Mapping[tuple[str, str], Drawings], plan: _Plan) -> Ablation:
    """Return the images with and without a part of the negative branch."""
    changed = drawn["branches", name]
    usual = drawn["subject", CONCEPT].of_first_seeds(len(changed.seeds))
    adds = name == NEGATIVE_WORD and not plan.has_negative_word
    return Ablation(changed, usual) if adds else Ablation(usual, changed)


def _by_guidance(
    drawn: Mapping[tuple[str, str], Drawings], plan: _Plan, params: EvaluationParams
) -> dict[float, Drawings]:
    """Return guidance scale -> the concept's images, in ascending order, that of the sampler included."""
    if not (params.guidance_images and params.guidance_scales):
        return {}
    usual = drawn["subject", CONCEPT].of_first_seeds(params.guidance_images)
    scales = {scale: drawn["guidance", str(scale)] for scale in plan.guidance}
    return dict(sorted((scales | {params.sampler.guidance_scale: usual}).items()))
