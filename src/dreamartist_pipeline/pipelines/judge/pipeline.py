"""Wiring of the judge pipeline: how the judge is made and how well it knows real pictures."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.pipelines.judge.nodes import (
    measure_judge,
    render_test_sprites,
    render_training_sprites,
    train_judge,
)


def create_pipeline() -> Pipeline:
    """Published drawings → sprites at two sizes → judge, trained on one → its accuracy on the other."""
    return Pipeline(
        [
            node(render_training_sprites, ["sprite_packages", "params:pretrain", "params:judge"], "judge_sprites"),
            node(render_test_sprites, ["sprite_packages", "params:pretrain"], "judge_test_sprites"),
            node(train_judge, ["judge_sprites", "params:judge", "judge_checkpoints", "tracker"], "judge"),
            node(measure_judge, ["judge", "judge_test_sprites", "params:judge", "tracker"], "judge_accuracy"),
        ]
    )
