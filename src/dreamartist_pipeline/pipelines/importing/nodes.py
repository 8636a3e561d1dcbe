"""Convert files of other tools to a concept."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import ImportParams

if TYPE_CHECKING:
    from dreamartist_pipeline.core.concept import Concept
    from dreamartist_pipeline.interop.user_files import UserFiles
else:  # Kedro evaluates a node's annotations when it registers the pipelines; importing torch is slow
    Concept = UserFiles = Any

_NAMES = "import.names.{slot}"  # option with the words of a slot

log = logging.getLogger(__name__)


def import_concept(
    base_model: ModelLocation, import_files: UserFiles, toolkit_files: UserFiles, params: ImportParams
) -> tuple[Concept, dict[str, Any]]:
    """Convert LoRA and embedding files to a concept, checked against the base model without loading its weights.

    Returns:
        The concept, and a report: layers, ranks and vectors by branch, and the files with their SHA-256.

    Raises:
        InputError: nothing to import, a damaged file, a file of another kind or for another base model, or an invalid
            trigger word.
    """
    from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_outline
    from dreamartist_pipeline.backbones.known_models import clip_skip_hint
    from dreamartist_pipeline.backbones.layouts import layout_of
    from dreamartist_pipeline.interop.foreign_concept import make_concept, read_toolkit_folder, resolve
    from dreamartist_pipeline.pipelines.importing.reading import read_single_files
    from dreamartist_pipeline.pipelines.importing.reporting import describe, summary

    if not (params.positive or params.negative or params.words or params.toolkit):
        raise InputError(
            expected="files to import",
            got="none",
            remedy="set for example import.positive=cat.safetensors, import.words.pt1=my-cat.safetensors, or "
            "import.toolkit=FOLDER",
        )
    files = BaseModelFiles(base_model)
    outline = load_outline(files)
    layout = layout_of(outline, params.clip_skip)
    if params.toolkit is None:
        read = read_single_files(import_files, params, layout, _NAMES)
    else:
        read = read_toolkit_folder(toolkit_files, params.toolkit, layout, params.names, params.step, _NAMES)
    imported = resolve(read, layout, params.positive_acts_on, _NAMES)
    concept = make_concept(imported, outline.identity, params.class_word, params.clip_skip)
    hint = clip_skip_hint(files.names(), layout.names.architecture, params.clip_skip, "import.clip_skip")
    report = describe(imported, concept, hint)
    log.info("Imported:\n%s", summary(report))
    return concept, report
