"""Render the bundled reference images: subjects (and a style) held out of the embedded base model's training.

    python data/01_raw/reference_images/make_reference_images.py

Needs the `pretrain` extra and the sprite packages (`make sprites`). `sources.yml` lists the icons, the README
of this folder authors and licences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from dreamartist_pipeline.embedded.datasets import SpritePackagesDataset
from dreamartist_pipeline.embedded.sprites import icon_svg, rasterize

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
SIDE_PX, MARGIN_PX = 256, 20
BACKGROUND, CAPTION = "#ffffff", "white background"
HELD_OUT_PACKAGES = {  # never read by the pretrain pipeline
    "streamline-emojis": {
        "file": "iconify-json-streamline-emojis-1.2.4.tgz",
        "sha256": "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        "members": ["icons.json"],
    }
}


def render(collection: dict[str, Any], icon: str) -> Image.Image:
    """Draw one icon in the middle of a plain square."""
    name = collection.get("aliases", {}).get(icon, {}).get("parent", icon)
    pixels = rasterize(icon_svg(collection, name), SIDE_PX - 2 * MARGIN_PX)
    if pixels is None:
        raise ValueError(f"expected a drawing in the icon {icon!r}, got an empty image")
    sprite = Image.fromarray(pixels.transpose(1, 2, 0), "RGBA")
    image = Image.new("RGBA", (SIDE_PX, SIDE_PX), BACKGROUND)
    image.alpha_composite(sprite, (MARGIN_PX, MARGIN_PX))
    return image.convert("RGB")


def main() -> None:
    """Render every picture of `sources.yml`, with its caption."""
    sources = yaml.safe_load((FOLDER / "sources.yml").read_text(encoding="utf-8"))
    catalog = yaml.safe_load((ROOT / "conf" / "base" / "catalog_pretrain.yml").read_text(encoding="utf-8"))
    entry = catalog["sprite_packages"]
    specs = {**entry["packages"], **HELD_OUT_PACKAGES}
    used = {source["package"]: specs[source["package"]] for source in sources.values()}
    packages = SpritePackagesDataset(path=str(ROOT / entry["path"]), packages=used).load()
    for subject, source in sources.items():
        image = render(packages[source["package"]]["icons"], source["icon"])
        image.save(FOLDER / f"{subject}.png", optimize=True)
        (FOLDER / f"{subject}.txt").write_text(f"{CAPTION}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
