"""Training: the reference image becomes a concept."""

from dreamartist_pipeline.pipelines.training.pipeline import create_pipeline

__all__ = ["create_pipeline"]
