"""The registration pipeline."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.pipelines.registration.nodes import serve_concept


def create_pipeline() -> Pipeline:
    """Make an MLflow model of the concept; saving it registers it."""
    return Pipeline(
        [
            node(
                serve_concept,
                inputs={
                    "base_model": "base_model",
                    "concept": "concept",
                    "params": "params:registration",
                    "defaults": "params:generate",
                    "device": "params:device",
                    "concept_steps": "concept_steps",
                    "recommended_settings": "recommended_settings",
                },
                outputs="registered_model",
                name="serve_concept",
                tags="registration",
            )
        ]
    )
