"""Train a concept from one image: check the plan, train, plot what happened."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from PIL.Image import Image

from dreamartist_pipeline.params import DeviceParams, TrainingParams
from dreamartist_pipeline.pipelines.training.figures import training_figure

if TYPE_CHECKING:
    import torch
    from pandas import DataFrame
    from plotly.graph_objects import Figure

    from dreamartist_pipeline.backbones.concepts import NewConcept
    from dreamartist_pipeline.backbones.families import Backbone
    from dreamartist_pipeline.backbones.prompts import PromptEncoder
    from dreamartist_pipeline.core.concept import Concept
    from dreamartist_pipeline.core.embeddings import Vocabulary
    from dreamartist_pipeline.core.prompt_tokens import PromptTokens
    from dreamartist_pipeline.core.training import LatentImages, ParameterGroup, StepRecord, Trainee, TrainingData
    from dreamartist_pipeline.interop.user_files import UserFiles
else:  # Kedro resolves the hints of a node when it registers the pipelines, without importing any of these
    Concept = DataFrame = Figure = UserFiles = Any

_GENERAL_SLOTS = ("class", "caption")
_CURVE_POINTS = 200  # live curves have about this many points; between them, values are averaged
_ENCODE_BATCH = 8
_ANY_DEVICE = DeviceParams()
_CAPTION_VARIANTS = 64  # drawn once per training, so that prompts are tokenized once
_COLUMNS = ("step", "loss", "loss_reference", "guidance_scale", "seconds")

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where live curves and previews go."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers."""

    def log_image(self, image: Image, key: str, step: int) -> None:
        """Log a picture."""


class ImageStore(Protocol):
    """Where the regularization set is."""

    def captions(self, key: str) -> Mapping[str, str]:
        """File name -> caption."""

    def images(self, key: str) -> Iterator[Image]:
        """Yield the images in the order of the captions."""


# ------------------------------------------------------------------------------------------------- the plan


def check_training(
    base_model: str,
    params: TrainingParams,
    caption: str,
    device: DeviceParams = _ANY_DEVICE,
    user_files: UserFiles | None = None,
) -> dict[str, Any]:
    """Check the whole plan against the base model, before any long work and without loading its weights.

    Returns:
        The plan: branches, steps, rows and, per group, its layers, parameters, vectors and effective learning rate;
        with `start_from`, also what each group takes over from that concept.

    Raises:
        InputError: an incomplete base model, a selector that finds no layer, a trigger word that already means
            something, a template without its slot, a caption with a trigger word or with braces that cannot be read,
            words that do not fit into the prompt, LoRA groups of nothing but layers that clip_skip leaves out, an
            optimizer that cannot run here, a preview's scheduler that cannot be set up, a noise schedule that this base
            model cannot be trained with, or a concept to start from of which something has no place in this training.
    """
    from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_outline
    from dreamartist_pipeline.backbones.concepts import start_concept
    from dreamartist_pipeline.core.training import branch_table, lr_factor, parameter_groups
    from dreamartist_pipeline.pipelines.training.starting import begin_from, read_start

    check_templates(params)
    _check_braces(params, caption)
    _say_what_is_not_used(params, caption)
    _check_optimizers(params, device)
    _check_preview(params)
    start = read_start(user_files, params)
    outline = load_outline(BaseModelFiles(base_model))
    _check_timesteps(outline, params)
    _check_clip_skip(outline, params)
    planned = start_concept(outline, params, lr_factor(params), seed=0)
    _check_prompts(planned, params, caption)
    groups = parameter_groups(planned.stacks, planned.words, params.words.lr * lr_factor(params))
    _check_branches_train(groups, params)
    begun = begin_from(start, planned.stacks, planned.words, params, outline)
    log.info("What each branch will train:\n%s", branch_table(groups, begun["start"]["taken_over"] if begun else None))
    return {
        "num_branches": params.num_branches,
        "num_steps": params.num_steps,
        "guidance_scale": params.guidance_scale,
        "rows": {"reference": params.batch_size, "regularization": params.regularization_batch_size},
        "lr_factor": lr_factor(params),
        "groups": _describe(groups),
        **begun,
    }


