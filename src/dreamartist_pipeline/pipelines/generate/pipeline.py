"""The generate pipeline."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.pipelines.generate.nodes import generate_images


def create_pipeline() -> Pipeline:
    """Draw images with the concept, and a sheet of all images."""
    return Pipeline(
        [
            node(
                generate_images,
                inputs={
                    "base_model": "base_model",
                    "concept": "concept",
                    "params": "params:generate",
                    "device": "params:device",
                    "init_image": "init_image",
                    "init_mask": "init_mask",
                    "recommended_settings": "recommended_settings",
                    "concept_steps": "concept_steps",
                },
                outputs=["generated_images", "generated_grid"],
                name="generate_images",
                tags="generate",
            )
        ]
    )
