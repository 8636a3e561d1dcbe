"""Single LoRA and embedding files named in the parameters."""

from __future__ import annotations

from pathlib import PurePath

from dreamartist_pipeline.core.concept import TriggerWord
from dreamartist_pipeline.core.layout import ModelLayout
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter, added_up
from dreamartist_pipeline.interop.foreign_concept import Imported, Source, source
from dreamartist_pipeline.interop.foreign_lora import read_lora
from dreamartist_pipeline.interop.user_files import UserFiles
from dreamartist_pipeline.interop.word_files import read_vectors
from dreamartist_pipeline.params import ImportParams

_BRANCHES = ("positive", "negative")


def read_single_files(files: UserFiles, params: ImportParams, layout: ModelLayout) -> Imported:
    """Read the LoRA files of each branch, and the embedding files of each slot.

    Raises:
        InputError: a file of another kind, or for another base model.
    """
    sources: list[Source] = []
    adapters: dict[str, BranchAdapter] = {}
    for branch, paths in (("positive", params.positive), ("negative", params.negative)):
        members = []
        for path in paths:
            file, name = files[path](), PurePath(path).name
            lora = read_lora(file, name, layout.shapes, layout.names)
            members.append(lora.adapter)
            sources.append(source(name, file, f"{branch} LoRA, {lora.form}"))
        if members:
            adapters[branch] = added_up(members)
    words = []
    for slot, paths in params.words.items():
        names = params.names.get(slot, [PurePath(path).stem for path in paths])
        for branch, path, word in zip(_BRANCHES, paths, names, strict=False):
            file, name = files[path](), PurePath(path).name
            vectors = read_vectors(file, name, layout.names.embedding_keys)
            words.append(TriggerWord(word, slot, branch, vectors))
            sources.append(source(name, file, f"{branch} word {word}"))
    return Imported(adapters, tuple(words), tuple(sources))