def _check_optimizers(params: TrainingParams, device: DeviceParams) -> None:
    from dreamartist_pipeline.backbones.base_model import pick_device
    from dreamartist_pipeline.core.optimizers import check_optimizer

    target = pick_device(device)
    if params.lora:
        check_optimizer(params.optimizer, target)
    if params.words.names:
        check_optimizer(params.words.optimizer, target)


def _check_timesteps(outline: Backbone, params: TrainingParams) -> None:
    outline.objective.check_limits(params.timesteps)
    if params.zero_terminal_snr:
        outline.objective.with_zero_terminal_snr()


def _check_clip_skip(outline: Backbone, params: TrainingParams) -> None:
    """Confirm that clip_skip fits the text encoders, and say which layers of the LoRA groups it leaves out.

    Raises:
        InputError: no layer of a text encoder remains.
    """
    from dreamartist_pipeline.backbones.concepts import skipped_layers
    from dreamartist_pipeline.backbones.families.clip_text import check_clip_skip

    for encoder in outline.tokenizers:
        check_clip_skip(outline.networks[encoder].config.num_hidden_layers, params.clip_skip)
        selectors = [selector for group in params.lora.get(encoder, ()) for selector in group.layers]
        if params.clip_skip and (skipped := skipped_layers(outline, encoder, selectors, params.clip_skip)):
            log.info("clip_skip=%d leaves these layers out of the plan: %s.", params.clip_skip, ", ".join(skipped))


def _check_braces(params: TrainingParams, caption: str) -> None:
    """Confirm that the weighted words of templates and caption can be read.

    Raises:
        InputError: naming the prompt.
    """
    from dreamartist_pipeline.core.errors import InputError
    from dreamartist_pipeline.prompt_weights import parse_weights

    for prompt in [prompt for pair in _training_prompts(params, caption) for prompt in pair]:
        try:
            parse_weights(prompt)
        except ValueError as error:
            raise InputError(f"{error}; it is made of a template and the reference image's caption") from error


def _check_preview(params: TrainingParams) -> None:
    from dreamartist_pipeline.backbones.schedulers import check_sampler

    if params.preview.every:
        check_sampler(params.preview.sampler, params.zero_terminal_snr)


def check_templates(params: TrainingParams) -> None:
    """Confirm that every template holds a trigger word's slot, that every slot is used, and that none is unknown.

    Without trigger words any template will do; its word slots are filled with the class word.

    Raises:
        InputError: naming the template or slot.
    """
    from dreamartist_pipeline.core.captions import slot_names
    from dreamartist_pipeline.core.errors import InputError

    names = set(params.words.names)
    if not names:
        return
    wanted = " or ".join(f"{{{name}}}" for name in sorted(names))
    used: set[str] = set()
    for template in params.templates:
        slots = set(slot_names(template, names))
        if not slots & names:
            raise InputError(
                f"expected the slot {wanted} in every template; got {template!r}; write it where it belongs"
            )
        if unknown := sorted(slots - names - set(_GENERAL_SLOTS)):
            raise InputError(
                f"expected only the slots {wanted}, {{class}} and {{caption}} in templates; got {{{unknown[0]}}} in "
                f"{template!r}; correct it, or give its trigger words in words.names"
            )
        used |= slots
    if unused := sorted(names - used):
        raise InputError(
            f"expected every slot of words.names in some template; got none with {{{unused[0]}}}; "
            "add it to a template, or remove its trigger words"
        )


def _check_prompts(planned: NewConcept, params: TrainingParams, caption: str) -> None:
    """Confirm that trigger words are new to the base model and stand whole in every prompt of the training."""
    from dreamartist_pipeline.backbones.prompts import check_trigger_word
    from dreamartist_pipeline.core.branches import branches

    for encoder, words in planned.words.items():
        for word in words.vocabulary.words:
            check_trigger_word(planned.backbone.tokenizers[encoder], word.name)
        _check_caption(caption, words.vocabulary)
    for pair in _template_prompts(params, caption) if planned.words else ():
        for branch in branches(params.num_branches):
            planned.prompts.check_fits(pair[branch])


