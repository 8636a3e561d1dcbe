"""Single LoRA and embedding files named in the parameters."""

from __future__ import annotations

import re
from pathlib import PurePath

from dreamartist_pipeline.core.concept import TriggerWord
from dreamartist_pipeline.core.layout import ModelLayout
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter, added_up
from dreamartist_pipeline.interop.foreign_concept import Imported, Source, source
from dreamartist_pipeline.interop.foreign_lora import read_lora
from dreamartist_pipeline.interop.user_files import UserFiles
from dreamartist_pipeline.interop.word_files import read_vectors, typable, word_inside
from dreamartist_pipeline.params import ImportParams

_BRANCHES = ("positive", "negative")
_NAME_OF_ALL = re.compile(r"learned_embeds(-steps-\d+)?")  # what diffusers' script calls every word's file


def read_single_files(files: UserFiles, params: ImportParams, layout: ModelLayout, option: str) -> Imported:
    """Read the LoRA files of each branch, and the embedding files of each slot.

    Args:
        files: path -> what reads the file.
        params: which files belong to what.
        layout: of the base model.
        option: where users name the words of a slot, for a note: "import.names.{slot}".

    Raises:
        InputError: a file of another kind, or for another base model.
    """
    sources: list[Source] = []
    notes: list[str] = []
    adapters: dict[str, BranchAdapter] = {}
    for branch, paths in (("positive", params.positive), ("negative", params.negative)):
        members = []
        for path in paths:
            file, name = files[path](), PurePath(path).name
            lora = read_lora(file, name, layout.shapes, layout.names, path)
            members.append(lora.adapter)
            sources.append(source(name, file, f"{branch} LoRA, {lora.form}"))
            notes += lora.notes
        if members:
            adapters[branch] = added_up(members)
    words = []
    for slot, paths in params.words.items():
        named = params.names.get(slot)
        for index, (branch, path) in enumerate(zip(_BRANCHES, paths, strict=False)):
            file, name = files[path](), PurePath(path).name
            vectors = read_vectors(file, name, layout.names.embedding_keys)
            word, note = (named[index], "") if named else _word_of(file, name, option.format(slot=slot), layout)
            words.append(TriggerWord(word, slot, branch, vectors))
            sources.append(source(name, file, f"{branch} word {word}"))
            notes += [note] if note else []
    return Imported(adapters, tuple(words), tuple(sources), notes=tuple(notes))


def _word_of(file: bytes, name: str, option: str, layout: ModelLayout) -> tuple[str, str]:
    """Return a word that nobody has named, and what to say about it.

    Its name is the file's, as in other tools, unless that is what diffusers' script calls every file.
    """
    stem, inside = PurePath(name).stem, word_inside(file, name)
    if not inside or inside == stem:
        return stem, ""
    if _NAME_OF_ALL.fullmatch(stem) and inside == typable(inside):
        return inside, f"the trigger word {inside!r} is the one inside {name}; {option} gives it another name"
    if not _is_new(inside := typable(inside), layout):
        return stem, f"{name} itself names its trigger word {inside!r}, which the base model has as a word of its own"
    return stem, f"{name} itself names its trigger word {inside!r}; {option}={inside!r} takes that name"


def _is_new(word: str, layout: ModelLayout) -> bool:
    """Return whether the base model does not know a word, so that it can be a trigger word."""
    try:
        layout.check_word(word)
    except InputError:
        return False
    return True
