"""Sprites, one drawing with an alpha channel each: which published ones to take, their names, how to rasterise them."""

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
NAMES_BY_CODE_POINT = "noto"  # the package whose icon names stand in where a package has no code points
_DRAWN_GROUPS = {0, 3, 4, 5, 6, 7}  # faces, animals, food, travel, activities, objects; no people, symbols, flags
_MIN_COVERAGE = 0.02  # of opaque pixels; less is an empty or unreadable drawing


@dataclass(frozen=True)
class SpriteSet:
    """Sprites with their names.

    Attributes:
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


def choose_sprites(packages: SpritePackages, params: PretrainParams) -> Iterator[tuple[str, str, str]]:
    """Yield (svg, object word or "", style word) of every sprite the model may see.

    Objects in captions are those of `params.objects` in the packages of `params.styles`, and those that
    `params.published_objects` describes. All other drawings of all packages widen what the autoencoder sees. Held-out
    objects and styles are left out of everything.

    Raises:
        InputError: if a named object is missing from a style.
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
    """Return the labels, in plain letters, of all code points of drawable groups that are not held out."""
    held_out = {_normal(code) for code in params.held_out_objects.values()}
    return {
        code: _plain(str(emoji.get("label", "")))
        for emoji in packages[EMOJI_NAMES]["data"]
        if emoji.get("group") in _DRAWN_GROUPS and (code := _normal(emoji["hexcode"])) not in held_out
    }


def _plain(label: str) -> str:
    """Return a label in lower case and plain letters: "Piñata" is "pinata", "woman’s hat" is "womans hat"."""
    letters = unicodedata.normalize("NFKD", label.lower().replace("’", ""))
    return " ".join(re.findall(r"[a-z]+", "".join(c for c in letters if not unicodedata.combining(c))))


def _published_words(packages: SpritePackages, params: PretrainParams, labels: dict[str, str]) -> dict[str, str]:
    """Return code point -> word of the objects known by their published names.

    Names that are taken, held out or given twice name nothing. Of look-alikes the first of those that most styles draw
    stands for all, under the name they share.

    Raises:
        InputError: a listed name is no published one.
    """
    rule = params.published_objects
    if rule is None:
        return {}
    drawn = Counter(code for package in params.styles for code in icon_names(packages, package))
    code_of = {label: code for code, label in labels.items() if drawn[code] >= rule.min_styles}
    _check_published({*rule.left_out, *(label for group in rule.look_alikes.values() for label in group)}, labels)
    taken = {*params.objects, *params.held_out_objects, *rule.left_out}
    ambiguous = {label for label, count in Counter(labels.values()).items() if count > 1}
    shared = {label for group in rule.look_alikes.values() for label in group}
    alone = {label: [label] for label in code_of if label not in shared and len(label.split()) <= rule.max_words}
    words: dict[str, str] = {}
    for word, group in ({**alone, **rule.look_alikes}).items():
        known = [label for label in group if label in code_of and label not in taken | ambiguous]
        if word and word not in taken and known:
            words[code_of[max(known, key=lambda label: drawn[code_of[label]])]] = word
    return words


def _check_published(names: Iterable[str], labels: dict[str, str]) -> None:
    if unknown := sorted(set(names) - set(labels.values())):
        raise InputError(
            expected="published names in pretrain.published_objects",
            got=f"{', '.join(map(repr, unknown))}",
            remedy="correct or remove them",
        )


def choose_held_out_sprites(packages: SpritePackages, params: PretrainParams) -> Iterator[tuple[str, str, str]]:
    """Yield (svg, object word, style word) of the objects that no stage may see, in every style that draws them."""
    for package, style in params.styles.items():
        names = icon_names(packages, package)
        for word, code in params.held_out_objects.items():
            if _normal(code) in names:
                yield icon_svg(packages[package]["icons"], names[_normal(code)]), word, style


def icon_names(packages: SpritePackages, package: str) -> dict[str, str]:
    """Map code points to a package's icons: by its own code points, else by the names the noto set gives them."""
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
    """Render drawings, as `choose_sprites` yields them, to a sprite set; those that show nothing are left out."""
    import numpy as np

    rendered = [(image, word, style) for svg, word, style in drawings if (image := rasterize(svg, side_px)) is not None]
    images, words, styles = zip(*rendered, strict=True)
    return SpriteSet(torch.from_numpy(np.stack(images)), words, styles)


def rasterize(svg: str, side_px: int) -> np.ndarray | None:
    """Render an SVG to uint8 `[4, side_px, side_px]` RGBA, or None when nothing is drawn."""
    import numpy as np
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=side_px, height=side_px, skip_system_fonts=True)
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((side_px, side_px)))
    return pixels.transpose(2, 0, 1) if (pixels[..., 3] > 128).mean() >= _MIN_COVERAGE else None


def _normal(code: str) -> str:
    return code.lower().replace("-fe0f", "")
