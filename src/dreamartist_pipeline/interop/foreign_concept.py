"""Concepts from the files of other tools, checked against the base model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dreamartist_pipeline.core.concept import Concept, TriggerWord
from dreamartist_pipeline.core.layout import BaseModelIdentity, ModelLayout
from dreamartist_pipeline.core.lora_factors import SHARED
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter, build_concept
from dreamartist_pipeline.interop.foreign_lora import fitted
from dreamartist_pipeline.interop.toolkit import files_of_step, read_toolkit, toolkit_words
from dreamartist_pipeline.interop.toolkit_config import SLOT
from dreamartist_pipeline.interop.user_files import UserFiles
from dreamartist_pipeline.interop.word_files import typable
from dreamartist_pipeline.params import PositiveActsOn


@dataclass(frozen=True)
class Source:
    """A file that was read.

    Attributes:
        file: its name.
        sha256: of its bytes.
        holds: a description of its content.
    """

    file: str
    sha256: str
    holds: str


@dataclass(frozen=True)
class Imported:
    """The content of the files.

    Attributes:
        adapters: branch name, or "shared" for both -> its adapter.
        num_steps: of the training; 0 if unknown.
        left_out: branch name -> layers of text encoders that are not read.
        notes: what users should know about the files.
    """

    adapters: dict[str, BranchAdapter]
    words: tuple[TriggerWord, ...]
    sources: tuple[Source, ...]
    num_steps: int = 0
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def source(name: str, file: bytes, holds: str) -> Source:
    """Return a file's entry in the list of sources."""
    return Source(name, hashlib.sha256(file).hexdigest(), holds)


def read_toolkit_folder(
    files: UserFiles,
    folder: str,
    layout: ModelLayout,
    names: Mapping[str, Sequence[str]],
    step: int | None,
    option: str,
) -> Imported:
    """Read the files of one step from an output folder of the reference toolkit.

    Args:
        files: of the folder.
        folder: its name in messages.
        layout: of the base model.
        names: slot -> positive and optional negative word; empty: one pair, the negative word ending in "-neg".
        step: the step; None for the last.
        option: the option that names the words of a slot, for an error: "import.names.{slot}".

    Raises:
        InputError: no such step, an empty one, missing or unpaired words, or an unexpected or mismatched file.
    """
    of_step = files_of_step(files, step)
    contents = {name: files[name]() for name in of_step.names}
    found, vectors = read_toolkit(contents, layout.shapes, layout.names, step)
    words = toolkit_words(vectors, names, option.format(slot=SLOT))
    if not (found or words):
        raise InputError(expected=f"adapters or words in {folder}", got="none", remedy="give the folder of a training")
    adapters = {branch: fitted(adapter, f"the {branch} adapters", layout.shapes) for branch, adapter in found.items()}
    word_of = {of_step.words[word.name]: word for word in words}
    sources = [
        source(name, file, f"{word_of[name].branch} word {word_of[name].name}")
        if name in word_of
        else source(name, file, "adapters, HCP-Diffusion")
        for name, file in contents.items()
    ]
    return Imported(adapters, tuple(words), tuple(sources), of_step.step or 0)


def resolve(imported: Imported, layout: ModelLayout, positive_acts_on: PositiveActsOn, option: str) -> Imported:
    """Return the content of the concept: adapters by the branches they act on, without skipped layers, and valid words.

    Args:
        imported: as read.
        layout: of the base model.
        positive_acts_on: the branches of a positive adapter without a negative one; both, as in other tools.
        option: the option that names the words of a slot, for an error: "import.names.{slot}".

    Raises:
        InputError: an invalid, known or duplicate word, vectors that do not fit, or no effective adapter.
    """
    adapters = imported.adapters
    if positive_acts_on == "both" and set(adapters) == {"positive"}:
        adapters = {SHARED: adapters["positive"]}
    for word in imported.words:
        others = [other.name for other in imported.words if other is not word]
        _check_name(word, others, option.format(slot=word.slot))
        _check_is_new(word, layout, option.format(slot=word.slot))
        _check_vectors(word, layout)
    used, left_out = {}, {}
    for branch, adapter in adapters.items():
        updates = adapter.by_layer()
        skipped = [at for at in updates if at[1] in layout.skipped.get(at[0], ())]
        if skipped:
            left_out[branch] = tuple(layer for _, layer in skipped)
        if len(skipped) < len(updates):
            used[branch] = BranchAdapter.of_layers({at: updates[at] for at in updates if at not in skipped})
    if not (used or imported.words):
        raise InputError(
            expected="adapters with an effect",
            got="only text-encoder layers that are not read with this clip_skip",
            remedy="lower clip_skip, or give another file",
        )
    return replace(imported, adapters=used, left_out=left_out)


def make_concept(
    imported: Imported, base_model: BaseModelIdentity, class_word: str = "", clip_skip: int = 0
) -> Concept:
    """Return the concept, with the names and hashes of the files in its metadata.

    Raises:
        InputError: a negative word without a positive one.
    """
    sources = tuple((source.file, source.sha256) for source in imported.sources)
    return build_concept(
        imported.adapters, imported.words, base_model, class_word, imported.num_steps, clip_skip, sources
    )


# ------------------------------------------------------------------------------------------------- words


def _check_name(word: TriggerWord, others: Sequence[str], option: str) -> None:
    if not word.name or word.name != typable(word.name):
        raise InputError(
            expected="a trigger word without spaces, braces or slashes",
            got=f"{word.name!r}",
            remedy=f"name it, such as {option}={typable(word.name) or 'my-word'}",
        )
    if word.name.lower() in map(str.lower, others):
        raise InputError(
            expected="every trigger word once",
            got=f"{word.name!r} twice",
            remedy=f"give them different names, such as {option}=[{word.name}, {word.name}-neg]",
        )


def _check_is_new(word: TriggerWord, layout: ModelLayout, option: str) -> None:
    try:
        layout.check_word(word.name)
    except InputError as error:
        raise InputError(error.expected, error.got, f"{error.remedy} ({option})") from error


def _check_vectors(word: TriggerWord, layout: ModelLayout) -> None:
    widths = {encoder: vectors.shape[-1] for encoder, vectors in word.vectors.items()}
    if widths != layout.word_widths:
        raise InputError(
            expected=f"vectors of width {' and '.join(map(str, layout.word_widths.values()))} for {word.name!r}",
            got=" and ".join(map(str, widths.values())),
            remedy="give an embedding for this base model, or set base_model to the one it was made for",
        )
    if not 1 <= word.num_vectors <= layout.max_vectors:
        raise InputError(
            expected=f"1 to {layout.max_vectors} vectors for {word.name!r}, the length of a prompt",
            got=f"{word.num_vectors}",
            remedy="give another embedding",
        )
    if not all(vectors.isfinite().all() for vectors in word.vectors.values()):
        raise InputError(
            expected=f"finite vectors for {word.name!r}",
            got="infinite or NaN values",
            remedy="make or download the embedding again",
        )
