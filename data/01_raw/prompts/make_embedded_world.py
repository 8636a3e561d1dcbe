"""Write embedded_world.parquet: distinct captions of the embedded base model's picture world.

    python data/01_raw/prompts/make_embedded_world.py

Objects and styles are those of conf/base/parameters_pretrain.yml; the captions are the ones its training scenes carry.
Columns: prompt; objects (named ones, separated by a comma); style (as named in the prompt, or ''); background (its main
colour as named in the prompt, or '').
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pandas as pd
import torch
import yaml

from dreamartist_pipeline.core.sprites import COLORS, Scenes, SpriteSet, draw_scenes

FOLDER = Path(__file__).resolve().parent
RECIPE = FOLDER.parents[2] / "conf" / "base" / "parameters_pretrain.yml"
NUM_PROMPTS = 2000
SEED = 20240


def make_table(objects: list[str], styles: list[str]) -> pd.DataFrame:
    """Draw captioned scenes without pixels and keep the first NUM_PROMPTS distinct captions."""
    pairs = list(itertools.product(objects, styles))
    sprites = SpriteSet(
        images=torch.zeros(len(pairs), 4, 1, 1, dtype=torch.uint8),
        objects=tuple(name for name, _ in pairs),
        styles=tuple(style for _, style in pairs),
    )
    scenes = draw_scenes(sprites, num_scenes=2 * NUM_PROMPTS, seed=SEED)
    rows = [describe(scenes, index, sprites) for index in range(len(scenes.captions))]
    return pd.DataFrame(rows).drop_duplicates("prompt").head(NUM_PROMPTS).reset_index(drop=True)


def describe(scenes: Scenes, index: int, sprites: SpriteSet) -> dict[str, str]:
    """Say what the caption of one scene names."""
    caption = scenes.captions[index]
    shown = dict.fromkeys(sprites.objects[int(sprite)] for sprite in scenes.sprite[index] if sprite >= 0)
    style = re.search(r", (\w+) style", caption)
    background = re.search(rf", ({'|'.join(COLORS)}) [^,]*background", caption)
    return {
        "prompt": caption,
        "objects": ", ".join(shown),
        "style": style[1] if style else "",
        "background": background[1] if background else "",
    }


def main() -> None:
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["pretrain"]
    table = make_table(list(recipe["objects"]), list(recipe["styles"].values()))
    table.to_parquet(FOLDER / "embedded_world.parquet", index=False)
    print(f"{len(table)} prompts in {FOLDER / 'embedded_world.parquet'}")


if __name__ == "__main__":
    main()
