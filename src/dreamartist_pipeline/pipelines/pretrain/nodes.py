"""Nodes of the pretrain pipeline."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.params import PretrainParams

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from PIL import Image
    from transformers import CLIPModel, CLIPTokenizer

    from dreamartist_pipeline.checkpoint_files import CheckpointStore
    from dreamartist_pipeline.embedded.sprites import SpritePackages, SpriteSet


def render_sprites(packages: SpritePackages, params: PretrainParams) -> SpriteSet:
    """Rasterise every drawing that is not held out."""
    from tqdm.auto import tqdm

    from dreamartist_pipeline.embedded.sprites import choose_sprites, draw_sprites

    drawings = tqdm(list(choose_sprites(packages, params)), desc="sprites", unit="drawing")
    return draw_sprites(drawings, params.sprite_px)


def render_held_out_sprites(packages: SpritePackages, params: PretrainParams) -> SpriteSet:
    """Rasterise the held-out objects, on which the autoencoder is evaluated."""
    from dreamartist_pipeline.embedded.sprites import choose_held_out_sprites, draw_sprites

    return draw_sprites(choose_held_out_sprites(packages, params), params.sprite_px)


def train_autoencoder(
    sprites: SpriteSet,
    held_out_sprites: SpriteSet,
    start: str | None,
    params: PretrainParams,
    tracker: Tracker,
) -> AutoencoderKL:
    """Train the autoencoder on scenes of all sprites from its latest checkpoint on, or load the one of `start`."""
    import torch
    from diffusers import AutoencoderKL

    from dreamartist_pipeline.backbones.holding.folder import LonePart
    from dreamartist_pipeline.core.processes import run_on_processes
    from dreamartist_pipeline.embedded.stages import fit_autoencoder

    if params.keep_autoencoder and start is not None:
        return LonePart(Path(start) / "vae").module(AutoencoderKL, "vae", torch.device("cpu"), torch.float32)
    store = _store(params, "autoencoder")
    return run_on_processes(fit_autoencoder, _num_processes(params), sprites, held_out_sprites, params, store, tracker)


def build_vocabulary(sprites: SpriteSet, params: PretrainParams) -> CLIPTokenizer:
    """Train the tokenizer on the captions."""
    from dreamartist_pipeline.embedded.model import build_tokenizer
    from dreamartist_pipeline.embedded.scenes import draw_scenes

    captions = draw_scenes(sprites, params.towers.num_scenes, params.seed + 3).captions
    with tempfile.TemporaryDirectory() as folder:
        return build_tokenizer(captions, Path(folder), params.size.max_tokens)


def train_towers(sprites: SpriteSet, tokenizer_path: str, params: PretrainParams, tracker: Tracker) -> CLIPModel:
    """Train text and image tower, from their latest checkpoint on."""
    from dreamartist_pipeline.backbones.holding.clip_vocabulary import read_tokenizer
    from dreamartist_pipeline.core.processes import run_on_processes
    from dreamartist_pipeline.embedded.scenes import draw_scenes
    from dreamartist_pipeline.embedded.stages import fit_towers, token_ids_of

    store = _store(params, "towers")
    scenes = draw_scenes(sprites, params.towers.num_scenes, params.seed + 3)
    tokenizer = read_tokenizer(Path(tokenizer_path))
    token_ids = token_ids_of(tokenizer, list(scenes.captions))
    towers = run_on_processes(
        fit_towers, _num_processes(params), sprites, scenes, token_ids, tokenizer_path, params, store, tracker
    )
    return towers.half()


def train_denoiser(
    sprites: SpriteSet,
    autoencoder_path: str,
    tokenizer_path: str,
    towers_path: str,
    start: str | None,
    params: PretrainParams,
    tracker: Tracker,
) -> StableDiffusionPipeline:
    """Train UNet and text encoder on captioned scenes, from their latest checkpoint on."""
    import torch

    from dreamartist_pipeline.core.processes import run_on_processes
    from dreamartist_pipeline.embedded.stages import DenoiserParts, fit_denoiser

    store = _store(params, "autoencoder", "towers", "denoiser")
    parts = DenoiserParts(autoencoder_path, towers_path, tokenizer_path, start if params.continue_denoiser else None)
    pipeline = run_on_processes(fit_denoiser, _num_processes(params), sprites, parts, params, store, tracker)
    return pipeline.to(torch.float16)


def draw_samples(base_model_path: str, params: PretrainParams) -> tuple[Image.Image, Image.Image]:
    """Draw with the saved model, loaded as any user loads it.

    Returns:
        Images of the sample prompts from several seeds, and one of each of the first objects of the vocabulary.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    from dreamartist_pipeline.embedded.stages import object_grid, sample_grid

    pipeline = StableDiffusionPipeline.from_pretrained(
        base_model_path, dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    return sample_grid(pipeline, images_per_prompt=4), object_grid(pipeline, params)


_STAGES = ("autoencoder", "towers", "denoiser")
_LENGTH = {"num_steps", "decay_now", "minutes", "checkpoint_minutes", "drawing_processes"}


def _store(params: PretrainParams, *stages: str) -> CheckpointStore:
    from dreamartist_pipeline.checkpoint_files import CheckpointStore

    return CheckpointStore(Path(params.checkpoints)).of_recipe(_recipe(params, *stages))


def _recipe(params: PretrainParams, *stages: str) -> str:
    """Hash what affects the stages, except their length: a checkpoint is continued under the same recipe only."""
    ignored = {name: _LENGTH if name in stages else True for name in _STAGES}
    ignored |= {"num_processes": True, "checkpoints": True}
    return hashlib.sha256(params.model_dump_json(exclude=ignored, exclude_defaults=True).encode()).hexdigest()[:12]


def _num_processes(params: PretrainParams) -> int:
    import torch

    return 1 if torch.cuda.is_available() else params.num_processes
