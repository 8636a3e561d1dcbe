"""The evaluation pipeline."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.core.tracking import Tracker, tracked
from dreamartist_pipeline.pipelines.evaluation.nodes import evaluate_concept


def create_pipeline(tracker: Tracker) -> Pipeline:
    """Create a contact sheet, metrics, and tables of all measures and all images, with and without the concept."""
    return Pipeline(
        [
            node(
                tracked(evaluate_concept, tracker),
                inputs={
                    "base_model": "base_model",
                    "concept": "concept",
                    "prepared_image": "prepared_image",
                    "evaluation_views": "evaluation_views",
                    "params": "params:evaluation",
                    "ingestion": "params:ingestion",
                    "device": "params:device",
                    "concept_steps": "concept_steps",
                },
                outputs=[
                    "contact_sheet",
                    "evaluation_metrics",
                    "evaluation_scores",
                    "evaluation_table",
                    "evaluation_measures",
                ],
                name="evaluate_concept",
                tags="evaluation",
            )
        ]
    )
