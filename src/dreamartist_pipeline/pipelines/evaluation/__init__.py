"""Evaluation: similarity to the subject, and drift from the base model."""

from dreamartist_pipeline.pipelines.evaluation.pipeline import create_pipeline

__all__ = ["create_pipeline"]
