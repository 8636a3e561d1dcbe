"""The evaluation pipeline."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.core.tracking import Tracker, tracked
from dreamartist_pipeline.pipelines.evaluation.nodes import (
    compare_strengths,
    draw_base_images,
    evaluate_concept,
    map_attention,
)

_DRAWN_WITH = {
    "base_model": "base_model",
    "concept": "concept",
    "params": "params:evaluation",
    "device": "params:device",
}
"""Inputs of every node."""


def create_pipeline(tracker: Tracker) -> Pipeline:
    """Measure images with and without the concept, compare strengths and guidance scales, and map attention."""
    return Pipeline(
        [
            node(
                draw_base_images,
                inputs={**_DRAWN_WITH, "prepared_image": "prepared_image"},
                outputs="base_images",
                name="draw_base_images",
                tags="evaluation",
            ),
            node(
                tracked(evaluate_concept, tracker),
                inputs={
                    **_DRAWN_WITH,
                    "prepared_image": "prepared_image",
                    "base_images": "base_images",
                    "evaluation_views": "evaluation_views",
                    "ingestion": "params:ingestion",
                    "concept_steps": "concept_steps",
                },
                outputs=[
                    "contact_sheet",
                    "evaluation_metrics",
                    "evaluation_scores",
                    "evaluation_table",
                    "evaluation_measures",
                    "evaluation_pictures",
                ],
                name="evaluate_concept",
                tags="evaluation",
            ),
            node(
                compare_strengths,
                inputs={**_DRAWN_WITH, "prepared_image": "prepared_image", "concept_steps": "concept_steps"},
                outputs=["strengths_sheet", "guidance_sheet", "strengths_table", "recommended_settings"],
                name="compare_strengths",
                tags="evaluation",
            ),
            node(
                map_attention,
                inputs={**_DRAWN_WITH, "concept_steps": "concept_steps"},
                outputs=["attention_sheet", "attention_pictures"],
                name="map_attention",
                tags="evaluation",
            ),
        ]
    )
