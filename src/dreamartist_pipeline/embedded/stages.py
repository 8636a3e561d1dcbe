"""The training stages as each process runs them: build the parts, draw the scenes, fit, report."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from dreamartist_pipeline.backbones.evaluators import CLIP_NORMALIZATION
from dreamartist_pipeline.core.tracking import Tracker
from dreamartist_pipeline.embedded.model import (
    build_autoencoder,
    build_text_encoder,
    build_towers,
    build_unet,
    take_over_text_encoder,
)
from dreamartist_pipeline.embedded.pretraining import (
    Checkpoint,
    Checkpoints,
    StageReporter,
    StageSettings,
    autoencoder_loss,
    denoiser_loss,
    fit_stage,
    hidden_matrices,
    normalize_latents,
    psnr,
    step_generator,
)
from dreamartist_pipeline.embedded.scenes import Scenes, compose, draw_scenes
from dreamartist_pipeline.embedded.sprites import SpriteSet
from dreamartist_pipeline.params import DenoiserParams, PretrainParams, StageParams

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPModel


_VALIDATION_SCENES = 256
_NUM_SHOWN_OBJECTS = 64
_DRAWN_AT_ONCE = 16


def fit_autoencoder(
    sprites: SpriteSet, held_out: SpriteSet, params: PretrainParams, store: Checkpoints, tracker: Tracker
) -> AutoencoderKL:
    """Train the autoencoder and fold its latent statistics in; on every rank.

    Its quality is measured on scenes of the held-out sprites.
    """
    device, stage = _device(), params.autoencoder
    torch.manual_seed(params.seed)
    autoencoder = build_autoencoder(params.size).to(device, memory_format=torch.channels_last)
    images = sprites.images.to(device)
    scenes = draw_scenes(sprites, stage.num_scenes, params.seed + 1, _half_named_half_any(sprites)).to(device)

    def paint(chosen: torch.Tensor) -> torch.Tensor:
        return compose(images, scenes.rows(chosen), params.size.image_px)

    unseen_scenes = draw_scenes(held_out, _VALIDATION_SCENES, params.seed + 1).to(device)
    unseen = compose(held_out.images.to(device), unseen_scenes, params.size.image_px)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(scenes), (stage.batch_size,), device=device, generator=generator)
        torch.manual_seed(generator.initial_seed())  # the posterior's sample
        with torch.autocast(device.type, enabled=False):
            batch = paint(chosen)
        return autoencoder_loss(autoencoder, batch)

    def save(checkpoint: Checkpoint) -> None:
        store.save("autoencoder", checkpoint)
        with torch.no_grad():
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
    store: Checkpoints,
    tracker: Tracker,
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
            pixels = (compose(images, scenes.rows(chosen), params.size.image_px) / 2 + 0.5 - mean) / std
        return towers(input_ids=token_ids[chosen], pixel_values=pixels, return_loss=True)

    num_training = len(scenes) - min(_VALIDATION_SCENES, len(scenes) // 4)
    held_back = torch.arange(num_training, len(scenes), device=device)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        loss: torch.Tensor = compare(
            torch.randint(num_training, (stage.batch_size,), device=device, generator=generator)
        ).loss
        return loss

    def save(checkpoint: Checkpoint) -> None:
        store.save("towers", checkpoint)
        with torch.no_grad():
            matches = compare(held_back).logits_per_image.argmax(dim=1) == torch.arange(len(held_back), device=device)
        found = matches.float().mean().item()
        tqdm.write(f"towers after {checkpoint['step']} steps: {found:.0%} of {len(matches)} unseen captions found")
        tracker.log_metrics({"towers/captions_found": found}, step=checkpoint["step"])

    _fit("towers", [towers], loss_of, stage, params.seed, store, tracker, save)
    return towers.cpu().eval()


@dataclass(frozen=True)
class DenoiserParts:
    """Folders of what the denoiser is trained with.

    start: a base model to continue from; None: a fresh UNet, and the text tower as text encoder.
    """

    autoencoder: str
    towers: str
    tokenizer: str
    start: str | None = None


def fit_denoiser(
    sprites: SpriteSet, parts: DenoiserParts, params: PretrainParams, store: Checkpoints, tracker: Tracker
) -> StableDiffusionPipeline:
    """Train UNet and text encoder on scenes drawn anew for every step; on every rank, each with modules of its own.

    The text encoder goes on learning, which a model of this size needs.
    """
    device, stage = _device(), params.denoiser
    pipeline = assemble_untrained(parts, params).to(device)
    unet = pipeline.unet.to(memory_format=torch.channels_last).train()
    autoencoder = pipeline.vae.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    text_encoder = pipeline.text_encoder.train()
    empty_ids = token_ids_of(pipeline.tokenizer, [""]).to(device)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod.to(device)
    images = sprites.images.to(device)
    checkpoint = store.load("denoiser")
    batches = _SceneBatches.of(sprites, pipeline.tokenizer, stage, params.seed).starting_at(
        checkpoint["step"] if checkpoint else 0
    )

    def encode(scenes: Scenes) -> torch.Tensor:
        with torch.no_grad():
            painted = compose(images, scenes, params.size.image_px)
            latents: torch.Tensor = autoencoder.encode(painted).latent_dist.mode().float()
        return latents

    def loss_of_scenes(scenes: Scenes, token_ids: torch.Tensor, generator: torch.Generator, **options: Any) -> Any:
        latents, ids = encode(scenes.to(device)), token_ids.to(device)
        return denoiser_loss(unet, text_encoder, latents, ids, empty_ids, alphas_cumprod, generator, **options)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        loss: torch.Tensor = loss_of_scenes(*next(batches), generator, density=stage.timestep_density)
        return loss

    held_back = draw_scenes(sprites, _VALIDATION_SCENES, params.seed + 7, tinted_share=stage.tinted_share)
    held_back_ids = token_ids_of(pipeline.tokenizer, list(held_back.captions))

    @torch.no_grad()
    def validate(token_ids: torch.Tensor) -> float:
        generator = torch.Generator(device).manual_seed(params.seed)
        rows = zip(torch.arange(len(held_back)).split(64), token_ids.split(64), strict=True)
        losses = [loss_of_scenes(held_back.rows(chosen), ids, generator, prompt_dropout=0.0) for chosen, ids in rows]
        return torch.stack(losses).mean().item()

    def save(checkpoint: Checkpoint) -> None:
        store.save("denoiser", checkpoint)
        step = checkpoint["step"]
        right, wrong = validate(held_back_ids), validate(held_back_ids.roll(1, dims=0))
        tracker.log_metrics({"denoiser/held_back_loss": right, "denoiser/caption_gap": wrong - right}, step=step)
        tracker.log_image(sample_grid(pipeline), key="samples", step=step)
        tqdm.write(f"denoiser after {step} steps: loss {right:.4f}, with captions of other scenes {wrong:.4f}")

    _fit("denoiser", [unet, text_encoder], loss_of, stage, params.seed, store, tracker, save)
    return pipeline.to("cpu")


@dataclass(frozen=True)
class _SceneBatches(Dataset[tuple[Scenes, torch.Tensor]]):
    """Step -> this rank's scenes of that step and the token ids `[B, L]` of their captions."""

    names: SpriteSet  # without images: they are composed where the training is
    tokenizer: Any
    stage: DenoiserParams
    seed: int
    rank: int

    @classmethod
    def of(cls, sprites: SpriteSet, tokenizer: Any, stage: DenoiserParams, seed: int) -> _SceneBatches:
        names = replace(sprites, images=sprites.images[:0])
        return cls(names, tokenizer, stage, seed, dist.get_rank() if dist.is_initialized() else 0)

    def __getitem__(self, step: int) -> tuple[Scenes, torch.Tensor]:
        seed = step_generator(self.seed + 2, self.rank, step, torch.device("cpu")).initial_seed()
        scenes = draw_scenes(self.names, self.stage.batch_size, seed, tinted_share=self.stage.tinted_share)
        return scenes, token_ids_of(self.tokenizer, list(scenes.captions))

    def starting_at(self, step: int) -> Iterator[tuple[Scenes, torch.Tensor]]:
        """Iterate over the batches from this step on, without end."""
        workers = self.stage.drawing_processes
        return iter(DataLoader(self, batch_size=None, sampler=itertools.count(step), num_workers=workers))


