"""Wiring of the judge pipeline, which trains and tests the judge."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.core.tracking import Tracker, tracked
from dreamartist_pipeline.pipelines.judge.nodes import (
    measure_judge,
    render_test_sprites,
    render_training_sprites,
    train_judge,
)


def create_pipeline(tracker: Tracker) -> Pipeline:
    """Published drawings → sprites at two sizes → judge, trained at one size → its accuracy at the other."""
    return Pipeline(
        [
            node(
                render_training_sprites,
                ["sprite_packages", "params:pretrain", "params:judge"],
                "judge_sprites",
                name="render_training_sprites",
            ),
            node(
                render_test_sprites,
                ["sprite_packages", "params:pretrain"],
                "judge_test_sprites",
                name="render_test_sprites",
            ),
            node(
                tracked(train_judge, tracker),
                ["judge_sprites", "params:judge"],
                "judge",
                name="train_judge",
            ),
            node(
                tracked(measure_judge, tracker),
                ["judge", "judge_test_sprites", "params:judge"],
                "judge_accuracy",
                name="measure_judge",
            ),
        ]
    )
