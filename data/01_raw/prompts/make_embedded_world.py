"""Write embedded_world.parquet: distinct captions of the embedded base model's training scenes.

    python data/01_raw/prompts/make_embedded_world.py

Objects and styles are those of the judge, in the order of conf/base/parameters_pretrain.yml, followed by objects with
published names. Columns: prompt; objects (comma-separated); style ('' if the prompt has none); background (its main
colour, '' if the prompt has none).
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd
import torch
import yaml

from dreamartist_pipeline.embedded.scenes import Shown, draw_scenes
from dreamartist_pipeline.embedded.sprites import SpriteSet
from dreamartist_pipeline.embedded.datasets import JudgeDataset

FOLDER = Path(__file__).resolve().parent
JUDGE = FOLDER.parent / "judge" / "judge.safetensors"
RECIPE = FOLDER.parents[2] / "conf" / "base" / "parameters_pretrain.yml"
NUM_PROMPTS = 2000
SEED = 20240


def vocabulary() -> tuple[list[str], list[str]]:
    """Return objects and styles."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["_recipes"]["world"]
    known = JudgeDataset(filepath=str(JUDGE)).load().vocabulary
    objects = dict.fromkeys([*recipe["objects"], *sorted(known.objects)])
    return (
        [word for word in objects if word in known.objects],
        [style for style in recipe["styles"].values() if style in known.styles],
    )


def make_table(objects: list[str], styles: list[str]) -> pd.DataFrame:
    """Draw captioned scenes without pixels and keep the first NUM_PROMPTS distinct captions."""
    pairs = list(itertools.product(objects, styles))
    sprites = SpriteSet(
        images=torch.zeros(len(pairs), 4, 1, 1, dtype=torch.uint8),
        objects=tuple(name for name, _ in pairs),
        styles=tuple(style for _, style in pairs),
    )
    scenes = draw_scenes(sprites, num_scenes=2 * NUM_PROMPTS, seed=SEED)
    rows = [describe(shown) for shown in scenes.shown]
    return pd.DataFrame(rows).drop_duplicates("prompt").head(NUM_PROMPTS).reset_index(drop=True)


def describe(shown: Shown) -> dict[str, str]:
    """Say what the caption of one scene names."""
    return {
        "prompt": shown.caption,
        "objects": ", ".join(dict.fromkeys(shown.objects)),
        "style": shown.style if "style" in shown.caption else "",
        "background": shown.background if "background" in shown.caption else "",
    }


def main() -> None:
    table = make_table(*vocabulary())
    table.to_parquet(FOLDER / "embedded_world.parquet", index=False)
    print(f"{len(table)} prompts in {FOLDER / 'embedded_world.parquet'}")


if __name__ == "__main__":
    main()
