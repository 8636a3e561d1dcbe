"""The prompts pipeline."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.pipelines.prompts.nodes import draw_regularization_prompts


def create_pipeline() -> Pipeline:
    """Draw prompts at random from the prompt database."""
    return Pipeline(
        [
            node(
                draw_regularization_prompts,
                inputs={"prompt_database": "prompt_database", "params": "params:prompts"},
                outputs="regularization_prompts",
                name="draw_regularization_prompts",
                tags="prompts",
            )
        ]
    )
