"""A model with another autoencoder than its own: the setting `vae`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import CLIPTokenizer

from dreamartist_pipeline.backbones.holding.checkpoint_kinds import VAE_PREFIX
from dreamartist_pipeline.backbones.holding.folder import INDEX, FolderParts, LonePart
from dreamartist_pipeline.backbones.holding.parts import ModelParts, StoredTensor, StoredTensors, current_names
from dreamartist_pipeline.backbones.holding.single_file import check_whole, converted
from dreamartist_pipeline.backbones.holding.tensor_files import read_tensors
from dreamartist_pipeline.errors import InputError

VAE = "vae"
_PREFIXES = (VAE_PREFIX, "vae.", "")  # in a whole model, and in files of an autoencoder alone
_FIRST_OF_DECODER = "decoder.conv_in.weight"  # [width, latent channels, 3, 3]
_DIFFUSERS_NAMES = "encoder.down_blocks."
_CHANNELS, _DEFAULT_CHANNELS = "latent_channels", 4


class Autoencoder(Protocol):
    """An autoencoder by itself."""

    @property
    def place(self) -> str:
        """Where it is, for errors."""
        ...

    def config(self) -> dict[str, Any]:
        """Return its configuration."""
        ...

    def tensors(self, *, half: bool) -> StoredTensors:
        """Return its weights; see `ModelParts.tensors`."""
        ...

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yield (name, path) of its files."""
        ...

    def check(self) -> None:
        """Check that its files are there and complete.

        Raises:
            InputError: they are not.
        """
        ...


@dataclass(frozen=True)
class WithAutoencoder(ModelParts):
    """The parts of a model, with another autoencoder.

    Attributes:
        model: all other parts.
        vae: the autoencoder.
    """

    model: ModelParts
    vae: Autoencoder

    @property
    def place(self) -> str:
        """The places of both."""
        return f"{self.model.place} with {self.vae.place}"

    def index(self) -> dict[str, Any]:
        """Return model_index.json of the model."""
        return self.model.index()

    def names(self) -> tuple[str, ...]:
        """Return what the model's files say that it is called."""
        return self.model.names()

    def config(self, part: str) -> dict[str, Any]:
        """Return the configuration of a part."""
        return self.vae.config() if part == VAE else self.model.config(part)

    def tokenizer(self, part: str) -> CLIPTokenizer:
        """Return a tokenizer."""
        return self.model.tokenizer(part)

    def tensors(self, part: str, *, half: bool = False) -> StoredTensors:
        """Return the weights of a part."""
        return self.vae.tensors(half=half) if part == VAE else self.model.tensors(part, half=half)

    def files(self, parts: Collection[str]) -> Iterator[tuple[str, Path]]:
        """Yield (name, path) of the files of the model, without its own autoencoder, and of the other one."""
        yield from self.model.files([part for part in parts if part != VAE])
        yield from ((f"vae={name}", file) for name, file in self.vae.files())

    def check(self, parts: Collection[str]) -> None:
        """Check all files, and that the autoencoder's latents are those of the model.

        Raises:
            InputError: a file is missing or damaged, or the latents have another number of channels.
        """
        self.model.check([part for part in parts if part != VAE])
        self.vae.check()
        channels = self.vae.config().get(_CHANNELS, _DEFAULT_CHANNELS)
        expected = self.model.config("unet").get("out_channels", _DEFAULT_CHANNELS)
        if channels != expected:
            raise InputError(
                expected=f"an autoencoder with {expected} latent channels for {self.model.place}",
                got=f"{channels} latent channels in {self.vae.place}",
                remedy="set vae to one for this kind of model, or to null for the model's own",
            )


@dataclass(frozen=True)
class AutoencoderFolder:
    """A folder of an autoencoder alone, or of a whole model in diffusers' layout."""

    folder: Path

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.folder)

    def config(self) -> dict[str, Any]:
        """Return its configuration."""
        return self._parts().config(VAE)

    def tensors(self, *, half: bool) -> StoredTensors:
        """Return its weights."""
        return self._parts().tensors(VAE, half=half)

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yield (name, path) of its files."""
        return ((name, file) for name, file in self._parts().files([VAE]) if name != INDEX)

    def check(self) -> None:
        """Check that its files are there and complete.

        Raises:
            InputError: they are not.
        """
        self._parts().check([VAE])

    def _parts(self) -> FolderParts:
        return FolderParts(self.folder) if (self.folder / VAE).is_dir() else LonePart(self.folder)


@dataclass(frozen=True)
class AutoencoderFile:
    """A single file of an autoencoder, or of a whole model, in the names of diffusers or of the original code.

    Attributes:
        file: the file.
        model: whose own autoencoder has the same architecture.
    """

    file: Path
    model: ModelParts

    @property
    def place(self) -> str:
        """The file."""
        return str(self.file)

    def config(self) -> dict[str, Any]:
        """Return the configuration of the model's own autoencoder, for as many latent channels as the file has."""
        return self.model.config(VAE) | {_CHANNELS: self._own()[_FIRST_OF_DECODER].shape[1]}

    def tensors(self, *, half: bool) -> StoredTensors:
        """Return its weights; half is not used."""
        own = self._own()
        if any(name.startswith(_DIFFUSERS_NAMES) for name in own):
            return current_names(own)
        original = {f"{VAE_PREFIX}{name}": tensor for name, tensor in own.items()}
        return converted(original, VAE_PREFIX, self.config(), self.place)

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yield the file."""
        yield self.file.name, self.file

    def check(self) -> None:
        """Check that the file is complete, and of an autoencoder.

        Raises:
            InputError: it is not.
        """
        check_whole(self.file)
        self._own()

    def _own(self) -> dict[str, StoredTensor]:
        """Return the tensors of the autoencoder by their names without prefix.

        Raises:
            InputError: there is no autoencoder.
        """
        tensors = read_tensors(self.file)
        for prefix in _PREFIXES:
            first = tensors.get(f"{prefix}{_FIRST_OF_DECODER}")
            if first is not None and len(first.shape) == 4:
                return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
        raise InputError(
            expected=f"an autoencoder at {self.file}",
            got=f"other keys: {', '.join(sorted(tensors)[:3])}, …",
            remedy="set vae to the file or folder of an autoencoder, or to null for the model's own",
        )
