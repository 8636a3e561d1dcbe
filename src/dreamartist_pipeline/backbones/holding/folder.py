"""A base model as a folder in diffusers' layout: one folder per part."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from dreamartist_pipeline.backbones.holding.clip_vocabulary import clip_tokenizer, read_tokenizer
from dreamartist_pipeline.backbones.holding.configurations import check_config
from dreamartist_pipeline.backbones.holding.parts import (
    ModelParts,
    StoredTensor,
    StoredTensors,
    config_name,
    current_names,
    has_weights,
)
from dreamartist_pipeline.backbones.holding.tensor_files import is_whole, read_tensors
from dreamartist_pipeline.decoding.json_text import read_json_object
from dreamartist_pipeline.errors import InputError

SNAPSHOTS = "snapshots"  # folder of the revisions of a repository in the cache of the hub
INDEX = "model_index.json"
CONFIG_SUFFIXES = (".json", ".txt")
_FILE_SUFFIXES = (*CONFIG_SUFFIXES, ".safetensors", ".bin")
_VOCABULARY_FILES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})  # either set is enough
_WEIGHTS = re.compile(  # diffusers and transformers put the variant before the shard, older versions after it
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d+-of-(?P<shards>\d+))?"
    r"(?:\.(?P<old_variant>\w+))?\.(?P<format>safetensors|bin)"
)
_HALF_VARIANTS, _FORMATS = ("fp16", "bf16"), ("safetensors", "bin")


@dataclass(frozen=True)
class FolderParts(ModelParts):
    """The parts of a model in a folder; a tokenizer without vocabulary has that of CLIP.

    Attributes:
        folder: with model_index.json.
    """

    folder: Path

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.folder)

    def part(self, name: str) -> Path:
        """Return the folder of a part."""
        return self.folder / name

    def index(self) -> dict[str, Any]:
        """Return model_index.json.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        return self._json(self.folder / INDEX)

    def config(self, part: str) -> dict[str, Any]:
        """Return the configuration of a part.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        file = self.part(part) / config_name(part)
        config = self._json(file)
        check_config(part, config, str(file))
        return config

    def tokenizer(self, part: str) -> CLIPTokenizer:
        """Return a tokenizer.

        Raises:
            InputError: its files are damaged.
        """
        config, folder = self.config(part), self.part(part)
        if not has_vocabulary(folder):
            return clip_tokenizer(config)
        for file in folder.glob("*"):
            self._inside(file)
        return read_tokenizer(folder)

    def tensors(self, part: str, *, half: bool = False) -> StoredTensors:
        """Return the weights of a part, from all of its shards."""
        return current_names(self.stored(part, half=half))

    def stored(self, part: str, *, half: bool = False) -> dict[str, StoredTensor]:
        """Return the weights of a part by their names in its files; see `tensors`."""
        found: dict[str, StoredTensor] = {}
        for file in weight_files((file.name for file in self.part(part).iterdir()), half=half):
            found |= read_tensors(self._inside(self.part(part) / file))
        return found

    def files(self, parts: Collection[str]) -> Iterator[tuple[str, Path]]:
        """Yield (name, path) of model_index.json, and of all files of these parts."""
        folders = (self.folder / INDEX, *(file for part in parts for file in self.part(part).rglob("*")))
        for file in folders:
            if file.is_file() and file.suffix in _FILE_SUFFIXES:
                yield file.relative_to(self.folder).as_posix(), self._inside(file)

    def check(self, parts: Collection[str]) -> None:
        """Check that no file is missing or truncated, and that the configurations can be read.

        Raises:
            InputError: one is, or they cannot.
        """
        self._require(missing_files(self, parts))
        for part in parts:
            self.config(part)
        if damaged := [name for name, file in self.files(parts) if not is_whole(file)]:
            raise InputError(
                expected=f"complete weight files in {self.folder}",
                got=f"truncated or damaged files, or Git LFS pointers: {', '.join(damaged)}",
                remedy="download the model again",
            )

    def _json(self, file: Path) -> dict[str, Any]:
        name = file.relative_to(self.folder).as_posix()
        if not file.is_file():
            self._require([name])
        return read_json_object(
            self._inside(file),
            expected=f"a readable base model in {self.folder}",
            name=name,
            remedy="correct base_model, or download the model again",
        )

    def _inside(self, file: Path) -> Path:
        """Return a file if it is in the folder; links in the cache of the hub lead to the blobs of the repository.

        Raises:
            InputError: a link leads to another place.
        """
        root, target = self.folder.resolve(), file.resolve()
        in_cache = root.parent.name == SNAPSHOTS and root.parents[1].name.startswith("models--")
        if target.is_relative_to(root) or (in_cache and target.is_relative_to(root.parents[1] / "blobs")):
            return file
        raise InputError(
            expected=f"the files of the model in {self.folder}",
            got=f"{file.relative_to(self.folder)}, a link to {target}",
            remedy="copy the file in place of the link; for another autoencoder, set vae",
        )

    def _require(self, missing: Collection[str]) -> None:
        if missing:
            raise InputError(
                expected=f"a complete base model in {self.folder}",
                got=f"one without {', '.join(missing)}",
                remedy="copy the missing files, or download the model again",
            )


@dataclass(frozen=True)
class LonePart(FolderParts):
    """A folder with the files of one part, such as of an autoencoder by itself."""

    def part(self, name: str) -> Path:
        """Return the folder."""
        return self.folder


def missing_files(parts: FolderParts, names: Collection[str]) -> list[str]:
    """Return what the folder lacks of these parts."""
    return list(dict.fromkeys(missing for name in names for missing in _missing(parts.part(name), name)))


def weight_files(names: Iterable[str], *, half: bool) -> list[str]:
    """Return the weight files to read, out of the names of all files in the folder of a part.

    Files in full precision are read for float32, and those of a variant in half precision (`.fp16`, `.bf16`) for half
    precision; where there is only one of these, that one. safetensors take precedence over pickled files.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        if match := _WEIGHTS.fullmatch(name):
            variant = match["variant"] or match["old_variant"] or ""
            groups.setdefault((variant, match["format"]), []).append(name)
    order = (*_HALF_VARIANTS, "") if half else ("", *_HALF_VARIANTS)
    chosen = next((groups[key] for key in itertools.product(order, _FORMATS) if key in groups), [])
    return [name for name in chosen if not _num_shards(name)][:1] or chosen


def _num_shards(name: str) -> int:
    """Return the number of shards that the name of a weight file gives, 0 for a file that is whole."""
    match = _WEIGHTS.fullmatch(name)
    return int(match["shards"] or 0) if match else 0


def has_vocabulary(folder: Path) -> bool:
    """Return whether the folder of a tokenizer has its vocabulary."""
    names = {file.name for file in folder.iterdir()}
    return any(files <= names for files in _VOCABULARY_FILES)


def _missing(folder: Path, part: str) -> Iterator[str]:
    if not folder.is_dir():
        yield f"{part}/"
        return
    names = {file.name for file in folder.iterdir()}
    if config_name(part) not in names:
        yield f"{part}/{config_name(part)}"
    if has_weights(part):
        for half in (False, True):
            chosen = weight_files(names, half=half)
            if len(chosen) < max(map(_num_shards, chosen), default=1):
                yield f"{part}/*.safetensors" if not chosen else f"some shards of {part}/{chosen[0]}"
    if part.startswith("tokenizer") and not has_vocabulary(folder):
        yield f"{part}/tokenizer.json (or vocab.json and merges.txt)"
