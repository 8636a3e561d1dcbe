"""Concepts on a base model: starting a new one, attaching a trained one, and drawing with it.

A base model stays as it is: adapters and words go into a copy of UNet and text encoder that shares all weights.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image
from torch import nn

from dreamartist_pipeline.backbones.base_model import (
    Backbone,
    decode_latents,
    encode_images,
    with_zero_terminal_snr,
)
from dreamartist_pipeline.backbones.prompts import PromptEncoder, initial_word_vectors
from dreamartist_pipeline.backbones.schedulers import make_scheduler
from dreamartist_pipeline.core.adapters import AdapterStack, inject, load_adapters, select_layers
from dreamartist_pipeline.core.branches import BRANCH_NAMES, NEGATIVE, stack
from dreamartist_pipeline.core.concept import NETWORKS, WORDS, Concept, ConceptMetadata, to_json
from dreamartist_pipeline.core.embeddings import Vocabulary, WordEmbedding
from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.core.images import to_images, to_tensor
from dreamartist_pipeline.core.init_picture import InitPicture, fit_picture, redrawn
from dreamartist_pipeline.core.lora_factors import SHARED
from dreamartist_pipeline.core.sampling import KnownLatents, image_generators, initial_noise, sample_latents
from dreamartist_pipeline.params import ResolvedGroup, SamplerParams, StrengthParams, TrainingParams

_NUM_BRANCHES = 2  # when drawing, the negative rows are always there
_VERSIONED = ("torch", "diffusers", "transformers")


# ------------------------------------------------------------------------------------------------- a new concept


@dataclass(frozen=True)
class NewConcept:
    """A concept that trains: adapters and words in place in a copy of the base model.

    stacks: network (`unet`, `text_encoder`) -> its adapters; networks without adapters are left out.
    words: the learned vectors, or None without trigger words.
    """

    backbone: Backbone
    prompts: PromptEncoder
    stacks: dict[str, AdapterStack]
    words: WordEmbedding | None
    num_branches: int

    def snapshot(self, metadata: ConceptMetadata) -> Concept:
        """Return a copy of what has been learned so far."""
        tensors = {
            f"{network}.{name}": tensor
            for network, adapters in self.stacks.items()
            for name, tensor in adapters.state_dict().items()
        }
        if self.words is not None:
            tensors |= {f"{WORDS}.{key}": tensor for key, tensor in self.words.tensors().items()}
        return Concept(dict(sorted(tensors.items())), metadata)


def start_concept(backbone: Backbone, params: TrainingParams, lr_factor: float, seed: int) -> NewConcept:
    """Put fresh adapters and words into a copy of the base model; its outputs do not change yet.

    Raises:
        InputError: a layer selector finds nothing, an init text does not fit, or the base model cannot be trained with
            the noise schedule asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    own = share_weights(with_zero_terminal_snr(backbone) if params.zero_terminal_snr else backbone)
    networks = {"unet": own.unet, "text_encoder": own.text_encoder}
    stacks = inject_adapters(networks, params, lr_factor, generator)
    for adapters in stacks.values():
        adapters.train()
    vocabulary, words = None, None
    if params.words.names:
        embedding = own.text_encoder.get_input_embeddings()
        vocabulary = build_vocabulary(params, embedding.num_embeddings)
        initial = initial_word_vectors(params.words, vocabulary, own.tokenizer, embedding, generator)
        words = _put_words(own, vocabulary, initial)
    return NewConcept(own, PromptEncoder(own, vocabulary, params.clip_skip), stacks, words, params.num_branches)


def inject_adapters(
    networks: Mapping[str, nn.Module], params: TrainingParams, lr_factor: float, generator: torch.Generator
) -> dict[str, AdapterStack]:
    """Put the configured LoRA groups into UNet and text encoder, in place; also works on the meta device.

    Raises:
        InputError: a layer selector finds nothing, or only text-encoder layers that clip_skip leaves out.
    """
    groups = lora_groups(params, lr_factor)
    if params.clip_skip:
        used = _without_skipped(networks["text_encoder"], groups["text_encoder"], params.clip_skip)
        groups = groups | {"text_encoder": used}
    return {
        network: inject(networks[network], groups[network], params.num_branches, generator)
        for network in NETWORKS
        if groups[network]
    }


def skipped_layers(text_encoder: nn.Module, selectors: Sequence[str], clip_skip: int) -> list[str]:
    """Return the layers selected in what clip_skip leaves out: no gradient would ever reach an adapter there."""
    text_model: Any = getattr(text_encoder, "text_model", text_encoder)  # transformers 5 has no module between
    blocks = text_model.encoder.layers
    left_out = {module for block in blocks[len(blocks) - clip_skip :] for module in block.modules()}
    return [name for name in select_layers(text_encoder, selectors) if text_encoder.get_submodule(name) in left_out]


