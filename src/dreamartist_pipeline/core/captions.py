"""Prompt templates, and transforms of caption tags."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import CaptionTransformParams
from dreamartist_pipeline.prompt_weights import parse_weights, quoted

_SLOT = re.compile(r"(?<!\$)\{(?P<name>\w+)(?P<weight>:[^{}:]*)?\}")
_USUAL_SLOT = re.compile(r"pt\d*|class|caption")
_EMPTY_GROUP = re.compile(r"(?<!\$)\{\s*(:[^{}:]*)?\}")
_OPEN, _CLOSE = "\x02", "\x03"  # replace the braces of slots while weights are parsed


def fill_template(template: str, slots: Mapping[str, str]) -> str:
    """Fill '{name}' slots; slots without a value are removed together with the space, comma or weight around them.

    '{name:1.2}' is a slot with a weight if `slots` has the name, or if it is 'pt1' (any number), 'class' or 'caption'.
    Otherwise it is a weighted word and is kept. '${name}' is plain text.

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
    """Fill the slots of a negative prompt; 'pt1' (any number), 'class' and 'caption' without a word are removed.

    Any other '{name}' is a weighted word, not a slot. `words` is slot -> trigger word.

    >>> fill_negative_prompt("{pt1}, {blurry}, {class}", {"pt1": "my-cat-neg"})
    'my-cat-neg, {blurry}'
    """
    weighted = {name: f"{{{name}}}" for name in slot_names(prompt) if not _USUAL_SLOT.fullmatch(name)}
    return fill_template(prompt, {**weighted, **words})


def slot_names(template: str, words: Collection[str] = ()) -> list[str]:
    """Return the slot names of a template, in order.

    `words` are the slots with trigger words; see `fill_template` for '{name:1.2}'.
    """
    return [match["name"] for match in _SLOT.finditer(template) if _is_slot(match, words)]


def check_slots(prompts: Collection[str], words: Collection[str]) -> None:
    """Check that prompts have no unknown slots, which would become the class word.

    Args:
        prompts: without their slots filled.
        words: the slots with trigger words; without any, every slot is the class word.

    Raises:
        InputError: a slot that is neither in `words` nor 'pt1' (any number), 'class' or 'caption'.
    """
    for prompt in prompts if words else ():
        for name in slot_names(prompt, words):
            if name not in words and not _USUAL_SLOT.fullmatch(name):
                raise InputError(
                    expected=f"only the slots {', '.join(f'{{{slot}}}' for slot in [*words, 'class'])} in prompts",
                    got=f"{{{name}}} in {quoted(prompt)}",
                    remedy=f"correct it, or write a weighted word with its weight, {{{name}:1.1}}",
                )


def without_weights(template: str, words: Collection[str] = ()) -> str:
    """Remove the weights of a template and keep its slots.

    >>> without_weights("a {{pt1}:1.2}, {blue:1.3} background")
    'a {pt1}, blue background'

    Raises:
        InputError: unbalanced braces or an invalid weight.
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
    """Fill one template for each branch.

    Args:
        template: text with slots: those of `names`, '{class}' and '{caption}'.
        names: slot -> (positive, negative) trigger word; ('', '') removes the slot in both branches.
        class_word: fills '{class}'. In a template without '{class}', it fills every slot that is not in `names`.
        caption: fills '{caption}'.

    Returns:
        (negative prompt, positive prompt), the order of the stacked branches.
    """
    slots = slot_names(template, names)
    unnamed = {} if "class" in slots else dict.fromkeys(slots, class_word)
    common = unnamed | {"class": class_word, "caption": caption}
    positive = {slot: words[0] for slot, words in names.items()}
    negative = {slot: words[1] for slot, words in names.items()}
    return fill_template(template, common | negative), fill_template(template, common | positive)


def _tidy(text: str) -> str:
    """Remove empty groups, repeated spaces and commas, and spaces before commas."""
    while text != (fewer := _EMPTY_GROUP.sub("", text)):
        text = fewer
    return " ".join(re.sub(r"(\s*,)+", ",", text).split()).strip(" ,")


# ------------------------------------------------------------------------------------------------- caption transforms


def caption_variants(caption: str, transforms: Sequence[CaptionTransformParams], count: int, seed: int) -> list[str]:
    """Draw `count` variants of a caption by applying all transforms in order; without transforms, return the caption.

    Duplicates are kept, so that a uniform choice among the variants has the probabilities of the transforms.
    """
    if not transforms:
        return [caption]
    choices = random.Random(seed)
    tags = _tags(caption)
    variants = []
    for _ in range(count):
        remaining = tags
        for transform in transforms:
            remaining = _transformed(remaining, transform, choices)
        variants.append(", ".join(remaining))
    return variants


def _transformed(tags: list[str], transform: CaptionTransformParams, choices: random.Random) -> list[str]:
    """Shuffle the tags, drop each one with probability p (tag_dropout), or all of them at once (tag_erase)."""
    match transform.kind:
        case "tag_shuffle":
            return choices.sample(tags, len(tags))
        case "tag_dropout":
            return [tag for tag in tags if choices.random() >= transform.p]
        case "tag_erase":
            return [] if choices.random() < transform.p else tags


def _tags(caption: str) -> list[str]:
    """Split a caption at its commas, except within the braces of weighted words."""
    tags, depth = [""], 0
    for character in caption:
        depth += (character == "{") - (character == "}")
        if character == "," and depth <= 0:
            tags.append("")
        else:
            tags[-1] += character
    return [tag.strip() for tag in tags if tag.strip()]
