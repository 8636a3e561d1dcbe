"""Templates, and how one of them becomes a prompt for each branch."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
