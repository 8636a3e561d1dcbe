"""Make a concept of the files of other tools."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.params import ImportParams

if TYPE_CHECKING:
    from dreamartist_pipeline.core.concept import Concept
    from dreamartist_pipeline.pipelines.importing.reading import UserFiles
else:  # Kedro resolves the hints of a node when it registers the pipelines, without importing torch
    Concept = UserFiles = Any

log = logging.getLogger(__name__)


def import_concept(
    base_model: str, user_files: UserFiles, concept_in_place: str | None, params: ImportParams
) -> tuple[Concept, dict[str, Any]]:
    """Make a concept of LoRA and embedding files, checked against the base model without loading its weights.

    Returns:
        The concept, and the report: layers, ranks and vectors by branch, and the files with their SHA-256.

    Raises:
        InputError: nothing to import, a concept that would be replaced unasked, a file that is missing, of another
            kind or for another base model, or a trigger word that already means something.
    """
    from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_outline
    from dreamartist_pipeline.backbones.prompts import check_clip_skip
    from dreamartist_pipeline.pipelines.importing.reading import (
        check_words,
        layer_shapes,
        make_concept,
        read_lora_files,
        read_toolkit_folder,
    )
    from dreamartist_pipeline.pipelines.importing.reporting import describe, summary

    check_request(concept_in_place, params)
    files = BaseModelFiles(base_model)
    outline = load_outline(files)
    check_clip_skip(outline.text_encoder.config.num_hidden_layers, params.clip_skip)
    read = read_lora_files if params.toolkit is None else read_toolkit_folder
    imported = read(user_files, params, layer_shapes(outline))
    check_words(imported.words, outline)
    concept = make_concept(imported, params, files.name, files.fingerprint())
    report = describe(imported, concept)
    log.info("Imported:\n%s", summary(report))
    return concept, report


def check_request(concept_in_place: str | None, params: ImportParams) -> None:
    """Confirm that there is something to import, and that nothing is replaced unasked.

    Raises:
        InputError: neither files nor a folder, or a concept of this subject without `replace`.
    """
    if not (params.positive or params.negative or params.words or params.toolkit):
        raise InputError(
            "expected files to import; got none; name them, such as import.positive=cat.safetensors, "
            "import.words.pt1=my-cat.safetensors, or import.toolkit=FOLDER"
        )
    if concept_in_place is not None and not params.replace:
        raise InputError(
            f"expected a subject without a concept; {concept_in_place} is there already; choose another name "
            "(subject=NAME), or replace it (import.replace=true)"
        )
