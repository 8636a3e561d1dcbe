"""The training stages of the embedded base model, as each process runs them."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from dreamartist_pipeline.backbones.evaluators import CLIP_NORMALIZATION, load_transformer
from dreamartist_pipeline.backbones.holding.clip_vocabulary import read_tokenizer
from dreamartist_pipeline.backbones.holding.folder import LonePart
from dreamartist_pipeline.core.checkpoints import Checkpoints
from dreamartist_pipeline.core.images import image_grid, to_images
from dreamartist_pipeline.core.processes import rank
from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.embedded.model import (
    build_autoencoder,
    build_text_encoder,
    build_towers,
    build_unet,
    load_with_new_vocabulary,
)
from dreamartist_pipeline.embedded.pretraining import (
    autoencoder_loss,
    denoiser_loss,
    has_bfloat16,
    normalize_latents,
    psnr,
    run_stage,
    stage_device,
    step_generator,
)
from dreamartist_pipeline.embedded.scenes import Scenes, compose, draw_scenes
from dreamartist_pipeline.embedded.sprites import SpriteSet
from dreamartist_pipeline.params import DenoiserParams, PretrainParams

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPModel


_VALIDATION_SCENES = 256
_NUM_SHOWN_OBJECTS = 64
_SAMPLING_BATCH = 16


def fit_autoencoder(
    sprites: SpriteSet, held_out: SpriteSet, params: PretrainParams, store: Checkpoints, tracker: Tracker
) -> AutoencoderKL:
    """Train the autoencoder and normalise its latents; called on every rank.

    Checkpoints are evaluated on scenes of the held-out sprites.
    """
    device, stage = stage_device(), params.autoencoder
    torch.manual_seed(params.seed)
    autoencoder = build_autoencoder(params.size).to(device, memory_format=torch.channels_last)
    images = sprites.images.to(device)
    scenes = draw_scenes(sprites, stage.num_scenes, params.seed + 1, _balanced_choices(sprites)).to(device)

    def paint(chosen: torch.Tensor) -> torch.Tensor:
        return compose(images, scenes.rows(chosen), params.size.image_px)

    validation_scenes = draw_scenes(held_out, _VALIDATION_SCENES, params.seed + 1).to(device)
    validation = compose(held_out.images.to(device), validation_scenes, params.size.image_px)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(scenes), (stage.batch_size,), device=device, generator=generator)
        torch.manual_seed(generator.initial_seed())  # the posterior's sample
        with torch.autocast(device.type, enabled=False):
            batch = paint(chosen)
        return autoencoder_loss(autoencoder, batch)

    def evaluate(step: int) -> None:
        _log_reconstructions(autoencoder, validation, tracker, step)

    bf16 = has_bfloat16(device)
    run_stage("autoencoder", [autoencoder], loss_of, stage, params.seed, store, tracker, bf16=bf16, after_save=evaluate)
    with torch.no_grad():
        batches = torch.arange(min(len(scenes), 1024), device=device).split(64)
        latents = torch.cat([autoencoder.encode(paint(batch)).latent_dist.mode() for batch in batches])
    normalize_latents(autoencoder.quant_conv, autoencoder.post_quant_conv, latents)
    return autoencoder.cpu().requires_grad_(False)


@torch.no_grad()
def _log_reconstructions(autoencoder: AutoencoderKL, images: torch.Tensor, tracker: Tracker, step: int) -> None:
    latents = (autoencoder.encode(batch).latent_dist.mode() for batch in images.split(64))
    restored = torch.cat([autoencoder.decode(batch).sample for batch in latents])
    psnr_db = psnr(restored, images).mean().item()
    tqdm.write(f"autoencoder after {step} steps: {psnr_db:.2f} dB on held-out sprites")
    tracker.log_metrics({"autoencoder/psnr_db": psnr_db}, step=step)
    pairs = [*to_images(images[:8]), *to_images(restored[:8])]
    tracker.log_image(image_grid(pairs, columns=8), key="autoencoder", step=step)


def fit_towers(
    sprites: SpriteSet,
    scenes: Scenes,
    token_ids: torch.Tensor,
    tokenizer_path: str,
    params: PretrainParams,
    store: Checkpoints,
    tracker: Tracker,
) -> CLIPModel:
    """Train text and image tower contrastively (CLIP, Radford et al. 2021); called on every rank.

    Args:
        sprites: of the scenes.
        scenes: training scenes, the last of which are held back for validation.
        token_ids: `[N, L]` of their captions, int64.
        tokenizer_path: folder of the tokenizer.
        params: the recipe.
        store: where checkpoints are.
        tracker: receives the curves.
    """
    device, stage = stage_device(), params.towers
    tokenizer = read_tokenizer(Path(tokenizer_path))
    torch.manual_seed(params.seed)
    towers = build_towers(params.size, tokenizer).to(device).train()
    images, scenes, token_ids = sprites.images.to(device), scenes.to(device), token_ids.to(device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in CLIP_NORMALIZATION)

    def compare(chosen: torch.Tensor) -> Any:
        with torch.autocast(device.type, enabled=False):
            pixels = (compose(images, scenes.rows(chosen), params.size.image_px) / 2 + 0.5 - mean) / std
        return towers(input_ids=token_ids[chosen], pixel_values=pixels, return_loss=True)

    num_training = len(scenes) - min(_VALIDATION_SCENES, len(scenes) // 4)
    held_back = torch.arange(num_training, len(scenes), device=device)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        loss: torch.Tensor = compare(
            torch.randint(num_training, (stage.batch_size,), device=device, generator=generator)
        ).loss
        return loss

    @torch.no_grad()
    def evaluate(step: int) -> None:
        nearest = compare(held_back).logits_per_image.argmax(dim=1)
        accuracy = (nearest == torch.arange(len(held_back), device=device)).float().mean().item()
        tqdm.write(f"towers after {step} steps: right caption for {accuracy:.0%} of {len(held_back)} unseen images")
        tracker.log_metrics({"towers/captions_found": accuracy}, step=step)

    bf16 = has_bfloat16(device)
    run_stage("towers", [towers], loss_of, stage, params.seed, store, tracker, bf16=bf16, after_save=evaluate)
    return towers.cpu().eval()


@dataclass(frozen=True)
class DenoiserParts:
    """Folders of the parts that the denoiser is trained with.

    Attributes:
        autoencoder: trained.
        towers: trained.
        tokenizer: of the captions.
        start: base model to continue from; None: an untrained UNet, and the text tower as text encoder.
    """

    autoencoder: str
    towers: str
    tokenizer: str
    start: str | None = None


def fit_denoiser(
    sprites: SpriteSet, parts: DenoiserParts, params: PretrainParams, store: Checkpoints, tracker: Tracker
) -> StableDiffusionPipeline:
    """Train UNet and text encoder on new scenes in every step; called on every rank.

    At this size the text encoder has to keep learning.
    """
    device, stage = stage_device(), params.denoiser
    pipeline = assemble_untrained(parts, params).to(device)
    unet = pipeline.unet.to(memory_format=torch.channels_last).train()
    text_encoder = pipeline.text_encoder.train()
    loss_on = _loss_on_scenes(pipeline, sprites.images.to(device), params.size.image_px)
    checkpoint = store.load("denoiser")
    names = replace(sprites, images=sprites.images[:0])
    batches = _SceneBatches(names, pipeline.tokenizer, stage, params.seed, rank()).starting_at(
        checkpoint["step"] if checkpoint else 0
    )

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        return loss_on(*next(batches), generator, density=stage.timestep_density)

    held_back = draw_scenes(sprites, _VALIDATION_SCENES, params.seed + 7, tinted_share=stage.tinted_share)
    held_back_ids = token_ids_of(pipeline.tokenizer, list(held_back.captions))

    @torch.no_grad()
    def validation_loss(token_ids: torch.Tensor) -> float:
        generator = torch.Generator(device).manual_seed(params.seed)
        batches = zip(torch.arange(len(held_back)).split(64), token_ids.split(64), strict=True)
        losses = [loss_on(held_back.rows(rows), ids, generator, prompt_dropout=0.0) for rows, ids in batches]
        return torch.stack(losses).mean().item()

    def evaluate(step: int) -> None:
        loss, shuffled = validation_loss(held_back_ids), validation_loss(held_back_ids.roll(1, dims=0))
        tracker.log_metrics({"denoiser/held_back_loss": loss, "denoiser/caption_gap": shuffled - loss}, step=step)
        tracker.log_image(sample_grid(pipeline), key="samples", step=step)
        tqdm.write(f"denoiser after {step} steps: loss {loss:.4f}, with shuffled captions {shuffled:.4f}")

    networks, bf16 = [unet, text_encoder], has_bfloat16(device)
    run_stage("denoiser", networks, loss_of, stage, params.seed, store, tracker, bf16=bf16, after_save=evaluate)
    return pipeline.to("cpu")


def _loss_on_scenes(
    pipeline: StableDiffusionPipeline, sprite_images: torch.Tensor, image_px: int
) -> Callable[..., torch.Tensor]:
    """Return (scenes, token ids `[B, L]`, generator, options of `denoiser_loss`) -> loss of UNet and text encoder."""
    device = sprite_images.device
    autoencoder = pipeline.vae.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    empty_ids = token_ids_of(pipeline.tokenizer, [""]).to(device)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod.to(device)

    def loss_on(scenes: Scenes, token_ids: torch.Tensor, generator: torch.Generator, **options: Any) -> torch.Tensor:
        with torch.no_grad():
            images = compose(sprite_images, scenes.to(device), image_px)
            latents = autoencoder.encode(images).latent_dist.mode().float()
        networks, ids = (pipeline.unet, pipeline.text_encoder), token_ids.to(device)
        return denoiser_loss(*networks, latents, ids, empty_ids, alphas_cumprod, generator, **options)

    return loss_on


@dataclass(frozen=True)
class _SceneBatches(Dataset[tuple[Scenes, torch.Tensor]]):
    """Step -> this rank's scenes of that step, and the token ids `[B, L]` of their captions."""

    names: SpriteSet  # without images: the training process composes them
    tokenizer: Any
    stage: DenoiserParams
    seed: int
    rank: int

    def __getitem__(self, step: int) -> tuple[Scenes, torch.Tensor]:
        seed = step_generator(self.seed + 2, self.rank, step, torch.device("cpu")).initial_seed()
        scenes = draw_scenes(self.names, self.stage.batch_size, seed, tinted_share=self.stage.tinted_share)
        return scenes, token_ids_of(self.tokenizer, list(scenes.captions))

    def starting_at(self, step: int) -> Iterator[tuple[Scenes, torch.Tensor]]:
        """Return an infinite iterator over the batches from this step on."""
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=itertools.count(step),
            num_workers=self.stage.drawing_processes,
            worker_init_fn=_ignore_interrupts,
        )
        return iter(loader)


