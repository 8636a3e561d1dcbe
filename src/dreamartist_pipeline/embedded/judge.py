"""The judge: a small classifier of the embedded base model's images.

It evaluates the base model and is independent of it: other layers, another seed, drawings rendered at another
resolution, augmentation, and no training image from a base model or its autoencoder. Each attribute (`HEADS`) has its
own softmax. An attribute without a label in a scene, such as the tint of an object in its own colours, adds no loss and
is not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from dreamartist_pipeline.embedded.colors import COLORS
from dreamartist_pipeline.embedded.scenes import (
    LAYOUTS,
    PATTERNS,
    TINTS,
    Scenes,
    Shown,
    all_tints,
    draw_scenes,
    interleaved,
)
from dreamartist_pipeline.embedded.sprites import SpriteSet

IMAGE_PX = 64
NOTHING = "nothing"  # label of the second object in a scene with one object
ATTRIBUTES = ("object", "second_object", "style", "background", "pattern", "tint", "second_tint", "layout")

_SIDE_BY_SIDE = "beside"
_TWINS = "twins"  # looks like two equal objects beside each other
_UNORDERED_PATTERNS = ("striped", "checkered")  # whose two colours cover the same area
_SHARED_WITH = {  # head -> head whose words and weights it shares
    "second_object": "first_object",
    "second_tint": "first_tint",
}
_NORM_GROUPS = 4
_NO_LABEL = -100


@dataclass(frozen=True)
class JudgeVocabulary:
    """Classes of the judge that depend on the sprites."""

    objects: tuple[str, ...]
    styles: tuple[str, ...]

    def answers(self) -> dict[str, tuple[str, ...]]:
        """Return the classes of every head, in the order of its logits."""
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
    """Prediction of the judge for one image. Every head always predicts; first is left or top.

    Attributes:
        first_object: its word.
        second_object: its word, or NOTHING.
        style: its word in captions.
        layout: one of LAYOUTS.
        pattern: one of PATTERNS.
        background: its colour; of the colours of stripes and checks, the first in COLORS.
        second_color: of the pattern; meaningless without one.
        first_tint: of the first object; meaningless without a tint.
        second_tint: of the second object; likewise.
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
    """A residual convolutional network with group normalisation and an attention map per head.

    Each head pools the features by its own softmax over positions, so one set of weights recognises an object anywhere.

    Args:
        vocabulary: the classes.
        channels: of the stem and of each block; each of them halves the resolution.
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
            {_SHARED_WITH.get(head, head): nn.Linear(channels[-1], len(answers[head])) for head in HEADS}
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits `[B, answers]` of every head for images `[B, 3, 64, 64]` in [-1, 1].

        Raises:
            ValueError: images of another size.
        """
        if images.shape[1:] != (3, IMAGE_PX, IMAGE_PX):
            raise ValueError(f"expected images [B, 3, {IMAGE_PX}, {IMAGE_PX}], got {list(images.shape)}")
        features = F.silu(self.norm(self.blocks(self.stem(images))))
        attention = (self.gaze(features) + self.places).flatten(2).softmax(-1)  # [B, heads, places]
        pooled = attention @ features.flatten(2).transpose(1, 2)  # [B, heads, C]
        return {head: self.words[_SHARED_WITH.get(head, head)](pooled[:, i]) for i, head in enumerate(HEADS)}


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


# ---------------------------------------------------------------------------------------------- labels


def labels_of(shown: Shown) -> dict[str, str | None]:
    """Return the label of every head, or None where the scene has none."""
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
    kinds = set(zip(shown.objects, shown.tints, strict=True))
    return _TWINS if shown.layout == _SIDE_BY_SIDE and len(kinds) == 1 else shown.layout


def agreement(verdict: Verdict, shown: Shown) -> dict[str, bool | None]:
    """Return for each of ATTRIBUTES whether the verdict is right; None where the scene has no label.

    `second_object` has a label in scenes with two objects. The background is right if both colours of a pattern are.
    """
    labels = labels_of(shown)
    right = {head: None if labels[head] is None else getattr(verdict, head) == labels[head] for head in HEADS}
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


def attributes_in_caption(shown: Shown) -> frozenset[str]:
    """Return the ATTRIBUTES that the caption of a scene names; style and background may be omitted."""
    omitted: set[str] = set()
    if f"{shown.style} style" not in shown.caption:
        omitted |= {"style"}
    if "background" not in shown.caption:
        omitted |= {"background", "pattern"}
    return frozenset(ATTRIBUTES) - omitted


# ---------------------------------------------------------------------------------------------- training, judging


