"""Report: one page about a subject."""

from dreamartist_pipeline.pipelines.report.pipeline import create_pipeline

__all__ = ["create_pipeline"]
