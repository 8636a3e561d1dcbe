"""Train and test the judge, a classifier of the embedded base model's images."""

from dreamartist_pipeline.pipelines.judge.pipeline import create_pipeline

__all__ = ["create_pipeline"]
