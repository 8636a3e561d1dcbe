"""Wiring of the pretrain pipeline: how the embedded base model is made."""

from __future__ import annotations

from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.pipelines.pretrain.nodes import (
    draw_samples,
    render_sprites,
    train_autoencoder,
    train_denoiser,
)


def create_pipeline() -> Pipeline:
    """Published drawings → sprites → autoencoder → denoiser → base model."""
    return Pipeline(
        [
            node(render_sprites, ["sprite_packages", "params:pretrain"], "sprites"),
            node(
                train_autoencoder,
                ["sprites", "params:pretrain", "pretrain_checkpoints", "tracker"],
                "pretrained_autoencoder",
            ),
            node(
                train_denoiser,
                ["sprites", "pretrained_autoencoder", "params:pretrain", "pretrain_checkpoints", "tracker"],
                "pretrained_base_model",
            ),
            node(draw_samples, "pretrained_base_model", "pretrained_samples"),
        ]
    )
