"""Prompts: draw the regularization prompts from a prompt database."""

from dreamartist_pipeline.pipelines.prompts.pipeline import create_pipeline

__all__ = ["create_pipeline"]
