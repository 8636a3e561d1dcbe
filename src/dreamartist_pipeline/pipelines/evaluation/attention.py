"""Pictures with the attention of class word and trigger words laid over them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from dreamartist_pipeline.backbones.attention_maps import BranchWords, MappedPicture, draw_with_maps
from dreamartist_pipeline.backbones.base_model import open_base_model
from dreamartist_pipeline.backbones.concepts import LoadedConcept, attach, attach_base
from dreamartist_pipeline.core.branches import BRANCH_NAMES
from dreamartist_pipeline.core.captions import fill_negative_prompt, fill_template, slot_names
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.figures import note_sheet, overlay, prompt_table
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.drawn_pictures import PictureEntry, write_pictures
from dreamartist_pipeline.params import DeviceParams, EvaluationParams
from dreamartist_pipeline.pipelines.evaluation.measuring import BASE, CONCEPT
from dreamartist_pipeline.pipelines.evaluation.prompt_words import (
    negative_word_slots,
    subject_words,
    with_negative_words,
)

_HEADINGS = {BASE: "base model", CONCEPT: "concept"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Subject:
    """A model to draw with, and the words that stand for the subject in its prompts.

    Attributes:
        group: BASE or CONCEPT.
        loaded: the base model or the concept.
        words: slot -> word, of the positive branch.
        negative_prompt: filled, with all negative words.
        negative_words: in the negative prompt.
    """

    group: str
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


@dataclass(frozen=True)
class AttentionColumn:
    """Pictures of one model, or the maps of one branch over them.

    Attributes:
        group: BASE or CONCEPT.
        shown: "" for the pictures; for maps the branch, with the range of shares from the first colour to the last.
        prompts: filled, one per image.
        images: one per prompt.
    """

    group: str
    shown: str
    prompts: Sequence[str]
    images: Sequence[Image.Image]


@dataclass(frozen=True)
class AttentionMaps:
    """Prompts with the attention of the subject's words.

    Attributes:
        templates: the prompts with their slots.
        seed: of every picture.
        columns: with an image per prompt.
        left_out: why there are none; "" if there are.
    """

    templates: Sequence[str] = ()
    seed: int = 0
    columns: Sequence[AttentionColumn] = ()
    left_out: str = ""

    def sheet(self) -> Image.Image:
        """Return all columns on one sheet, or a sheet that says why there are none."""
        if self.left_out:
            return note_sheet(f"Attention is not drawn: {self.left_out}.")
        headings = [column.shown or _HEADINGS[column.group] for column in self.columns]
        rows = list(zip(*(column.images for column in self.columns), strict=True))
        return prompt_table(self.templates, headings, rows)

    def files(self) -> dict[str, bytes]:
        """Return name -> bytes of the images, and their index; see `write_pictures`."""
        pictures = [
            (PictureEntry(kind="attention", group=one.group, condition=one.shown, prompt=prompt, seed=self.seed), image)
            for one in self.columns
            for prompt, image in zip(one.prompts, one.images, strict=True)
        ]
        return write_pictures(pictures)


def draw_attention(
    base_model: ModelLocation, concept: Concept, params: EvaluationParams, device: DeviceParams
) -> AttentionMaps:
    """Draw the first prompts with the base model and with the concept, and the attention of the subject's words.

    Prompts in which the subject's word is no separate word are left out, which is logged.

    Args:
        base_model: its location.
        concept: trained on it.
        params: of the evaluation.
        device: of the run.
    """
    if not params.attention_images:
        return AttentionMaps(left_out="evaluation.attention_images is 0")
    subjects = _subjects(base_model, concept, params, device)
    templates = [one for one in params.prompts if all(_has_words(one, subject, params) for subject in subjects)]
    if not templates:
        return AttentionMaps(left_out="no prompt of the evaluation has the subject as a separate word")
    templates = templates[: params.attention_images]
    columns = [column for subject in subjects for column in _columns(subject, templates, params)]
    return AttentionMaps(templates, params.seed, columns)


def _columns(subject: _Subject, templates: Sequence[str], params: EvaluationParams) -> list[AttentionColumn]:
    """Return the pictures of one model, and a column of maps per branch that has words."""
    prompts = [subject.prompt(template, params.class_word) for template in templates]
    drawn = [_draw(template, subject, params) for template in templates]
    columns = [AttentionColumn(subject.group, "", prompts, [picture.image for picture in drawn])]
    for branch in reversed(BRANCH_NAMES):
        if all(branch in picture.maps for picture in drawn):
            shares = [picture.share(branch) for picture in drawn]
            highest = max(float(share.max()) for share in shares)
            images = [overlay(picture.image, share / highest) for picture, share in zip(drawn, shares, strict=True)]
            columns.append(AttentionColumn(subject.group, f"{branch}: 0 to {highest:.0%}", prompts, images))
    return columns


def _subjects(
    base_model: ModelLocation, concept: Concept, params: EvaluationParams, device: DeviceParams
) -> list[_Subject]:
    """Return the base model with the class word, and the concept with its trigger words."""
    backbone = open_base_model(base_model, device)
    loaded = attach(backbone, concept, params.strength)
    of_base, of_concept = subject_words(concept, params)
    words = loaded.negative_words
    negative_prompt = with_negative_words(concept, params, words)
    return [
        _Subject(BASE, attach_base(backbone, concept), of_base, fill_negative_prompt(params.negative_prompt, {})),
        _Subject(
            CONCEPT,
            loaded,
            of_concept,
            negative_prompt,
            [words[slot] for slot in negative_word_slots(concept) if _is_read(loaded, negative_prompt, words[slot])],
        ),
    ]


def _is_read(loaded: LoadedConcept, prompt: str, word: str) -> bool:
    """Return whether the text encoders read a word of a prompt, whose end they may cut off; log if not."""
    try:
        loaded.prompts.positions(prompt, word)
    except InputError as error:
        log.info("No map of attention for the word %r in the prompt %r: %s", word, prompt, error)
        return False
    return True


def _has_words(template: str, subject: _Subject, params: EvaluationParams) -> bool:
    """Return whether a prompt has its words as separate words; log if not."""
    words, prompt = subject.mapped_words(template)["positive"], subject.prompt(template, params.class_word)
    return bool(words) and all(_is_read(subject.loaded, prompt, word) for word in words)


def _draw(template: str, subject: _Subject, params: EvaluationParams) -> MappedPicture:
    """Draw one picture from the first seed."""
    prompt = subject.prompt(template, params.class_word)
    words = subject.mapped_words(template)
    loaded = subject.loaded
    batch = ([prompt], subject.negative_prompt, [params.seed], params.sampler)
    (picture,) = draw_with_maps(loaded.backbone, loaded, *batch, words)
    return picture
