"""Concepts on a base model: starting a new one, attaching a trained one, and generating images with it.

The base model is never changed: adapters and words are put into copies of its networks that share all weights.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import torch
from PIL import Image

from dreamartist_pipeline.backbones.base_model import decode_latents, encode_images, with_zero_terminal_snr
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.fitting import check_base_model
from dreamartist_pipeline.backbones.prompts import PromptEncoder, initial_word_vectors
from dreamartist_pipeline.backbones.schedulers import make_scheduler
from dreamartist_pipeline.core.adapters import AdapterStack, inject, load_adapters, select_layers
from dreamartist_pipeline.core.branches import BRANCH_NAMES, NEGATIVE, rows_of, stack
from dreamartist_pipeline.core.concept import Concept, ConceptMetadata, to_json, words_part
from dreamartist_pipeline.core.devices import free_memory_bytes
from dreamartist_pipeline.core.embeddings import Vocabulary, WordEmbedding
from dreamartist_pipeline.core.images import to_images, to_tensor
from dreamartist_pipeline.core.init_picture import InitPicture, fit_picture, redrawn
from dreamartist_pipeline.core.lora_factors import SHARED
from dreamartist_pipeline.core.prompt_tokens import Conditioning
from dreamartist_pipeline.core.sampling import KnownLatents, image_generators, initial_noise, sample_latents
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import LoRAGroup, ResolvedGroup, SamplerParams, StrengthParams, TrainingParams

_NUM_BRANCHES = 2  # images are always generated with negative rows
_VERSIONED = ("torch", "diffusers", "transformers")

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------- a new concept


@dataclass(frozen=True)
class NewConcept:
    """A concept in training: adapters and words in a copy of the base model.

    Attributes:
        stacks: network (such as `unet`) -> its adapters; networks without adapters are omitted.
        words: text encoder -> the learned vectors; empty without trigger words.
    """

    backbone: Backbone
    prompts: PromptEncoder
    stacks: dict[str, AdapterStack]
    words: dict[str, WordEmbedding]
    num_branches: int

    def snapshot(self, metadata: ConceptMetadata) -> Concept:
        """Return a copy of the current adapters and words."""
        return Concept(self.tensors(), metadata)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return a copy of the current adapters and words, as in `Concept.tensors`."""
        tensors = {
            f"{network}.{name}": tensor
            for network, adapters in self.stacks.items()
            for name, tensor in adapters.state_dict().items()
        }
        for encoder, words in self.words.items():
            tensors |= {f"{words_part(encoder)}.{key}": tensor for key, tensor in words.tensors().items()}
        return dict(sorted(tensors.items()))

    @contextmanager
    def drawing(self, trigger_words: dict[str, tuple[str, str]]) -> Iterator[LoadedConcept]:
        """Yield the current state to generate images with, without a copy and with dropout off.

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
    """Put new adapters and words into a copy of the base model; new adapters do not change its outputs.

    Raises:
        InputError: a layer selector matches nothing, an init text is invalid, or the base model does not support
            zero terminal SNR.
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
    """Put the configured LoRA groups into the base model's networks, in place, also on the meta device.

    Returns:
        Network -> its adapters, also in `own.adapters`.

    Raises:
        InputError: the base model does not have a network, a layer selector matches nothing, or a group has only
            layers that clip_skip leaves out.
    """
    for network in params.lora:
        if network not in own.networks:
            near = difflib.get_close_matches(network, own.networks, n=1)
            raise InputError(
                expected=f"LoRA groups for the base model's networks, {', '.join(f'lora_{n}' for n in own.networks)}",
                got=f"lora_{network}",
                remedy=f"did you mean lora_{near[0]}?" if near else "remove it",
            )
    groups = lora_groups(params, lr_factor)
    for encoder in own.tokenizers:
        groups[encoder] = _without_skipped(own, encoder, groups.get(encoder, ()), params.clip_skip)
    for network, module in own.networks.items():
        if groups.get(network):
            own.adapters[network] = inject(module, groups[network], params.num_branches, generator)
    return own.adapters


def skipped_layers(backbone: Backbone, encoder: str, selectors: Sequence[str], clip_skip: int) -> list[str]:
    """Return the selected layers of a text encoder that are not read, by clip_skip or in any case."""
    module = backbone.networks[encoder]
    left_out = backbone.unread_modules(encoder, clip_skip)
    return [name for name in select_layers(module, selectors) if module.get_submodule(name) in left_out]


