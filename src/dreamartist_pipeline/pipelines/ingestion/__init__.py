"""Ingestion: prepare the reference image."""

from dreamartist_pipeline.pipelines.ingestion.pipeline import create_pipeline

__all__ = ["create_pipeline"]
