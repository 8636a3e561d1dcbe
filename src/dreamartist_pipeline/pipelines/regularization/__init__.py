"""Regularization: the base model draws the images that keep its behaviour in place."""

from dreamartist_pipeline.pipelines.regularization.pipeline import create_pipeline

__all__ = ["create_pipeline"]
