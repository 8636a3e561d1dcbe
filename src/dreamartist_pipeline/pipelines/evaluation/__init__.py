"""Evaluation: what the concept learned, and what it changed besides."""

from dreamartist_pipeline.pipelines.evaluation.pipeline import create_pipeline

__all__ = ["create_pipeline"]
