"""Training data of the embedded base model: captioned scenes of sprites.

A *scene* is one or two sprites, optionally tinted, on a plain or patterned background, with a caption. Scenes are drawn
at random (cheap, on the CPU) and composed to pixels separately (batched, on any device).
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from dreamartist_pipeline.embedded.colors import COLORS
from dreamartist_pipeline.embedded.sprites import SpriteSet

TINTS: tuple[str, ...] = tuple(name for name in COLORS if name not in ("black", "white"))
PATTERNS: tuple[str, ...] = ("plain", "striped", "dotted", "checkered")
LAYOUTS: tuple[str, ...] = ("one", "small", "twins", "beside", "stacked")

_COLOR_JITTER = 12  # ± levels of 255, so that a colour word is a small region of colours
_MID_LUMINANCE = 0.55  # luminance that a tint maps onto its pure colour
TINTED_SHARE = 0.25  # of objects
_USUAL_WORDING = 0.8  # share of the first wording of each part of a caption
_NO_TINT = [0.0, 0.0, 0.0, 0.0]

_Place = tuple[float, float, float]  # centre x, centre y, side
_NOWHERE: _Place = (0.5, 0.5, 0.0)


@dataclass(frozen=True)
class Shown:
    """Labels and caption of one scene.

    Attributes:
        objects: words of the objects, left or top first.
        tints: colour word of each object, or "" for its own colours.
        style: word of the drawing style.
        layout: one of LAYOUTS.
        pattern: one of PATTERNS.
        background: colour word.
        second_color: colour word, visible in patterns only.
        caption: the prompt.
    """

    objects: tuple[str, ...]
    tints: tuple[str, ...]
    style: str
    layout: str
    pattern: str
    background: str
    second_color: str
    caption: str


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes.

    Attributes:
        sprite: `[B, 2]` indices, -1 for none; this and all other tensors are float32.
        place: `[B, 2, 3]` centre x, y and side, as fractions of the image.
        tint: `[B, 2, 4]` 0 or 1, and RGB in 0..255.
        pattern: `[B]` index into PATTERNS.
        colors: `[B, 2, 3]` RGB of background and pattern in 0..255.
        shift: `[B, 2]` offset of the pattern in pixels.
        shown: labels and captions, `B` entries; empty after `rows`.
    """

    sprite: torch.Tensor
    place: torch.Tensor
    tint: torch.Tensor
    pattern: torch.Tensor
    colors: torch.Tensor
    shift: torch.Tensor
    shown: tuple[Shown, ...] = ()

    def __len__(self) -> int:
        return len(self.sprite)

    @property
    def captions(self) -> tuple[str, ...]:
        """The caption of each scene."""
        return tuple(shown.caption for shown in self.shown)

    def to(self, device: torch.device | str) -> Scenes:
        """Return the scenes on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def rows(self, chosen: torch.Tensor) -> Scenes:
        """Return the chosen scenes, without `shown`."""
        return replace(self, **{name: tensor[chosen] for name, tensor in self._tensors().items()}, shown=())

    def subset(self, indices: Sequence[int]) -> Scenes:
        """Return the chosen scenes with their `shown`."""
        return replace(self.rows(torch.tensor(indices)), shown=tuple(self.shown[index] for index in indices))

    def _tensors(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "shown"}


# ---------------------------------------------------------------------------------------------- drawing scenes


TintRule = Callable[[str], Sequence[str]]
"""Word of an object -> tints that it is drawn with."""


def unseen_tints(word: str) -> tuple[str, ...]:
    """Return the two tints that an object never has in training, for tests of unseen combinations."""
    first = zlib.crc32(word.encode()) % len(TINTS)
    return TINTS[first], TINTS[(first + 3) % len(TINTS)]


def seen_tints(word: str) -> tuple[str, ...]:
    """Return the tints that an object has in training."""
    return tuple(tint for tint in TINTS if tint not in unseen_tints(word))


def all_tints(word: str) -> tuple[str, ...]:
    """Return every tint."""
    return TINTS


def draw_scenes(
    sprites: SpriteSet,
    num_scenes: int,
    seed: int,
    choices: Sequence[int] | None = None,
    tints_of: TintRule = seen_tints,
    tinted_share: float = TINTED_SHARE,
) -> Scenes:
    """Draw random scenes with captions.

    Args:
        sprites: the drawings.
        num_scenes: number of scenes.
        seed: the same seed draws the same scenes.
        choices: indices of the sprites to draw from, with repetitions; default: all named ones.
        tints_of: tints of an object.
        tinted_share: share of tinted objects.
    """
    rng = random.Random(seed)
    pool = list(choices) if choices is not None else sprites.named()
    by_style: dict[str, list[int]] = {}
    for index in pool:
        by_style.setdefault(sprites.styles[index], []).append(index)
    sampler = _SceneSampler(sprites, pool, by_style, tints_of, tinted_share, rng)
    return _stack([sampler.draw() for _ in range(num_scenes)], rng)


def interleaved(kinds: Sequence[Hashable]) -> list[int]:
    """Return all indices, ordered so that every first part has about the same number of each kind."""
    count: Counter[Hashable] = Counter()
    ranked: list[tuple[int, int]] = []
    for index, kind in enumerate(kinds):
        count[kind] += 1
        ranked.append((count[kind], index))
    return [index for _, index in sorted(ranked)]


@dataclass(frozen=True)
class _Scene:
    sprites: tuple[int, int]
    places: tuple[_Place, _Place]
    shown: Shown


@dataclass(frozen=True)
class _SceneSampler:
    """Draws random scenes."""

    sprites: SpriteSet
    pool: Sequence[int]
    by_style: dict[str, list[int]]
    tints_of: TintRule
    tinted_share: float
    rng: random.Random

    def draw(self) -> _Scene:
        rng = self.rng
        first = rng.choice(self.pool)
        style = self.sprites.styles[first]
        background = "white" if rng.random() < 0.08 else rng.choice(list(COLORS))
        second_color = rng.choice([name for name in COLORS if name != background])
        pattern = rng.choices(PATTERNS, weights=(0.82, 0.07, 0.055, 0.055))[0]
        layout = rng.choices(LAYOUTS, weights=(0.66, 0.07, 0.07, 0.12, 0.08))[0]
        indices, tints = [first], [self._tint(first, background)]
        if layout == "twins":
            indices, tints = indices * 2, tints * 2
        elif layout in ("beside", "stacked"):
            other = rng.choice(self.by_style[style])
            indices, tints = [*indices, other], [*tints, self._tint(other, background)]
        objects = tuple(self.sprites.objects[index] for index in indices)
        names = [f"{tint} {name}" if tint else name for name, tint in zip(objects, tints, strict=True)]
        caption = _caption(
            _arrangement(layout, names, rng), style, _background_phrase(pattern, background, second_color), rng
        )
        return _Scene(
            (first, indices[1] if len(indices) > 1 else -1),
            _places(layout, rng),
            Shown(objects, tuple(tints), style, layout, pattern, background, second_color, caption),
        )

    def _tint(self, index: int, background: str) -> str:
        allowed = [tint for tint in self.tints_of(self.sprites.objects[index]) if tint != background]
        return self.rng.choice(allowed) if self.rng.random() < self.tinted_share else ""


def _places(layout: str, rng: random.Random) -> tuple[_Place, _Place]:
    if layout == "one":
        side = rng.uniform(0.8, 0.95)
        slack = 0.5 * (1 - side) * 0.6
        return (0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack), side), _NOWHERE
    if layout == "small":
        return (0.5 + rng.uniform(-0.04, 0.04), 0.5 + rng.uniform(-0.04, 0.04), rng.uniform(0.4, 0.5)), _NOWHERE
    side = rng.uniform(0.45, 0.5)
    if layout == "stacked":
        return (0.5, 0.26, side), (0.5, 0.75, side)
    return (0.26, 0.5, side), (0.75, 0.5, side)


def _arrangement(layout: str, names: Sequence[str], rng: random.Random) -> str:
    """Return the phrase of objects and layout, mostly in the first of two wordings."""
    first, second = _with_article(names[0]), _with_article(names[-1])
    usual, other = {
        "one": (first, f"one {names[0]}"),
        "small": (f"a small {names[0]}", f"a tiny {names[0]}"),
        "twins": (f"two {names[0]}s", f"a pair of {names[0]}s"),
        "beside": (f"{first} on the left and {second} on the right", f"{first} left of {second}"),
        "stacked": (f"{first} above {second}", f"{second} below {first}"),
    }[layout]
    return usual if rng.random() < _USUAL_WORDING else other


def _with_article(name: str) -> str:
    return f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"


def _background_phrase(pattern: str, background: str, second_color: str) -> str:
    return {
        "plain": f"{background} background",
        "striped": f"{background} and {second_color} striped background",
        "dotted": f"{background} background with {second_color} dots",
        "checkered": f"{background} and {second_color} checkered background",
    }[pattern]


def _caption(objects: str, style: str, background: str, rng: random.Random) -> str:
    """Compose a caption; parts are sometimes omitted, reordered or worded differently."""
    parts = [objects]
    if rng.random() < 0.9:
        parts.append(f"{style} style" if rng.random() < _USUAL_WORDING else f"in {style} style")
    if rng.random() < 0.93:
        parts.append(background if rng.random() < _USUAL_WORDING else f"on a {background}")
    if len(parts) == 3 and rng.random() < 0.2:
        parts = [parts[0], parts[2], parts[1]]
    return ", ".join(parts)


def _stack(drawn: Sequence[_Scene], rng: random.Random) -> Scenes:
    def jittered(name: str) -> list[float]:
        return [min(255.0, max(0.0, level + rng.uniform(-_COLOR_JITTER, _COLOR_JITTER))) for level in COLORS[name]]

    def tints(names: Sequence[str]) -> list[list[float]]:
        rows = [[1.0, *jittered(name)] if name else _NO_TINT for name in names]
        return [*rows, _NO_TINT][:2]

    shown = tuple(scene.shown for scene in drawn)
    return Scenes(
        sprite=torch.tensor([scene.sprites for scene in drawn], dtype=torch.float32),
        place=torch.tensor([scene.places for scene in drawn], dtype=torch.float32),
        tint=torch.tensor([tints(one.tints) for one in shown]),
        pattern=torch.tensor([PATTERNS.index(one.pattern) for one in shown], dtype=torch.float32),
        colors=torch.tensor([[jittered(one.background), jittered(one.second_color)] for one in shown]),
        shift=torch.tensor([[rng.randrange(16), rng.randrange(16)] for _ in drawn], dtype=torch.float32),
        shown=shown,
    )


# ---------------------------------------------------------------------------------------------- painting them


def compose(sprite_images: torch.Tensor, scenes: Scenes, size_px: int) -> torch.Tensor:
    """Paint scenes: float32 `[B, 3, size_px, size_px]` in [-1, 1], on the device of `sprite_images`.

    Each sprite is resampled at twice the size and averaged down, so that edges are smooth.
    """
    image = _paint_backgrounds(scenes, size_px)
    for slot in range(2):
        present = (scenes.sprite[:, slot] >= 0).nonzero().flatten()
        if len(present):
            layer = _place_sprites(sprite_images, scenes, slot, present, size_px)
            image[present] = image[present] * (1 - layer[:, 3:]) + layer[:, :3]
    return image * 2 - 1


def _paint_backgrounds(scenes: Scenes, size_px: int) -> torch.Tensor:
    device = scenes.pattern.device
    y, x = torch.meshgrid(*[torch.arange(size_px, device=device, dtype=torch.float32)] * 2, indexing="ij")
    x, y = x[None] + scenes.shift[:, 0, None, None], y[None] + scenes.shift[:, 1, None, None]  # [B, H, W]
    cell = size_px / 8
    stripes = (x / cell).floor() % 2 == 0
    period = 2 * cell
    dots = ((x % period - cell) ** 2 + (y % period - cell) ** 2) >= (cell / 2) ** 2
    checks = ((x / cell).floor() + (y / cell).floor()) % 2 == 0
    first = torch.stack([torch.ones_like(stripes), stripes, dots, checks], dim=1)  # [B, 4, H, W]
    chosen = first[torch.arange(len(first), device=device), scenes.pattern.long()][:, None]  # [B, 1, H, W]
    colors = scenes.colors[..., None, None] / 255
    return torch.where(chosen, colors[:, 0], colors[:, 1])


def _place_sprites(
    sprite_images: torch.Tensor, scenes: Scenes, slot: int, present: torch.Tensor, size_px: int
) -> torch.Tensor:
    """Resample the sprites of one slot onto the canvas: premultiplied RGBA `[len(present), 4, size_px, size_px]`."""
    rgba = sprite_images[scenes.sprite[present, slot].long()].float() / 255
    rgb, alpha = rgba[:, :3], rgba[:, 3:]
    tint = scenes.tint[present, slot]
    rgb = torch.where(tint[:, :1, None, None] > 0.5, tinted(rgb, alpha, tint[:, 1:] / 255), rgb)
    x, y, side = scenes.place[present, slot].unbind(-1)
    affine = torch.zeros(len(present), 2, 3, device=rgb.device)
    affine[:, 0, 0] = affine[:, 1, 1] = 1 / side
    affine[:, 0, 2] = (1 - 2 * x) / side
    affine[:, 1, 2] = (1 - 2 * y) / side
    grid = F.affine_grid(affine, [len(present), 4, 2 * size_px, 2 * size_px], align_corners=False)
    large = F.grid_sample(torch.cat([rgb * alpha, alpha], dim=1), grid, align_corners=False)
    return F.avg_pool2d(large, 2)


def tinted(rgb: torch.Tensor, alpha: torch.Tensor, color: torch.Tensor) -> torch.Tensor:
    """Recolour by luminance: the mean luminance maps to `color`, darker to black, lighter to white.

    Args:
        rgb: `[B, 3, H, W]` in 0..1.
        alpha: `[B, 1, H, W]` in 0..1.
        color: `[B, 3]` in 0..1.
    """
    weights = torch.tensor([0.299, 0.587, 0.114], device=rgb.device).view(1, 3, 1, 1)
    luminance = (rgb * weights).sum(1, keepdim=True)
    mean = (luminance * alpha).sum((2, 3), keepdim=True) / alpha.sum((2, 3), keepdim=True).clamp(min=1)
    exponent = torch.tensor(_MID_LUMINANCE, device=rgb.device).log() / mean.clamp(0.15, 0.85).log()
    luminance = luminance.clamp(1e-3, 1) ** exponent
    color = color[..., None, None]
    dark = color * luminance / _MID_LUMINANCE
    light = color + (1 - color) * (luminance - _MID_LUMINANCE) / (1 - _MID_LUMINANCE)
    return torch.where(luminance < _MID_LUMINANCE, dark, light).clamp(0, 1)
