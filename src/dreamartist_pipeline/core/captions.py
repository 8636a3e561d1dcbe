"""Templates, and how one of them becomes a prompt for each branch."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

_SLOT = re.compile(r"\{(\w+)\}")


def fill_template(template: str, slots: Mapping[str, str]) -> str:
    """Fill '{name}' slots; those not in `slots` become empty, and the gap they leave is closed.

    >>> fill_template("a {pt1}, {caption}, oil painting", {"pt1": "my-cat"})
    'a my-cat, oil painting'
    """
    return _tidy(_SLOT.sub(lambda match: slots.get(match[1], ""), template))


def slot_names(template: str) -> list[str]:
    """Return the names of a template's slots, in order."""
    return _SLOT.findall(template)


def branch_prompts(
    template: str, names: Mapping[str, tuple[str, str]], class_word: str = "", caption: str = ""
) -> tuple[str, str]:
    """Fill one template once for each branch.

    Args:
        template: text with slots: those of `names`, '{class}' and '{caption}'.
        names: slot -> (positive, negative) trigger word; ('', '') leaves the slot empty in both branches.
        class_word: fills '{class}'.
        caption: fills '{caption}'.

    Returns:
        (negative prompt, positive prompt), in the order in which branches are stacked.
    """
    common = {"class": class_word, "caption": caption}
    positive = {slot: words[0] for slot, words in names.items()}
    negative = {slot: words[1] for slot, words in names.items()}
    return fill_template(template, common | negative), fill_template(template, common | positive)


def _tidy(text: str) -> str:
    """Close the gaps that empty slots leave: doubled spaces, spaces before commas, commas with nothing between."""
    return " ".join(re.sub(r"(\s*,)+", ",", text).split()).strip(" ,")


# ------------------------------------------------------------------------------------------------- caption transforms


@dataclass(frozen=True)
class TagTransform:
    """One change of a caption's comma-separated tags, drawn anew for each variant.

    kind: "tag_shuffle" puts them into random order; "tag_dropout" drops each with probability p; "tag_erase" drops
        all of them together with probability p.
    """

    kind: Literal["tag_shuffle", "tag_dropout", "tag_erase"]
    p: float = 0.0

    def apply(self, tags: Sequence[str], choices: random.Random) -> list[str]:
        """Return the tags that remain, in their new order."""
        if self.kind == "tag_shuffle":
            return choices.sample(tags, len(tags))
        if self.kind == "tag_dropout":
            return [tag for tag in tags if choices.random() >= self.p]
        return [] if choices.random() < self.p else list(tags)


def caption_variants(caption: str, transforms: Sequence[TagTransform], count: int, seed: int) -> list[str]:
    """Draw `count` variants of a caption, each by all transforms in order; without transforms, the caption alone.

    Equal variants are kept, so that one drawn evenly from them has the transforms' probabilities.
    """
    if not transforms:
        return [caption]
    choices = random.Random(seed)
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    variants = []
    for _ in range(count):
        remaining = tags
        for transform in transforms:
            remaining = transform.apply(remaining, choices)
        variants.append(", ".join(remaining))
    return variants
