"""The ingestion pipeline."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.core.tracking import Tracker, tracked
from dreamartist_pipeline.pipelines.ingestion.nodes import prepare_reference


def create_pipeline(tracker: Tracker) -> Pipeline:
    """Prepare the reference image and its optional attention mask."""
    return Pipeline(
        [
            node(
                tracked(prepare_reference, tracker),
                inputs={
                    "reference_image": "reference_image",
                    "attention_mask_image": "attention_mask_image",
                    "params": "params:ingestion",
                },
                outputs=["prepared_image", "prepared_mask", "prepared_framing"],
                name="prepare_reference",
                tags="ingestion",
            )
        ]
    )
