"""From the files that the parameters name to a concept."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Protocol

from torch import nn

from dreamartist_pipeline.backbones.base_model import Outline
from dreamartist_pipeline.backbones.prompts import check_trigger_word
from dreamartist_pipeline.core.adapters import SHARED
from dreamartist_pipeline.core.concept import Concept, to_json
from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import (
    BaseModelIdentity,
    BranchAdapter,
    TriggerWord,
    added_up,
    build_concept,
)
from dreamartist_pipeline.interop.foreign_lora import Shapes, fitted, read_lora
from dreamartist_pipeline.interop.toolkit import files_of_step, read_toolkit, toolkit_words
from dreamartist_pipeline.interop.word_files import read_embedding
from dreamartist_pipeline.params import ImportParams

_BRANCHES = ("positive", "negative")


class UserFiles(Protocol):
    """Where the files are."""

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""

    def names(self, path: str) -> dict[str, str]:
        """Return name -> path of the files of a folder."""


@dataclass(frozen=True)
class Source:
    """A file that was read: its name, the SHA-256 of its bytes, and what it holds."""

    file: str
    sha256: str
    holds: str


@dataclass(frozen=True)
class Imported:
    """What the files hold.

    adapters: branch name, or "shared" for both -> its adapter. num_steps: how long it was trained, 0 when unknown.
    """

    adapters: dict[str, BranchAdapter]
    words: tuple[TriggerWord, ...]
    sources: tuple[Source, ...]
    num_steps: int = 0


def layer_shapes(outline: Outline) -> Shapes:
    """Return the shape of every weight that can be adapted: network -> layer -> shape."""
    networks = {"unet": outline.unet, "text_encoder": outline.text_encoder}
    return {
        network: {
            name: tuple(layer.weight.shape)
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        }
        for network, module in networks.items()
    }


# ------------------------------------------------------------------------------------------------- single files


def read_lora_files(user_files: UserFiles, params: ImportParams, shapes: Shapes) -> Imported:
    """Read the LoRA files of each branch, and the embedding files of each slot.

    Raises:
        InputError: a file that is missing, of another kind, or for another base model.
    """
    sources: list[Source] = []
    adapters: dict[str, BranchAdapter] = {}
    for branch, paths in (("positive", params.positive), ("negative", params.negative)):
        members = []
        for path in paths:
            file, name = user_files.read(path), PurePath(path).name
            lora = read_lora(file, name, shapes)
            members.append(lora.adapter)
            sources.append(_source(name, file, f"{branch} LoRA, {lora.form}"))
        if members:
            adapters[branch] = added_up(members)
    words = []
    for slot, paths in params.words.items():
        names = params.names.get(slot, [PurePath(path).stem for path in paths])
        for branch, path, word in zip(_BRANCHES, paths, names, strict=False):
            file, name = user_files.read(path), PurePath(path).name
            words.append(TriggerWord(word, slot, branch, read_embedding(file, name)))
            sources.append(_source(name, file, f"{branch} word {word}"))
    return Imported(placed(adapters, params), tuple(words), tuple(sources))


def placed(adapters: dict[str, BranchAdapter], params: ImportParams) -> dict[str, BranchAdapter]:
    """Let a positive adapter without a negative one act on both branches, unless it is to act on the positive alone."""
    if set(adapters) == {"positive"} and params.positive_acts_on == "both":
        return {SHARED: adapters["positive"]}
    return adapters


def _source(name: str, file: bytes, holds: str) -> Source:
    return Source(name, hashlib.sha256(file).hexdigest(), holds)


# ------------------------------------------------------------------------------------------------- the toolkit's folder


def read_toolkit_folder(user_files: UserFiles, params: ImportParams, shapes: Shapes) -> Imported:
    """Read the files of one step out of a folder that the reference toolkit left.

    Raises:
        InputError: there is no such folder or step, or a file that does not belong there or to this base model.
    """
    assert params.toolkit is not None
    paths = user_files.names(params.toolkit)
    of_step = files_of_step(paths, params.step)
    files = {name: user_files.read(paths[name]) for name in of_step.names}
    modules = {network: list(layers) for network, layers in shapes.items()}
    found, vectors = read_toolkit(files, modules, params.step)
    if not (found or vectors):
        raise InputError(f"expected adapters or words in {params.toolkit}; got none; give the folder of a training")
    adapters = {branch: fitted(adapter, f"the {branch} adapters", shapes) for branch, adapter in found.items()}
    words = toolkit_words(vectors, params.names, "import.names.pt1") if vectors else []
    words_by_file = {of_step.words[word.name]: word for word in words}
    sources = [
        _source(name, file, _holds(words_by_file[name]) if name in words_by_file else "adapters, HCP-Diffusion")
        for name, file in files.items()
    ]
    return Imported(placed(adapters, params), tuple(words), tuple(sources), of_step.step or 0)


def _holds(word: TriggerWord) -> str:
    return f"{word.branch} word {word.name}"


# ------------------------------------------------------------------------------------------------- the concept


def check_words(words: Sequence[TriggerWord], outline: Outline) -> None:
    """Confirm that the words can be typed, are new to the base model and differ, and that their vectors fit it.

    Raises:
        InputError: naming the word.
    """
    for word in words:
        _check_name(word, [other.name for other in words if other is not word])
        check_trigger_word(outline.tokenizer, word.name)
        _check_vectors(word, outline)


def _check_name(word: TriggerWord, others: Sequence[str]) -> None:
    option = f"import.names.{word.slot}"
    if not word.name or re.search(r"\s", word.name):
        named = re.sub(r"\s+", "-", word.name) or "my-word"
        raise InputError(
            f"expected a trigger word without spaces; got {word.name!r}; name it, such as {option}={named}"
        )
    if word.name.lower() in map(str.lower, others):
        raise InputError(
            f"expected every trigger word once; got {word.name!r} twice; name them apart, such as "
            f"{option}=[{word.name}, {word.name}-neg]"
        )


def _check_vectors(word: TriggerWord, outline: Outline) -> None:
    config, (count, width) = outline.text_encoder.config, word.vectors.shape
    if width != config.hidden_size:
        raise InputError(
            f"expected vectors of width {config.hidden_size} for {word.name!r}; got {width}; give an embedding for "
            "this base model, or set base_model to the one it was made for"
        )
    if count > (most := config.max_position_embeddings - 2):
        raise InputError(
            f"expected at most {most} vectors for {word.name!r}, which is what a prompt holds; got {count}; give an "
            "embedding with fewer"
        )


def make_concept(imported: Imported, params: ImportParams, base_model: str, fingerprint: str) -> Concept:
    """Return the concept; its metadata name the files it was made of.

    Raises:
        InputError: words of one branch that differ in their number of vectors, or a slot with half a pair.
    """
    concept = build_concept(
        imported.adapters,
        imported.words,
        BaseModelIdentity(base_model, fingerprint),
        params.class_word,
        imported.num_steps,
        params.clip_skip,
    )
    sources = to_json([[source.file, source.sha256] for source in imported.sources])
    return Concept(concept.tensors, concept.metadata | {"imported_from": sources})
