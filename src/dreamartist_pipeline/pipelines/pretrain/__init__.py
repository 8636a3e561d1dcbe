"""Train the embedded base model from scratch."""

from dreamartist_pipeline.pipelines.pretrain.pipeline import create_pipeline

__all__ = ["create_pipeline"]
