"""The pipelines that compare methods, and that tune them before."""

from dreamartist_pipeline.pipelines.compare.pipeline import create_pipeline, create_tuning_pipeline

__all__ = ["create_pipeline", "create_tuning_pipeline"]
