"""The training stages as each process runs them: build the parts, draw the scenes, fit, report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from PIL import Image
from tqdm.auto import tqdm

from dreamartist_pipeline.backbones.embedded import build_autoencoder, build_text_encoder, build_towers, build_unet
from dreamartist_pipeline.backbones.evaluators import CLIP_NORMALIZATION
from dreamartist_pipeline.core.pretraining import (
    Checkpoint,
    StageReporter,
    StageSettings,
    autoencoder_loss,
    averaged_weights,
    denoiser_loss,
    fit_stage,
    hidden_matrices,
    normalize_latents,
    psnr,
)
from dreamartist_pipeline.core.sprites import Scenes, SpriteSet, compose, draw_scenes
from dreamartist_pipeline.params import PretrainParams, StageParams

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPModel

    from dreamartist_pipeline.datasets.sprites import CheckpointStore

_VALIDATION_SCENES = 256
_NUM_SHOWN_OBJECTS = 64
_DRAWN_AT_ONCE = 16


def fit_autoencoder(
    sprites: SpriteSet, held_out: SpriteSet, params: PretrainParams, store: CheckpointStore, tracker: Any
) -> AutoencoderKL:
    """Train the autoencoder and fold its latent statistics in; on every rank.

    Its quality is measured on scenes of the held-out sprites.
    """
    device, stage = _device(), params.autoencoder
    torch.manual_seed(params.seed)
    autoencoder = build_autoencoder(params.size).to(device, memory_format=torch.channels_last)
    images = sprites.images.to(device)
    scenes = draw_scenes(sprites, stage.num_scenes, params.seed + 1, _half_named_half_any(sprites)).to(device)
    paint = partial(_paint, images, scenes, params.size.image_px)
    unseen_scenes = draw_scenes(held_out, _VALIDATION_SCENES, params.seed + 1).to(device)
    unseen = compose(held_out.images.to(device), unseen_scenes, params.size.image_px)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(scenes), (stage.batch_size,), device=device, generator=generator)
        torch.manual_seed(generator.initial_seed())  # the posterior's sample
        with torch.autocast(device.type, enabled=False):
            batch = paint(chosen)
        return autoencoder_loss(autoencoder, batch)

    parameters = list(autoencoder.parameters())

    def save(checkpoint: Checkpoint) -> None:
        store.save("autoencoder", checkpoint)
        with averaged_weights(parameters, checkpoint), torch.no_grad():
            restored = torch.cat(
                [autoencoder.decode(autoencoder.encode(batch).latent_dist.mode()).sample for batch in unseen.split(64)]
            )
        quality = psnr(restored, unseen).mean().item()
        tqdm.write(f"autoencoder after {checkpoint['step']} steps: {quality:.2f} dB on held-out sprites")
        tracker.log_metrics({"autoencoder/psnr_db": quality}, step=checkpoint["step"])
        tracker.log_image(_side_by_side(unseen[:8], restored[:8]), key="autoencoder", step=checkpoint["step"])

    _fit("autoencoder", [autoencoder], loss_of, stage, params.seed, store, tracker, save)
    with torch.no_grad():
        typical = [paint(batch) for batch in torch.arange(min(len(scenes), 1024), device=device).split(64)]
        latents = torch.cat([autoencoder.encode(batch).latent_dist.mode() for batch in typical])
    normalize_latents(autoencoder.quant_conv, autoencoder.post_quant_conv, latents)
    return autoencoder.cpu().requires_grad_(False)


def fit_towers(
    sprites: SpriteSet,
    scenes: Scenes,
    token_ids: torch.Tensor,
    tokenizer_path: str,
    params: PretrainParams,
    store: CheckpointStore,
    tracker: Any,
) -> CLIPModel:
    """Train text and image tower to find each other's match (Radford et al. 2021); on every rank.

    Args:
        scenes: what is painted, anew each time it is drawn.
        token_ids: `[N, L]` of their captions, int64.
    """
    from transformers import CLIPTokenizer

    device, stage = _device(), params.towers
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_path, local_files_only=True)
    torch.manual_seed(params.seed)
    towers = build_towers(params.size, tokenizer).to(device).train()
    images, scenes, token_ids = sprites.images.to(device), scenes.to(device), token_ids.to(device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in CLIP_NORMALIZATION)

    def compare(chosen: torch.Tensor) -> Any:
        with torch.autocast(device.type, enabled=False):
            pixels = (_paint(images, scenes, params.size.image_px, chosen) / 2 + 0.5 - mean) / std
        return towers(input_ids=token_ids[chosen], pixel_values=pixels, return_loss=True)

    num_training = len(scenes) - min(_VALIDATION_SCENES, len(scenes) // 4)
    held_back = torch.arange(num_training, len(scenes), device=device)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        loss: torch.Tensor = compare(
            torch.randint(num_training, (stage.batch_size,), device=device, generator=generator)
        ).loss
        return loss

    parameters = list(towers.parameters())

    def save(checkpoint: Checkpoint) -> None:
        store.save("towers", checkpoint)
        with averaged_weights(parameters, checkpoint), torch.no_grad():
            matches = compare(held_back).logits_per_image.argmax(dim=1) == torch.arange(len(held_back), device=device)
        found = matches.float().mean().item()
        tqdm.write(f"towers after {checkpoint['step']} steps: {found:.0%} of {len(matches)} unseen captions found")
        tracker.log_metrics({"towers/captions_found": found}, step=checkpoint["step"])

    _fit("towers", [towers], loss_of, stage, params.seed, store, tracker, save)
    return towers.cpu().eval()


def fit_denoiser(
    autoencoder_path: str,
    towers_path: str,
    tokenizer_path: str,
    latents: torch.Tensor,
    token_ids: torch.Tensor,
    params: PretrainParams,
    store: CheckpointStore,
    tracker: Any,
) -> StableDiffusionPipeline:
    """Train UNet and text encoder on cached latents; on every rank, each with modules of its own.

    The text encoder starts as the text tower and goes on learning, which a model of this size needs.

    Args:
        latents: `[N, C, h, w]` of the scenes, float32.
        token_ids: `[N, L]` of their captions, int64.
    """
    device, stage = _device(), params.denoiser
    pipeline = assemble_untrained(autoencoder_path, towers_path, tokenizer_path, params).to(device)
    unet = pipeline.unet.to(memory_format=torch.channels_last).train()
    text_encoder = pipeline.text_encoder.train()
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    empty_ids = token_ids_of(pipeline.tokenizer, [""]).to(device)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod.to(device)
    latents, token_ids = latents.to(device), token_ids.to(device)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(latents), (stage.batch_size,), device=device, generator=generator)
        return denoiser_loss(
            unet, text_encoder, latents[chosen], token_ids[chosen], empty_ids, alphas_cumprod, generator
        )

    def save(checkpoint: Checkpoint) -> None:
        store.save("denoiser", checkpoint)
        with averaged_weights(parameters, checkpoint):
            tracker.log_image(sample_grid(pipeline), key="samples", step=checkpoint["step"])

    _fit("denoiser", [unet, text_encoder], loss_of, stage, params.seed, store, tracker, save)
    return pipeline.to("cpu")


def _fit(
    name: str,
    networks: list[torch.nn.Module],
    loss_of: Any,
    stage: StageParams,
    seed: int,
    store: CheckpointStore,
    tracker: Any,
    save: Any,
) -> None:
    checkpoint = store.load(name)
    settings = StageSettings.of(stage, seed, bf16=_device().type == "cuda")
    first = not dist.is_initialized() or dist.get_rank() == 0
    start = checkpoint["step"] if checkpoint else 0
    with tqdm(total=stage.num_steps, initial=start, desc=name, unit="step", disable=not first) as bar:
        fit_stage(
            [parameter for network in networks for parameter in network.parameters()],
            loss_of,
            settings,
            matrices=hidden_matrices(*networks),
            checkpoint=checkpoint,
            save_checkpoint=save,
            on_step=StageReporter(name, stage.num_steps, bar, tracker),
        )


def assemble_untrained(
    autoencoder_path: str, towers_path: str, tokenizer_path: str, params: PretrainParams
) -> StableDiffusionPipeline:
    """Put a new UNet beside a trained autoencoder and a trained text tower, with Stable Diffusion's noise schedule."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_path, local_files_only=True)
    autoencoder = build_autoencoder(params.size)  # and not the loaded one, whose configuration names its folder
    autoencoder.load_state_dict(AutoencoderKL.from_pretrained(autoencoder_path, local_files_only=True).state_dict())
    text_encoder = build_text_encoder(params.size, tokenizer)
    towers = CLIPModel.from_pretrained(towers_path, local_files_only=True)
    text_encoder.load_state_dict(towers.text_model.state_dict())
    torch.manual_seed(params.seed)
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
        unet=build_unet(params.size),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def encode_scenes(
    autoencoder: AutoencoderKL, sprites: SpriteSet, scenes: Scenes, size_px: int, batch_size: int = 64
) -> torch.Tensor:
    """Return the latent means of all scenes, `[N, C, h, w]` on the CPU, in order."""
    device = _device()
    autoencoder, images, scenes = autoencoder.to(device), sprites.images.to(device), scenes.to(device)
    batches = torch.arange(len(scenes), device=device).split(batch_size)
    progress = tqdm(batches, desc="scenes to latents", unit="batch")
    painted = (_paint(images, scenes, size_px, batch) for batch in progress)
    encoded = [autoencoder.encode(batch).latent_dist.mode().cpu() for batch in painted]
    autoencoder.cpu()
    return torch.cat(encoded)


