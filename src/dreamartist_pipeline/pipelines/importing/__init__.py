"""Import: convert files of other tools to a concept."""

from dreamartist_pipeline.pipelines.importing.pipeline import create_pipeline

__all__ = ["create_pipeline"]
