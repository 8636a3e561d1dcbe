"""Concepts on a base model: starting a new one, attaching a trained one, and drawing with it.

A base model stays as it is: adapters and words go into a copy of UNet and text encoder that shares all weights.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import torch
from PIL import Image

from dreamartist_pipeline.backbones.base_model import decode_latents, encode_images, with_zero_terminal_snr
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.families.clip_text import skipped_modules
from dreamartist_pipeline.backbones.fitting import check_base_model
from dreamartist_pipeline.backbones.prompts import PromptEncoder, initial_word_vectors
from dreamartist_pipeline.backbones.schedulers import make_scheduler
from dreamartist_pipeline.core.adapters import AdapterStack, inject, load_adapters, select_layers
from dreamartist_pipeline.core.branches import BRANCH_NAMES, NEGATIVE, rows_of, stack
from dreamartist_pipeline.core.concept import Concept, ConceptMetadata, to_json, words_part
from dreamartist_pipeline.core.embeddings import Vocabulary, WordEmbedding
from dreamartist_pipeline.core.images import to_images, to_tensor
from dreamartist_pipeline.core.init_picture import InitPicture, fit_picture, redrawn
from dreamartist_pipeline.core.lora_factors import SHARED
from dreamartist_pipeline.core.prompt_tokens import Conditioning
from dreamartist_pipeline.core.sampling import KnownLatents, image_generators, initial_noise, sample_latents
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import LoRAGroup, ResolvedGroup, SamplerParams, StrengthParams, TrainingParams

_NUM_BRANCHES = 2  # when drawing, the negative rows are always there
_VERSIONED = ("torch", "diffusers", "transformers")


# ------------------------------------------------------------------------------------------------- a new concept


@dataclass(frozen=True)
class NewConcept:
    """A concept that trains: adapters and words in place in a copy of the base model.

    stacks: network (such as `unet`) -> its adapters; networks without adapters are left out.
    words: text encoder -> the learned vectors; empty without trigger words.
    """

    backbone: Backbone
    prompts: PromptEncoder
    stacks: dict[str, AdapterStack]
    words: dict[str, WordEmbedding]
    num_branches: int

    def snapshot(self, metadata: ConceptMetadata) -> Concept:
        """Return a copy of what has been learned so far."""
        tensors = {
            f"{network}.{name}": tensor
            for network, adapters in self.stacks.items()
            for name, tensor in adapters.state_dict().items()
        }
        for encoder, words in self.words.items():
            tensors |= {f"{words_part(encoder)}.{key}": tensor for key, tensor in words.tensors().items()}
        return Concept(dict(sorted(tensors.items())), metadata)

    @contextmanager
    def drawing(self, trigger_words: dict[str, tuple[str, str]]) -> Iterator[LoadedConcept]:
        """Draw with what has been learned so far, without a copy; dropout is off within.

        Args:
            trigger_words: slot -> (positive, negative).
        """
        for adapters in self.stacks.values():
            adapters.train(False)
        try:
            yield LoadedConcept(self.backbone, self.prompts, trigger_words)
        finally:
            for adapters in self.stacks.values():
                adapters.train()


def start_concept(backbone: Backbone, params: TrainingParams, lr_factor: float, seed: int) -> NewConcept:
    """Put fresh adapters and words into a copy of the base model; its outputs do not change yet.

    Raises:
        InputError: a layer selector finds nothing, an init text does not fit, or the base model cannot be trained with
            the noise schedule asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    own = (with_zero_terminal_snr(backbone) if params.zero_terminal_snr else backbone).share_weights()
    stacks = inject_adapters(own, params, lr_factor, generator)
    for adapters in stacks.values():
        adapters.train()
    words = {}
    for encoder, tokenizer in own.tokenizers.items() if params.words.names else ():
        embedding = own.networks[encoder].get_input_embeddings()
        vocabulary = build_vocabulary(params, embedding.num_embeddings)
        initial = initial_word_vectors(params.words, vocabulary, tokenizer, embedding, generator)
        words[encoder] = _put_words(own, encoder, vocabulary, initial)
    vocabularies = {encoder: embedding.vocabulary for encoder, embedding in words.items()}
    return NewConcept(own, PromptEncoder(own, vocabularies, params.clip_skip), stacks, words, params.num_branches)


