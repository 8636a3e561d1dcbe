"""Training data: tokenized prompts, and images as latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from tqdm import tqdm

from dreamartist_pipeline.backbones.base_model import encode_images
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.prompts import PromptEncoder
from dreamartist_pipeline.core.batches import LatentImages, TrainingData, derived_seed
from dreamartist_pipeline.core.branches import branches
from dreamartist_pipeline.core.captions import branch_prompts, caption_variants
from dreamartist_pipeline.core.image_set import CaptionedImages
from dreamartist_pipeline.core.images import Framing, attention_mask, fit_to_size, framing, to_tensor
from dreamartist_pipeline.core.prompt_tokens import PromptTokens, by_branch
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import TrainingParams

_ENCODE_BATCH = 8
_CAPTION_VARIANTS = 64  # generated once per training, so that prompts are tokenized once


# ------------------------------------------------------------------------------------------------- prompts


def template_prompts(params: TrainingParams, caption: str) -> list[tuple[str, str]]:
    """Return (negative, positive) of every template."""
    return [branch_prompts(template, params.words.names, params.class_word, caption) for template in params.templates]


def training_prompts(params: TrainingParams, caption: str) -> list[tuple[str, str]]:
    """Return (negative, positive) of every template with every caption variant, the same in both branches."""
    seed = derived_seed(params.seed, "captions")
    variants = caption_variants(caption, params.caption_transforms, _CAPTION_VARIANTS, seed)
    return [prompt for variant in variants for prompt in template_prompts(params, variant)]


def fill_prompt(prompt: str, params: TrainingParams) -> str:
    """Fill the slots of a preview prompt with the positive trigger words and the class word."""
    return branch_prompts(prompt, params.words.names, params.class_word)[1]


# ------------------------------------------------------------------------------------------------- images


def training_data(
    backbone: Backbone,
    prompts: PromptEncoder,
    image: Image,
    mask: Image,
    regularization: Sequence[tuple[str, Image]],
    params: TrainingParams,
    caption: str,
    reference_framing: Framing | None = None,
) -> TrainingData:
    """Encode the prepared image and the regularization set once, and tokenize every prompt.

    `mask` is L; 127 is weight 1. `regularization` contains (caption, image) pairs; images of another size are scaled to
    that of the prepared image. Without `reference_framing`, the prepared image is a whole picture.
    """
    tokens = _tokens(prompts, training_prompts(params, caption), params)
    whole = framing(image.size, image.size, "crop")
    reference = _latent_images(backbone, [image], tokens, [reference_framing or whole])
    others = None
    if regularization:
        captions = [(caption, caption) for caption, _ in regularization]  # no trigger word in either branch
        fitted = [
            other if other.size == image.size else fit_to_size(other, image.size, "crop", "white")
            for _, other in regularization
        ]
        framings = [framing(other.size, image.size, "crop") for _, other in regularization]
        others = _latent_images(backbone, fitted, _tokens(prompts, captions, params), framings, paired=True)
    pixels = to_tensor([image]).to(reference.mean.device) if params.loss.reconstruction_weight else None
    return TrainingData(reference, others, _latent_mask(mask, reference.mean), pixels)


def _tokens(prompts: PromptEncoder, pairs: Sequence[tuple[str, str]], params: TrainingParams) -> PromptTokens:
    """Tokenize (negative, positive) pairs: `[P, num_branches, L]`."""
    return by_branch([prompts.tokenize([pair[branch] for pair in pairs]) for branch in branches(params.num_branches)])


def _latent_images(
    backbone: Backbone,
    images: Sequence[Image],
    tokens: PromptTokens,
    framings: Sequence[Framing],
    paired: bool = False,
) -> LatentImages:
    starts = tqdm(range(0, len(images), _ENCODE_BATCH), desc="images to latents", unit="batch", delay=2.0)
    encoded = [encode_images(backbone, to_tensor(images[start : start + _ENCODE_BATCH])) for start in starts]
    mean, std = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    numbers = torch.tensor([each.numbers() for each in framings], device=mean.device)
    return LatentImages(mean, std, tokens, paired, numbers)


def _latent_mask(mask: Image, latents: torch.Tensor) -> torch.Tensor | None:
    """Return the loss mask `[1, 1, h, w]` at the latents' size, or None if all weights are 1."""
    height, width = latents.shape[-2:]
    weights = attention_mask(mask, (width, height)).to(latents.device)
    return None if bool((weights == 1).all()) else weights[None]


def regularization_images(regularization_set: CaptionedImages, params: TrainingParams) -> list[tuple[str, Image]]:
    """Return (caption, image) of the regularization set; nothing if its batch size is 0.

    Raises:
        InputError: an empty set with a batch size above 0.
    """
    if not params.regularization_batch_size:
        return []
    if not regularization_set:
        raise InputError(
            expected=f"images for training.regularization_batch_size={params.regularization_batch_size}",
            got="an empty regularization set",
            remedy="set it to 0, or prompts.num_prompts to more than 0",
        )
    return [(caption, read()) for caption, read in regularization_set]
