"""Import: files of other tools become a concept."""

from dreamartist_pipeline.pipelines.importing.pipeline import create_pipeline

__all__ = ["create_pipeline"]
