"""From published icon packages to sprites: which drawings to take, what to call them, how to rasterise them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.params import PretrainParams

if TYPE_CHECKING:
    import numpy as np

    from dreamartist_pipeline.datasets.sprites import SpritePackages

EMOJI_NAMES = "emojibase-data"  # code points with their groups
NAMES_BY_CODE_POINT = "noto"  # the package whose icon names stand in where a package has no code points
_DRAWN_GROUPS = {0, 3, 4, 5, 6, 7}  # faces, animals, food, travel, activities, objects; no people, symbols, flags
_MIN_COVERAGE = 0.02  # of opaque pixels; less is an empty or unreadable drawing


def choose_sprites(packages: SpritePackages, params: PretrainParams) -> Iterator[tuple[str, str, str]]:
    """Yield (svg, object word or "", style word) of every sprite the model may see.

    Objects in captions are those of `params.objects` in the packages of `params.styles`. All other drawings of all
    packages widen what the autoencoder sees. Held-out objects and styles are left out of everything.

    Raises:
        InputError: if a named object is missing from a style.
    """
    words = {_normal(code): word for word, code in params.objects.items()}
    held_out = {_normal(code) for code in params.held_out_objects.values()}
    codes = [
        code
        for emoji in packages[EMOJI_NAMES]["data"]
        if emoji.get("group") in _DRAWN_GROUPS and (code := _normal(emoji["hexcode"])) not in held_out
    ]
    for package in (*params.styles, *params.autoencoder_only_packages):
        style, names = params.styles.get(package, ""), icon_names(packages, package)
        for code in codes:
            if code in names:
                yield icon_svg(packages[package]["icons"], names[code]), words.get(code, "") if style else "", style
            elif style and code in words:
                raise InputError(
                    f"expected {words[code]!r} ({code}) in the sprite package {package!r}, found none; "
                    "remove it from pretrain.objects"
                )


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
