"""Templates, and how one of them becomes a prompt for each branch."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dreamartist_pipeline.prompt_weights import parse_weights

_SLOT = re.compile(r"\{(?P<name>\w+)(?P<weight>:[^{}:]*)?\}")
_USUAL_SLOT = re.compile(r"pt\d*|class|caption")
_EMPTY_GROUP = re.compile(r"\{\s*(:[^{}:]*)?\}")
_OPEN, _CLOSE = "\x02", "\x03"  # stand in for the braces of slots, no prompt has them


def fill_template(template: str, slots: Mapping[str, str]) -> str:
    """Fill '{name}' slots; those not in `slots` become empty, and the gap they leave is closed.

    '{name:1.2}' is a slot, too, whose text is weighted, if `slots` has the name or it is 'pt1' (any number), 'class' or
    'caption'; otherwise it is a weighted word and stays as it is. No weight is left where there is nothing to weight.

    >>> fill_template("a {pt1}, {caption}, oil painting", {"pt1": "my-cat"})
    'a my-cat, oil painting'
    >>> fill_template("a {{pt1}:1.2}, {caption:0.8}, {oil:1.3} painting", {"pt1": "my-cat"})
    'a {my-cat:1.2}, {oil:1.3} painting'
    """

    def fill(match: re.Match[str]) -> str:
        if not _is_slot(match, slots):
            return match[0]
        text = slots.get(match["name"], "")
        return f"{{{text}{match['weight']}}}" if match["weight"] else text

    return _tidy(_SLOT.sub(fill, template))


def fill_negative_prompt(prompt: str, words: Mapping[str, str]) -> str:
    """Fill a negative prompt's slots, slot -> word; 'pt1' (any number), 'class' and 'caption' without one become empty.

    Any other '{name}' is a weighted word here, not a slot.

    >>> fill_negative_prompt("{pt1}, {blurry}, {class}", {"pt1": "my-cat-neg"})
    'my-cat-neg, {blurry}'
    """
    weighted = {name: f"{{{name}}}" for name in slot_names(prompt) if not _USUAL_SLOT.fullmatch(name)}
    return fill_template(prompt, {**weighted, **words})


def slot_names(template: str, words: Collection[str] = ()) -> list[str]:
    """Return the names of a template's slots, in order.

    `words` are the slots that have trigger words; see `fill_template` for what '{name:1.2}' is.
    """
    return [match["name"] for match in _SLOT.finditer(template) if _is_slot(match, words)]


def without_weights(template: str, words: Collection[str] = ()) -> str:
    """Return a template without weights, its slots still open.

    >>> without_weights("a {{pt1}:1.2}, {blue:1.3} background")
    'a {pt1}, blue background'

    Raises:
        ValueError: braces that cannot be read.
    """
    marked = _SLOT.sub(lambda m: f"{_OPEN}{m['name']}{_CLOSE}" if _is_slot(m, words) else m[0], template)
    plain = "".join(text for text, _ in parse_weights(marked))
    return plain.replace(_OPEN, "{").replace(_CLOSE, "}")


def _is_slot(match: re.Match[str], words: Collection[str]) -> bool:
    name = match["name"]
    return not match["weight"] or name in words or _USUAL_SLOT.fullmatch(name) is not None


def branch_prompts(
    template: str, names: Mapping[str, tuple[str, str]], class_word: str = "", caption: str = ""
) -> tuple[str, str]:
    """Fill one template once for each branch.

    Args:
        template: text with slots: those of `names`, '{class}' and '{caption}'.
        names: slot -> (positive, negative) trigger word; ('', '') leaves the slot empty in both branches.
        class_word: fills '{class}', or, in a template without it, every slot that `names` lacks, as when
            drawing; with it, "a {pt1} {class}" would say the class word twice.
        caption: fills '{caption}'.

    Returns:
        (negative prompt, positive prompt), in the order in which branches are stacked.
    """
    slots = slot_names(template, names)
    unnamed = {} if "class" in slots else dict.fromkeys(slots, class_word)
    common = unnamed | {"class": class_word, "caption": caption}
    positive = {slot: words[0] for slot, words in names.items()}
    negative = {slot: words[1] for slot, words in names.items()}
    return fill_template(template, common | negative), fill_template(template, common | positive)


def _tidy(text: str) -> str:
    """Close the gaps of empty slots: weights of nothing, doubled spaces, spaces before commas, commas on end."""
    while text != (fewer := _EMPTY_GROUP.sub("", text)):
        text = fewer
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
    tags = _tags(caption)
    variants = []
    for _ in range(count):
        remaining = tags
        for transform in transforms:
            remaining = transform.apply(remaining, choices)
        variants.append(", ".join(remaining))
    return variants


def _tags(caption: str) -> list[str]:
    """Cut a caption at its commas; those within the braces of weighted words hold their tags together."""
    tags, depth = [""], 0
    for character in caption:
        depth += (character == "{") - (character == "}")
        if character == "," and depth <= 0:
            tags.append("")
        else:
            tags[-1] += character
    return [tag.strip() for tag in tags if tag.strip()]
