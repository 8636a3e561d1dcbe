"""Agreement of images with their prompts as one number, for choices between steps and between settings."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from dreamartist_pipeline.core.measures import TextImageScorer, prompt_texts
from dreamartist_pipeline.embedded import colors


def prompt_agreement(
    templates: Sequence[str],
    images: Sequence[Image.Image],
    class_word: str,
    scorer: TextImageScorer | None,
    reads_colors: bool,
) -> float | None:
    """Return the share of images with the background that their prompt names, or the mean text-image score.

    Args:
        templates: the prompt of each image, with its slots.
        images: drawn from them.
        class_word: replaces trigger words for the score.
        scorer: for prompts that name no background, or None.
        reads_colors: whether named backgrounds are compared with the pixels.

    Returns:
        The agreement; None if it is not measured.
    """
    if reads_colors:
        pairs = zip(templates, images, strict=True)
        asked = [(words, image) for one, image in pairs if (words := colors.asked_backgrounds(one))]
        if asked:
            return sum(colors.background_color(image) in words for words, image in asked) / len(asked)
    return None if scorer is None else float(scorer.score(images, prompt_texts(templates, class_word)).mean())
