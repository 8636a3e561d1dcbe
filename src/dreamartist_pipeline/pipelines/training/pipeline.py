"""The training pipeline."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.core.tracking import Tracker, tracked
from dreamartist_pipeline.pipelines.training.figures import draw_curves
from dreamartist_pipeline.pipelines.training.nodes import check_training, compare_reconstruction, train_concept


def create_pipeline(tracker: Tracker) -> Pipeline:
    """Check the training and the autoencoder's reconstruction, train the concept, plot the curves."""
    nodes = [
        node(
            check_training,
            inputs={
                "base_model": "base_model",
                "params": "params:training",
                "caption": "reference_caption",
                "device": "params:device",
                "start_files": "start_files",
                "ingestion": "params:ingestion",
            },
            outputs="training_plan",
            name="check_training",
        ),
        node(
            tracked(compare_reconstruction, tracker),
            inputs=["base_model", "prepared_image", "params:device"],
            outputs="reconstruction",
            name="compare_reconstruction",
        ),
        node(
            tracked(train_concept, tracker),
            inputs={
                "base_model": "base_model",
                "prepared_image": "prepared_image",
                "prepared_mask": "prepared_mask",
                "prepared_framing": "prepared_framing",
                "regularization_set": "regularization_set",
                "training_plan": "training_plan",
                "params": "params:training",
                "caption": "reference_caption",
                "device": "params:device",
                "start_files": "start_files",
            },
            outputs=["concept", "training_history", "training_scores", "concept_steps"],
            name="train_concept",
        ),
        node(
            draw_curves,
            inputs=["training_history", "training_scores"],
            outputs=["training_curves", "training_curves_page"],
            name="draw_curves",
        ),
    ]
    return Pipeline(nodes, tags="training")