def draw_hard_scenes(sprites: SpriteSet, num_scenes: int, seed: int) -> Scenes:
    """Draw scenes with every tint, balanced over size, number of objects, and tinted or not.

    Small, paired and tinted objects are harder to classify, and rare in the base model's training scenes. The same
    seed draws the same scenes.
    """
    scenes = draw_scenes(sprites, 4 * num_scenes, seed, tints_of=all_tints)
    kinds = [(one.layout == "small", len(one.objects), any(one.tints)) for one in scenes.shown]
    return scenes.subset(interleaved(kinds)[:num_scenes])


def judge_loss(judge: Judge, images: torch.Tensor, shown: Sequence[Shown]) -> torch.Tensor:
    """Return the mean over heads of the cross-entropy, each averaged over the images with a label.

    Args:
        judge: the trained model.
        images: `[B, 3, 64, 64]` in [-1, 1].
        shown: the scene of each image.
    """
    logits, all_labels = judge(images), [labels_of(one) for one in shown]
    losses = []
    for name, words in judge.vocabulary.answers().items():
        targets = [_NO_LABEL if (word := labels[name]) is None else words.index(word) for labels in all_labels]
        target = torch.tensor(targets, device=images.device)
        total = F.cross_entropy(logits[name], target, ignore_index=_NO_LABEL, reduction="sum")
        losses.append(total / (target != _NO_LABEL).sum().clamp(min=1))
    return torch.stack(losses).mean()


@torch.no_grad()
def judge_images(judge: Judge, images: torch.Tensor, batch_size: int = 128) -> list[Verdict]:
    """Return the verdicts on images `[N, 3, 64, 64]` in [-1, 1]."""
    answers = judge.vocabulary.answers()
    verdicts: list[Verdict] = []
    for batch in images.split(batch_size):
        chosen = {name: logits.argmax(1).tolist() for name, logits in judge(batch).items()}
        verdicts += [
            Verdict(**{name: answers[name][indices[row]] for name, indices in chosen.items()})
            for row in range(len(batch))
        ]
    return verdicts


# ---------------------------------------------------------------------------------------------- augmentation

_MAX_SHIFT_PX = 2
_BLUR_SIDES_PX = (36, 56)  # downsampled to, then upsampled again
_BLUR_PARTS = 2  # of half a batch, each with its own resolution; the other half stays sharp
_MAX_GAIN, _MAX_OFFSET = 0.08, 0.06  # small, so that colours keep their names
_MAX_NOISE, _MAX_BLOTCHES = 0.10, 0.06  # standard deviations
_BLOTCHES_PX = 8


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Augment images `[B, 3, H, W]` in [-1, 1]: shifts, blur, brightness and colour casts, fine and coarse noise.

    These imitate the artefacts of an autoencoder and a sampler.
    """
    images = _recolored(_blurred(_shifted(images, generator), generator), generator)
    return _noised(images, generator).clamp(-1, 1)


def _shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    batch, _, height, width = images.shape
    device, reach = images.device, _MAX_SHIFT_PX
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    down, right = torch.randint(2 * reach + 1, (2, batch, 1), device=device, generator=generator)
    rows, columns = torch.arange(height, device=device) + down, torch.arange(width, device=device) + right  # [B, side]
    index = torch.arange(batch, device=device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # [B, H, W, 3] -> [B, 3, H, W]


def _blurred(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    half = len(images) // 2
    parts = images[half:].chunk(_BLUR_PARTS)
    low, high = _BLUR_SIDES_PX
    sides = torch.randint(low, high + 1, (len(parts),), device=images.device, generator=generator).tolist()
    small = [
        F.interpolate(part, size=(side, side), mode="bilinear", antialias=True)
        for part, side in zip(parts, sides, strict=True)
    ]
    return torch.cat([images[:half], *(F.interpolate(part, size=images.shape[2:], mode="bilinear") for part in small)])


def _recolored(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    gain = 1 + _MAX_GAIN * _uniform((len(images), 1, 1, 1), generator)
    return images * gain + _MAX_OFFSET * _uniform((len(images), 3, 1, 1), generator)


def _noised(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    batch, _, height, width = images.shape
    levels = torch.rand(2, batch, 1, 1, 1, device=images.device, generator=generator)
    fine = torch.randn(images.shape, device=images.device, generator=generator)
    coarse = torch.randn(batch, 3, _BLOTCHES_PX, _BLOTCHES_PX, device=images.device, generator=generator)
    blotches = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return images + _MAX_NOISE * levels[0] * fine + _MAX_BLOTCHES * levels[1] * blotches


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, device=generator.device, generator=generator) * 2 - 1
