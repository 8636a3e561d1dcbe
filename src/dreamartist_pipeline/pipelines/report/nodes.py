"""Write the report of a subject."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from dreamartist_pipeline.early_checks import optional_inputs
from dreamartist_pipeline.run_facts import RunFacts

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

    from dreamartist_pipeline.core.concept import Concept
else:  # Kedro evaluates a node's annotations when it registers the pipelines; these imports are slow
    Concept = DataFrame = Figure = Any

log = logging.getLogger(__name__)


@optional_inputs(
    *("prepared_image", "reconstruction", "training_plan", "training_curves"),
    *("evaluation_measures", "evaluation_pictures", "strengths_sheet", "guidance_sheet", "recommended_settings"),
    *("attention_pictures", "export_report"),
)
def write_report(
    concept: Concept,
    facts: RunFacts,
    *,
    prepared_image: Image | None = None,
    reconstruction: Image | None = None,
    training_plan: Mapping[str, Any] | None = None,
    training_curves: Figure | None = None,
    evaluation_measures: DataFrame | None = None,
    evaluation_pictures: Mapping[str, bytes] | None = None,
    strengths_sheet: Image | None = None,
    guidance_sheet: Image | None = None,
    recommended_settings: Mapping[str, Any] | None = None,
    attention_pictures: Mapping[str, bytes] | None = None,
    export_report: Mapping[str, Any] | None = None,
) -> str:
    """Return the page: what was asked, what was learned, measures, and files with the commands that use them.

    What is None is missing, and the page says which command makes it.

    Raises:
        InputError: a folder of pictures, or the file of recommended settings, is damaged.
    """
    from dreamartist_pipeline.core.strengths import RecommendedSettings
    from dreamartist_pipeline.pipelines.report.contents import Sources, contents_of
    from dreamartist_pipeline.pipelines.report.page import render

    sources = Sources(
        metadata=concept.metadata,
        facts=facts,
        prepared_image=prepared_image,
        reconstruction=reconstruction,
        plan=training_plan,
        curves=training_curves,
        measures=evaluation_measures,
        pictures=evaluation_pictures,
        strengths_sheet=strengths_sheet,
        guidance_sheet=guidance_sheet,
        recommended=RecommendedSettings.read(recommended_settings, concept),
        attention=attention_pictures,
        export=export_report,
    )
    contents = contents_of(sources)
    for missing in contents.missing:
        log.info("The report has no %s: %s", missing.what, missing.command)
    return render(contents)
