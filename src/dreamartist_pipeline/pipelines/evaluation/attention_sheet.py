"""A sheet of pictures with the attention of the trigger words laid over them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from dreamartist_pipeline.backbones.attention_maps import BranchWords, MappedPicture, draw_with_maps
from dreamartist_pipeline.backbones.base_model import open_base_model
from dreamartist_pipeline.backbones.concepts import LoadedConcept, attach, attach_base
from dreamartist_pipeline.core.captions import fill_negative_prompt, fill_template, slot_names
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.figures import note_sheet, prompt_table
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, EvaluationParams

_COLOR_SCALE = "Viridis"  # of plotly; its lightness grows evenly, with and without colour vision
_NUM_COLORS = 256
_OPACITY = 0.7  # of the map over the picture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Subject:
    """A model to draw with, and the words that stand for the subject in its prompts.

    Attributes:
        heading: of its pictures.
        loaded: the base model or the concept.
        words: slot -> word, of the positive branch.
        negative_prompt: filled, with all negative words.
        negative_words: in the negative prompt.
    """

    heading: str
    loaded: LoadedConcept
    words: Mapping[str, str]
    negative_prompt: str
    negative_words: Sequence[str] = ()

    def mapped_words(self, template: str) -> BranchWords:
        """Return the words that get a map in the pictures of a template."""
        slots = slot_names(template, self.words)
        return {"positive": [self.words[slot] for slot in slots if slot in self.words], "negative": self.negative_words}

    def prompt(self, template: str, class_word: str) -> str:
        """Return a template with its slots filled."""
        return fill_template(template, {"class": class_word, **self.words})


def draw_attention(
    base_model: ModelLocation, concept: Concept, params: EvaluationParams, device: DeviceParams
) -> Image.Image:
    """Draw the first prompts with the base model and with the concept, and the attention of the subject's words.

    Prompts in which the subject's word is no separate word are left out, which is logged.

    Args:
        base_model: its location.
        concept: trained on it.
        params: of the evaluation.
        device: of the run.
    """
    if not params.attention_images:
        return note_sheet("Attention is not drawn: evaluation.attention_images is 0.")
    subjects = _subjects(base_model, concept, params, device)
    templates = [one for one in params.prompts if all(_has_words(one, subject, params) for subject in subjects)]
    if not templates:
        return note_sheet("Attention is not drawn: no prompt of the evaluation has the subject as a separate word.")
    templates = templates[: params.attention_images]
    pictures = {subject.heading: [_draw(one, subject, params) for one in templates] for subject in subjects}
    headings, columns = [], []
    for heading, row in pictures.items():
        headings.append(heading)
        columns.append([picture.image for picture in row])
        for branch in ("positive", "negative"):
            maps = [torch.stack(list(found.values())).sum(dim=0) for one in row if (found := one.maps.get(branch))]
            if len(maps) == len(row):
                highest = max(float(one.max()) for one in maps)
                headings.append(f"{branch}: 0 to {highest:.0%}")
                columns.append([overlay(p.image, one / highest) for p, one in zip(row, maps, strict=True)])
    return prompt_table(templates, headings, list(zip(*columns, strict=True)))


def _subjects(
    base_model: ModelLocation, concept: Concept, params: EvaluationParams, device: DeviceParams
) -> list[_Subject]:
    """Return the base model with the class word, and the concept with its trigger words."""
    backbone = open_base_model(base_model, device)
    loaded = attach(backbone, concept, params.strength)
    slots = [name for template in params.prompts for name in slot_names(template, loaded.trigger_words)]
    positive = dict.fromkeys(slots, concept.metadata.class_word or params.class_word)
    positive |= {slot: words[0] for slot, words in loaded.trigger_words.items()}
    negative = [pair[1] for pair in loaded.trigger_words.values() if pair[1] not in ("", pair[0])]
    plain = fill_negative_prompt(params.negative_prompt, loaded.negative_words)
    named = [slot for slot in slot_names(params.negative_prompt, loaded.trigger_words) if slot in loaded.trigger_words]
    prompt = plain if named else ", ".join(filter(None, [plain, *negative]))
    of_base = _Subject(
        "base model",
        attach_base(backbone, concept),
        dict.fromkeys(slots, params.class_word),
        fill_negative_prompt(params.negative_prompt, {}),
    )
    return [of_base, _Subject("concept", loaded, positive, prompt, negative)]


def _has_words(template: str, subject: _Subject, params: EvaluationParams) -> bool:
    """Return whether a prompt has its words as separate words; log if not."""
    words = subject.mapped_words(template)
    try:
        for word in words["positive"]:
            subject.loaded.prompts.positions(subject.prompt(template, params.class_word), word)
    except InputError as error:
        log.info("No map of attention for the prompt %r: %s", template, error)
        return False
    return bool(words["positive"])


def _draw(template: str, subject: _Subject, params: EvaluationParams) -> MappedPicture:
    """Draw one picture from the first seed."""
    prompt = subject.prompt(template, params.class_word)
    words = subject.mapped_words(template)
    loaded = subject.loaded
    batch = ([prompt], subject.negative_prompt, [params.seed], params.sampler)
    (picture,) = draw_with_maps(loaded.backbone, loaded, *batch, words)
    return picture


def overlay(image: Image.Image, shares: torch.Tensor) -> Image.Image:
    """Return the luminance of a picture under a colour-coded map.

    Args:
        image: the picture.
        shares: 0 to 1, `[H, W]` of the picture.
    """
    index = (shares.clamp(0, 1) * (_NUM_COLORS - 1)).round().to(torch.uint8).numpy()
    colored = Image.fromarray(_colors()[index])
    return Image.blend(image.convert("L").convert("RGB"), colored, _OPACITY)


def _colors() -> np.ndarray:
    """Return the colours from 0 to 1, uint8 `[256, 3]`."""
    from plotly.colors import sample_colorscale

    points = [index / (_NUM_COLORS - 1) for index in range(_NUM_COLORS)]
    colors = sample_colorscale(_COLOR_SCALE, points, colortype="tuple")
    return (np.array(colors) * 255).round().astype(np.uint8)
