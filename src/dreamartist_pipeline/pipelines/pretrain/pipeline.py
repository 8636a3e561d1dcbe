"""Wiring of the pretrain pipeline, which trains the embedded base model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.core.tracking import Tracker, tracked
from dreamartist_pipeline.pipelines.pretrain.nodes import (
    build_vocabulary,
    draw_samples,
    render_held_out_sprites,
    render_sprites,
    train_autoencoder,
    train_denoiser,
    train_towers,
)

if TYPE_CHECKING:
    from dreamartist_pipeline.embedded.pretraining import Checkpoints


def create_pipeline(tracker: Tracker, checkpoints: Checkpoints) -> Pipeline:
    """Published drawings → sprites → autoencoder, towers → denoiser → base model."""
    denoiser_inputs = [
        "sprites",
        "pretrained_autoencoder",
        "pretrained_tokenizer",
        "pretrained_towers",
        "pretraining_start",
        "params:pretrain",
    ]
    return Pipeline(
        [
            node(render_sprites, ["sprite_packages", "params:pretrain"], "sprites"),
            node(render_held_out_sprites, ["sprite_packages", "params:pretrain"], "held_out_sprites"),
            node(
                tracked(train_autoencoder, tracker, checkpoints=checkpoints),
                ["sprites", "held_out_sprites", "pretraining_start", "params:pretrain"],
                "pretrained_autoencoder",
            ),
            node(build_vocabulary, ["sprites", "params:pretrain"], "pretrained_tokenizer"),
            node(
                tracked(train_towers, tracker, checkpoints=checkpoints),
                ["sprites", "pretrained_tokenizer", "params:pretrain"],
                "pretrained_towers",
            ),
            node(
                tracked(train_denoiser, tracker, checkpoints=checkpoints),
                denoiser_inputs,
                "pretrained_base_model",
            ),
            node(
                draw_samples,
                ["pretrained_base_model", "params:pretrain"],
                ["pretrained_samples", "pretrained_objects"],
            ),
        ]
    )
