"""The prompts that recognition is measured with: each asks for another background, and for one more thing or none."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dreamartist_pipeline.embedded.scenes import Scenes, Shown, all_tints, draw_scenes
from dreamartist_pipeline.embedded.sprites import SpriteSet

PLAIN, HARD = "plain", "hard"
GROUP_OF = {"background": PLAIN, "color": HARD, "style": HARD, "size": HARD}  # what a prompt asks to be different
ASKED_STYLES = ("flat", "glossy")  # of no reference picture; every object is drawn in them
REFERENCE_BACKGROUND = "white"
SLOT = "{}"  # where a prompt names its object

_SHARES = {"background": 2, "color": 1, "style": 1, "size": 1}  # of prompts, so that both groups are well known
_TINTED_SHARE = 0.5
_SCENES_PER_PROMPT, _MORE_SCENES = 1000, 2000  # one in 450 is of the rarest kind


@dataclass(frozen=True)
class Prompts:
    """Prompts with the scenes they describe.

    Attributes:
        scenes: one object each, of which only the place and the colours count; not its sprite.
        kinds: for each, what it asks to be different: a key of GROUP_OF.
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
    """Draw the prompts; the same seed draws the same.

    Args:
        num_prompts: of each hard kind; of plain ones there are twice as many.
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
    shown = tuple(scenes.shown[index] for index in chosen)
    rows = dataclasses.replace(scenes.rows(torch.tensor(chosen)), shown=shown)
    return Prompts(rows, tuple(str(kind_of(one)) for one in shown))


def _evenly(scenes: Scenes, indices: Sequence[int]) -> list[int]:
    """Return scenes in an order in which every colour, of the object or else of the background, comes equally often."""
    seen: Counter[str] = Counter()
    turns: list[tuple[int, int]] = []
    for index in indices:
        color = scenes.shown[index].tints[0] or scenes.shown[index].background
        seen[color] += 1
        turns.append((seen[color], index))
    return [index for _, index in sorted(turns)]


def kind_of(shown: Shown) -> str | None:
    """Return what a caption asks to be different beside the background, or None where it does not fit.

    It fits when it asks for one object before another plain background, and for at most one more thing.
    """
    if len(shown.objects) != 1 or shown.pattern != "plain" or shown.background == REFERENCE_BACKGROUND:
        return None
    if "background" not in shown.caption:
        return None
    asked = {"color": bool(shown.tints[0]), "style": "style" in shown.caption, "size": shown.layout == "small"}
    changed = [kind for kind, is_asked in asked.items() if is_asked]
    return {0: "background", 1: (changed or [""])[0]}.get(len(changed))


def fill(templates: Sequence[str], word: str) -> list[str]:
    """Put a word into templates, "an" before a vowel."""
    article = "an" if word[:1] in "aeiou" else "a"
    return [template.replace(f"a {SLOT}", f"{article} {SLOT}").replace(SLOT, word) for template in templates]
