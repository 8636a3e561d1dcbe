"""What fills the slots of an evaluation's prompts, for the base model and for a concept."""

from __future__ import annotations

from collections.abc import Mapping

from dreamartist_pipeline.core.captions import fill_negative_prompt, slot_names
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.params import EvaluationParams


def trigger_words(concept: Concept) -> dict[str, str]:
    """Return slot -> positive trigger word."""
    return {slot: positive for slot, (positive, _) in concept.metadata.words.items()}


def subject_words(concept: Concept, params: EvaluationParams) -> tuple[dict[str, str], dict[str, str]]:
    """Return slot -> class word for the base model, and slot -> trigger word for the concept.

    A slot without a trigger word has the class word of the concept, or that of the evaluation.
    """
    words = trigger_words(concept)
    slots = [name for template in params.prompts for name in slot_names(template, words)]
    of_concept = dict.fromkeys(slots, concept.metadata.class_word or params.class_word) | words
    return dict.fromkeys(slots, params.class_word), of_concept


def names_negative_word(concept: Concept, params: EvaluationParams) -> bool:
    """Return whether the negative prompt has the slot of a trigger word."""
    words = concept.metadata.words
    return any(slot in words for slot in slot_names(params.negative_prompt, words))


def negative_word_slots(concept: Concept) -> list[str]:
    """Return the slots with a negative word of their own."""
    return [slot for slot, (positive, negative) in concept.metadata.words.items() if negative not in ("", positive)]


def with_negative_words(concept: Concept, params: EvaluationParams, words: Mapping[str, str]) -> str:
    """Return the negative prompt with the concept's negative words, in their slots or at its end.

    Args:
        concept: with the words.
        params: of the evaluation.
        words: slot -> its word in a negative prompt, see `LoadedConcept.negative_words`.
    """
    filled = fill_negative_prompt(params.negative_prompt, words)
    if names_negative_word(concept, params):
        return filled
    return ", ".join(filter(None, [filled, *(words[slot] for slot in negative_word_slots(concept))]))
