"""The judge: a small classifier that says what a picture of the embedded model's world shows.

It scores what the base model draws, and shares nothing with it: other layers, another seed, drawings rendered at
another size, disturbances of its own, and never an image that a base model or its autoencoder made. Each question
(`HEADS`) has a softmax of its own; a question that a scene does not pose, such as the tint of an object that keeps its
own colours, adds no loss and is never scored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from dreamartist_pipeline.embedded.colors import COLORS
from dreamartist_pipeline.embedded.scenes import LAYOUTS, PATTERNS, TINTS, Scenes, Shown, all_tints, draw_scenes
from dreamartist_pipeline.embedded.sprites import SpriteSet

IMAGE_PX = 64
NOTHING = "nothing"  # the second object of a scene that has one
ATTRIBUTES = ("object", "second_object", "style", "background", "pattern", "tint", "second_tint", "layout")

_SIDE_BY_SIDE = "beside"
_LOOKS_THE_SAME = "twins"  # as two equal objects placed beside each other
_UNORDERED_PATTERNS = ("striped", "checkered")  # whose two colours cover the same area
_SAME_WORDS = {  # head -> whose words and weights it shares
    "second_object": "first_object",
    "second_tint": "first_tint",
}
_NORM_GROUPS = 4
_NOT_ASKED = -100


@dataclass(frozen=True)
class JudgeVocabulary:
    """The words the judge can answer with, beside the fixed ones of the picture world."""

    objects: tuple[str, ...]
    styles: tuple[str, ...]

    def answers(self) -> dict[str, tuple[str, ...]]:
        """Return the possible words of every head, in the order of its logits."""
        return {
            "first_object": (*self.objects, NOTHING),
            "second_object": (*self.objects, NOTHING),
            "style": self.styles,
            "layout": LAYOUTS,
            "pattern": PATTERNS,
            "background": tuple(COLORS),
            "second_color": tuple(COLORS),
            "first_tint": TINTS,
            "second_tint": TINTS,
        }


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in one image, in words; first is left or top.

    second_object: NOTHING where there is none. second_color: of the pattern, if there is one. first_tint, second_tint:
    the tint, if the object has one. Of stripes and checks, whose colours are interchangeable, `background` is the one
    that comes first in COLORS.
    """

    first_object: str
    second_object: str
    style: str
    layout: str
    pattern: str
    background: str
    second_color: str
    first_tint: str
    second_tint: str


HEADS = tuple(field.name for field in fields(Verdict))


# ---------------------------------------------------------------------------------------------- the classifier


