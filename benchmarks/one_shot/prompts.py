"""Prompts of the recognition benchmark: another background than the reference, and at most one more difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dreamartist_pipeline.embedded.scenes import Scenes, Shown, all_tints, draw_scenes, interleaved
from dreamartist_pipeline.embedded.sprites import SpriteSet

PLAIN, HARD = "plain", "hard"
GROUP_OF = {"background": PLAIN, "color": HARD, "style": HARD, "size": HARD}  # difference from the reference -> group
ASKED_STYLES = ("flat", "glossy")  # styles of no reference picture, with drawings of every object
REFERENCE_BACKGROUND = "white"
SLOT = "{}"  # placeholder of the object

_SHARES = {"background": 2, "color": 1, "style": 1, "size": 1}  # of prompts; both groups have enough
_TINTED_SHARE = 0.5
_SCENES_PER_PROMPT, _MORE_SCENES = 1000, 2000  # one in 450 is of the rarest kind


@dataclass(frozen=True)
class Prompts:
    """Prompts with the scenes they describe.

    Attributes:
        scenes: one object each; the sprite is a placeholder.
        kinds: of each prompt, a key of GROUP_OF.
    """

    scenes: Scenes
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def templates(self) -> tuple[str, ...]:
        """The captions, with SLOT in place of the object."""
        return self.scenes.captions


def draw_prompts(num_prompts: int, seed: int) -> Prompts:
    """Draw the prompts.

    Args:
        num_prompts: per hard kind; twice as many plain ones.
        seed: of the scenes.
    """
    slots = SpriteSet(torch.empty(0, 4, 1, 1, dtype=torch.uint8), (SLOT,) * len(ASKED_STYLES), ASKED_STYLES)
    num_scenes = _SCENES_PER_PROMPT * num_prompts + _MORE_SCENES
    scenes = draw_scenes(slots, num_scenes, seed, tints_of=all_tints, tinted_share=_TINTED_SHARE)
    chosen: list[int] = []
    for kind, share in _SHARES.items():
        of_kind = [index for index, shown in enumerate(scenes.shown) if kind_of(shown) == kind]
        if len(of_kind) < share * num_prompts:
            raise ValueError(f"expected {share * num_prompts} prompts of the kind {kind!r}, got {len(of_kind)}")
        chosen += _evenly(scenes, of_kind)[: share * num_prompts]
    drawn = scenes.subset(chosen)
    return Prompts(drawn, tuple(str(kind_of(shown)) for shown in drawn.shown))


def _evenly(scenes: Scenes, indices: Sequence[int]) -> list[int]:
    """Order scenes so that every colour, of the object or else of the background, is equally frequent."""
    colors = [scenes.shown[index].tints[0] or scenes.shown[index].background for index in indices]
    return [indices[position] for position in interleaved(colors)]


def kind_of(shown: Shown) -> str | None:
    """Return the kind of a caption, or None if the benchmark does not use it.

    Used are captions with one object, another plain background, and at most one more difference.
    """
    if len(shown.objects) != 1 or shown.pattern != "plain" or shown.background == REFERENCE_BACKGROUND:
        return None
    if "background" not in shown.caption:
        return None
    asked = {"color": bool(shown.tints[0]), "style": "style" in shown.caption, "size": shown.layout == "small"}
    changed = [kind for kind, is_asked in asked.items() if is_asked]
    return {0: "background", 1: (changed or [""])[0]}.get(len(changed))


def fill(templates: Sequence[str], word: str) -> list[str]:
    """Fill a word into templates, with "an" before a vowel."""
    article = "an" if word[:1] in "aeiou" else "a"
    return [template.replace(f"a {SLOT}", f"{article} {SLOT}").replace(SLOT, word) for template in templates]