def _paint(images: torch.Tensor, scenes: Scenes, size_px: int, chosen: torch.Tensor) -> torch.Tensor:
    return compose(images, scenes.rows(chosen), size_px)


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
    from dreamartist_pipeline.core.images import image_grid

    images = []
    for seed in range(images_per_prompt):
        images += _draw(pipeline, SAMPLE_PROMPTS, [seed * 100 + i for i in range(len(SAMPLE_PROMPTS))])
    return image_grid(images, columns=len(SAMPLE_PROMPTS))


def object_grid(pipeline: StableDiffusionPipeline, params: PretrainParams) -> Image.Image:
    """Draw the first objects of the vocabulary, styles in turn, each with its word under it."""
    from dreamartist_pipeline.core.images import image_grid

    words, styles = list(params.objects)[:_NUM_SHOWN_OBJECTS], list(params.styles.values())
    named = [(word, styles[i % len(styles)]) for i, word in enumerate(words)]
    images = _draw(pipeline, [f"a {word}, {style} style, white background" for word, style in named], range(len(words)))
    return image_grid(images, columns=8, labels=[f"{word}, {style}" for word, style in named])


@torch.no_grad()
def _draw(pipeline: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), _DRAWN_AT_ONCE):
        rows = slice(start, start + _DRAWN_AT_ONCE)
        images += pipeline(
            list(prompts[rows]),
            num_inference_steps=20,
            guidance_scale=4.0,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[rows]],
        ).images
    return images


def _half_named_half_any(sprites: SpriteSet) -> list[int]:
    """Draw named sprites as often as all the others together: they are what will be generated."""
    named = sprites.named()
    others = [index for index, name in enumerate(sprites.objects) if not name]
    return named * max(1, len(others) // len(named)) + others


def _side_by_side(images: torch.Tensor, restored: torch.Tensor) -> Any:
    from dreamartist_pipeline.core.images import image_grid, to_images

    return image_grid([*to_images(images), *to_images(restored)], columns=len(images))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
