"""Datasets of the embedded world: sprite packages, rendered sprites, trained models, the judge."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from kedro.io import AbstractDataset, DatasetError
from pydantic import BaseModel, Field, ValidationError

from dreamartist_pipeline.decoding.json_text import parse_json, reasons
from dreamartist_pipeline.decoding.safetensors_files import read_header
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.whole_files import restored, written_whole, written_whole_folder

if TYPE_CHECKING:
    import torch

    from dreamartist_pipeline.embedded.judge import Judge
    from dreamartist_pipeline.embedded.sprites import SpritePackages, SpriteSet

JUDGE_FORMAT = "dreamartist-judge/1"
_JUDGE_HEADER = "judge"  # a single entry: safetensors writes several in no fixed order


class _SpriteNames(BaseModel):
    """The metadata of a sprite set."""

    objects: tuple[str, ...]
    styles: tuple[str, ...]


class _JudgeHeader(_SpriteNames):
    """The metadata of a judge."""

    format: Literal["dreamartist-judge/1"]
    channels: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=1, max_length=16)]


class SpritePackagesDataset(AbstractDataset[None, "SpritePackages"]):
    """Published icon packages (npm tarballs), verified against their SHA-256 before they are parsed; read-only.

    Args:
        path: folder of the tarballs.
        packages: name -> {"file": name of the tarball, "sha256": its hash, "members": JSON files to read}.
        metadata: for kedro-viz.
    """

    def __init__(
        self, *, path: str, packages: dict[str, dict[str, Any]], metadata: dict[str, Any] | None = None
    ) -> None:
        self._path = Path(path)
        self._packages = packages
        self.metadata = metadata

    def load(self) -> SpritePackages:
        return {name: self._read(spec) for name, spec in self._packages.items()}

    def _read(self, spec: dict[str, Any]) -> dict[str, Any]:
        tarball = self._path / spec["file"]
        if not tarball.exists():
            raise DatasetError(
                f"expected the sprite package {tarball}; got no such file; run `make sprites`, which downloads it"
            )
        digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
        if digest != spec["sha256"]:
            raise DatasetError(
                f"expected {tarball} with SHA-256 {spec['sha256']}; got {digest}; "
                "delete it and run `make sprites`, which downloads it again"
            )
        with tarfile.open(tarball) as archive:
            return {PurePosixPath(member).stem: _read_json(archive, member) for member in spec["members"]}

    def save(self, data: None) -> None:
        raise DatasetError("sprite packages are read-only")

    def _exists(self) -> bool:
        return all((self._path / spec["file"]).exists() for spec in self._packages.values())

    def _describe(self) -> dict[str, Any]:
        return {"path": self._path.as_posix(), "packages": list(self._packages)}


def _read_json(archive: tarfile.TarFile, member: str) -> Any:
    file = archive.extractfile(f"package/{member}")
    if file is None:
        raise DatasetError(
            f"expected {member} in the sprite package; got no such file; delete the package and run `make sprites`"
        )
    return json.load(file)


_Data = TypeVar("_Data")


class _FileDataset(AbstractDataset[_Data, _Data]):
    """A dataset of one file."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def _read_tensors(self, what: str) -> tuple[Mapping[str, str], dict[str, torch.Tensor]]:
        """Return the metadata and the tensors of a safetensors file.

        Raises:
            InputError: another file.
            FileNotFoundError: no file.
        """
        with self._filepath.open("rb") as stream:
            header = read_header(stream, f"{what} in {self._filepath}")
            return header.metadata, {name: header.read(stream, name) for name in header.tensors}

    def _exists(self) -> bool:
        return self._filepath.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath.as_posix()}


class SpriteSetDataset(_FileDataset["SpriteSet"]):
    """A SpriteSet as one safetensors file, with the names in its header."""

    def load(self) -> SpriteSet:
        from dreamartist_pipeline.embedded.sprites import SpriteSet

        metadata, tensors = self._read_tensors("a sprite set")
        try:
            names = _SpriteNames.model_validate({key: parse_json(text) for key, text in metadata.items()})
            return SpriteSet(tensors["images"], names.objects, names.styles)
        except (ValueError, KeyError) as error:
            raise InputError(
                expected=f"a sprite set in {self._filepath}",
                got=f"a damaged file ({error})",
                remedy="delete it, and run the pretrain pipeline again",
            ) from error

    def save(self, data: SpriteSet) -> None:
        from safetensors.torch import save_file

        names = {"objects": json.dumps(data.objects), "styles": json.dumps(data.styles)}
        with written_whole(self._filepath) as temporary:
            save_file({"images": data.images.contiguous()}, temporary, metadata=names)


class PretrainedFolderDataset(AbstractDataset[Any, str]):
    """A folder of a diffusers or transformers model: saves by `save_pretrained`, as a whole; loads the path."""

    def __init__(self, *, path: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = Path(path)
        self.metadata = metadata

    def load(self) -> str:
        return restored(self._path).as_posix()

    def save(self, data: Any) -> None:
        with written_whole_folder(self._path) as temporary:
            data.save_pretrained(temporary)

    def _exists(self) -> bool:
        return restored(self._path).exists()

    def _describe(self) -> dict[str, Any]:
        return {"path": self._path.as_posix()}


class StartDataset(AbstractDataset[None, str | None]):
    """Folder of a base model to continue from, loaded as a path, or None; read-only."""

    def __init__(self, *, path: str | None, metadata: dict[str, Any] | None = None) -> None:
        self._path = path
        self.metadata = metadata

    def load(self) -> str | None:
        if not self._exists():
            raise DatasetError(
                f"expected a folder with model_index.json at {self._path}; got none; correct pretrain.start"
            )
        return self._path

    def save(self, data: None) -> None:
        raise DatasetError(f"{self._path} is read-only")

    def _exists(self) -> bool:
        return self._path is None or (Path(self._path) / "model_index.json").is_file()

    def _describe(self) -> dict[str, Any]:
        return {"path": self._path}


class JudgeDataset(_FileDataset["Judge"]):
    """A Judge as one safetensors file: weights in float16, vocabulary and channels in the header.

    The loaded judge is frozen, in float32 and in eval mode.
    """

    def load(self) -> Judge:
        from dreamartist_pipeline.embedded.judge import Judge, JudgeVocabulary

        try:
            metadata, weights = self._read_tensors("the judge")
            header = _JudgeHeader.model_validate(parse_json(metadata.get(_JUDGE_HEADER, "{}")))
            judge = Judge(JudgeVocabulary(header.objects, header.styles), header.channels)
            judge.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        except (FileNotFoundError, ValueError, RuntimeError) as error:  # RuntimeError: weights of other shapes
            got = reasons(error) if isinstance(error, ValidationError) else str(error)
            raise DatasetError(
                f"expected a judge of the format {JUDGE_FORMAT} at {self._filepath}; got: {got}; run `make judge`, "
                "which trains it"
            ) from error
        return judge.eval().requires_grad_(False)

    def save(self, data: Judge) -> None:
        import torch
        from safetensors.torch import save_file

        header = {
            "format": JUDGE_FORMAT,
            "objects": data.vocabulary.objects,
            "styles": data.vocabulary.styles,
            "channels": data.channels,
        }
        weights = {name: value.to(torch.float16).contiguous() for name, value in data.state_dict().items()}
        with written_whole(self._filepath) as temporary:
            save_file(weights, temporary, metadata={_JUDGE_HEADER: json.dumps(header)})
