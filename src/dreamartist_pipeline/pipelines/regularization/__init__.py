"""Regularization: draw the images for prior preservation."""

from dreamartist_pipeline.pipelines.regularization.pipeline import create_pipeline

__all__ = ["create_pipeline"]
