"""Write a concept's files for other tools, and verify them by reading them back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.core.kept_steps import KeptSteps, check_step, concept_at
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.early_checks import PlannedConcept, checked_early, optional_inputs
from dreamartist_pipeline.params import DeviceParams, ExportParams

if TYPE_CHECKING:
    from dreamartist_pipeline.core.concept import Concept
else:  # Kedro evaluates a node's annotations when it registers the pipelines; importing torch is slow
    Concept = Any

log = logging.getLogger(__name__)

_CPU_FLOAT32 = DeviceParams(device="cpu", dtype="float32")  # rules out differences by device or dtype


def check_export(params: ExportParams, planned: PlannedConcept | None) -> None:
    """Check that the formats can store the concept, and that scheduler and ComfyUI support it.

    Raises:
        InputError: a format or scheduler that cannot be used.
    """
    from dreamartist_pipeline.backbones.families import FAMILIES
    from dreamartist_pipeline.backbones.schedulers import check_sampler
    from dreamartist_pipeline.interop.comfyui import comfyui_sampler
    from dreamartist_pipeline.interop.expressible import check_expressible
    from dreamartist_pipeline.interop.toolkit import check_networks

    zero_terminal_snr = planned is not None and planned.zero_terminal_snr
    check_sampler(params.sampler, zero_terminal_snr)
    if planned is not None:
        check_expressible(planned.groups, params.formats, planned.is_trained_here)
        if "toolkit" in params.formats:
            known = {network for family in FAMILIES for network in family.network_classes}
            check_networks(planned.groups.keys() & known)  # others are misspelt, which the training says
        has_loras = "kohya" in params.formats or not any(planned.groups.values())
        has_words = "embeddings" in params.formats or not planned.slots
        if has_loras and has_words:  # the export will have a ComfyUI workflow
            comfyui_sampler(params.sampler)


@checked_early("export", check_export)
@checked_early("export", check_step, "concept_steps")
@optional_inputs("recommended_settings")
def write_files(
    base_model: ModelLocation,
    concept: Concept,
    params: ExportParams,
    concept_steps: KeptSteps | None = None,
    recommended_settings: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """Return name -> bytes of every file of the export.

    `lora/` contains kohya files, `diffusers/` peft files, `embeddings/` the trigger words, `toolkit/` the reference
    toolkit's files; the root contains a ComfyUI workflow, a script for diffusers and a README.

    Raises:
        InputError: a step that is not kept, a concept that the formats cannot store, a scheduler that ComfyUI does not
            have, or no recommended settings for `params.recommended`.
    """
    from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_outline
    from dreamartist_pipeline.core.strengths import RecommendedSettings, with_recommended
    from dreamartist_pipeline.interop.expressible import check_expressible
    from dreamartist_pipeline.pipelines.export.writing import companions, concept_files, read_source

    concept = concept_at(concept, concept_steps or {}, params.step, "export.step")
    recommended = RecommendedSettings.read(recommended_settings, concept)
    params = with_recommended(params, recommended, "export")
    check_expressible(concept.metadata.lora, params.formats)  # not checked early if this run imports the concept
    log.info("Adapter strengths in the workflow and the script: %s.", params.strength)
    source = read_source(concept, load_outline(BaseModelFiles(base_model)))
    written = concept_files(source, params, recommended)
    return written | companions(source, written, params, recommended)


@optional_inputs("recommended_settings")
def check_files(
    base_model: ModelLocation,
    concept: Concept,
    candidate: dict[str, bytes],
    params: ExportParams,
    concept_steps: KeptSteps | None = None,
    recommended_settings: dict[str, Any] | None = None,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Read every file back and compare it with the concept.

    Returns:
        The files, unchanged, and the report: for every file what was compared, the difference and its limit.

    Raises:
        InputError: a file that differs from the concept; the message names it.
    """
    from dreamartist_pipeline.backbones.base_model import open_base_model
    from dreamartist_pipeline.core.strengths import RecommendedSettings, with_recommended
    from dreamartist_pipeline.pipelines.export.checking import verify_files

    concept = concept_at(concept, concept_steps or {}, params.step, "export.step")
    recommended = RecommendedSettings.read(recommended_settings, concept)
    params = with_recommended(params, recommended, "export")
    backbone = open_base_model(base_model, _CPU_FLOAT32)
    report = verify_files(backbone, concept, candidate, params)
    for name, entry in report["files"].items():
        if isinstance(difference := entry.get("difference"), str) and difference:
            log.warning("%s: images in ComfyUI differ: %s", name, difference)
        for tool, layers in entry.get("refused_layers", {}).items():
            if layers:
                log.info("%s: %s ignores %d of its layers; see the report", name, tool, len(layers))
    return candidate, report
