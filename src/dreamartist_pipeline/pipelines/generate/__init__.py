"""Generate: a trained concept draws what prompts ask for."""

from dreamartist_pipeline.pipelines.generate.pipeline import create_pipeline

__all__ = ["create_pipeline"]