def _without_skipped(
    text_encoder: nn.Module, groups: Sequence[ResolvedGroup], clip_skip: int
) -> tuple[ResolvedGroup, ...]:
    """Narrow the groups to the layers that text states come from.

    Raises:
        InputError: a group has no layer left.
    """
    narrowed = []
    for group in groups:
        skipped = skipped_layers(text_encoder, group.layers, clip_skip)
        left = [name for name in select_layers(text_encoder, group.layers) if name not in skipped]
        if not left:
            raise InputError(
                f"expected layers in {group.name} that text states come from; got {', '.join(skipped)}, which "
                f"clip_skip={clip_skip} leaves out, so that nothing would train; select earlier layers, "
                "or lower clip_skip"
            )
        narrowed.append(group.model_copy(update={"layers": tuple(left)}))
    return tuple(narrowed)


def lora_groups(params: TrainingParams, lr_factor: float) -> dict[str, tuple[ResolvedGroup, ...]]:
    """Return the LoRA groups of every network, with the learning rates as applied, named as `unet.0.positive`.

    Without a negative branch every group is one for all rows, so that drawing applies it to the negative rows too, as
    other tools apply a plain LoRA.
    """
    configured = {"unet": params.lora_unet, "text_encoder": params.lora_text_encoder}
    return {
        network: tuple(
            ResolvedGroup.model_validate(
                group.model_dump()
                | {
                    "name": f"{network}.{index}.{(branch := SHARED if params.num_branches == 1 else group.branch)}",
                    "branch": branch,
                    "lr": group.lr * lr_factor,
                }
            )
            for index, group in enumerate(groups)
        )
        for network, groups in configured.items()
    }


def build_vocabulary(params: TrainingParams, vocabulary_size: int) -> Vocabulary:
    """Return the trigger words, numbered from the end of the base vocabulary."""
    return Vocabulary.build(params.words.names, params.words.num_vectors, vocabulary_size, params.num_branches)


def concept_metadata(
    backbone: Backbone, params: TrainingParams, lr_factor: float, start_sha256: str | None = None
) -> ConceptMetadata:
    """Return what a concept needs to be used again, and what made it.

    Args:
        backbone: the base model it trains on.
        params: of the training.
        lr_factor: what every learning rate is multiplied by.
        start_sha256: of the concept's file that it starts from, or None.
    """
    return ConceptMetadata(
        base_model=backbone.name,
        base_model_fingerprint=backbone.fingerprint,
        prediction_type=backbone.schedule.prediction_type,
        zero_terminal_snr=params.zero_terminal_snr,
        guidance_scale=params.guidance_scale,
        class_word=params.class_word,
        clip_skip=params.clip_skip,
        num_branches=params.num_branches,
        num_steps=params.num_steps,
        seed=params.seed,
        templates=params.templates,
        words=params.words.names,
        num_vectors=params.words.num_vectors,
        init_text=params.words.init_text,
        lora=lora_groups(params, lr_factor),
        config_sha256=hashlib.sha256(to_json(params.result_values()).encode()).hexdigest(),
        versions={name: version(name) for name in _VERSIONED},
        start_sha256=start_sha256,
    )


# ------------------------------------------------------------------------------------------------- a trained concept


@dataclass(frozen=True)
class LoadedConcept:
    """A concept ready to draw with; without a concept, the base model itself.

    trigger_words: slot -> (positive, negative); the latter is "" for a word by itself.
    """

    backbone: Backbone
    prompts: PromptEncoder
    vocabulary: Vocabulary | None
    trigger_words: dict[str, tuple[str, str]]

    @property
    def negative_words(self) -> dict[str, str]:
        """Slot -> the word that a negative prompt's slot stands for: the negative one, or the only one there is."""
        words = {word.key: word.name for word in self.vocabulary.words} if self.vocabulary else {}
        return {
            slot: words.get(f"{BRANCH_NAMES[NEGATIVE]}.{slot}", positive)
            for slot, (positive, _) in self.trigger_words.items()
        }


