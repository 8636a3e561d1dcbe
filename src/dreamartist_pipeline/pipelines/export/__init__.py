"""Export: write a concept's files for other tools."""

from dreamartist_pipeline.pipelines.export.pipeline import create_pipeline

__all__ = ["create_pipeline"]
