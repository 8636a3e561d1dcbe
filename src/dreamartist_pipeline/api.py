"""Functions for scripts and notebooks: read concepts, draw images, sample given latents, compute one training step.

Nothing is random: `draw_images` takes seeds; the other functions take latents, noise and timesteps, so that results can
be compared with other implementations.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn

from dreamartist_pipeline.backbones.attention_maps import BranchWords, MappedPicture, draw_with_maps
from dreamartist_pipeline.backbones.base_model import files_for, load_backbone
from dreamartist_pipeline.backbones.concepts import LoadedConcept, attach
from dreamartist_pipeline.backbones.drawing import DrawingRequest, attach_and_fill, draw, fill_prompt
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.layouts import layout_of
from dreamartist_pipeline.backbones.schedulers import check_sampler, draws_noise, make_scheduler
from dreamartist_pipeline.backbones.served import served_concept
from dreamartist_pipeline.backbones.token_vectors import NearToken
from dreamartist_pipeline.backbones.token_vectors import nearest_tokens as tokens_near
from dreamartist_pipeline.backbones.token_vectors import token_vectors as vectors_of
from dreamartist_pipeline.core import sampling
from dreamartist_pipeline.core.adapters import BranchLoRALayer
from dreamartist_pipeline.core.batches import Batch
from dreamartist_pipeline.core.branches import NEGATIVE, guidance_at, rows_of
from dreamartist_pipeline.core.captions import fill_negative_prompt, slot_names
from dreamartist_pipeline.core.concept import Concept, words_part
from dreamartist_pipeline.core.embeddings import WordEmbedding
from dreamartist_pipeline.core.init_picture import init_picture
from dreamartist_pipeline.core.lora_factors import SHARED
from dreamartist_pipeline.core.model_location import ModelLocation
from dreamartist_pipeline.core.prompt_tokens import PromptTokens, by_branch
from dreamartist_pipeline.core.training_step import TrainableModel, combined_prediction, row_losses
from dreamartist_pipeline.datasets.user_files import folder_files
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop import concept_file
from dreamartist_pipeline.interop.foreign_concept import Imported, make_concept, read_toolkit_folder, resolve
from dreamartist_pipeline.interop.toolkit_config import SLOT
from dreamartist_pipeline.params import (
    DeviceParams,
    GenerateParams,
    GuidanceScale,
    LossParams,
    PositiveActsOn,
    RegistrationParams,
    SamplerParams,
    StrengthParams,
)
from dreamartist_pipeline.serving.packaging import save_model

_NUM_BRANCHES = 2
_WORDS_ARGUMENT = "`words`"
_CPU, _AUTO = DeviceParams(device="cpu"), DeviceParams()
_FULL_STRENGTH = StrengthParams()
_FIVE_DDIM_STEPS = SamplerParams(scheduler="ddim", num_inference_steps=5, guidance_scale=3.0)
_DEFAULT_SAMPLER = SamplerParams()
_PLAIN_LOSS = LossParams(weighting="none")
_MAX_COPIED_MB = RegistrationParams().max_copied_mb

log = logging.getLogger(__name__)


def open_base_model(
    path: str | Path,
    device: DeviceParams = _CPU,
    *,
    vae: str | Path | None = None,
    config: str | Path | None = None,
) -> Backbone:
    """Load a base model, frozen.

    Args:
        path: a single file, a folder in diffusers' layout, or `hub:OWNER/NAME[/FILE][@REVISION]`.
        device: where it runs.
        vae: the same for another autoencoder, or None.
        config: folder of configurations for a single file, in place of those of its kind.

    Raises:
        InputError: there is no model, or it is incomplete or cannot be read.
    """
    location = ModelLocation(str(path), *(None if each is None else str(each) for each in (vae, config)))
    return load_backbone(files_for(location, device), device)


def read_concept(path: str | Path) -> Concept:
    """Read a concept of this project, `data/06_models/<subject>/concept.safetensors`.

    Raises:
        InputError: no such file, or not a concept.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(
            expected=f"a concept file at {file}", got="none", remedy="correct the path, or train the concept"
        )
    return concept_file.read_concept(file.read_bytes(), str(file))


