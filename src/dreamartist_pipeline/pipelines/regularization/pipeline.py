"""The regularization pipeline."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.pipelines.regularization.nodes import make_regularization_set


def create_pipeline() -> Pipeline:
    """Draw the regularization set with the base model."""
    return Pipeline(
        [
            node(
                make_regularization_set,
                inputs={
                    "base_model": "base_model",
                    "regularization_prompts": "regularization_prompts",
                    "params": "params:regularization",
                    "ingestion": "params:ingestion",
                    "device": "params:device",
                },
                outputs="regularization_set",
                name="make_regularization_set",
                tags="regularization",
            )
        ]
    )
