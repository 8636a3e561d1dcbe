"""Sprites, drawings with an alpha channel: selection from published packages, names, rasterisation."""

from __future__ import annotations

import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import PretrainParams

if TYPE_CHECKING:
    import numpy as np

SpritePackages = dict[str, dict[str, Any]]
"""Package -> stem of a JSON file -> its content."""

EMOJI_NAMES = "emojibase-data"  # code points with their groups
NAMES_BY_CODE_POINT = "noto"  # names the icons of packages that have no code points
_DRAWN_GROUPS = {0, 3, 4, 5, 6, 7}  # faces, animals, food, travel, activities, objects; no people, symbols, flags
_MIN_COVERAGE = 0.02  # share of opaque pixels; drawings with less are empty or unreadable


@dataclass(frozen=True)
class SpriteSet:
    """Sprites with their names.

    Attributes:
        images: uint8 `[N, 4, side, side]`, RGBA with straight alpha.
        objects: `N` words of objects in captions; "" is never named (autoencoder only).
        styles: `N` words of styles in captions.
    """

    images: torch.Tensor
    objects: tuple[str, ...]
    styles: tuple[str, ...]

    def named(self) -> list[int]:
        """Return the indices of sprites with an object word."""
        return [i for i, name in enumerate(self.objects) if name]


def choose_sprites(packages: SpritePackages, params: PretrainParams) -> Iterator[tuple[str, str, str]]:
    """Yield (svg, object word or "", style word) of every training sprite.

    Captions name the objects of `params.objects` and `params.published_objects` in the packages of `params.styles`.
    All other drawings train the autoencoder only. Held-out objects and styles are excluded.

    Raises:
        InputError: an object of `params.objects` is missing from a style.
    """
    labels = _published_labels(packages, params)
    named = {_normal(code): word for word, code in params.objects.items()}
    words = _published_words(packages, params, labels) | named
    for package in (*params.styles, *params.autoencoder_only_packages):
        style, names = params.styles.get(package, ""), icon_names(packages, package)
        for code in labels:
            if code in names:
                yield icon_svg(packages[package]["icons"], names[code]), words.get(code, "") if style else "", style
            elif style and code in named:
                raise InputError(
                    expected=f"{named[code]!r} ({code}) in the sprite package {package!r}",
                    got="none",
                    remedy="remove it from pretrain.objects",
                )


def _published_labels(packages: SpritePackages, params: PretrainParams) -> dict[str, str]:
    """Return code point -> normalised label of all drawable emoji that are not held out."""
    held_out = {_normal(code) for code in params.held_out_objects.values()}
    return {
        code: _plain(str(emoji.get("label", "")))
        for emoji in packages[EMOJI_NAMES]["data"]
        if emoji.get("group") in _DRAWN_GROUPS and (code := _normal(emoji["hexcode"])) not in held_out
    }


def _plain(label: str) -> str:
    """Return a label in lower-case ASCII letters: "Piñata" becomes "pinata", "woman’s hat" "womans hat"."""
    letters = unicodedata.normalize("NFKD", label.lower().replace("’", ""))
    return " ".join(re.findall(r"[a-z]+", "".join(c for c in letters if not unicodedata.combining(c))))


def _published_words(packages: SpritePackages, params: PretrainParams, labels: dict[str, str]) -> dict[str, str]:
    """Return code point -> word of the objects named by their published labels.

    Labels that are ambiguous, held out or in `params.objects` are skipped. Of a group of look-alikes, the drawing
    with the most styles is used, under the group's word.

    Raises:
        InputError: `published_objects` lists an unknown label.
    """
    rule = params.published_objects
    if rule is None:
        return {}
    drawn = Counter(code for package in params.styles for code in icon_names(packages, package))
    code_of = {label: code for code, label in labels.items() if drawn[code] >= rule.min_styles}
    shared = {label for group in rule.look_alikes.values() for label in group}
    if unknown := sorted({*rule.left_out, *shared} - set(labels.values())):
        raise InputError(
            expected="published names in pretrain.published_objects",
            got=", ".join(map(repr, unknown)),
            remedy="correct or remove them",
        )
    taken = {*params.objects, *params.held_out_objects, *rule.left_out}
    ambiguous = {label for label, count in Counter(labels.values()).items() if count > 1}
    single = {label: [label] for label in code_of if label not in shared and len(label.split()) <= rule.max_words}
    words: dict[str, str] = {}
    for word, group in {**single, **rule.look_alikes}.items():
        known = [label for label in group if label in code_of and label not in taken | ambiguous]
        if word and word not in taken and known:
            words[code_of[max(known, key=lambda label: drawn[code_of[label]])]] = word
    return words


def choose_held_out_sprites(packages: SpritePackages, params: PretrainParams) -> Iterator[tuple[str, str, str]]:
    """Yield (svg, object word, style word) of the held-out objects, in every style that has them."""
    for package, style in params.styles.items():
        names = icon_names(packages, package)
        for word, code in params.held_out_objects.items():
            if _normal(code) in names:
                yield icon_svg(packages[package]["icons"], names[_normal(code)]), word, style


def icon_names(packages: SpritePackages, package: str) -> dict[str, str]:
    """Return code point -> icon name of a package, by its own code points or else by those of noto."""
    chars = packages[package].get("chars") or packages[NAMES_BY_CODE_POINT]["chars"]
    icons = packages[package]["icons"]["icons"]
    return {_normal(code): name for code, name in chars.items() if name in icons}


def icon_svg(collection: dict[str, Any], name: str) -> str:
    """Return one icon of an iconify collection as an SVG document."""
    icon = collection["icons"][name]
    width, height = (icon.get(key, collection.get(key, 16)) for key in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def draw_sprites(drawings: Iterable[tuple[str, str, str]], side_px: int) -> SpriteSet:
    """Rasterise drawings, as `choose_sprites` yields them; empty ones are left out."""
    import numpy as np

    rendered = [(image, word, style) for svg, word, style in drawings if (image := rasterize(svg, side_px)) is not None]
    images, words, styles = zip(*rendered, strict=True)
    return SpriteSet(torch.from_numpy(np.stack(images)), words, styles)


def rasterize(svg: str, side_px: int) -> np.ndarray | None:
    """Rasterise an SVG to uint8 `[4, side_px, side_px]` RGBA; None if nearly nothing is opaque."""
    import numpy as np
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=side_px, height=side_px, skip_system_fonts=True)
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((side_px, side_px)))
    return pixels.transpose(2, 0, 1) if (pixels[..., 3] > 128).mean() >= _MIN_COVERAGE else None


def _normal(code: str) -> str:
    return code.lower().replace("-fe0f", "")
