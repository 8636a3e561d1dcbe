"""Nodes of the pretrain pipeline: sprites, autoencoder, denoiser, a look at what it draws."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from dreamartist_pipeline.params import PretrainParams

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from PIL import Image

    from dreamartist_pipeline.core.sprites import SpriteSet
    from dreamartist_pipeline.datasets.sprites import CheckpointStore, SpritePackages


def render_sprites(packages: SpritePackages, params: PretrainParams) -> SpriteSet:
    """Rasterise every drawing that the model may see."""
    import numpy as np
    import torch
    from tqdm.auto import tqdm

    from dreamartist_pipeline.core.sprites import SpriteSet
    from dreamartist_pipeline.pipelines.pretrain.rendering import choose_sprites, rasterize

    rendered = [
        (image, word, style)
        for svg, word, style in tqdm(list(choose_sprites(packages, params)), desc="sprites", unit="drawing")
        if (image := rasterize(svg, params.sprite_px)) is not None
    ]
    images, words, styles = zip(*rendered, strict=True)
    return SpriteSet(torch.from_numpy(np.stack(images)), words, styles)


def train_autoencoder(
    sprites: SpriteSet, params: PretrainParams, checkpoints: CheckpointStore, tracker: Any
) -> AutoencoderKL:
    """Train the autoencoder on scenes of all sprites; resumes from its last checkpoint."""
    from dreamartist_pipeline.pipelines.pretrain.processes import run_on_processes
    from dreamartist_pipeline.pipelines.pretrain.stages import fit_autoencoder

    store = checkpoints.of_recipe(_recipe(params, "autoencoder"))
    return run_on_processes(fit_autoencoder, _num_processes(params), sprites, params, store, tracker)


def train_denoiser(
    sprites: SpriteSet, autoencoder_path: str, params: PretrainParams, checkpoints: CheckpointStore, tracker: Any
) -> StableDiffusionPipeline:
    """Train UNet and text encoder on captioned scenes; resumes from its last checkpoint."""
    import torch
    from diffusers import AutoencoderKL

    from dreamartist_pipeline.backbones.embedded import build_tokenizer
    from dreamartist_pipeline.core.sprites import draw_scenes
    from dreamartist_pipeline.pipelines.pretrain.processes import run_on_processes
    from dreamartist_pipeline.pipelines.pretrain.stages import encode_scenes, fit_denoiser, token_ids_of

    store = checkpoints.of_recipe(_recipe(params, "autoencoder", "denoiser"))
    scenes = draw_scenes(sprites, params.denoiser.num_scenes, params.seed + 2)
    tokenizer = build_tokenizer(scenes.captions, store.path / "tokenizer", params.size.max_tokens)
    autoencoder = AutoencoderKL.from_pretrained(autoencoder_path, local_files_only=True)
    latents = encode_scenes(autoencoder, sprites, scenes, params.size.image_px)
    token_ids = token_ids_of(tokenizer, list(scenes.captions))
    pipeline = run_on_processes(
        fit_denoiser,
        _num_processes(params),
        autoencoder_path,
        str(store.path / "tokenizer"),
        latents,
        token_ids,
        params,
        store,
        tracker,
    )
    return pipeline.to(torch.float16)


def draw_samples(base_model_path: str) -> Image.Image:
    """Draw a grid with the finished model as everyone else will load it."""
    import torch
    from diffusers import StableDiffusionPipeline

    from dreamartist_pipeline.pipelines.pretrain.stages import sample_grid

    pipeline = StableDiffusionPipeline.from_pretrained(
        base_model_path, dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    grid: Image.Image = sample_grid(pipeline, images_per_prompt=4)
    return grid


def _recipe(params: PretrainParams, *stages: str) -> str:
    """Hash what decides a stage's result, so that a checkpoint never continues another recipe."""
    ignored = {"num_processes", *({"autoencoder", "denoiser"} - set(stages))}
    return hashlib.sha256(params.model_dump_json(exclude=ignored).encode()).hexdigest()[:12]


def _num_processes(params: PretrainParams) -> int:
    import torch

    return 1 if torch.cuda.is_available() else params.num_processes