def _ignore_interrupts(_: int) -> None:
    """Keep a worker of the data loader alive on Ctrl-C: the step that it draws for is finished before the stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def assemble_untrained(parts: DenoiserParts, params: PretrainParams) -> StableDiffusionPipeline:
    """Build the pipeline of a trained autoencoder, UNet and text encoder as they start, and the noise schedule."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel

    tokenizer = read_tokenizer(Path(parts.tokenizer))
    autoencoder = build_autoencoder(params.size)  # and not the loaded one, whose configuration names its folder
    autoencoder.load_state_dict(_weights(AutoencoderKL, "vae", Path(parts.autoencoder)))
    torch.manual_seed(params.seed)
    text_encoder, unet = build_text_encoder(params.size, tokenizer), build_unet(params.size)
    if parts.start is None:
        text_encoder.load_state_dict(load_transformer(CLIPModel, "clip", Path(parts.towers)).text_model.state_dict())
    else:
        start = Path(parts.start)
        unet.load_state_dict(_weights(UNet2DConditionModel, "unet", start / "unet"))
        weights = _weights(CLIPTextModel, "text_encoder", start / "text_encoder")
        load_with_new_vocabulary(text_encoder, tokenizer, weights, read_tokenizer(start / "tokenizer"))
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _weights(kind: Any, part: str, folder: Path) -> dict[str, torch.Tensor]:
    module = LonePart(folder).module(kind, part, torch.device("cpu"), torch.float32)
    weights: dict[str, torch.Tensor] = module.state_dict()
    return weights


