"""The report pipeline."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.pipelines.report.nodes import write_report
from dreamartist_pipeline.run_facts import RUN_FACTS


def create_pipeline() -> Pipeline:
    """Write one page from what the other pipelines have stored; no model is loaded."""
    return Pipeline(
        [
            node(
                write_report,
                inputs={
                    "concept": "concept",
                    "facts": RUN_FACTS,
                    "prepared_image": "prepared_image",
                    "reconstruction": "reconstruction",
                    "training_plan": "training_plan",
                    "training_curves": "training_curves",
                    "evaluation_measures": "evaluation_measures",
                    "evaluation_pictures": "evaluation_pictures",
                    "strengths_sheet": "strengths_sheet",
                    "guidance_sheet": "guidance_sheet",
                    "recommended_settings": "recommended_settings",
                    "attention_pictures": "attention_pictures",
                    "export_report": "export_report",
                },
                outputs="report",
                name="write_report",
                tags="report",
            )
        ]
    )
