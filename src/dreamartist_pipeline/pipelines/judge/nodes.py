"""Nodes of the judge pipeline."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.params import JudgeParams, PretrainParams

if TYPE_CHECKING:
    from dreamartist_pipeline.embedded.judge import Judge
    from dreamartist_pipeline.embedded.sprites import SpritePackages, SpriteSet


def render_training_sprites(packages: SpritePackages, pretrain: PretrainParams, params: JudgeParams) -> SpriteSet:
    """Rasterise the drawings that captions name, at the judge's resolution."""
    return _render_named(packages, pretrain, params.sprite_px)


def render_test_sprites(packages: SpritePackages, pretrain: PretrainParams) -> SpriteSet:
    """Rasterise the drawings that captions name, at the base model's resolution."""
    return _render_named(packages, pretrain, pretrain.sprite_px)


def train_judge(sprites: SpriteSet, params: JudgeParams, tracker: Tracker) -> Judge:
    """Train the judge on augmented scenes with every tint, from its latest checkpoint on."""
    import torch

    from dreamartist_pipeline.checkpoint_files import CheckpointStore
    from dreamartist_pipeline.embedded.judge import (
        IMAGE_PX,
        Judge,
        JudgeVocabulary,
        augment,
        draw_hard_scenes,
        judge_loss,
    )
    from dreamartist_pipeline.embedded.pretraining import run_stage, stage_device
    from dreamartist_pipeline.embedded.scenes import compose

    vocabulary = JudgeVocabulary(tuple(dict.fromkeys(sprites.objects)), tuple(dict.fromkeys(sprites.styles)))
    torch.manual_seed(params.seed)
    device = stage_device()
    judge, stage, drawings = Judge(vocabulary, params.channels).to(device), params.training, sprites.images.to(device)
    scenes = draw_hard_scenes(sprites, stage.num_scenes, params.seed + 1)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(scenes), (stage.batch_size,), device=device, generator=generator).cpu()
        images = augment(compose(drawings, scenes.rows(chosen).to(device), IMAGE_PX), generator)
        return judge_loss(judge, images, [scenes.shown[index] for index in chosen.tolist()])

    store = CheckpointStore(Path(params.checkpoints)).of_recipe(_recipe(params, vocabulary))
    run_stage("judge", [judge], loss_of, stage, params.seed, store, tracker)
    return judge.cpu().eval().requires_grad_(False)


def measure_judge(judge: Judge, sprites: SpriteSet, params: JudgeParams, tracker: Tracker) -> dict[str, Any]:
    """Measure the judge's accuracy on unseen scenes of the test sprites."""
    import torch
    from tqdm.auto import tqdm

    from dreamartist_pipeline.embedded.judge import IMAGE_PX, judge_images
    from dreamartist_pipeline.embedded.scenes import all_tints, compose, draw_scenes
    from dreamartist_pipeline.pipelines.judge.measuring import accuracy_report

    scenes = draw_scenes(sprites, params.num_test_scenes, params.seed + 2, tints_of=all_tints)
    batches = torch.arange(len(scenes)).split(128)
    verdicts = [
        verdict
        for chosen in tqdm(batches, desc="judging", unit="batch")
        for verdict in judge_images(judge, compose(sprites.images, scenes.rows(chosen), IMAGE_PX))
    ]
    report = accuracy_report(verdicts, scenes.shown)
    flat = {
        f"judge/{group}/{attribute}": share
        for group, shares in report["accuracy"].items()
        for attribute, share in shares.items()
    }
    tracker.log_metrics(flat, step=0)
    return report


def _render_named(packages: SpritePackages, pretrain: PretrainParams, side_px: int) -> SpriteSet:
    from tqdm.auto import tqdm

    from dreamartist_pipeline.embedded.sprites import choose_sprites, draw_sprites

    named = [drawing for drawing in choose_sprites(packages, pretrain) if drawing[1]]
    return draw_sprites(tqdm(named, desc=f"sprites of {side_px} px", unit="drawing"), side_px)


def _recipe(params: JudgeParams, vocabulary: object) -> str:
    """Hash what affects the weights: a checkpoint is continued under the same recipe only."""
    decisive = params.model_dump_json(exclude={"num_test_scenes", "checkpoints"}, exclude_defaults=True) + repr(
        vocabulary
    )
    return hashlib.sha256(decisive.encode()).hexdigest()[:12]
