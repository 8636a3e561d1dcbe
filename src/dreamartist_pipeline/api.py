"""A few calls for scripts and notebooks: concepts from files, sampling from given noise, the numbers of one step.

Nothing here is random. Latents, noise and timesteps are handed in, so that results can be compared with those of any
other implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from dreamartist_pipeline.backbones.base_model import Backbone, BaseModelFiles, load_backbone, make_scheduler
from dreamartist_pipeline.backbones.concepts import LoadedConcept, attach
from dreamartist_pipeline.core import sampling
from dreamartist_pipeline.core.adapters import BranchLoRALayer
from dreamartist_pipeline.core.branches import GuidanceScale, stack
from dreamartist_pipeline.core.concept import WORDS, Concept
from dreamartist_pipeline.core.embeddings import WordEmbedding
from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.core.training import Batch, Trainee, combined_prediction, row_losses
from dreamartist_pipeline.interop.branch_adapters import BaseModelIdentity, build_concept
from dreamartist_pipeline.interop.toolkit import SLOT, read_toolkit, toolkit_words
from dreamartist_pipeline.params import DeviceParams, LossParams, SamplerParams, StrengthParams

_NUM_BRANCHES = 2
_CPU = DeviceParams(device="cpu")
_FULL_STRENGTH = StrengthParams()
_FIVE_DDIM_STEPS = SamplerParams(scheduler="ddim", num_inference_steps=5, guidance_scale=3.0)
_PLAIN_LOSS = LossParams(weighting="none")


def open_base_model(folder: str | Path, device: DeviceParams = _CPU) -> Backbone:
    """Load a base model in diffusers' layout, frozen.

    Raises:
        InputError: the folder is incomplete or cannot be read.
    """
    return load_backbone(BaseModelFiles(folder), device)


def read_toolkit_concept(
    backbone: Backbone,
    folder: str | Path,
    words: tuple[str, str] | None = None,
    clip_skip: int = 0,
    step: int | None = None,
) -> Concept:
    """Read the reference toolkit's files of one step as a concept for this base model.

    Args:
        backbone: the base model that it was trained on; the files do not say which.
        folder: `{unet,text_encoder}[-neg]-STEP.safetensors` (or `.ckpt`) and the words as `WORD-STEP.pt` or `WORD.pt`;
            or a folder with all these in `ckpts/`.
        words: (positive, negative); None takes the two `.pt` files, of which the negative ends in "-neg".
        clip_skip: as it was trained; the files do not say.
        step: which step; None takes the newest.

    Raises:
        InputError: no such folder, no files of that step, a file that does not belong there, or words that are no
            pair.
    """
    if not Path(folder).is_dir():
        raise InputError(f"expected a folder of the toolkit's files at {folder}; got none; correct the path")
    inner = Path(folder) / "ckpts"
    source = inner if inner.is_dir() else Path(folder)
    files = {file.name: file.read_bytes() for file in sorted(source.iterdir()) if file.is_file()}
    networks = {"unet": backbone.unet, "text_encoder": backbone.text_encoder}
    modules = {network: [name for name, _ in module.named_modules()] for network, module in networks.items()}
    adapters, vectors = read_toolkit(files, modules, step)
    learned = toolkit_words(vectors, {SLOT: words} if words else {}, "`words`")
    identity = BaseModelIdentity(backbone.name, backbone.fingerprint)
    return build_concept(adapters, learned, identity, clip_skip=clip_skip)


def sample_latents(
    backbone: Backbone,
    concept: Concept | None,
    prompt: str,
    negative_prompt: str,
    latents: torch.Tensor,
    *,
    strength: StrengthParams = _FULL_STRENGTH,
    sampler: SamplerParams = _FIVE_DDIM_STEPS,
) -> torch.Tensor:
    """Denoise given latents, one adapter per branch: `neg + s · (pos − neg)` goes to the scheduler at every step.

    Args:
        backbone: the base model.
        concept: what was trained on it, or None.
        prompt: of the positive branch, trigger word in it.
        negative_prompt: of the negative branch; the negative trigger word acts only if it is written here.
        latents: `[B, C, h, w]` standard normal, float32.
        strength: a factor on each branch's adapter.
        sampler: scheduler, steps and s.

    Returns:
        Denoised latents `[B, C, h, w]`, before the autoencoder's scaling factor is taken out.

    Raises:
        InputError: a scheduler that draws noise on the way, or a concept of another base model.
    """
    if sampler.scheduler == "euler_a":
        raise InputError(
            "expected a scheduler that draws no noise, got euler_a; choose ddim, dpmsolver++, euler or unipc"
        )
    loaded = attach(backbone, concept, strength)
    with torch.no_grad():
        states = _text_states(loaded, prompt, negative_prompt, len(latents))
        return sampling.sample_latents(
            lambda noisy, timesteps: loaded.backbone.denoise(noisy, timesteps, states),
            make_scheduler(loaded.backbone, sampler),
            latents.to(backbone.device),
            sampler.guidance_scale,
            sampler.num_inference_steps,
        )


@dataclass(frozen=True)
class StepValues:
    """What one training step computes, before any update.

    prediction: combined, `[B, C, h, w]`. row_losses: `[B]`; loss: their mean. gradients: of the loss, by the tensor's
    name in the concept; of the factors and vectors themselves, without any clipping.
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
    guidance_scale: str = "3.0",
    loss: LossParams = _PLAIN_LOSS,
    mask: torch.Tensor | None = None,
) -> StepValues:
    """Compute combined prediction, loss and gradients of one step for given latents, noise and timesteps.

    The functions are those of the training loop (`core.training`).

    Args:
        backbone: the base model.
        concept: adapters and words as they are; nothing is changed.
        prompt, negative_prompt: as the template gives them, each with its branch's trigger word.
        latents, noise: `[B, C, h, w]` float32.
        timesteps: `[B]` int64.
        guidance_scale: "3.0" or "low-high:curve".
        loss: kind of error and SNR weighting.
        mask: attention mask `[B, 1, h, w]`, or None.

    Raises:
        InputError: a reconstruction loss is asked for, which needs the picture.
    """
    if loss.reconstruction_weight:
        raise InputError(
            "expected a loss on the prediction alone, got a reconstruction_weight, which needs the picture; set it to 0"
        )
    latents, noise, timesteps = (given.to(backbone.device) for given in (latents, noise, timesteps))
    mask = None if mask is None else mask.to(backbone.device)
    loaded = attach(backbone, concept, _FULL_STRENGTH)
    trainee = Trainee(loaded.backbone.denoise, loaded.prompts.encode, loaded.backbone.schedule, (), _NUM_BRANCHES)
    rows = len(latents)
    batch = Batch(
        latents=latents,
        noise=noise,
        timesteps=timesteps,
        token_ids=loaded.prompts.token_ids([negative_prompt, prompt])[None],  # [1, 2, L]
        prompt_of_row=torch.zeros(rows, dtype=torch.long, device=backbone.device),
        row_weight=torch.full((rows,), 1 / rows, device=backbone.device),
        mask=mask,
    )
    guidance = GuidanceScale.parse(guidance_scale).at(timesteps, trainee.schedule.num_train_timesteps)
    prediction = combined_prediction(trainee, batch, guidance)
    delta = loss.huber_delta if loss.kind == "huber" else None
    by_row = row_losses(prediction, batch, trainee.schedule, loss.weighting, loss.snr_gamma, delta)
    learned = dict(_learned(loaded))
    gradients = torch.autograd.grad(by_row.mean(), list(learned.values()), allow_unused=True)
    return StepValues(
        prediction.detach(),
        by_row.detach(),
        by_row.mean().detach(),
        {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for (name, parameter), gradient in zip(learned.items(), gradients, strict=True)
        },
    )


def _text_states(loaded: LoadedConcept, prompt: str, negative_prompt: str, rows: int) -> torch.Tensor:
    """Return `[2·rows, L, D]`, negative rows first; every row of a branch has the same prompt."""
    ids = loaded.prompts.token_ids([negative_prompt]), loaded.prompts.token_ids([prompt])
    return loaded.prompts.encode(stack(*ids)).repeat_interleave(rows, dim=0)


def _learned(loaded: LoadedConcept) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what a concept has learned under the names it has in a concept file."""
    for network in ("unet", "text_encoder"):
        for layer, module in getattr(loaded.backbone, network).named_modules():
            if isinstance(module, BranchLoRALayer):
                for update in module.updates:
                    yield f"{network}.{layer}.{update.key}.down", update.down
                    yield f"{network}.{layer}.{update.key}.up", update.up
    embedding = loaded.backbone.text_encoder.get_input_embeddings()
    if isinstance(embedding, WordEmbedding):
        for word, vectors in zip(embedding.vocabulary.words, embedding.vectors, strict=True):
            yield f"{WORDS}.{word.key}", vectors