def token_ids_of(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """Tokenize captions, padded to the tokenizer's length: `[N, L]` int64."""
    return torch.tensor(tokenizer(captions, padding="max_length", truncation=True).input_ids)


SAMPLE_PROMPTS = (
    "a cat, flat style, blue background",
    "a red butterfly, noto style, yellow background",
    "a hamburger, twemoji style, green background",
    "a blue car, blob style, white background",
    "a house, noto style, pink and white striped background",
    "a small frog, flat style, purple background",
    "a dog on the left and a yellow star on the right, noto style, teal background",
    "a green apple above an orange fish, twemoji style, gray background",
)


def sample_grid(pipeline: StableDiffusionPipeline, images_per_prompt: int = 2) -> Image.Image:
    """Draw every sample prompt, one column per prompt, with fixed seeds."""
    images = []
    for seed in range(images_per_prompt):
        images += _draw(pipeline, SAMPLE_PROMPTS, [seed * 100 + i for i in range(len(SAMPLE_PROMPTS))])
    return image_grid(images, columns=len(SAMPLE_PROMPTS))


def object_grid(pipeline: StableDiffusionPipeline, params: PretrainParams) -> Image.Image:
    """Draw the first objects of the vocabulary, in alternating styles, each labelled with object and style."""
    words, styles = list(params.objects)[:_NUM_SHOWN_OBJECTS], list(params.styles.values())
    named = [(word, styles[i % len(styles)]) for i, word in enumerate(words)]
    images = _draw(pipeline, [f"a {word}, {style} style, white background" for word, style in named], range(len(words)))
    return image_grid(images, columns=8, labels=[f"{word}, {style}" for word, style in named])


@torch.no_grad()
def _draw(pipeline: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), _SAMPLING_BATCH):
        rows = slice(start, start + _SAMPLING_BATCH)
        images += pipeline(
            list(prompts[rows]),
            num_inference_steps=20,
            guidance_scale=4.0,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[rows]],
        ).images
    return images


def _balanced_choices(sprites: SpriteSet) -> list[int]:
    """Return sprite indices, the named ones about as often as all others: they are what the model will draw."""
    named = sprites.named()
    others = [index for index, name in enumerate(sprites.objects) if not name]
    return named * max(1, len(others) // len(named)) + others