def draw_images(
    backbone: Backbone,
    concept: Concept | None,
    prompts: str | Sequence[str],
    negative_prompt: str = "",
    seeds: Sequence[int] = (0, 1),
    *,
    strength: StrengthParams | Literal["reference"] = _FULL_STRENGTH,
    sampler: SamplerParams = _DEFAULT_SAMPLER,
    size_px: tuple[int, int] | None = None,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    denoise: float | None = None,
) -> list[Image.Image]:
    """Draw every prompt with every seed, as the generate pipeline does.

    Args:
        backbone: the base model.
        concept: a concept for this base model, or None.
        prompts: one or several; '{pt1}' is the positive trigger word.
        negative_prompt: '{pt1}' is the negative trigger word, which is used only if the prompt contains it.
        seeds: one image per prompt and seed; an image depends on its own seed only.
        strength: a factor on each branch's adapter; "reference" is the toolkit's 0.8 positive, 0.65 negative.
        sampler: scheduler, steps, guidance scale, batch size.
        size_px: (width, height); None: the base model's size, with the aspect ratio of `image`.
        image: initial image (img2img).
        mask: white where `image` is redrawn (inpainting), with the same aspect ratio.
        denoise: share of the steps that are run on `image`, diffusers' `strength`; None: 0.8, or 1 with a mask.

    Returns:
        The images, prompt by prompt, each with its settings in `info`: `parameters`, and `dreamartist` as JSON.

    Raises:
        InputError: a concept that does not fit the base model, an invalid scheduler, or an image and mask that do not
            fit each other.
    """
    check_sampler(sampler, concept is not None and concept.metadata.zero_terminal_snr)
    request = DrawingRequest(
        prompts=(prompts,) if isinstance(prompts, str) else tuple(prompts),
        negative_prompt=negative_prompt,
        seeds=tuple(seeds),
        sampler=sampler,
        strength=StrengthParams.model_validate(strength),
        size_px=size_px,
        init=init_picture(image, mask, denoise, sampler.num_inference_steps),
    )
    return list(draw(backbone, concept, request).images)


def draw_with_attention(
    backbone: Backbone,
    concept: Concept | None,
    prompt: str,
    negative_prompt: str = "",
    seeds: Sequence[int] = (0, 1),
    *,
    words: BranchWords | None = None,
    strength: StrengthParams | Literal["reference"] = _FULL_STRENGTH,
    sampler: SamplerParams = _DEFAULT_SAMPLER,
    size_px: tuple[int, int] | None = None,
) -> list[MappedPicture]:
    """Draw a prompt with every seed, and map where each branch attends to its words.

    The images equal those of `draw_images`, pixel for pixel, without `info`.

    Args:
        backbone, concept, prompt, negative_prompt, seeds, strength, sampler, size_px: see `draw_images`.
        words: "positive" or "negative" -> words of that prompt; None: the trigger words that its slots are filled with.

    Returns:
        One picture per seed; `picture.share("positive")` is the share of each pixel's attention that the words get.

    Raises:
        InputError: as `draw_images`, or a word that the prompt does not have.
    """
    check_sampler(sampler, concept is not None and concept.metadata.zero_terminal_snr)
    request = DrawingRequest(
        (prompt,), negative_prompt, tuple(seeds), sampler, StrengthParams.model_validate(strength), size_px
    )
    loaded, filled = attach_and_fill(backbone, concept, request)
    pairs = loaded.trigger_words
    if words is None:
        words = {
            "positive": [pairs[slot][0] for slot in slot_names(prompt, pairs) if slot in pairs],
            "negative": [loaded.negative_words[slot] for slot in slot_names(negative_prompt, pairs) if slot in pairs],
        }
    prompts = [*filled.prompts] * len(seeds)
    return draw_with_maps(backbone, loaded, prompts, filled.negative_prompt, seeds, sampler, words, size_px=size_px)


def token_vectors(backbone: Backbone, text: str, encoder: str = "text_encoder") -> torch.Tensor:
    """Return the vectors of a text's tokens in a text encoder of the base model, float32 `[k, D]`, on the CPU."""
    embedding = backbone.networks[encoder].get_input_embeddings()
    return vectors_of(backbone.tokenizers[encoder], embedding, text).float().cpu()