def _without_skipped(
    backbone: Backbone, encoder: str, groups: Sequence[ResolvedGroup], clip_skip: int
) -> tuple[ResolvedGroup, ...]:
    """Return the groups without the layers of `skipped_layers`.

    Raises:
        InputError: a group has no other layers.
    """
    module, narrowed = backbone.networks[encoder], []
    for group in groups:
        skipped = skipped_layers(backbone, encoder, group.layers, clip_skip)
        if not skipped:
            narrowed.append(group)
            continue
        layers = tuple(name for name in select_layers(module, group.layers) if name not in skipped)
        if not layers:
            raise InputError(
                expected=f"layers in {group.name} that are used with clip_skip={clip_skip}",
                got=f"only {', '.join(skipped)}",
                remedy="select earlier layers, or lower clip_skip",
            )
        narrowed.append(group.model_copy(update={"layers": layers}))
    return tuple(narrowed)


def lora_groups(params: TrainingParams, lr_factor: float) -> dict[str, tuple[ResolvedGroup, ...]]:
    """Return network -> its LoRA groups, with the scaled learning rates and names such as `unet.0.positive`.

    Without a negative branch every group is shared, so that images are generated with it in the negative rows, too, as
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
    resolved = {"name": f"{name}.{branch}", "branch": branch, "lr": group.lr * lr_factor}
    return ResolvedGroup.model_validate(group.model_dump() | resolved)


def build_vocabulary(params: TrainingParams, vocabulary_size: int) -> Vocabulary:
    """Return the trigger words, with ids after the base vocabulary."""
    return Vocabulary.build(params.words.names, params.words.num_vectors, vocabulary_size, params.num_branches)


def library_versions() -> dict[str, str]:
    """Return library -> version, for those that a training computes with."""
    return {name: version(name) for name in _VERSIONED}


def concept_metadata(
    backbone: Backbone, params: TrainingParams, lr_factor: float, start_sha256: str | None = None
) -> ConceptMetadata:
    """Return the metadata of a concept: how to use it, and how it was trained.

    Args:
        backbone: the base model it is trained on.
        params: of the training.
        lr_factor: factor on every learning rate.
        start_sha256: of the concept file that the training starts from, or None.
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
        versions=library_versions(),
        start_sha256=start_sha256,
    )


# ------------------------------------------------------------------------------------------------- a trained concept


@dataclass(frozen=True)
class LoadedConcept:
    """A concept on a base model, or the base model alone, to generate images with.

    Attributes:
        trigger_words: slot -> (positive, negative); the latter is "" for a word without a partner.
    """

    backbone: Backbone
    prompts: PromptEncoder
    trigger_words: dict[str, tuple[str, str]]

    @property
    def negative_words(self) -> dict[str, str]:
        """Slot -> its word in a negative prompt: the negative one, or the positive one without a partner."""
        words = {word.key: word.name for word in self.prompts.words}
        return {
            slot: words.get(f"{BRANCH_NAMES[NEGATIVE]}.{slot}", positive)
            for slot, (positive, _) in self.trigger_words.items()
        }

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Merge the adapters of the denoiser into copies of its weights within this context, to draw with.

        Images are drawn in about the time of the base model. A text encoder runs once per batch, so that merging its
        adapters would take longer than it saves: their factors are packed. Adapters stay apart, too, where the copies
        would take more than half of the free memory, which is logged.
        """
        with ExitStack() as contexts:
            for network, adapters in self.backbone.adapters.items():
                in_encoder = network in self.backbone.tokenizers
                merges = not in_encoder and _have_memory(adapters, self.backbone.device)
                contexts.enter_context(adapters.merged() if merges else adapters.packed())
            yield


def _have_memory(adapters: AdapterStack, device: torch.device) -> bool:
    """Return whether there is memory to merge adapters; log that there is not."""
    needed, free = adapters.merged_bytes, free_memory_bytes(device)
    if 2 * needed <= free:
        return True
    log.warning(
        "The adapters are not merged for drawing, because the merged weights would take %.1f of %.1f GiB of free "
        "memory; drawing takes longer, and the images are the same up to rounding.",
        needed / 2**30,
        free / 2**30,
    )
    return False


def attach(backbone: Backbone, concept: Concept | None, strength: StrengthParams) -> LoadedConcept:
    """Put a concept into a copy of the base model that shares its weights; `backbone` is not changed.

    Raises:
        InputError: the concept was trained on a base model of another layout, or is incomplete.
    """
    if concept is None:
        return LoadedConcept(backbone, PromptEncoder(backbone), {})
    check_base_model(concept, backbone)
    own = with_schedule_of(concept, backbone).share_weights()
    strengths = (strength.negative, strength.positive)
    metadata = concept.metadata
    for network, module in own.networks.items():
        if tensors := concept.part(network):
            groups = metadata.lora[network]
            own.adapters[network] = load_adapters(module, tensors, groups, _NUM_BRANCHES, strengths)
    vocabularies = {encoder: _load_words(own, encoder, concept) for encoder in own.tokenizers if metadata.words}
    return LoadedConcept(own, PromptEncoder(own, vocabularies, metadata.clip_skip), metadata.words)


def attach_base(backbone: Backbone, concept: Concept) -> LoadedConcept:
    """Return the base model without a concept, but with the concept's noise schedule and clip_skip."""
    own = with_schedule_of(concept, backbone)
    return LoadedConcept(own, PromptEncoder(own, clip_skip=concept.metadata.clip_skip), {})