class Judge(nn.Module):
    """A residual convolutional network with group normalisation; each head has its own attention map.

    A question's own softmax over places pools the features it is answered from, so that an object is told by the same
    weights wherever it stands.

    Args:
        vocabulary: the words it answers with.
        channels: of the stem and of each block; every one of them halves the side.
    """

    def __init__(self, vocabulary: JudgeVocabulary, channels: Sequence[int]) -> None:
        super().__init__()
        self.vocabulary, self.channels = vocabulary, tuple(channels)
        self.stem = nn.Conv2d(3, channels[0], 5, stride=2, padding=2)
        self.blocks = nn.Sequential(*(_Block(*pair) for pair in pairwise(channels)))
        self.norm = nn.GroupNorm(_NORM_GROUPS, channels[-1])
        side = IMAGE_PX >> len(channels)
        self.gaze = nn.Conv2d(channels[-1], len(HEADS), 1)
        self.places = nn.Parameter(torch.zeros(len(HEADS), side, side))
        answers = vocabulary.answers()
        self.words = nn.ModuleDict(
            {_SAME_WORDS.get(head, head): nn.Linear(channels[-1], len(answers[head])) for head in HEADS}
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits `[B, answers]` of every head for images `[B, 3, 64, 64]` in [-1, 1].

        Raises:
            ValueError: images of another size.
        """
        if images.shape[1:] != (3, IMAGE_PX, IMAGE_PX):
            raise ValueError(f"expected images [B, 3, {IMAGE_PX}, {IMAGE_PX}], got {list(images.shape)}; resize them")
        features = F.silu(self.norm(self.blocks(self.stem(images))))
        attention = (self.gaze(features) + self.places).flatten(2).softmax(-1)  # [B, heads, places]
        pooled = attention @ features.flatten(2).transpose(1, 2)  # [B, heads, C]
        return {head: self.words[_SAME_WORDS.get(head, head)](pooled[:, i]) for i, head in enumerate(HEADS)}


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_NORM_GROUPS, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(_NORM_GROUPS, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual: torch.Tensor = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        skipped: torch.Tensor = self.skip(F.avg_pool2d(x, 2))
        return skipped + residual


# ---------------------------------------------------------------------------------------------- truth and verdict


def truth_of(shown: Shown) -> dict[str, str | None]:
    """Return the right word for every head, or None where the scene does not pose the question."""
    two = len(shown.objects) > 1
    background, second_color = _background_colors(shown)
    return {
        "first_object": shown.objects[0],
        "second_object": shown.objects[1] if two else NOTHING,
        "style": shown.style,
        "layout": _visible_layout(shown),
        "pattern": shown.pattern,
        "background": background,
        "second_color": second_color,
        "first_tint": shown.tints[0] or None,
        "second_tint": (shown.tints[1] or None) if two else None,
    }


def _background_colors(shown: Shown) -> tuple[str, str | None]:
    if shown.pattern == "plain":
        return shown.background, None
    if shown.pattern in _UNORDERED_PATTERNS:
        first, second = sorted((shown.background, shown.second_color), key=list(COLORS).index)
        return first, second
    return shown.background, shown.second_color


def _visible_layout(shown: Shown) -> str:
    things = set(zip(shown.objects, shown.tints, strict=True))
    return _LOOKS_THE_SAME if shown.layout == _SIDE_BY_SIDE and len(things) == 1 else shown.layout


def agreement(verdict: Verdict, shown: Shown) -> dict[str, bool | None]:
    """Say for each of ATTRIBUTES whether the verdict agrees with what is shown; None where nothing was asked.

    A second object is asked for where there is one; that there is none is a matter of the layout. The background
    agrees when both colours of a pattern do.
    """
    truth = truth_of(shown)
    right = {head: None if truth[head] is None else getattr(verdict, head) == truth[head] for head in HEADS}
    return {
        "object": right["first_object"],
        "second_object": right["second_object"] if len(shown.objects) > 1 else None,
        "style": right["style"],
        "background": right["background"] and right["second_color"] is not False,
        "pattern": right["pattern"],
        "tint": right["first_tint"],
        "second_tint": right["second_tint"],
        "layout": right["layout"],
    }


def said_in_caption(shown: Shown) -> frozenset[str]:
    """Return those of ATTRIBUTES that a scene's caption speaks of: style and background are sometimes left out."""
    unsaid: set[str] = set()
    if f"{shown.style} style" not in shown.caption:
        unsaid |= {"style"}
    if "background" not in shown.caption:
        unsaid |= {"background", "pattern"}
    return frozenset(ATTRIBUTES) - unsaid


# ---------------------------------------------------------------------------------------------- training, judging


def draw_hard_scenes(sprites: SpriteSet, num_scenes: int, seed: int) -> Scenes:
    """Draw scenes with every tint, as many small, paired or tinted objects as large ones in their own colours.

    The former are harder to tell, and rarer where the base model learns. The same seed draws the same scenes.
    """
    scenes = draw_scenes(sprites, 4 * num_scenes, seed, tints_of=all_tints)
    seen: Counter[tuple[bool, int, bool]] = Counter()
    turns: list[tuple[int, int]] = []  # a scene's turn within its kind, its index
    for index, shown in enumerate(scenes.shown):
        kind = (shown.layout == "small", len(shown.objects), any(shown.tints))
        seen[kind] += 1
        turns.append((seen[kind], index))
    chosen = [index for _, index in sorted(turns)[:num_scenes]]
    return replace(scenes.rows(torch.tensor(chosen)), shown=tuple(scenes.shown[index] for index in chosen))


def judge_loss(judge: Judge, images: torch.Tensor, shown: Sequence[Shown]) -> torch.Tensor:
    """Return the mean over heads of the cross-entropy, each over the images that pose its question.

    Args:
        judge: what is trained.
        images: `[B, 3, 64, 64]` in [-1, 1].
        shown: the truth about each image.
    """
    logits, truths = judge(images), [truth_of(one) for one in shown]
    losses = []
    for name, words in judge.vocabulary.answers().items():
        targets = [_NOT_ASKED if (word := truth[name]) is None else words.index(word) for truth in truths]
        target = torch.tensor(targets, device=images.device)
        total = F.cross_entropy(logits[name], target, ignore_index=_NOT_ASKED, reduction="sum")
        losses.append(total / (target != _NOT_ASKED).sum().clamp(min=1))
    return torch.stack(losses).mean()


@torch.no_grad()
def judge_images(judge: Judge, images: torch.Tensor, batch_size: int = 128) -> list[Verdict]:
    """Return a verdict on every image of `[N, 3, 64, 64]` in [-1, 1]."""
    answers = judge.vocabulary.answers()
    verdicts: list[Verdict] = []
    for batch in images.split(batch_size):
        chosen = {name: logits.argmax(1).tolist() for name, logits in judge(batch).items()}
        verdicts += [
            Verdict(**{name: answers[name][indices[row]] for name, indices in chosen.items()})
            for row in range(len(batch))
        ]
    return verdicts


# ---------------------------------------------------------------------------------------------- disturbances

_MAX_SHIFT_PX = 2
_SOFT_SIDES_PX = (36, 56)  # resampled down to and up again
_SOFT_PARTS = 2  # of half a batch, each of its own softness; the other half stays sharp
_MAX_GAIN, _MAX_OFFSET = 0.08, 0.06  # small, so that every colour keeps its name
_MAX_NOISE, _MAX_BLOTCHES = 0.10, 0.06  # standard deviations
_BLOTCHES_PX = 8


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Disturb images `[B, 3, H, W]` in [-1, 1]: shifts, softness, brightness and colour casts, fine and coarse noise.

    They stand for what an autoencoder and a sampler may do to a picture without changing what it shows.
    """
    images = _recolored(_softened(_shifted(images, generator), generator), generator)
    return _noised(images, generator).clamp(-1, 1)


def _shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    batch, _, height, width = images.shape
    device, reach = images.device, _MAX_SHIFT_PX
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    down, right = torch.randint(2 * reach + 1, (2, batch, 1), device=device, generator=generator)
    rows, columns = torch.arange(height, device=device) + down, torch.arange(width, device=device) + right  # [B, side]
    index = torch.arange(batch, device=device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # [B, H, W, 3] -> [B, 3, H, W]


def _softened(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    half = len(images) // 2
    parts = images[half:].chunk(_SOFT_PARTS)
    low, high = _SOFT_SIDES_PX
    sides = torch.randint(low, high + 1, (len(parts),), device=images.device, generator=generator).tolist()
    return torch.cat([images[:half], *(_resampled(part, side) for part, side in zip(parts, sides, strict=True))])


def _resampled(images: torch.Tensor, side_px: int) -> torch.Tensor:
    small = F.interpolate(images, size=(side_px, side_px), mode="bilinear", antialias=True)
    return F.interpolate(small, size=images.shape[2:], mode="bilinear")


def _recolored(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    gain = 1 + _MAX_GAIN * _signed(images, (len(images), 1, 1, 1), generator)
    return images * gain + _MAX_OFFSET * _signed(images, (len(images), 3, 1, 1), generator)


def _noised(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    batch, _, height, width = images.shape
    levels = torch.rand(2, batch, 1, 1, 1, device=images.device, generator=generator)
    fine = torch.randn(images.shape, device=images.device, generator=generator)
    coarse = torch.randn(batch, 3, _BLOTCHES_PX, _BLOTCHES_PX, device=images.device, generator=generator)
    blotches = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return images + _MAX_NOISE * levels[0] * fine + _MAX_BLOTCHES * levels[1] * blotches


def _signed(images: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, device=images.device, generator=generator) * 2 - 1
