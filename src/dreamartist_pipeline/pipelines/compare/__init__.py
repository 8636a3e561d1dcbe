"""The pipelines that compare methods, tune them before, and sweep parameters."""

from dreamartist_pipeline.pipelines.compare.pipeline import (
    create_pipeline,
    create_sweep_pipeline,
    create_tuning_pipeline,
)

__all__ = ["create_pipeline", "create_sweep_pipeline", "create_tuning_pipeline"]