def with_schedule_of(concept: Concept, backbone: Backbone) -> Backbone:
    """Return the base model with the noise schedule of a concept; weights are shared."""
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


# ------------------------------------------------------------------------------------------------- generating


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
    """Generate one image per prompt; image i has prompt i and seed i.

    Positive rows have the prompt and the positive adapter, negative rows the negative prompt and the negative adapter.

    Args:
        backbone: the base model that `loaded` was attached to.
        loaded: the concept, or the base model alone.
        prompts: one per image, trigger words filled in.
        negative_prompt: for all images.
        seeds: one per image.
        sampler: scheduler, steps, guidance scale and batch size.
        progress: called with the number of new images after each batch.
        size_px: (width, height); None: the base model's size.
        init: a picture to start from, with denoising strength and mask; it is resized to `size_px`.

    Raises:
        ValueError: not one seed per prompt.
        InputError: sides that are no multiples of the latent scale, or a scheduler that cannot follow the schedule.
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
    """Yield the latents `[B, C, h, w]` of each batch of images; arguments and errors are those of `generate`."""
    if len(prompts) != len(seeds):
        raise ValueError(f"expected one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds")
    size_px = size_px or (backbone.image_px, backbone.image_px)
    shape = _latent_shape(backbone, size_px)
    picture = None if init is None else _encode_picture(backbone, fit_picture(init, size_px))
    with loaded.merged():
        for start in range(0, len(prompts), sampler.batch_size):
            rows = slice(start, start + sampler.batch_size)
            yield _draw_batch(backbone, loaded, prompts[rows], negative_prompt, seeds[rows], sampler, shape, picture)


@dataclass(frozen=True)
class _EncodedPicture:
    """A picture to start from, as the distribution of its latents.

    Attributes:
        mean, std: `[1, C, h, w]`, multiplied by the scaling factor.
        denoise, mask: see `KnownLatents`.
    """

    mean: torch.Tensor
    std: torch.Tensor
    denoise: float
    mask: torch.Tensor | None

    def sample(self, generators: Sequence[torch.Generator]) -> KnownLatents:
        """Sample its latents once per image, with the image's generator."""
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
        # diffusers samples the masked picture's latents here; discarding as much noise keeps seeds equivalent.
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
            remedy="round them to multiples",
        )
    return backbone.latent_channels, height // backbone.latent_scale, width // backbone.latent_scale


def _conditioning(encoder: PromptEncoder, prompts: Sequence[str], negative_prompt: str) -> Conditioning:
    """Return the conditioning of 2·B rows, negative rows first; equal prompts are encoded once."""
    distinct = list(dict.fromkeys(prompts))
    tokens = encoder.tokenize([negative_prompt, *distinct])
    positive = torch.arange(1, len(tokens), device=tokens.ids.device)
    row = torch.tensor([distinct.index(prompt) for prompt in prompts], device=tokens.ids.device)
    encoded = encoder.encode(tokens[stack(torch.zeros_like(positive), positive)])
    return encoded[rows_of(row, len(distinct), _NUM_BRANCHES)]
