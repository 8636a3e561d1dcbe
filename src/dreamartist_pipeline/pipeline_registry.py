"""The pipelines by name."""

from __future__ import annotations

from kedro.pipeline import Pipeline

from dreamartist_pipeline.pipelines import (
    compare,
    evaluation,
    export,
    generate,
    importing,
    ingestion,
    judge,
    personalize,
    pretrain,
    prompts,
    registration,
    regularization,
    report,
    training,
)
from dreamartist_pipeline.tracking import MLflowTracker


def register_pipelines() -> dict[str, Pipeline]:
    """Return the pipelines of `kedro run --pipeline NAME`, in the order in which they are run one after the other."""
    tracker = MLflowTracker()
    stages = {
        "ingestion": ingestion.create_pipeline(tracker),
        "prompts": prompts.create_pipeline(),
        "regularization": regularization.create_pipeline(),
        "training": training.create_pipeline(tracker),
    }
    train = sum(stages.values(), Pipeline([]))
    measuring, reporting = evaluation.create_pipeline(tracker), report.create_pipeline()
    evaluate = measuring + reporting
    exporting, register = export.create_pipeline(), registration.create_pipeline()
    return {
        **stages,
        "train": train,
        "evaluation": measuring,
        "report": reporting,
        "evaluate": evaluate,
        "export": exporting,
        "register": register,
        "generate": generate.create_pipeline(),
        "import": importing.create_pipeline(),
        "pretrain": pretrain.create_pipeline(tracker),
        "judge": judge.create_pipeline(tracker),
        "compare": compare.create_pipeline(),
        "tune": compare.create_tuning_pipeline(),
        "personalize": personalize.create_pipeline(),
        "sweep": compare.create_sweep_pipeline(),
        "__default__": train + evaluate + exporting + register,
    }
