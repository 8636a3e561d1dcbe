"""The images of an evaluation: every prompt with the base model and with the concept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from PIL import Image
from tqdm import tqdm

from dreamartist_pipeline.backbones.base_model import reconstruct
from dreamartist_pipeline.backbones.concepts import LoadedConcept, attach, attach_base, generate
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.captions import fill_negative_prompt, fill_template, slot_names, without_weights
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.params import EvaluationParams
from dreamartist_pipeline.pipelines.evaluation.measuring import BASE, CONCEPT, Drawings, EvaluationImages

_PROGRESS_DELAY_S = 2.0


def draw_images(
    backbone: Backbone, concept: Concept, reference: Image.Image, params: EvaluationParams
) -> tuple[EvaluationImages, dict[str, str]]:
    """Draw all prompts with the base model and with the concept.

    Returns:
        The images, and the positive trigger word of each slot.
    """
    reconstruction = reconstruct(backbone, reference)
    loaded = {BASE: attach_base(backbone, concept), CONCEPT: attach(backbone, concept, params.strength)}
    words = {slot: positive for slot, (positive, _) in loaded[CONCEPT].trigger_words.items()}
    slots = [name for template in params.prompts for name in slot_names(template, words)]
    class_words = dict.fromkeys(slots, params.class_word)
    subject_words = dict.fromkeys(slots, concept.metadata.class_word or params.class_word)
    fillings = {BASE: class_words, CONCEPT: subject_words | words}
    num_images = 2 * params.images_per_prompt * (len(params.prompts) + len(params.prior_prompts))
    with tqdm(total=num_images, desc="evaluation", unit="image", delay=_PROGRESS_DELAY_S) as bar:
        subject = {name: _draw(loaded[name], params.prompts, fillings[name], params, bar.update) for name in loaded}
        prior = {name: _draw(loaded[name], params.prior_prompts, {}, params, bar.update) for name in loaded}
    return EvaluationImages(reference, reconstruction, subject, prior, params.class_word), words


def _draw(
    loaded: LoadedConcept,
    templates: Sequence[str],
    words: Mapping[str, str],
    params: EvaluationParams,
    progress: Callable[[int], None],
) -> Drawings:
    """Draw every template, its slots filled with `words`, from every seed.

    Metrics use the templates without weights.
    """
    num_seeds = params.images_per_prompt
    seeds = [params.seed + i for i in range(num_seeds)]
    filled = [fill_template(template, {"class": params.class_word, **words}) for template in templates]
    prompts = [prompt for prompt in filled for _ in seeds]
    negative_prompt = fill_negative_prompt(params.negative_prompt, loaded.negative_words)
    images = generate(loaded.backbone, loaded, prompts, negative_prompt, seeds * len(filled), params.sampler, progress)
    rows = [images[start : start + num_seeds] for start in range(0, len(images), num_seeds)]
    return Drawings([without_weights(template, words) for template in templates], filled, seeds, rows)
