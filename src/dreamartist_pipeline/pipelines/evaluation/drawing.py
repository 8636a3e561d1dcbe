"""The images of an evaluation: every prompt with the base model and with the concept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image
from tqdm import tqdm

from dreamartist_pipeline.backbones.base_model import open_base_model, reconstruct
from dreamartist_pipeline.backbones.concepts import LoadedConcept, attach, attach_base, generate
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.captions import fill_negative_prompt, fill_template, slot_names, without_weights
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.devices import device_of_rank, num_processes
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.core.processes import spread
from dreamartist_pipeline.params import DeviceParams, EvaluationParams
from dreamartist_pipeline.pipelines.evaluation.measuring import BASE, CONCEPT, Drawings, EvaluationImages

_PROGRESS_DELAY_S = 2.0


@dataclass(frozen=True)
class _Part:
    """The prompts of one model.

    Attributes:
        model: BASE or CONCEPT.
        templates: prompts with unfilled slots.
        words: slot -> what fills it; none for prompts whose images must not change.
        prompts: the templates, filled.
    """

    model: str
    templates: Sequence[str]
    words: Mapping[str, str]
    prompts: Sequence[str]


@dataclass(frozen=True)
class _Batch:
    """Images of one model that are generated together.

    Attributes:
        model: BASE or CONCEPT.
        rows: (prompt, seed) of each image.
    """

    model: str
    rows: Sequence[tuple[str, int]]


def draw_images(
    base_model: ModelLocation, concept: Concept, reference: Image.Image, params: EvaluationParams, device: DeviceParams
) -> tuple[EvaluationImages, dict[str, str]]:
    """Draw all prompts with the base model and with the concept, on all processes.

    Returns:
        The images, and the positive trigger word of each slot.
    """
    backbone = open_base_model(base_model, device)
    loaded = _load(backbone, concept, params)
    words = {slot: positive for slot, (positive, _) in loaded[CONCEPT].trigger_words.items()}
    slots = [name for template in params.prompts for name in slot_names(template, words)]
    class_words = dict.fromkeys(slots, params.class_word)
    subject_words = dict.fromkeys(slots, concept.metadata.class_word or params.class_word)
    fillings = {BASE: class_words, CONCEPT: subject_words | words}
    subject = [_filled(loaded, name, params.prompts, fillings[name], params) for name in loaded]
    prior = [_filled(loaded, name, params.prior_prompts, {}, params) for name in loaded]
    batches = [batch for part in (*subject, *prior) for batch in _batches(part, params)]
    images: list[Image.Image] = []
    num_images = sum(len(batch.rows) for batch in batches)
    with tqdm(total=num_images, desc="evaluation", unit="image", delay=_PROGRESS_DELAY_S) as bar:
        for drawn in spread(_draw, batches, num_processes(device), base_model, concept, params, device):
            images += drawn
            bar.update(len(drawn))
    remaining = iter(images)
    subject_images, prior_images = (
        {part.model: _drawings(part, params, remaining) for part in parts} for parts in (subject, prior)
    )
    reconstruction = reconstruct(backbone, reference)
    return EvaluationImages(reference, reconstruction, subject_images, prior_images, params.class_word), words


def _load(backbone: Backbone, concept: Concept, params: EvaluationParams) -> dict[str, LoadedConcept]:
    return {BASE: attach_base(backbone, concept), CONCEPT: attach(backbone, concept, params.strength)}


def _filled(
    loaded: Mapping[str, LoadedConcept],
    model: str,
    templates: Sequence[str],
    words: Mapping[str, str],
    params: EvaluationParams,
) -> _Part:
    """Fill the slots of templates with `words`."""
    prompts = [fill_template(template, {"class": params.class_word, **words}) for template in templates]
    if words:  # the others draw what must not change
        loaded[model].prompts.warn_without_word(prompts)
    return _Part(model, templates, words, prompts)


def _seeds(params: EvaluationParams) -> list[int]:
    return [params.seed + i for i in range(params.images_per_prompt)]


def _batches(part: _Part, params: EvaluationParams) -> Iterator[_Batch]:
    """Yield the images of every prompt from every seed, in batches that depend on no number of processes."""
    rows = [(prompt, seed) for prompt in part.prompts for seed in _seeds(params)]
    for start in range(0, len(rows), params.sampler.batch_size):
        yield _Batch(part.model, rows[start : start + params.sampler.batch_size])


def _draw(
    rank: int,
    batches: Sequence[_Batch],
    base_model: ModelLocation,
    concept: Concept,
    params: EvaluationParams,
    device: DeviceParams,
) -> Iterator[list[Image.Image]]:
    """Draw the batches of one process."""
    backbone = open_base_model(base_model, device_of_rank(device, rank))
    loaded = _load(backbone, concept, params)
    for batch in batches:
        model = loaded[batch.model]
        prompts, seeds = [prompt for prompt, _ in batch.rows], [seed for _, seed in batch.rows]
        negative_prompt = fill_negative_prompt(params.negative_prompt, model.negative_words)
        yield generate(model.backbone, model, prompts, negative_prompt, seeds, params.sampler)


def _drawings(part: _Part, params: EvaluationParams, images: Iterator[Image.Image]) -> Drawings:
    """Take the images of a part from those of all; metrics use the templates without weights."""
    seeds = _seeds(params)
    rows = [[next(images) for _ in seeds] for _ in part.prompts]
    return Drawings([without_weights(each, part.words) for each in part.templates], part.prompts, seeds, rows)