def attach(backbone: Backbone, concept: Concept | None, strength: StrengthParams) -> LoadedConcept:
    """Put a concept on a copy of the base model that shares its weights; `backbone` itself stays as it is.

    Raises:
        InputError: the concept was trained on another base model, or its tensors do not belong to this one.
    """
    if concept is None:
        return LoadedConcept(backbone, PromptEncoder(backbone), None, {})
    check_base_model(concept, backbone.name, backbone.fingerprint)
    own = share_weights(_with_schedule_of(concept, backbone))
    networks = {"unet": own.unet, "text_encoder": own.text_encoder}
    strengths = (strength.negative, strength.positive)
    metadata = concept.metadata
    for network in NETWORKS:
        if tensors := concept.part(network):
            load_adapters(networks[network], tensors, metadata.lora.get(network, ()), _NUM_BRANCHES, strengths)
    vocabulary = _load_words(own, concept) if metadata.words else None
    return LoadedConcept(own, PromptEncoder(own, vocabulary, metadata.clip_skip), vocabulary, metadata.words)


def attach_base(backbone: Backbone, concept: Concept) -> LoadedConcept:
    """Return the base model alone, as it is to be compared with a concept: same schedule, same layer of text states."""
    own = _with_schedule_of(concept, backbone)
    return LoadedConcept(own, PromptEncoder(own, clip_skip=concept.metadata.clip_skip), None, {})


def _with_schedule_of(concept: Concept, backbone: Backbone) -> Backbone:
    return with_zero_terminal_snr(backbone) if concept.metadata.zero_terminal_snr else backbone


def check_base_model(concept: Concept, name: str, fingerprint: str) -> None:
    """Confirm that a concept belongs to the base model of this name and fingerprint.

    Raises:
        InputError: it was trained on another one.
    """
    expected = concept.metadata.base_model_fingerprint
    if expected != fingerprint:
        raise InputError(
            f"expected the base model that the concept was trained on, {concept.metadata.base_model!r} with "
            f"fingerprint {expected}; got {name!r} with fingerprint {fingerprint}; "
            "set base_model to the former, or train the concept again"
        )


def _load_words(own: Backbone, concept: Concept) -> Vocabulary:
    embedding = own.text_encoder.get_input_embeddings()
    words = {word.key: word.vectors for word in concept.trigger_words()}
    if wrong := [key for key, vectors in words.items() if vectors.shape[1] != embedding.embedding_dim]:
        raise InputError(
            f"expected vectors of width {embedding.embedding_dim} for every trigger word; got others for "
            f"{', '.join(wrong)}; load a concept that was trained on this base model"
        )
    counts = {key: len(vectors) for key, vectors in words.items()}
    vocabulary = Vocabulary.of_counts(concept.metadata.words, counts, embedding.num_embeddings)
    _put_words(own, vocabulary, [words[word.key] for word in vocabulary.words])
    return vocabulary


def _put_words(own: Backbone, vocabulary: Vocabulary, vectors: Sequence[torch.Tensor]) -> WordEmbedding:
    words = WordEmbedding(own.text_encoder.get_input_embeddings(), vocabulary, vectors)
    own.text_encoder.set_input_embeddings(words)
    return words


def share_weights(backbone: Backbone) -> Backbone:
    """Return a backbone whose UNet and text encoder are other modules over the same tensors."""
    return dataclasses.replace(
        backbone, unet=_copy_module(backbone.unet), text_encoder=_copy_module(backbone.text_encoder)
    )


