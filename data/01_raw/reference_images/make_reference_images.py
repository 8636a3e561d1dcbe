"""Render the bundled reference images: subjects (and a style) that the embedded base model has never seen.

    python data/01_raw/reference_images/make_reference_images.py

Needs the `pretrain` extra and the sprite packages (see data/01_raw/sprite_packages).
Sources and licences are in the README beside this file.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from PIL import Image

from dreamartist_pipeline.embedded.datasets import SpritePackagesDataset
from dreamartist_pipeline.pipelines.pretrain.rendering import icon_svg, rasterize

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
SUBJECTS = {  # file name -> sprite package, icon
    "fox": ("noto", "fox"),
    "octopus": ("twemoji", "octopus"),
    "strawberry": ("noto", "strawberry"),
    "owl": ("twemoji", "owl"),
    "robot": ("noto", "robot"),
    "rocket": ("twemoji", "rocket"),
    "mushroom": ("noto", "mushroom"),
    "penguin": ("twemoji", "penguin"),
    "snail": ("noto", "snail"),
    "umbrella": ("twemoji", "umbrella"),
    "mushroom-outline": ("streamline-emojis", "mushroom"),
}


def render(collection: dict, icon: str) -> Image.Image:
    """Draw one icon in the middle of a plain square."""
    name = collection.get("aliases", {}).get(icon, {}).get("parent", icon)
    pixels = rasterize(icon_svg(collection, name), SIDE_PX - 2 * MARGIN_PX)
    if pixels is None:
        raise ValueError(f"expected a drawing in the icon {icon!r}, got an empty one")
    sprite = Image.fromarray(pixels.transpose(1, 2, 0), "RGBA")
    image = Image.new("RGBA", (SIDE_PX, SIDE_PX), BACKGROUND)
    image.alpha_composite(sprite, (MARGIN_PX, MARGIN_PX))
    return image.convert("RGB")


def main() -> None:
    catalog = yaml.safe_load((ROOT / "conf" / "base" / "catalog_pretrain.yml").read_text(encoding="utf-8"))
    entry = catalog["sprite_packages"]
    specs = {**entry["packages"], **HELD_OUT_PACKAGES}
    wanted = {package: specs[package] for package, _ in SUBJECTS.values()}
    packages = SpritePackagesDataset(path=str(ROOT / entry["path"]), packages=wanted).load()
    for file_name, (package, icon) in SUBJECTS.items():
        image = render(packages[package]["icons"], icon)
        image.save(FOLDER / f"{file_name}.png", optimize=True)
        (FOLDER / f"{file_name}.txt").write_text(f"{CAPTION}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
