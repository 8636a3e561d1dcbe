"""Write a concept's files for other tools, and read every one of them back before the export is called good."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.early_checks import PlannedConcept, checked_early
from dreamartist_pipeline.params import DeviceParams, ExportParams

if TYPE_CHECKING:
    from dreamartist_pipeline.core.concept import Concept
else:  # Kedro resolves the hints of a node when it registers the pipelines, without importing torch
    Concept = Any

log = logging.getLogger(__name__)

_CHECKED_ON = DeviceParams(device="cpu", dtype="float32")  # so that only the files can make a difference


def check_export(params: ExportParams, planned: PlannedConcept | None) -> None:
    """Confirm that the formats can hold the concept, and that scheduler and ComfyUI can draw with it.

    Raises:
        InputError: they cannot.
    """
    from dreamartist_pipeline.backbones.schedulers import check_sampler
    from dreamartist_pipeline.interop.comfyui import comfyui_sampler
    from dreamartist_pipeline.interop.expressible import check_expressible

    zero_terminal_snr = planned is not None and planned.zero_terminal_snr
    check_sampler(params.sampler, zero_terminal_snr)
    if planned is not None:
        check_expressible(planned.groups, params.formats, planned.is_trained_here)
        if _will_have_workflow(params, planned):
            comfyui_sampler(params.sampler)


def _will_have_workflow(params: ExportParams, planned: PlannedConcept) -> bool:
    """Say whether the formats hold all that a workflow needs of the concept."""
    has_loras = any(planned.groups.values())
    return ("kohya" in params.formats or not has_loras) and ("embeddings" in params.formats or not planned.has_words)


@checked_early("export", check_export)
def write_files(base_model: str, concept: Concept, params: ExportParams) -> dict[str, bytes]:
    """Return name -> bytes of every file of the export.

    `lora/` holds the kohya files, `diffusers/` the peft files, `embeddings/` the trigger words, `toolkit/` the
    reference toolkit's files; beside them a ComfyUI workflow, a script for diffusers and a README.

    Raises:
        InputError: a concept that the chosen formats cannot hold, or a scheduler that ComfyUI does not have.
    """
    from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_outline
    from dreamartist_pipeline.interop.expressible import check_expressible
    from dreamartist_pipeline.pipelines.export.writing import companions, concept_files, read_source

    check_expressible(concept.metadata.lora, params.formats)  # of an import, known only now
    log.info("Adapter strengths in the workflow and the script: %s.", params.strength)
    source = read_source(concept, load_outline(BaseModelFiles(base_model)))
    written = concept_files(source, params)
    return written | companions(source, written, params)


def check_files(
    base_model: str, concept: Concept, candidate: dict[str, bytes], params: ExportParams
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Read every file back and compare it with the concept.

    Returns:
        The files, unchanged, and the report: for every file what was compared, the difference and its limit.

    Raises:
        InputError: a file does not give back what the concept says; the message names it.
    """
    from dreamartist_pipeline.backbones.base_model import open_base_model
    from dreamartist_pipeline.pipelines.export.checking import check_export

    backbone = open_base_model(base_model, _CHECKED_ON)
    report = check_export(backbone, concept, candidate, params)
    for name, entry in report["files"].items():
        if isinstance(difference := entry.get("difference"), str) and difference:
            log.warning("%s draws another picture: %s", name, difference)
        for tool, layers in entry.get("refused_layers", {}).items():
            if layers:
                log.info("%s: %s will not take %d of its layers; see the report", name, tool, len(layers))
    return candidate, report