def _copy_module(module: Any) -> Any:
    """Copy the modules, but not the parameters and buffers they hold."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


# ------------------------------------------------------------------------------------------------- drawing


def generate(
    backbone: Backbone,
    loaded: LoadedConcept,
    prompts: Sequence[str],
    negative_prompt: str,
    seeds: Sequence[int],
    sampler: SamplerParams,
    progress: Callable[[int], None] | None = None,
    *,
    size_px: tuple[int, int] | None = None,
    init: InitPicture | None = None,
) -> list[Image.Image]:
    """Draw one image per prompt; image i takes prompt i and seed i.

    Positive rows: the prompt, the positive adapter. Negative rows: the user's negative prompt without a trigger word,
    the negative adapter. Without a concept exactly the base model draws.

    Args:
        backbone: the base model that `loaded` was attached to.
        loaded: the concept, or the base model alone.
        prompts: one per image, trigger words in them.
        negative_prompt: for all images.
        seeds: one per image.
        sampler: scheduler, steps, guidance scale and batch size.
        progress: called with the number of new images after each batch.
        size_px: (width, height); None: the base model's size.
        init: a picture to start from, and what of it is drawn anew; it is brought to `size_px`, and encoded once.

    Raises:
        ValueError: not one seed per prompt.
        InputError: sides that the autoencoder cannot make, or a scheduler that does not go with the concept.
    """
    images: list[Image.Image] = []
    for latents in draw_latents(backbone, loaded, prompts, negative_prompt, seeds, sampler, size_px=size_px, init=init):
        images += to_images(decode_latents(backbone, latents))
        if progress:
            progress(len(latents))
    return images


def draw_latents(
    backbone: Backbone,
    loaded: LoadedConcept,
    prompts: Sequence[str],
    negative_prompt: str,
    seeds: Sequence[int],
    sampler: SamplerParams,
    *,
    size_px: tuple[int, int] | None = None,
    init: InitPicture | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the latents `[B, C, h, w]` of one batch of images after the other; see `generate`.

    Raises:
        ValueError: not one seed per prompt.
        InputError: sides that the autoencoder cannot make, or a scheduler that does not go with the concept.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"expected one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds")
    size_px = size_px or (backbone.image_px, backbone.image_px)
    shape = _latent_shape(backbone, size_px)
    picture = None if init is None else _encode_picture(backbone, fit_picture(init, size_px))
    for start in range(0, len(prompts), sampler.batch_size):
        rows = slice(start, start + sampler.batch_size)
        yield _draw_batch(backbone, loaded, prompts[rows], negative_prompt, seeds[rows], sampler, shape, picture)


@dataclass(frozen=True)
class _EncodedPicture:
    """A picture to start from, as the distribution of its latents.

    mean, std: `[1, C, h, w]`, times the scaling factor. denoise, mask: see `KnownLatents`.
    """

    mean: torch.Tensor
    std: torch.Tensor
    denoise: float
    mask: torch.Tensor | None

    def sample(self, generators: Sequence[torch.Generator]) -> KnownLatents:
        """Sample its latents for every image with the image's own generator, which moves on by as much."""
        noise = initial_noise(self.mean.shape[1:], generators).to(self.mean.device)  # [B, C, h, w]
        return KnownLatents(self.mean + self.std * noise, self.denoise, self.mask)


def _encode_picture(backbone: Backbone, init: InitPicture) -> _EncodedPicture:
    mean, std = encode_images(backbone, to_tensor([init.image]))
    mask = None if init.mask is None else redrawn(init.mask, (mean.shape[3], mean.shape[2])).to(backbone.device)
    return _EncodedPicture(mean, std, init.denoise, mask)


@torch.no_grad()
def _draw_batch(
    backbone: Backbone,
    loaded: LoadedConcept,
    prompts: Sequence[str],
    negative_prompt: str,
    seeds: Sequence[int],
    sampler: SamplerParams,
    shape: tuple[int, int, int],
    picture: _EncodedPicture | None,
) -> torch.Tensor:
    """Return the latents `[B, C, h, w]` of one batch; shape: (C, h, w)."""
    hidden = _text_states(loaded.prompts, prompts, negative_prompt)
    generators = image_generators(seeds)
    known = None if picture is None else picture.sample(generators)
    noise = initial_noise(shape, generators).to(backbone.device)
    if known is not None and known.mask is not None:
        # diffusers encodes the masked picture here, for models with inputs for it; the seeds shall mean the same.
        initial_noise(shape, generators)
    return sample_latents(
        lambda latents, timesteps: loaded.backbone.denoise(latents, timesteps, hidden),
        make_scheduler(loaded.backbone, sampler),
        noise,
        sampler.guidance_scale,
        sampler.num_inference_steps,
        generators=generators,
        known=known,
    )


def _latent_shape(backbone: Backbone, size_px: tuple[int, int]) -> tuple[int, int, int]:
    """Return (C, h, w)."""
    width, height = size_px
    if width < 1 or height < 1 or width % backbone.latent_scale or height % backbone.latent_scale:
        raise InputError(
            f"expected width and height in multiples of the base model's {backbone.latent_scale} px; "
            f"got {width} × {height} px; round them"
        )
    return int(backbone.unet.config.in_channels), height // backbone.latent_scale, width // backbone.latent_scale


def _text_states(encoder: PromptEncoder, prompts: Sequence[str], negative_prompt: str) -> torch.Tensor:
    """Return `[2B, L, D]`, negative rows first; equal prompts are encoded once."""
    distinct = list(dict.fromkeys(prompts))
    tokens = encoder.tokenize([negative_prompt, *distinct])
    positive = torch.arange(1, len(tokens), device=tokens.ids.device)
    states = encoder.encode(tokens[stack(torch.zeros_like(positive), positive)])
    states = states.view(_NUM_BRANCHES, len(distinct), *states.shape[1:])  # [2, D, L, width]
    row = torch.tensor([distinct.index(prompt) for prompt in prompts], device=tokens.ids.device)
    return states[:, row].flatten(0, 1)
