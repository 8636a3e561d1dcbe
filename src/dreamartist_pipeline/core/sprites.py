"""The embedded model's picture world: sprites composed into captioned scenes.

A *sprite* is one emoji drawing with an alpha channel. A *scene* places one or two sprites, possibly tinted,
on a coloured and possibly patterned background, and comes with a caption that says exactly what it shows.
Drawing a scene (cheap, random) is kept apart from composing its pixels (batched tensor arithmetic on any device).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (50, 160, 70),
    "teal": (40, 170, 170),
    "blue": (50, 100, 220),
    "purple": (135, 70, 190),
    "pink": (245, 150, 190),
    "brown": (130, 85, 50),
    "gray": (140, 140, 140),
    "black": (25, 25, 25),
    "white": (255, 255, 255),
}
TINTS: tuple[str, ...] = tuple(name for name in COLORS if name not in ("black", "white"))
PATTERNS: tuple[str, ...] = ("plain", "striped", "dotted", "checkered")

_COLOR_JITTER = 12  # ± levels of 255, so that a colour word means a small region and not one value
_MID_LUMINANCE = 0.55  # luminance that a tint maps onto its pure colour


@dataclass(frozen=True)
class SpriteSet:
    """Sprites with their names.

    images: uint8 `[N, 4, side, side]`, RGBA with straight alpha.
    objects: per sprite, the object's word in captions, or "" when it is never named (autoencoder only).
    styles: per sprite, the style's word in captions.
    """

    images: torch.Tensor
    objects: tuple[str, ...]
    styles: tuple[str, ...]

    def named(self) -> list[int]:
        """Indices of the sprites that captions may name."""
        return [i for i, name in enumerate(self.objects) if name]


@dataclass(frozen=True)
class Scenes:
    """A batch of drawn scenes; every tensor is float32 with the batch first.

    sprite `[B, 2]` indices, -1 for none · place `[B, 2, 3]` centre x, y and side, as fractions of the image ·
    tint `[B, 2, 4]` on/off and RGB in 0..255 · pattern `[B]` index into PATTERNS ·
    colors `[B, 2, 3]` background and pattern RGB in 0..255 · shift `[B, 2]` pattern offset in pixels.
    """

    sprite: torch.Tensor
    place: torch.Tensor
    tint: torch.Tensor
    pattern: torch.Tensor
    colors: torch.Tensor
    shift: torch.Tensor
    captions: tuple[str, ...]

    def to(self, device: torch.device | str) -> Scenes:
        """Return the scenes on a device."""
        return Scenes(**{name: tensor.to(device) for name, tensor in self._tensors().items()}, captions=self.captions)

    def rows(self, chosen: torch.Tensor) -> Scenes:
        """Return the chosen scenes, to be composed; captions are left behind."""
        return Scenes(**{name: tensor[chosen] for name, tensor in self._tensors().items()}, captions=())

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "captions"}


@dataclass(frozen=True)
class _Scene:
    sprites: tuple[int, int]
    places: tuple[tuple[float, float, float], tuple[float, float, float]]
    tints: tuple[str, str]
    pattern: str
    background: str
    second_color: str
    caption: str


def draw_scenes(sprites: SpriteSet, num_scenes: int, seed: int, choices: Sequence[int] | None = None) -> Scenes:
    """Draw random scenes with captions.

    Args:
        sprites: where the pictures come from.
        num_scenes: how many.
        seed: the same seed draws the same scenes.
        choices: sprite indices to draw from; by default all that have a name.
    """
    rng = random.Random(seed)
    pool = list(choices) if choices is not None else sprites.named()
    by_style: dict[str, list[int]] = {}
    for index in pool:
        by_style.setdefault(sprites.styles[index], []).append(index)
    drawn = [_draw_scene(sprites, pool, by_style, rng) for _ in range(num_scenes)]
    return _stack(drawn, rng)


def _draw_scene(sprites: SpriteSet, pool: Sequence[int], by_style: dict[str, list[int]], rng: random.Random) -> _Scene:
    first = rng.choice(pool)
    style = sprites.styles[first]
    background = "white" if rng.random() < 0.08 else rng.choice(list(COLORS))
    second_color = rng.choice([name for name in COLORS if name != background])
    pattern = rng.choices(PATTERNS, weights=(0.82, 0.07, 0.055, 0.055))[0]
    tints = [_draw_tint(background, rng), ""]
    name = _colored(sprites.objects[first], tints[0])
    second, places = -1, [(0.5, 0.5, 0.0), (0.5, 0.5, 0.0)]
    layout = rng.choices(("one", "small", "pair", "twins"), weights=(0.76, 0.07, 0.12, 0.05))[0]
    if layout == "one":
        side = rng.uniform(0.8, 0.95)
        slack = 0.5 * (1 - side) * 0.6
        places[0] = (0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack), side)
        what = _with_article(name)
    elif layout == "small":
        places[0] = (0.5 + rng.uniform(-0.04, 0.04), 0.5 + rng.uniform(-0.04, 0.04), rng.uniform(0.4, 0.5))
        what = f"a small {name}"
    else:
        side = rng.uniform(0.45, 0.5)
        places = [(0.26, 0.5, side), (0.75, 0.5, side)]
        if layout == "twins":
            second, tints[1], what = first, tints[0], f"two {name}s"
        else:
            second, tints[1] = rng.choice(by_style[style]), _draw_tint(background, rng)
            other = _colored(sprites.objects[second], tints[1])
            what = f"{_with_article(name)} on the left and {_with_article(other)} on the right"
    caption = _caption(what, style, _background_phrase(pattern, background, second_color), rng)
    return _Scene(
        (first, second), (places[0], places[1]), (tints[0], tints[1]), pattern, background, second_color, caption
    )


def _draw_tint(background: str, rng: random.Random) -> str:
    return rng.choice([name for name in TINTS if name != background]) if rng.random() < 0.22 else ""


def _colored(name: str, tint: str) -> str:
    return f"{tint} {name}" if tint else name


def _with_article(name: str) -> str:
    return f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"


def _background_phrase(pattern: str, background: str, second_color: str) -> str:
    return {
        "plain": f"{background} background",
        "striped": f"{background} and {second_color} striped background",
        "dotted": f"{background} background with {second_color} dots",
        "checkered": f"{background} and {second_color} checkered background",
    }[pattern]


def _caption(what: str, style: str, background: str, rng: random.Random) -> str:
    """Compose a caption whose parts are sometimes missing and sometimes reordered, as people write them."""
    parts = [what]
    if rng.random() < 0.9:
        parts.append(f"{style} style")
    if rng.random() < 0.93:
        parts.append(background)
    if len(parts) == 3 and rng.random() < 0.2:
        parts = [parts[0], parts[2], parts[1]]
    return ", ".join(parts)


def _stack(drawn: Sequence[_Scene], rng: random.Random) -> Scenes:
    def jittered(name: str) -> list[float]:
        return [min(255.0, max(0.0, level + rng.uniform(-_COLOR_JITTER, _COLOR_JITTER))) for level in COLORS[name]]

    def tint(name: str) -> list[float]:
        return [1.0, *jittered(name)] if name else [0.0, 0.0, 0.0, 0.0]

    return Scenes(
        sprite=torch.tensor([scene.sprites for scene in drawn], dtype=torch.float32),
        place=torch.tensor([scene.places for scene in drawn], dtype=torch.float32),
        tint=torch.tensor([[tint(name) for name in scene.tints] for scene in drawn]),
        pattern=torch.tensor([PATTERNS.index(scene.pattern) for scene in drawn], dtype=torch.float32),
        colors=torch.tensor([[jittered(scene.background), jittered(scene.second_color)] for scene in drawn]),
        shift=torch.tensor([[rng.randrange(16), rng.randrange(16)] for _ in drawn], dtype=torch.float32),
        captions=tuple(scene.caption for scene in drawn),
    )


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
    """Recolour by luminance: the sprite's mean luminance maps to `color`, darker towards black, lighter towards white.

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
