"""Ingestion: the one reference image becomes training data."""

from dreamartist_pipeline.pipelines.ingestion.pipeline import create_pipeline

__all__ = ["create_pipeline"]
