"""Where a base model is: the settings base_model, vae and base_model_config, and ids of the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HUB = "hub:"


@dataclass(frozen=True)
class ModelLocation:
    """Where a base model is, as the settings of a run name it.

    Attributes:
        path: a folder, a single file, or `hub:OWNER/NAME[/FILE][@REVISION]`.
        vae: the same for an autoencoder in place of the model's own; None for its own.
        config: a folder of configurations for a single file; None for those of its kind.
    """

    path: str
    vae: str | None = None
    config: str | None = None

    @classmethod
    def of(cls, location: Path | str | ModelLocation) -> ModelLocation:
        """Return a location; a path alone is that of a model with its own autoencoder."""
        return location if isinstance(location, ModelLocation) else cls(str(location))


@dataclass(frozen=True)
class HubId:
    """`OWNER/NAME[/FILE][@REVISION]` on the Hugging Face hub.

    Attributes:
        repository: `OWNER/NAME`.
        file: in the repository; None for all of it.
        revision: branch, tag or commit; None for the default branch.
    """

    repository: str
    file: str | None = None
    revision: str | None = None

    @classmethod
    def in_path(cls, path: str) -> HubId | None:
        """Return the id in a path that begins with `hub:`, None for paths on disk."""
        if not path.startswith(HUB):
            return None
        name, _, revision = path.removeprefix(HUB).partition("@")
        owner, _, rest = name.partition("/")
        repository, _, file = rest.partition("/")
        return cls(f"{owner}/{repository}", file or None, revision or None)

    def __str__(self) -> str:
        file, revision = f"/{self.file}" if self.file else "", f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{file}{revision}"