def _check_caption(caption: str, vocabulary: Vocabulary) -> None:
    """Confirm that trigger words come from templates alone: a caption is the same in both branches."""
    from dreamartist_pipeline.core.errors import InputError

    if found := [part.name for part in vocabulary.split_prompt(caption) if not isinstance(part, str)]:
        raise InputError(
            f"expected a caption of what the picture shows beside the subject; got {caption!r}, in which {found[0]} is "
            "a trigger word, which both branches would learn; take it out, templates say it"
        )


def _say_what_is_not_used(params: TrainingParams, caption: str) -> None:
    from dreamartist_pipeline.core.captions import slot_names

    has_slot = any("caption" in slot_names(template) for template in params.templates)
    if caption and not has_slot:
        log.warning("The caption %r is not used: no template has {caption}.", caption)
    if params.caption_transforms and not (caption and has_slot):
        log.warning("caption_transforms change nothing: there is no caption, or no template has {caption}.")


def _check_branches_train(groups: Sequence[ParameterGroup], params: TrainingParams) -> None:
    from dreamartist_pipeline.core.branches import BRANCH_NAMES, branches
    from dreamartist_pipeline.core.errors import InputError

    trained = {group.branch for group in groups}
    for branch in branches(params.num_branches):
        name = BRANCH_NAMES[branch]
        if not trained & {name, "shared"}:
            raise InputError(
                f"expected something to train in the {name} branch; got groups for {sorted(trained)} only; "
                f"add a LoRA group with branch: {name[0]}, or trigger words"
            )