def inject_adapters(
    own: Backbone, params: TrainingParams, lr_factor: float, generator: torch.Generator
) -> dict[str, AdapterStack]:
    """Put the configured LoRA groups into the base model's networks, in place; also works on the meta device.

    Raises:
        InputError: a network that the base model does not have, a layer selector that finds nothing, or only layers
            that clip_skip leaves out.
    """
    _check_networks(list(params.lora), list(own.networks))
    groups = lora_groups(params, lr_factor)
    for encoder in own.tokenizers if params.clip_skip else ():
        groups[encoder] = _without_skipped(own, encoder, groups.get(encoder, ()), params.clip_skip)
    return {
        network: inject(module, groups[network], params.num_branches, generator)
        for network, module in own.networks.items()
        if groups.get(network)
    }


def _check_networks(named: Sequence[str], known: Sequence[str]) -> None:
    """Confirm that LoRA groups are for networks of the base model.

    Raises:
        InputError: one is not.
    """
    for network in named:
        if network not in known:
            near = difflib.get_close_matches(network, known, n=1)
            raise InputError(
                expected=f"LoRA groups for the base model's networks, {', '.join(f'lora_{n}' for n in known)}",
                got=f"lora_{network}",
                remedy=f"{f'did you mean lora_{near[0]}?' if near else 'remove it'}",
            )


def skipped_layers(backbone: Backbone, encoder: str, selectors: Sequence[str], clip_skip: int) -> list[str]:
    """Return the selected layers of a text encoder that clip_skip leaves out."""
    module = backbone.networks[encoder]
    left_out = skipped_modules(module, clip_skip)
    return [name for name in select_layers(module, selectors) if module.get_submodule(name) in left_out]


def _without_skipped(
    backbone: Backbone, encoder: str, groups: Sequence[ResolvedGroup], clip_skip: int
) -> tuple[ResolvedGroup, ...]:
    """Narrow the groups to the layers that text states come from.

    Raises:
        InputError: a group has no layer left.
    """
    narrowed = []
    for group in groups:
        skipped = skipped_layers(backbone, encoder, group.layers, clip_skip)
        left = [name for name in select_layers(backbone.networks[encoder], group.layers) if name not in skipped]
        if not left:
            raise InputError(
                expected=f"layers in {group.name} that text states come from",
                got=f"{', '.join(skipped)}, which clip_skip={clip_skip} leaves out, so that nothing would train",
                remedy="select earlier layers, or lower clip_skip",
            )
        narrowed.append(group.model_copy(update={"layers": tuple(left)}))
    return tuple(narrowed)


def lora_groups(params: TrainingParams, lr_factor: float) -> dict[str, tuple[ResolvedGroup, ...]]:
    """Return the LoRA groups of every network named, with the learning rates as applied, named as `unet.0.positive`.

    Without a negative branch every group is one for all rows, so that drawing applies it to the negative rows too, as
    other tools apply a plain LoRA.
    """
    return {
        network: tuple(
            _resolved(group, f"{network}.{index}", lr_factor, params.num_branches) for index, group in enumerate(groups)
        )
        for network, groups in params.lora.items()
    }


