"""The ingestion pipeline."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.pipelines.ingestion.nodes import prepare_reference


def create_pipeline() -> Pipeline:
    """Prepare the reference image and its optional attention mask."""
    return Pipeline(
        [
            node(
                prepare_reference,
                inputs={
                    "reference_image": "reference_image",
                    "attention_mask_image": "attention_mask_image",
                    "params": "params:ingestion",
                },
                outputs=["prepared_image", "prepared_mask"],
                name="prepare_reference",
                tags="ingestion",
            )
        ]
    )
