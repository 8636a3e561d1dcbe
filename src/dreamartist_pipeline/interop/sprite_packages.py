"""From published icon packages to sprites: which drawings to take, what to call them, how to rasterise them."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.params import PretrainParams

if TYPE_CHECKING:
    import numpy as np

    from dreamartist_pipeline.core.sprites import SpriteSet
    from dreamartist_pipeline.datasets.sprites import SpritePackages

EMOJI_NAMES = "emojibase-data"  # code points with their groups
NAMES_BY_CODE_POINT = "noto"  # the package whose icon names stand in where a package has no code points
_DRAWN_GROUPS = {0, 3, 4, 5, 6, 7}  # faces, animals, food, travel, activities, objects; no people, symbols, flags
_MIN_COVERAGE = 0.02  # of opaque pixels; less is an empty or unreadable drawing


def choose_sprites(packages: SpritePackages, params: PretrainParams) -> Iterator[tuple[str, str, str]]:
    """Yield (svg, object word or "", style word) of every sprite the model may see.

    Objects in captions are those of `params.objects` in the packages of `params.styles`, and with `params.all_objects`
    everything else that all these packages draw. All other drawings of all packages widen what the autoencoder sees.
    Held-out objects and styles are left out of everything.

    Raises:
        InputError: if a named object is missing from a style.
    """
    labels = _published_labels(packages, params)
    words = {_normal(code): word for word, code in params.objects.items()}
    if params.all_objects:
        words = _common_words(packages, params, labels) | words
    for package in (*params.styles, *params.autoencoder_only_packages):
        style, names = params.styles.get(package, ""), icon_names(packages, package)
        for code in labels:
            if code in names:
                yield icon_svg(packages[package]["icons"], names[code]), words.get(code, "") if style else "", style
            elif style and code in words:
                raise InputError(
                    f"expected {words[code]!r} ({code}) in the sprite package {package!r}, found none; "
                    "remove it from pretrain.objects"
                )


def _published_labels(packages: SpritePackages, params: PretrainParams) -> dict[str, str]:
    """Return the labels of all code points of drawable groups that are not held out."""
    held_out = {_normal(code) for code in params.held_out_objects.values()}
    return {
        code: str(emoji.get("label", ""))
        for emoji in packages[EMOJI_NAMES]["data"]
        if emoji.get("group") in _DRAWN_GROUPS and (code := _normal(emoji["hexcode"])) not in held_out
    }


def _common_words(packages: SpritePackages, params: PretrainParams, labels: dict[str, str]) -> dict[str, str]:
    """Name what every style draws by its label in plain letters; labels that are taken or held out name nothing."""
    drawn = set.intersection(*(set(icon_names(packages, package)) for package in params.styles))
    words = {code: " ".join(re.findall(r"[a-z]+", labels[code].lower())) for code in labels if code in drawn}
    taken = Counter([*words.values(), *params.objects, *params.held_out_objects])
    return {code: word for code, word in words.items() if word and taken[word] == 1}


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
    import torch

    from dreamartist_pipeline.core.sprites import SpriteSet

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