def _resolved(group: LoRAGroup, name: str, lr_factor: float, num_branches: int) -> ResolvedGroup:
    branch = SHARED if num_branches == 1 else group.branch
    own = {"name": f"{name}.{branch}", "branch": branch, "lr": group.lr * lr_factor}
    return ResolvedGroup.model_validate(group.model_dump() | own)


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
    groups = lora_groups(params, lr_factor)
    return ConceptMetadata(
        base_model=backbone.name,
        base_model_fingerprint=backbone.fingerprint,
        base_model_family=backbone.family,
        prediction_type=backbone.objective.prediction_type,
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
        lora={network: groups.get(network, ()) for network in backbone.networks},
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
    trigger_words: dict[str, tuple[str, str]]

    @property
    def negative_words(self) -> dict[str, str]:
        """Slot -> the word that a negative prompt's slot stands for: the negative one, or the only one there is."""
        words = {word.key: word.name for word in self.prompts.words}
        return {
            slot: words.get(f"{BRANCH_NAMES[NEGATIVE]}.{slot}", positive)
            for slot, (positive, _) in self.trigger_words.items()
        }


def attach(backbone: Backbone, concept: Concept | None, strength: StrengthParams) -> LoadedConcept:
    """Put a concept on a copy of the base model that shares its weights; `backbone` itself stays as it is.

    Raises:
        InputError: the concept was trained on a base model of another layout, or lacks something.
    """
    if concept is None:
        return LoadedConcept(backbone, PromptEncoder(backbone), {})
    check_base_model(concept, backbone)
    own = with_schedule_of(concept, backbone).share_weights()
    strengths = (strength.negative, strength.positive)
    metadata = concept.metadata
    for network, module in own.networks.items():
        if tensors := concept.part(network):
            load_adapters(module, tensors, metadata.lora[network], _NUM_BRANCHES, strengths)
    vocabularies = {encoder: _load_words(own, encoder, concept) for encoder in own.tokenizers if metadata.words}
    return LoadedConcept(own, PromptEncoder(own, vocabularies, metadata.clip_skip), metadata.words)


def attach_base(backbone: Backbone, concept: Concept) -> LoadedConcept:
    """Return the base model alone, as it is to be compared with a concept: same schedule, same layer of text states."""
    own = with_schedule_of(concept, backbone)
    return LoadedConcept(own, PromptEncoder(own, clip_skip=concept.metadata.clip_skip), {})


def with_schedule_of(concept: Concept, backbone: Backbone) -> Backbone:
    """Return the base model with the noise schedule that a concept was trained on, weights shared."""
    return with_zero_terminal_snr(backbone) if concept.metadata.zero_terminal_snr else backbone


def _load_words(own: Backbone, encoder: str, concept: Concept) -> Vocabulary:
    vectors = {word.key: word.vectors[encoder] for word in concept.trigger_words()}
    counts = {key: len(tensor) for key, tensor in vectors.items()}
    first_id = own.networks[encoder].get_input_embeddings().num_embeddings
    vocabulary = Vocabulary.of_counts(concept.metadata.words, counts, first_id)
    _put_words(own, encoder, vocabulary, [vectors[word.key] for word in vocabulary.words])
    return vocabulary


def _put_words(own: Backbone, encoder: str, vocabulary: Vocabulary, vectors: Sequence[torch.Tensor]) -> WordEmbedding:
    module = own.networks[encoder]
    words = WordEmbedding(module.get_input_embeddings(), vocabulary, vectors)
    module.set_input_embeddings(words)
    return words


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
    conditioning = _conditioning(loaded.prompts, prompts, negative_prompt)
    generators = image_generators(seeds)
    known = None if picture is None else picture.sample(generators)
    noise = initial_noise(shape, generators).to(backbone.device)
    if known is not None and known.mask is not None:
        # diffusers encodes the masked picture here, for models with inputs for it; the seeds shall mean the same.
        initial_noise(shape, generators)
    return sample_latents(
        lambda latents, timesteps: loaded.backbone.denoise(latents, timesteps, conditioning),
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
            expected=f"width and height in multiples of the base model's {backbone.latent_scale} px",
            got=f"{width} × {height} px",
            remedy="round them",
        )
    return backbone.latent_channels, height // backbone.latent_scale, width // backbone.latent_scale


def _conditioning(encoder: PromptEncoder, prompts: Sequence[str], negative_prompt: str) -> Conditioning:
    """Return what 2·B rows are told, negative ones first; equal prompts are encoded once."""
    distinct = list(dict.fromkeys(prompts))
    tokens = encoder.tokenize([negative_prompt, *distinct])
    positive = torch.arange(1, len(tokens), device=tokens.ids.device)
    row = torch.tensor([distinct.index(prompt) for prompt in prompts], device=tokens.ids.device)
    encoded = encoder.encode(tokens[stack(torch.zeros_like(positive), positive)])
    return encoded[rows_of(row, len(distinct), _NUM_BRANCHES)]
