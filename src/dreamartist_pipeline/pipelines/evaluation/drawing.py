"""The images of an evaluation, drawn on all processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image
from tqdm import tqdm

from dreamartist_pipeline.backbones.base_model import open_base_model, reconstruct
from dreamartist_pipeline.backbones.concepts import LoadedConcept, attach, attach_base, generate
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.captions import without_weights
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.devices import device_of_rank, num_processes
from dreamartist_pipeline.core.image_set import batches_of
from dreamartist_pipeline.core.kept_steps import KeptSteps
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.core.processes import spread
from dreamartist_pipeline.core.strengths import Setting
from dreamartist_pipeline.params import DeviceParams, EvaluationParams, StrengthParams
from dreamartist_pipeline.pipelines.evaluation.measuring import BASE, CONCEPT, Ablation, Drawings, EvaluationImages
from dreamartist_pipeline.pipelines.evaluation.planning import (
    NEGATIVE_WORD,
    PRIOR,
    SUBJECT,
    DrawnModel,
    Part,
    Plan,
    base_parts,
    first_rows,
    with_setting,
)

_PROGRESS_DELAY_S = 2.0
_MOST_ATTACHED = 4  # concepts with their strengths, each with a copy of its adapters

NO_STEPS: KeptSteps = {}


@dataclass(frozen=True)
class Batch:
    """Images of one model that are generated together.

    Attributes:
        model: what they are drawn with.
        rows: (prompt, seed) of each image.
    """

    model: DrawnModel
    rows: Sequence[tuple[str, int]]


class _Models:
    """The base model, and the concepts attached at the strengths that were drawn with last."""

    def __init__(self, backbone: Backbone, concept: Concept, steps: KeptSteps = NO_STEPS) -> None:
        self.backbone = backbone
        self._concept, self._steps = concept, steps
        self._loaded: dict[tuple[int | None, StrengthParams | None], LoadedConcept] = {}

    def __getitem__(self, model: DrawnModel) -> LoadedConcept:
        """Return a model to generate images with."""
        return self._of(model.step, None if model.name == BASE else model.strength)

    def with_strength(self, strength: StrengthParams) -> LoadedConcept:
        """Return the concept, not that of a kept step, at a strength."""
        return self._of(None, strength)

    def _of(self, step: int | None, strength: StrengthParams | None) -> LoadedConcept:
        key = step, strength
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
    of_base: Mapping[str, Drawings],
    params: EvaluationParams,
    device: DeviceParams,
    views: Sequence[Image.Image] = (),
) -> tuple[EvaluationImages, dict[str, str]]:
    """Draw all prompts with the concept, on all processes.

    Args:
        base_model: its location.
        concept: on the base model.
        reference: the prepared image.
        of_base: SUBJECT and PRIOR -> the images of the base model.
        params: of the evaluation.
        device: of the run.
        views: further pictures of the subject.

    Returns:
        All images, and the positive trigger word of each slot.
    """
    models = _Models(open_base_model(base_model, device), concept)
    plan = _plan(models, concept, params)
    if plan.subject.words:
        models[plan.subject.model].prompts.warn_without_word(plan.subject.prompts)
    drawn = _draw_parts(plan.parts(), base_model, concept, params, device)
    subject, prior = ({BASE: of_base[kind], CONCEPT: drawn[kind, ""]} for kind in (SUBJECT, PRIOR))
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
    models = _Models(open_base_model(base_model, device), concept)
    base, ours = base_parts(concept, params)[SUBJECT], _plan(models, concept, params).subject
    base, ours = first_rows(base, params.sweep), first_rows(ours, params.sweep)
    parts = {("settings", str(index)): with_setting(ours, one) if one else base for index, one in enumerate(settings)}
    drawn = _draw_parts(parts, base_model, concept, params, device, steps)
    return dict(zip(settings, drawn.values(), strict=True))


def _plan(models: _Models, concept: Concept, params: EvaluationParams) -> Plan:
    return Plan.of(concept, params, models.with_strength(params.strength).negative_words)


# ------------------------------------------------------------------------------------------- drawing


def _draw_parts(
    parts: Mapping[tuple[str, str], Part],
    base_model: ModelLocation,
    concept: Concept,
    params: EvaluationParams,
    device: DeviceParams,
    steps: KeptSteps = NO_STEPS,
) -> dict[tuple[str, str], Drawings]:
    images = draw_batches(batches_of_parts(parts.values(), params), base_model, concept, params, device, steps)
    return {key: drawings(part, images) for key, part in parts.items()}


def batches_of_parts(parts: Iterable[Part], params: EvaluationParams) -> list[Batch]:
    """Return the images of parts, in batches that depend on no number of processes; none has images of two parts."""
    rows_of_parts = [(part, part.rows()) for part in parts]
    return [
        Batch(part.model, [rows[index] for index in batch])
        for part, rows in rows_of_parts
        for batch in batches_of(len(rows), params.sampler.batch_size)
    ]


def draw_batches(
    batches: Sequence[Batch],
    base_model: ModelLocation,
    concept: Concept,
    params: EvaluationParams,
    device: DeviceParams,
    steps: KeptSteps = NO_STEPS,
    title: str = "evaluation",
) -> Iterator[Image.Image]:
    """Yield the images of batches, drawn on all processes, with a progress bar of that title."""
    num_images = sum(len(batch.rows) for batch in batches)
    with tqdm(total=num_images, desc=title, unit="image", delay=_PROGRESS_DELAY_S) as bar:
        for drawn in spread(_draw, batches, num_processes(device), base_model, concept, params, device, steps):
            for image in drawn:
                bar.update()
                yield image


def _draw(
    rank: int,
    batches: Sequence[Batch],
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


def drawings(part: Part, images: Iterator[Image.Image]) -> Drawings:
    """Take the images of a part from those of all; metrics use the templates without weights."""
    rows = [[next(images) for _ in part.seeds] for _ in part.prompts]
    return Drawings([without_weights(each, part.words) for each in part.templates], part.prompts, part.seeds, rows)


def _ablation(name: str, drawn: Mapping[tuple[str, str], Drawings], plan: Plan) -> Ablation:
    """Return the images with and without a part of the negative branch."""
    changed = drawn["branches", name]
    usual = drawn[SUBJECT, ""].of_first_seeds(len(changed.seeds))
    adds = name == NEGATIVE_WORD and not plan.has_negative_word
    return Ablation(changed, usual) if adds else Ablation(usual, changed)


def _by_guidance(
    drawn: Mapping[tuple[str, str], Drawings], plan: Plan, params: EvaluationParams
) -> dict[float, Drawings]:
    """Return guidance scale -> the concept's images, in ascending order, that of the sampler included."""
    if not (params.guidance_images and params.guidance_scales):
        return {}
    usual = drawn[SUBJECT, ""].of_first_seeds(params.guidance_images)
    scales = {scale: drawn["guidance", str(scale)] for scale in plan.guidance}
    return dict(sorted((scales | {params.sampler.guidance_scale: usual}).items()))
