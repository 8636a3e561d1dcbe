"""Training: train a concept from the reference image."""

from dreamartist_pipeline.pipelines.training.pipeline import create_pipeline

__all__ = ["create_pipeline"]
