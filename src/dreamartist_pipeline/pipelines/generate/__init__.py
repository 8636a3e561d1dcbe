"""Generate: draw images with a trained concept."""

from dreamartist_pipeline.pipelines.generate.pipeline import create_pipeline

__all__ = ["create_pipeline"]
