"""Find the parts of a base model at a location: a folder, a single file, or an id of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamartist_pipeline.backbones.holding.autoencoder import (
    VAE,
    Autoencoder,
    AutoencoderFile,
    AutoencoderFolder,
    WithAutoencoder,
)
from dreamartist_pipeline.backbones.holding.folder import INDEX, FolderParts, LonePart
from dreamartist_pipeline.backbones.holding.hub import hub_file, hub_folder, repository_of, snapshot_in
from dreamartist_pipeline.backbones.holding.parts import ModelParts, config_name
from dreamartist_pipeline.backbones.holding.single_file import SingleFileParts
from dreamartist_pipeline.core.model_location import HUB, HubId, ModelLocation
from dreamartist_pipeline.errors import InputError

NamesOfParts = Callable[[Mapping[str, Any], str], Sequence[str]]
"""model_index.json and the place of a model -> the parts that its family reads."""


def find_parts(location: ModelLocation, names_of_parts: NamesOfParts, *, half: bool) -> ModelParts:
    """Return the parts of a base model; one of the hub is downloaded if it is not cached.

    Args:
        location: of the model.
        names_of_parts: what to download.
        half: download weights in half precision, where there are such.

    Raises:
        InputError: there is no model at the location.
    """

    def needed(folder: Path) -> tuple[FolderParts, Sequence[str]]:
        parts = FolderParts(folder)
        return parts, [part for part in names_of_parts(parts.index(), parts.place) if part != VAE or not location.vae]

    if (hub := HubId.in_path(location.path)) is None:
        place = snapshot_in(Path(location.path).expanduser())
    else:
        place = hub_file(hub, hub.file) if hub.file else hub_folder(hub, INDEX, needed, half=half)
    model = _model_at(place, location.config)
    return model if location.vae is None else WithAutoencoder(model, _find_autoencoder(location.vae, model, half=half))


def name_of(location: str) -> str:
    """Return what a model is called: its hub id, or the name of its folder or file without a path."""
    if (hub := HubId.in_path(location)) is not None:
        return str(hub)
    path = Path(location).expanduser()
    return repository_of(snapshot_in(path)) or path.resolve().name


def _model_at(place: Path, configs: str | None) -> ModelParts:
    if place.is_file():
        return SingleFileParts(place, Path(configs).expanduser() if configs else None)
    if not place.is_dir():
        raise InputError(
            expected=f"a base model at {place}",
            got="no such folder or file",
            remedy=f"set base_model to a single file, to a folder in diffusers' layout, or to {HUB}OWNER/NAME",
        )
    if configs:
        raise InputError(
            expected="base_model_config with a single file only",
            got=f"{configs} with the folder {place}",
            remedy="correct the configurations in that folder",
        )
    return FolderParts(place)


def _find_autoencoder(path: str, model: ModelParts, *, half: bool) -> Autoencoder:
    if (hub := HubId.in_path(path)) is None:
        place = snapshot_in(Path(path).expanduser())
    elif hub.file:
        place = hub_file(hub, hub.file)
    else:
        place = hub_folder(hub, config_name(VAE), lambda folder: (LonePart(folder), [VAE]), half=half)
    if place.is_file():
        return AutoencoderFile(place, model)
    if place.is_dir():
        return AutoencoderFolder(place)
    raise InputError(
        expected=f"an autoencoder at {place}",
        got="no such folder or file",
        remedy=f"set vae to a single file, to a folder in diffusers' layout, or to {HUB}OWNER/NAME",
    )