def nearest_tokens(
    backbone: Backbone, vectors: torch.Tensor, count: int = 5, encoder: str = "text_encoder"
) -> list[list[NearToken]]:
    """Return the base model's tokens that are nearest to vectors, by cosine similarity, the nearest first.

    Args:
        backbone: the base model.
        vectors: `[n, D]`, such as those of `Concept.trigger_words()`.
        count: of tokens per vector.
        encoder: text encoder of the vectors.

    Returns:
        A list per vector.
    """
    embedding = backbone.networks[encoder].get_input_embeddings()
    return tokens_near(backbone.tokenizers[encoder], embedding, vectors, count)


def save_mlflow_model(
    folder: str | Path,
    concept: Concept,
    base_model: str | Path,
    *,
    vae: str | Path | None = None,
    config: str | Path | None = None,
    device: DeviceParams = _AUTO,
    strength: StrengthParams | Literal["reference"] = _FULL_STRENGTH,
    sampler: SamplerParams = _DEFAULT_SAMPLER,
    max_copied_mb: int = _MAX_COPIED_MB,
) -> None:
    """Write an MLflow model, which `mlflow models predict` and `mlflow models serve` can call.

    Args:
        folder: of the model; it must not exist, or be empty.
        concept: a concept for this base model.
        base_model, vae, config: see `open_base_model`.
        device: where the model runs; "auto" is the GPU of the machine that serves it, if it has one.
        strength, sampler: defaults of the options of a call.
        max_copied_mb: a base model in a folder up to this size is copied into the model.

    Raises:
        InputError: the folder is not empty, or there is no such base model.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(expected=f"an empty or new folder {target}", got="files in it", remedy="choose another")
    location = ModelLocation(str(base_model), *(None if each is None else str(each) for each in (vae, config)))
    defaults = GenerateParams(prompts="a {pt1}", sampler=sampler, strength=StrengthParams.model_validate(strength))
    save_model(served_concept(concept, location, defaults, device, max_copied_mb), target)


def read_toolkit_concept(
    backbone: Backbone,
    folder: str | Path,
    words: tuple[str, str] | None = None,
    clip_skip: int = 0,
    step: int | None = None,
    *,
    positive_acts_on: PositiveActsOn = "both",
) -> Concept:
    """Read the reference toolkit's files of one step as a concept for this base model, as `import.toolkit` does.

    Missing negative adapters and a missing negative word are logged as warnings.

    Args:
        backbone: the base model of the training; the files do not name it.
        folder: `{unet,text_encoder}[-neg]-STEP.safetensors` (or `.ckpt`) and the words as `WORD-STEP.pt` or `WORD.pt`;
            or a folder with all these in `ckpts/`.
        words: (positive, negative); None: the two `.pt` files, of which the negative ends in "-neg".
        clip_skip: of the training; the files do not name it. Layers that it skips are not read.
        step: None: the newest.
        positive_acts_on: what positive adapters act on without negative ones: "both" branches, as in other tools, or
            only the "positive" one.

    Raises:
        InputError: no such folder, no files of that step, an unexpected file or one for another base model, an
            incomplete pair of adapters, or words that are not a pair or not valid.
    """
    if isinstance(words, str):
        raise InputError(expected="`words` as (positive, negative)", got=f"{words!r}", remedy="give both")
    layout, names = layout_of(backbone, clip_skip), {SLOT: words} if words else {}
    read = read_toolkit_folder(
        folder_files(Path(folder).expanduser()), str(folder), layout, names, step, _WORDS_ARGUMENT
    )
    imported = resolve(read, layout, positive_acts_on, _WORDS_ARGUMENT)
    _warn_incomplete_pair(imported, str(folder))
    return make_concept(imported, backbone.identity, clip_skip=clip_skip)


def sample_latents(
    backbone: Backbone,
    concept: Concept | None,
    prompt: str,
    negative_prompt: str,
    latents: torch.Tensor,
    *,
    strength: StrengthParams | Literal["reference"] = _FULL_STRENGTH,
    sampler: SamplerParams = _FIVE_DDIM_STEPS,
) -> torch.Tensor:
    """Denoise given latents with one adapter per branch; the scheduler gets `neg + s · (pos − neg)` at every step.

    Args:
        backbone: the base model.
        concept: a concept for this base model, or None.
        prompt: of the positive branch; '{pt1}' is its trigger word.
        negative_prompt: of the negative branch; '{pt1}' is its trigger word, which is used only if written here.
        latents: `[B, C, h, w]` standard normal, float32.
        strength: a factor on each branch's adapter.
        sampler: scheduler, steps and s.

    Returns:
        Denoised latents `[B, C, h, w]`, still multiplied by the autoencoder's scaling factor.

    Raises:
        InputError: an ancestral or invalid scheduler, a concept that does not fit the base model, latents of another
            shape, or a trigger word beyond the text encoder's context.
    """
    _check_latents(latents, backbone)
    check_sampler(sampler, concept is not None and concept.metadata.zero_terminal_snr)
    loaded = attach(backbone, concept, StrengthParams.model_validate(strength))
    scheduler = make_scheduler(loaded.backbone, sampler)
    if draws_noise(scheduler):
        raise InputError(
            expected="a scheduler that draws no noise",
            got=f"{sampler.scheduler}",
            remedy="choose ddim, dpmsolver++, euler or unipc",
        )
    filled = (
        fill_negative_prompt(negative_prompt, loaded.negative_words),
        fill_prompt(prompt, loaded, _class_word(concept)),
    )
    loaded.prompts.check_not_cut(filled)
    rows = torch.zeros(len(latents), dtype=torch.long, device=backbone.device)  # all of the same prompt
    with torch.no_grad(), loaded.merged():
        encoded = loaded.prompts.encode(loaded.prompts.tokenize(filled))
        conditioning = encoded[rows_of(rows, 1, _NUM_BRANCHES)]
        return sampling.sample_latents(
            lambda noisy, timesteps: loaded.backbone.denoise(noisy, timesteps, conditioning),
            scheduler,
            latents.to(backbone.device),
            sampler.guidance_scale,
            sampler.num_inference_steps,
        )


@dataclass(frozen=True)
class StepValues:
    """Results of one training step before the update.

    Attributes:
        prediction: combined, `[B, C, h, w]`.
        row_losses: `[B]`.
        loss: mean of `row_losses`.
        gradients: of the loss with respect to the concept's tensors, by name, not clipped. In a concept read from files
            of other tools, `down` is as in the file and `up` is multiplied by alpha.
    """

    prediction: torch.Tensor = field(repr=False)
    row_losses: torch.Tensor
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor] = field(repr=False)


def step_values(
    backbone: Backbone,
    concept: Concept,
    prompt: str,
    negative_prompt: str,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    guidance_scale: str | float = "3.0",
    loss: LossParams = _PLAIN_LOSS,
    mask: torch.Tensor | None = None,
    framing: torch.Tensor | None = None,
) -> StepValues:
    """Compute combined prediction, loss and gradients of one step for given latents, noise and timesteps.

    It calls the functions of the training's steps (`core.training_step`).

    Args:
        backbone: the base model.
        concept: it is not changed.
        prompt, negative_prompt: filled templates, each with its branch's trigger word or with '{pt1}'.
        latents, noise: `[B, C, h, w]` float32.
        timesteps: `[B]` integers from 0.
        guidance_scale: a number, or "3.0", or "low-high:curve".
        loss: loss function and SNR weighting.
        mask: attention mask `[B, 1, h, w]`, or None.
        framing: original height and width, crop top and left, height and width of each image, `[B, 6]`, which SDXL is
            conditioned on; None: whole images.

    Raises:
        InputError: a reconstruction loss, which needs the image; tensors of the wrong shape; or a concept that does not
            fit the base model.
    """
    _check_loss(loss)
    _check_step(backbone, latents, noise, timesteps, mask, framing)
    loaded = attach(backbone, concept, _FULL_STRENGTH)
    model = TrainableModel(loaded.backbone.denoise, loaded.prompts.encode, loaded.backbone.objective, (), _NUM_BRANCHES)
    class_word = _class_word(concept)
    filled = (fill_prompt(negative_prompt, loaded, class_word, NEGATIVE), fill_prompt(prompt, loaded, class_word))
    loaded.prompts.check_not_cut(filled)
    tokens = by_branch([loaded.prompts.tokenize([each]) for each in filled])  # [1, 2, L]
    batch = _batch_of_one_prompt(tokens, latents, noise, timesteps, mask, framing)
    guidance = guidance_at(_guidance(guidance_scale), model.objective.noise_level(batch.timesteps))
    learned = dict(_learned(loaded))
    with torch.enable_grad():  # also inside the caller's torch.no_grad()
        prediction = combined_prediction(model, batch, guidance)
        by_row = row_losses(prediction, batch, model.objective, loss)
        gradients = _gradients(by_row.mean(), learned)
    return StepValues(prediction.detach(), by_row.detach(), by_row.mean().detach(), gradients)


def _gradients(value: torch.Tensor, learned: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the gradients of a scalar by name; zeros for parameters that it does not depend on."""
    gradients = torch.autograd.grad(value, list(learned.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(learned.items(), gradients, strict=True)
    }


def _guidance(guidance_scale: str | float) -> GuidanceScale:
    try:
        return GuidanceScale.model_validate(guidance_scale)
    except ValidationError as error:
        raise InputError(
            expected="a guidance_scale from 1, such as '3.0' or '1.5-4.0:cos'",
            got=f"{guidance_scale!r}",
            remedy="correct it",
        ) from error


def _class_word(concept: Concept | None) -> str:
    return "" if concept is None else concept.metadata.class_word


def _warn_incomplete_pair(imported: Imported, folder: str) -> None:
    """Log which parts of a pair the toolkit's folder lacks."""
    if SHARED in imported.adapters:
        log.warning("%s has no negative adapters: the positive ones act on both branches", folder)
    elif "positive" in imported.adapters and "negative" not in imported.adapters:
        log.warning("%s has no negative adapters: the negative branch is the base model", folder)
    branches = {word.branch for word in imported.words}
    if branches == {"positive"} and "negative" in imported.adapters:
        log.warning("%s has negative adapters, but no negative word", folder)


def _check_latents(latents: torch.Tensor, backbone: Backbone) -> None:
    channels = backbone.latent_channels
    if latents.dim() != 4 or latents.shape[1] != channels or not latents.numel():
        raise InputError(
            expected=f"latents [B, {channels}, h, w] of this base model",
            got=f"{list(latents.shape)}",
            remedy="correct the shape",
        )
    if not latents.isfinite().all():
        raise InputError(expected="finite latents", got="infinite values or NaN", remedy="correct them")


def _check_loss(loss: LossParams) -> None:
    if loss.reconstruction_weight:
        raise InputError(
            expected="a loss without reconstruction, which needs the image",
            got=f"reconstruction_weight={loss.reconstruction_weight:g}",
            remedy="set it to 0",
        )


def _check_step(
    backbone: Backbone,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    mask: torch.Tensor | None,
    framing: torch.Tensor | None,
) -> None:
    """Check the shapes of a step's tensors and the range of its timesteps."""
    _check_latents(latents, backbone)
    rows, _, height, width = latents.shape
    for name, tensor, shape in (
        ("noise", noise, latents.shape),
        ("timesteps", timesteps, (rows,)),
        ("mask", mask, (rows, 1, height, width)),
        ("framing", framing, (rows, 6)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise InputError(
                expected=f"{name} {list(shape)}, to match the latents",
                got=f"{list(tensor.shape)}",
                remedy="correct the shape",
            )
    backbone.objective.check_timesteps(timesteps)


def _batch_of_one_prompt(
    tokens: PromptTokens,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    mask: torch.Tensor | None,
    framing: torch.Tensor | None,
) -> Batch:
    """Return a batch on the device of the tokens `[1, 2, L]`; all rows have the same prompt and weight."""
    rows, device = len(latents), tokens.ids.device
    return Batch(
        latents=latents.to(device),
        noise=noise.to(device),
        timesteps=timesteps.to(device),
        tokens=tokens,
        prompt_of_row=torch.zeros(rows, dtype=torch.long, device=device),
        row_weight=torch.full((rows,), 1 / rows, device=device),
        mask=None if mask is None else mask.to(device),
        framing=None if framing is None else framing.to(device),
    )


def _learned(loaded: LoadedConcept) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trained parameters of a concept with their names in a concept file."""
    for network, adapted in loaded.backbone.networks.items():
        for layer, module in adapted.named_modules():
            if isinstance(module, BranchLoRALayer):
                for update in module.updates:
                    for name, parameter in update.learned().items():
                        yield f"{network}.{layer}.{update.key}.{name}", parameter
    for encoder in loaded.backbone.tokenizers:
        embedding = loaded.backbone.networks[encoder].get_input_embeddings()
        if isinstance(embedding, WordEmbedding):
            for word, vectors in zip(embedding.vocabulary.words, embedding.vectors, strict=True):
                yield f"{words_part(encoder)}.{word.key}", vectors
