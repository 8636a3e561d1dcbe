"""Registration: a concept as a version of a registered model in MLflow."""

from dreamartist_pipeline.pipelines.registration.pipeline import create_pipeline

__all__ = ["create_pipeline"]
