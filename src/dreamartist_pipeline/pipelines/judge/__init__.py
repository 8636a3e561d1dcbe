"""Train and test the judge of the embedded base model's pictures."""

from dreamartist_pipeline.pipelines.judge.pipeline import create_pipeline

__all__ = ["create_pipeline"]
