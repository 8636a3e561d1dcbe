"""Many subjects: a run for each, and one table and page of all."""

from dreamartist_pipeline.pipelines.personalize.pipeline import create_pipeline

__all__ = ["create_pipeline"]