def _describe(groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    return [
        {
            "name": group.name,
            "kind": group.kind,
            "branch": group.branch,
            "num_layers": group.num_layers,
            "num_parameters": group.num_parameters,
            "num_vectors": sum(len(p) for p in group.parameters) if group.kind == "words" else 0,
            "lr": group.lr,
        }
        for group in groups
    ]


def _template_prompts(params: TrainingParams, caption: str) -> list[tuple[str, str]]:
    """Return (negative, positive) of every template."""
    from dreamartist_pipeline.core.captions import branch_prompts

    return [branch_prompts(template, params.words.names, params.class_word, caption) for template in params.templates]


def _training_prompts(params: TrainingParams, caption: str) -> list[tuple[str, str]]:
    """Return (negative, positive) of every template with every variant of the caption, the same in both branches."""
    from dreamartist_pipeline.core.captions import TagTransform, caption_variants
    from dreamartist_pipeline.core.training import derived_seed

    transforms = [TagTransform(transform.kind, transform.p) for transform in params.caption_transforms]
    seed = derived_seed(params.seed, "captions")
    variants = caption_variants(caption, transforms, _CAPTION_VARIANTS, seed)
    return [prompt for variant in variants for prompt in _template_prompts(params, variant)]


# ------------------------------------------------------------------------------------------------- the training


def train_concept(
    base_model: str,
    prepared_image: Image,
    prepared_mask: Image,
    regularization_set: dict[str, Any],
    image_store: ImageStore,
    training_plan: dict[str, Any],
    params: TrainingParams,
    caption: str,
    device: DeviceParams,
    tracker: Tracker,
    user_files: UserFiles | None = None,
) -> tuple[Concept, DataFrame]:
    """Train both branches on the prepared image, from fresh values or from those of a concept.

    Returns:
        The concept, and the history: one row per step.

    Raises:
        InputError: the plan was made for other parameters, another base model or another concept to start from.
        TrainingError: a branch receives no gradient, or the loss or what is learned is no longer finite.
    """
    from dreamartist_pipeline.backbones.base_model import open_base_model
    from dreamartist_pipeline.backbones.concepts import concept_metadata, start_concept
    from dreamartist_pipeline.core.training import derived_seed, fit, lr_factor, parameter_groups
    from dreamartist_pipeline.pipelines.training.starting import begin_from, read_start

    start = read_start(user_files, params)
    backbone = open_base_model(base_model, device)
    factor = lr_factor(params)
    new = start_concept(backbone, params, factor, derived_seed(params.seed, "initial"))
    begun = begin_from(start, new.stacks, new.words, params, backbone)
    groups = parameter_groups(new.stacks, new.words, params.words.lr * factor)
    _check_plan(training_plan, {"groups": _describe(groups), **begun})
    metadata = concept_metadata(backbone, params, factor) | ({"start_sha256": start.sha256} if start else {})
    images = _regularization_images(regularization_set, image_store, params)
    data = training_data(backbone, new.prompts, prepared_image, prepared_mask, images, params, caption)
    with _StepReport(params.num_steps, tracker) as report:
        preview = _preview(new, params, tracker)
        history = fit(trainee(new, groups), data, params, report, preview)
    return new.snapshot(metadata), history_table(history)


def _check_plan(training_plan: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    from dreamartist_pipeline.core.errors import InputError

    if {key: training_plan[key] for key in ("groups", "start") if key in training_plan} != expected:
        raise InputError(
            "expected the plan of these parameters and this base model; got another one, from an earlier run; "
            "run the node check_training again"
        )


def trainee(new: NewConcept, groups: tuple[ParameterGroup, ...]) -> Trainee:
    """Return the new concept as the training loop sees it."""
    import torch

    from dreamartist_pipeline.backbones.base_model import decode_with_gradients
    from dreamartist_pipeline.core.training import Trainee

    return Trainee(
        denoise=new.backbone.denoise,
        encode=new.prompts.encode,
        objective=new.backbone.objective,
        groups=groups,
        num_branches=new.num_branches,
        half_precision=new.backbone.dtype == torch.float16,
        decode=lambda latents: decode_with_gradients(new.backbone, latents),
    )


def training_data(
    backbone: Backbone,
    prompts: PromptEncoder,
    image: Image,
    mask: Image,
    regularization: Sequence[tuple[str, Image]],
    params: TrainingParams,
    caption: str,
) -> TrainingData:
    """Encode the prepared image and the regularization set once, and tokenize every prompt.

    `mask` is L, 127 where a pixel counts once. `regularization` holds (caption, image) pairs; images are brought to the
    prepared image's size where theirs differs.
    """
    from dreamartist_pipeline.core.images import fit_to_size, to_tensor
    from dreamartist_pipeline.core.training import TrainingData

    reference = _latent_images(backbone, [image], _tokens(prompts, _training_prompts(params, caption), params))
    others = None
    if regularization:
        captions = [(caption, caption) for caption, _ in regularization]  # no trigger word in either branch
        fitted = [
            other if other.size == image.size else fit_to_size(other, image.size, "crop", "white")
            for _, other in regularization
        ]
        others = _latent_images(backbone, fitted, _tokens(prompts, captions, params), paired=True)
    pixels = to_tensor([image]).to(reference.mean.device) if params.loss.reconstruction_weight else None
    return TrainingData(reference, others, _latent_mask(mask, reference.mean), pixels)


def _tokens(prompts: PromptEncoder, pairs: Sequence[tuple[str, str]], params: TrainingParams) -> PromptTokens:
    """Tokenize (negative, positive) pairs: `[P, num_branches, L]`."""
    from dreamartist_pipeline.core.branches import branches
    from dreamartist_pipeline.core.prompt_tokens import by_branch

    return by_branch([prompts.tokenize([pair[branch] for pair in pairs]) for branch in branches(params.num_branches)])


def _latent_images(
    backbone: Backbone, images: Sequence[Image], tokens: PromptTokens, paired: bool = False
) -> LatentImages:
    import torch
    from tqdm import tqdm

    from dreamartist_pipeline.backbones.base_model import encode_images
    from dreamartist_pipeline.core.images import to_tensor
    from dreamartist_pipeline.core.training import LatentImages

    starts = tqdm(range(0, len(images), _ENCODE_BATCH), desc="images to latents", unit="batch", delay=2.0)
    encoded = [encode_images(backbone, to_tensor(images[start : start + _ENCODE_BATCH])) for start in starts]
    mean, std = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    return LatentImages(mean, std, tokens, paired)


def _latent_mask(mask: Image, latents: torch.Tensor) -> torch.Tensor | None:
    """Return the loss mask `[1, 1, h, w]` at the latents' size, or None when every pixel counts once."""
    from dreamartist_pipeline.core.images import attention_mask

    height, width = latents.shape[-2:]
    weights = attention_mask(mask, (width, height)).to(latents.device)
    return None if bool((weights == 1).all()) else weights[None]


def _regularization_images(
    regularization_set: Mapping[str, Any], image_store: ImageStore, params: TrainingParams
) -> list[tuple[str, Image]]:
    """Return (caption, image) of the regularization set; nothing when the training takes no rows from it.

    Raises:
        InputError: rows are to be taken from a set without images.
    """
    from dreamartist_pipeline.core.errors import InputError

    if not params.regularization_batch_size:
        return []
    key = regularization_set["key"]
    captioned = list(zip(image_store.captions(key).values(), image_store.images(key), strict=True))
    if not captioned:
        raise InputError(
            "expected regularization images, because training.regularization_batch_size="
            f"{params.regularization_batch_size}; got an empty set; set it to 0, or prompts.num_prompts to more than 0"
        )
    return captioned


def history_table(history: Sequence[Mapping[str, float]]) -> DataFrame:
    """Return the history as a table; without a step it has its columns still."""
    import pandas as pd

    return pd.DataFrame(list(history), columns=None if history else list(_COLUMNS))


# ------------------------------------------------------------------------------------------------- while it trains


class _StepReport:
    """Shows each step on a progress bar and sends averaged values to the tracker, about 200 times a training."""

    def __init__(self, num_steps: int, tracker: Tracker) -> None:
        self._tracker, self._every = tracker, max(1, num_steps // _CURVE_POINTS)
        self._num_steps = num_steps
        self._rows: list[dict[str, float]] = []

    def __enter__(self) -> _StepReport:
        from tqdm import tqdm

        self._bar = tqdm(total=self._num_steps, desc="training", unit="step", mininterval=0.5)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __call__(self, record: StepRecord) -> None:
        if record.step == 1:
            norms = ", ".join(f"{name} {norm:.2e}" for name, norm in record.grad_norm.items())
            log.info("Every branch received gradients in the first step: %s.", norms)
        self._rows.append({name: value for name, value in record.row().items() if name not in ("step", "seconds")})
        if record.step % self._every == 0 or record.step == self._num_steps:
            means = {name: sum(row[name] for row in self._rows) / len(self._rows) for name in self._rows[0]}
            self._tracker.log_metrics(means, step=record.step)
            self._bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
            self._rows.clear()
        self._bar.update()


def _preview(new: NewConcept, params: TrainingParams, tracker: Tracker) -> Callable[[int], None] | None:
    """Return what draws the preview prompts with the concept so far, always from the same seeds."""
    from dreamartist_pipeline.backbones.concepts import generate
    from dreamartist_pipeline.core.images import image_grid

    prompts = [fill_prompt(prompt, params) for prompt in params.preview.prompts]
    if not prompts:
        return None
    seeds = range(params.preview.seed, params.preview.seed + len(prompts))

    def draw(step: int) -> None:
        with new.drawing(params.words.names) as loaded:
            images = generate(new.backbone, loaded, prompts, "", seeds, params.preview.sampler)
        tracker.log_image(image_grid(images, columns=min(4, len(images)), labels=prompts), key="preview", step=step)

    return draw


def fill_prompt(prompt: str, params: TrainingParams) -> str:
    """Fill the slots of a preview prompt with the positive trigger words and the class word."""
    from dreamartist_pipeline.core.captions import branch_prompts

    return branch_prompts(prompt, params.words.names, params.class_word)[1]


# ------------------------------------------------------------------------------------------------- afterwards


def plot_history(training_history: DataFrame) -> Figure:
    """Plot losses, learning rates, gradient norms and guidance scale over the steps."""
    return training_figure(training_history)
