"""Wiring of the pretrain pipeline, which trains the embedded base model."""

from __future__ import annotations

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

_DENOISER_INPUTS = [
    "sprites",
    "pretrained_autoencoder",
    "pretrained_tokenizer",
    "pretrained_towers",
    "pretraining_start",
    "params:pretrain",
]


def create_pipeline(tracker: Tracker) -> Pipeline:
    """Published drawings → sprites → autoencoder, towers → denoiser → base model."""
    return Pipeline(
        [
            node(render_sprites, ["sprite_packages", "params:pretrain"], "sprites", name="render_sprites"),
            node(
                render_held_out_sprites,
                ["sprite_packages", "params:pretrain"],
                "held_out_sprites",
                name="render_held_out_sprites",
            ),
            node(
                tracked(train_autoencoder, tracker),
                ["sprites", "held_out_sprites", "pretraining_start", "params:pretrain"],
                "pretrained_autoencoder",
                name="train_autoencoder",
            ),
            node(build_vocabulary, ["sprites", "params:pretrain"], "pretrained_tokenizer", name="build_vocabulary"),
            node(
                tracked(train_towers, tracker),
                ["sprites", "pretrained_tokenizer", "params:pretrain"],
                "pretrained_towers",
                name="train_towers",
            ),
            node(
                tracked(train_denoiser, tracker),
                _DENOISER_INPUTS,
                "pretrained_base_model",
                name="train_denoiser",
            ),
            node(
                draw_samples,
                ["pretrained_base_model", "params:pretrain"],
                ["pretrained_samples", "pretrained_objects"],
                name="draw_samples",
            ),
        ]
    )
