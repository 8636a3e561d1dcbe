"""From files of other tools to a concept: what they hold, checked against the base model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dreamartist_pipeline.core.concept import Concept, TriggerWord
from dreamartist_pipeline.core.layout import BaseModelIdentity, ModelLayout
from dreamartist_pipeline.core.lora_factors import SHARED
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import (
    BranchAdapter,
    build_concept,
)
from dreamartist_pipeline.interop.foreign_lora import fitted
from dreamartist_pipeline.interop.toolkit import files_of_step, read_toolkit, toolkit_words
from dreamartist_pipeline.interop.toolkit_config import SLOT
from dreamartist_pipeline.interop.user_files import UserFiles
from dreamartist_pipeline.interop.word_files import typable
from dreamartist_pipeline.params import PositiveActsOn


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
    left_out: branch name -> layers whose updates act on nothing.
    """

    adapters: dict[str, BranchAdapter]
    words: tuple[TriggerWord, ...]
    sources: tuple[Source, ...]
    num_steps: int = 0
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


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
    """Read the files of one step out of a folder that the reference toolkit left.

    Args:
        files: those of the folder.
        folder: what it is called in messages.
        layout: of the base model.
        names: slot -> positive and, perhaps, negative word; empty: one pair, of which the negative ends in "-neg".
        step: which one; None takes the newest.
        option: where users name the words of a slot, for an error: "import.names.{slot}".

    Raises:
        InputError: there is no such step, nothing in it, words that are not there or no pair, or a file that
            does not belong there or to this base model.
    """
    of_step = files_of_step(files, step)
    contents = {name: files[name]() for name in of_step.names}
    modules = {network: list(layers) for network, layers in layout.shapes.items()}
    found, vectors = read_toolkit(contents, modules, layout.names, step)
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
    """Return what becomes the concept: adapters on the branches that they act on, and words that can be used.

    Args:
        imported: as read.
        layout: of the base model.
        positive_acts_on: what a positive adapter acts on where there is no negative one; both, as in other tools.
        option: where users name the words of a slot, for an error: "import.names.{slot}".

    Raises:
        InputError: a word that cannot be typed, is known to the base model or is there twice, vectors that do not fit,
            or nothing that acts on anything.
    """
    adapters = imported.adapters
    if positive_acts_on == "both" and set(adapters) == {"positive"}:
        adapters = {SHARED: adapters["positive"]}
    _check_words(imported.words, layout, option)
    left_out = {branch: layers for branch, a in adapters.items() if (layers := _skipped(a, layout))}
    used = {branch: _without_skipped(adapter, layout) for branch, adapter in adapters.items()}
    used = {branch: adapter for branch, adapter in used.items() if adapter.num_layers}
    if not (used or imported.words):
        raise InputError(
            expected="adapters that act on something",
            got="only text-encoder layers that clip_skip leaves out",
            remedy="lower clip_skip",
        )
    return replace(imported, adapters=used, left_out=left_out)


def make_concept(
    imported: Imported, base_model: BaseModelIdentity, class_word: str = "", clip_skip: int = 0
) -> Concept:
    """Return the concept; its metadata name the files it was made of.

    Raises:
        InputError: a negative word without a positive one.
    """
    sources = tuple((source.file, source.sha256) for source in imported.sources)
    return build_concept(
        imported.adapters, imported.words, base_model, class_word, imported.num_steps, clip_skip, sources
    )


# ------------------------------------------------------------------------------------------------- adapters


def _skipped(adapter: BranchAdapter, layout: ModelLayout) -> tuple[str, ...]:
    return tuple(layer for network, layer in adapter.by_layer() if layer in layout.skipped.get(network, ()))


def _without_skipped(adapter: BranchAdapter, layout: ModelLayout) -> BranchAdapter:
    """Return the adapter without the text encoders' layers that clip_skip leaves out."""
    networks = {
        network: {layer: f for layer, f in layers.items() if layer not in layout.skipped.get(network, ())}
        for network, layers in adapter.networks.items()
    }
    return BranchAdapter({network: layers for network, layers in networks.items() if layers})


# ------------------------------------------------------------------------------------------------- words


def _check_words(words: Sequence[TriggerWord], layout: ModelLayout, option: str) -> None:
    for word in words:
        _check_name(word, [other.name for other in words if other is not word], option.format(slot=word.slot))
        layout.check_word(word.name)
        _check_vectors(word, layout)


def _check_name(word: TriggerWord, others: Sequence[str], option: str) -> None:
    if not word.name or word.name != typable(word.name):
        named = typable(word.name) or "my-word"
        raise InputError(
            expected="a trigger word without spaces, braces or slashes",
            got=f"{word.name!r}",
            remedy=f"name it, such as {option}={named}",
        )
    if word.name.lower() in map(str.lower, others):
        raise InputError(
            expected="every trigger word once",
            got=f"{word.name!r} twice",
            remedy=f"name them apart, such as {option}=[{word.name}, {word.name}-neg]",
        )


def _check_vectors(word: TriggerWord, layout: ModelLayout) -> None:
    widths = {encoder: vectors.shape[-1] for encoder, vectors in word.vectors.items()}
    if widths != layout.word_widths:
        raise InputError(
            expected=f"vectors of width {_numbers(layout.word_widths)} for {word.name!r}",
            got=f"{_numbers(widths)}",
            remedy="give an embedding for this base model, or set base_model to the one it was made for",
        )
    if not 1 <= word.num_vectors <= layout.max_vectors:
        raise InputError(
            expected=f"1 to {layout.max_vectors} vectors for {word.name!r}, which is what a prompt holds",
            got=f"{word.num_vectors}",
            remedy="give another embedding",
        )
    if not all(vectors.isfinite().all() for vectors in word.vectors.values()):
        raise InputError(
            expected=f"finite vectors for {word.name!r}",
            got="some that are infinite or no numbers",
            remedy="make or download the embedding again",
        )


def _numbers(widths: Mapping[str, int]) -> str:
    return " and ".join(map(str, widths.values()))