def _fit(
    name: str,
    networks: list[torch.nn.Module],
    loss_of: Any,
    stage: StageParams,
    seed: int,
    store: Checkpoints,
    tracker: Tracker,
    save: Any,
) -> None:
    checkpoint = store.load(name)
    settings = StageSettings.of(stage, seed, bf16=_has_bfloat16(_device()))
    first = not dist.is_initialized() or dist.get_rank() == 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    start = checkpoint["step"] if checkpoint else 0
    with tqdm(total=stage.num_steps, initial=start, desc=name, unit="step", disable=not first) as bar:
        fit_stage(
            [parameter for network in networks for parameter in network.parameters()],
            loss_of,
            settings,
            matrices=hidden_matrices(*networks),
            checkpoint=checkpoint,
            save_checkpoint=save,
            on_step=StageReporter(name, stage.batch_size * world, bar, tracker),
        )


def assemble_untrained(parts: DenoiserParts, params: PretrainParams) -> StableDiffusionPipeline:
    """Put UNet and text encoder as they begin beside a trained autoencoder, with Stable Diffusion's noise schedule."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(parts.tokenizer, local_files_only=True)
    autoencoder = build_autoencoder(params.size)  # and not the loaded one, whose configuration names its folder
    autoencoder.load_state_dict(_weights(AutoencoderKL, parts.autoencoder))
    torch.manual_seed(params.seed)
    text_encoder, unet = build_text_encoder(params.size, tokenizer), build_unet(params.size)
    if parts.start is None:
        text_encoder.load_state_dict(
            CLIPModel.from_pretrained(parts.towers, local_files_only=True).text_model.state_dict()
        )
    else:
        unet.load_state_dict(_weights(UNet2DConditionModel, f"{parts.start}/unet"))
        known = CLIPTokenizer.from_pretrained(f"{parts.start}/tokenizer", local_files_only=True)
        take_over_text_encoder(text_encoder, tokenizer, _weights(CLIPTextModel, f"{parts.start}/text_encoder"), known)
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


def _weights(kind: Any, folder: str) -> dict[str, torch.Tensor]:
    loaded = kind.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    weights: dict[str, torch.Tensor] = loaded.state_dict()
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


def _has_bfloat16(device: torch.device) -> bool:
    """Say whether the device multiplies bfloat16 natively; emulated, it is slower than float32."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
