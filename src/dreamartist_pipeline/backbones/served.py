"""What an MLflow model of a concept consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, files_for
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.model_location import HUB, ModelLocation
from dreamartist_pipeline.params import DeviceParams, GenerateParams

_BYTES_PER_MB = 10**6


@dataclass(frozen=True)
class ServedConcept:
    """A concept with all that is needed to draw with it elsewhere.

    Attributes:
        aliases: names for this concept among those of its subject, such as "last".
        concept: the concept.
        base_model: where the base model is, with absolute paths.
        fingerprint: of the base model's weights.
        copied: name -> file of a base model that is copied; empty for one that is referred to.
        defaults: of the options of a drawing.
        device: where it is drawn.
    """

    aliases: tuple[str, ...]
    concept: Concept
    base_model: ModelLocation
    fingerprint: str
    copied: Mapping[str, Path]
    defaults: GenerateParams
    device: DeviceParams


def served_concept(
    concept: Concept,
    base_model: ModelLocation | Path | str,
    defaults: GenerateParams,
    device: DeviceParams,
    max_copied_mb: int,
    aliases: Sequence[str] = (),
) -> ServedConcept:
    """Return a concept with its base model, to be copied if it is a folder of at most `max_copied_mb`.

    Raises:
        InputError: there is no such base model, or it cannot be read.
    """
    files = files_for(base_model, device)
    return ServedConcept(
        aliases=tuple(aliases),
        concept=concept,
        base_model=_absolute(files.location),
        fingerprint=files.fingerprint(),
        copied=_copied(files, max_copied_mb * _BYTES_PER_MB),
        defaults=defaults,
        device=device,
    )


def _copied(files: BaseModelFiles, max_bytes: int) -> dict[str, Path]:
    """Return the files of a folder that is small enough; those of other models are not laid out in one folder."""
    location = files.location
    if not Path(location.path).expanduser().is_dir() or location.vae is not None or location.config is not None:
        return {}
    named = dict(files.files())
    return named if sum(file.stat().st_size for file in named.values()) <= max_bytes else {}


def _absolute(location: ModelLocation) -> ModelLocation:
    def absolute(path: str | None) -> str | None:
        return path if path is None or path.startswith(HUB) else str(Path(path).expanduser().absolute())

    path = absolute(location.path) or location.path
    return replace(location, path=path, vae=absolute(location.vae), config=absolute(location.config))
