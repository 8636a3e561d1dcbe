"""Drawings and subjects of the recognition benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import yaml

from dreamartist_pipeline.embedded.datasets import SpriteSetDataset
from dreamartist_pipeline.embedded.sprites import SpriteSet
from dreamartist_pipeline.params import PretrainParams
from dreamartist_pipeline.settings import CONFIG_LOADER_ARGS, CONFIG_LOADER_CLASS
from one_shot.prompts import ASKED_STYLES

SPRITE_SETS = ("sprites", "held_out_sprites")  # of the catalog
REMEDY = "or give --no-recognition"


@dataclass(frozen=True)
class World:
    """Drawings of the embedded world, and the subjects to be recognised.

    Attributes:
        sprites: of all objects that have a name, known and held out.
        fixed: the objects of the fixed gallery: the held-out ones, and the known ones that the recipe names one by one.
        references: subject -> style of its reference picture.
    """

    sprites: SpriteSet
    fixed: tuple[str, ...]
    references: Mapping[str, str]

    @cached_property
    def drawings(self) -> dict[tuple[str, str], int]:
        """(object, style) -> index of the sprite."""
        return {pair: index for index, pair in enumerate(zip(self.sprites.objects, self.sprites.styles, strict=True))}


def load_world(root: Path, images: Path, subjects: Sequence[str]) -> World:
    """Read drawings and recipe, and look up the styles of the subjects' pictures.

    Args:
        root: of the project.
        images: folder of the reference pictures, with `sources.yml`.
        subjects: of the benchmark; only held-out objects in a style of the recipe can be recognised.

    Raises:
        SystemExit: drawings or sources are missing, or no subject can be recognised.
    """
    loader = CONFIG_LOADER_CLASS(conf_source=str(root / "conf"), **CONFIG_LOADER_ARGS)
    recipe = PretrainParams.model_validate(loader["parameters"]["pretrain"])
    catalog = loader["catalog"]
    sprites = read_sprites([root / catalog[name]["filepath"] for name in SPRITE_SETS])
    references = reference_styles(images / "sources.yml", recipe, subjects)
    world = World(sprites, (*recipe.held_out_objects, *recipe.objects), references)
    check_drawn(world)
    return world


def read_sprites(files: Sequence[Path]) -> SpriteSet:
    """Read rendered sprites, concatenated, without unnamed ones.

    Raises:
        SystemExit: a file is missing.
    """
    if missing := [str(file) for file in files if not file.is_file()]:
        raise SystemExit(f"expected rendered sprites, got no {' and no '.join(missing)}; run `make sprites`, {REMEDY}")
    parts = [(one, one.named()) for one in (SpriteSetDataset(filepath=str(file)).load() for file in files)]
    return SpriteSet(
        torch.cat([one.images[chosen] for one, chosen in parts]),
        tuple(one.objects[index] for one, chosen in parts for index in chosen),
        tuple(one.styles[index] for one, chosen in parts for index in chosen),
    )


def reference_styles(sources: Path, recipe: PretrainParams, subjects: Sequence[str]) -> dict[str, str]:
    """Return subject -> style of its picture, for the subjects that can be recognised.

    Raises:
        SystemExit: there is no list of sources, or no such subject in it.
    """
    if not sources.is_file():
        raise SystemExit(f"expected the drawings' packages in {sources}, got no such file; write it, {REMEDY}")
    packages = {name: source["package"] for name, source in yaml.safe_load(sources.read_text("utf-8")).items()}
    styles = {name: recipe.styles[package] for name, package in packages.items() if package in recipe.styles}
    references = {name: styles[name] for name in subjects if name in styles and name in recipe.held_out_objects}
    if not references:
        raise SystemExit(
            f"expected a subject among {', '.join(name for name in styles if name in recipe.held_out_objects)}, "
            f"got {', '.join(subjects)}; name one, {REMEDY}"
        )
    return references


def check_drawn(world: World) -> None:
    """Check that galleries and scenes have all drawings they need.

    Raises:
        SystemExit: a drawing is missing.
    """
    subjects = [(word, style) for word, own in world.references.items() for style in (own, *ASKED_STYLES)]
    missing = [f"{style} {word}" for word, style in subjects if (word, style) not in world.drawings]
    missing += sorted(set(world.fixed) - set(world.sprites.objects))
    if missing:
        raise SystemExit(f"expected sprites of this recipe, got none of {missing[0]}; run `make sprites`, {REMEDY}")
