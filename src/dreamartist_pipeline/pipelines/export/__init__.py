"""Export: a trained concept becomes files for the tools where people make pictures."""

from dreamartist_pipeline.pipelines.export.pipeline import create_pipeline

__all__ = ["create_pipeline"]
