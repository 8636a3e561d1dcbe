"""Prompts: the regularization prompts are drawn from a prompt database."""

from dreamartist_pipeline.pipelines.prompts.pipeline import create_pipeline

__all__ = ["create_pipeline"]
