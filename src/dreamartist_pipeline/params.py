"""The schema of the configuration: all parameters of all pipelines, with bounds, defaults and sources.

Values are set in conf/. Unknown keys are errors, models are frozen, and cross-field checks run before a base model is
loaded.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticKnownError

from dreamartist_pipeline.layer_selectors import parse_selector
from dreamartist_pipeline.prompt_weights import parse_weights
from dreamartist_pipeline.schedulers import SCHEDULERS, UNFIT_SCHEDULERS
from dreamartist_pipeline.starting_runs import Workers

MAX_COUNT = 1_000_000_000  # of anything; below the limits of 32 bits
MAX_RANK = 4096
MAX_WORD = 100  # characters of a trigger word
PositiveInt = Annotated[int, Field(ge=1, le=MAX_COUNT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e9)]
BatchSize = Annotated[int, Field(ge=1, le=10_000)]
NumSteps = Annotated[int, Field(ge=1, le=10_000)]  # of sampling; base models have 1,000 timesteps
ImagesPerPrompt = Annotated[int, Field(ge=1, le=100_000)]
LearningRate = Annotated[float, Field(gt=0, le=100)]  # AdamW changes a parameter by about the rate in each step
Guidance = Annotated[float, Field(ge=1, le=1000)]  # usual values are 1 to 15
NumVectors = Annotated[int, Field(ge=1, le=1000)]  # the context of a text encoder has 77 tokens
Probability = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SidePx = Annotated[int, Field(ge=8, le=4096, multiple_of=8)]
OptimizerName = Literal["adamw", "adamw8bit", "prodigy", "schedule_free"]
_SLOT = re.compile(r"\w{1,100}")
_ONE_OR_SEVERAL = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)


def _check_weights(prompt: str) -> str:
    parse_weights(prompt)
    return prompt


def _check_device_name(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", name):
        raise ValueError("expected 'auto', 'cpu', 'cuda', 'cuda:1' (a number), 'mps', 'xpu' or 'xpu:1'")
    return name


def _check_evaluator(name: str) -> str:
    if not re.fullmatch(r"auto|efficientnet-lite0|(clip|siglip|dinov2):.+", name):
        raise ValueError(f"an evaluator is efficientnet-lite0, clip:…, siglip:…, dinov2:… or auto, got {name!r}")
    return name


TextImageModelName = Annotated[str, Field(pattern="^(auto|(clip|siglip):.+)$")]
Texts = Annotated[tuple[str, ...], _ONE_OR_SEVERAL]
"""Texts, or a single text, as in `--params generate.prompts=a red fox`."""
Plain = Annotated[str, Field(pattern=r"^[^{}]*$")]
"""A text without braces, to be inserted into templates."""
Prompt = Annotated[str, AfterValidator(_check_weights)]
"""A prompt or template, possibly with weighted words, `{cat:1.2}`."""
Prompts = Annotated[tuple[Prompt, ...], _ONE_OR_SEVERAL]
"""Prompts, or a single prompt."""
PATH = "a path"
NODE_PATH = "a path that a node opens"
ADDRESS = "a path, or an address in a store that its dataset opens"
KIND_AND_PATH = "a kind and a path, or an id of the Hugging Face hub"
"""Mark parameters with paths, also in lists and mappings, or with `clip:PATH`: see `hooks.run.with_paths_in`."""

TEMPLATE_PRESETS = {  # training.templates: NAME
    "object": (
        "a photo of a {pt1}, {caption}",
        "a close view of a {pt1}, {caption}",
        "one {pt1} in the picture, {caption}",
        "here is a {pt1}, {caption}",
        "a clear picture of the {pt1}, {caption}",
    ),
    "style": (
        "a picture in the style of {pt1}, {caption}",
        "an artwork made in {pt1} style, {caption}",
        "a drawing as {pt1} would make it, {caption}",
        "a scene in the look of {pt1}, {caption}",
    ),
    "caption": ("{pt1}, {caption}",),
}
PRODIGY_LR = (0.01, 10.0)  # Prodigy multiplies lr by its estimate; rates of AdamW would be far too small


class Params(BaseModel):
    """Base of all parameter models: frozen, without unknown keys, with finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# ------------------------------------------------------------------------------------------------- shared


class DeviceParams(Params):
    """Device and dtype of the frozen base model; adapters and words are always trained in float32.

    Several processes share the rows of a training step, and the images to draw; process r has the GPU r.
    """

    # auto is the GPU if there is one; cuda and xpu may have the number of a card, as in cuda:1
    device: Annotated[str, AfterValidator(_check_device_name)] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["none", "int8"] = "none"  # of the base model's Linears: int8 halves them, and changes results
    deterministic: bool = False  # deterministic algorithms only: the same bits in every run on the same GPU
    processes: PositiveInt | Literal["auto"] = "auto"  # auto: one per CUDA GPU if `device` has no number; 1 on others

    @model_validator(mode="after")
    def _check_processes(self) -> DeviceParams:
        if self.processes not in ("auto", 1) and self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"processes={self.processes} requires device=cuda, without a number, or device=cpu")
        return self


ON_CPU = "device=cpu,device.dtype=float32"
"""The parameters of a run on the CPU, as in `--params`."""

_FIXED_OPTIONS = (  # scheduler options that are set by the base model, or by the concept
    *("beta_end", "beta_schedule", "beta_start", "num_train_timesteps", "prediction_type", "rescale_betas_zero_snr"),
    *("timestep_type", "trained_betas"),
)


class SamplerParams(Params):
    """How images are sampled; see schedulers.py for the values of `scheduler`."""

    scheduler: str = "dpmsolver++"
    scheduler_options: dict[str, Any] = Field(default_factory=dict)  # further arguments of the scheduler class
    num_inference_steps: NumSteps = 20
    guidance_scale: Guidance = 4.0
    batch_size: BatchSize = 8

    @field_validator("scheduler")
    @classmethod
    def _check_scheduler(cls, name: str) -> str:
        if name in SCHEDULERS:
            return name
        for reason, classes in UNFIT_SCHEDULERS.items():
            if name in classes:
                raise ValueError(f"{name} {reason}; choose one of {', '.join(SCHEDULERS)}")
        near = difflib.get_close_matches(name, SCHEDULERS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(SCHEDULERS)}"
        raise ValueError(f"unknown or unsupported scheduler; {hint}")

    @field_validator("scheduler_options")
    @classmethod
    def _check_scheduler_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        if fixed := sorted(options.keys() & set(_FIXED_OPTIONS)):
            raise ValueError(f"{', '.join(fixed)} are fixed by the base model; leave them out")
        if options.get("use_flow_sigmas"):
            raise ValueError("use_flow_sigmas is for flow-matching models; leave it out")
        return options


STRENGTH_PRESETS = {"reference": {"positive": 0.8, "negative": 0.65}}  # strength: NAME; of the reference toolkit


class StrengthParams(Params):
    """Factor on the adapters of each branch in generation, or a name in STRENGTH_PRESETS."""

    positive: Annotated[float, Field(ge=0, le=100)] = 1.0
    negative: Annotated[float, Field(ge=0, le=100)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value not in STRENGTH_PRESETS:
            raise ValueError(f"expected {{positive: …, negative: …}} or {', '.join(STRENGTH_PRESETS)}, got {value!r}")
        return STRENGTH_PRESETS[value]

    def __str__(self) -> str:
        """Return both values as text."""
        return f"{self.positive:g} positive, {self.negative:g} negative"


# ------------------------------------------------------------------------------------------------- ingestion


class BucketParams(Params):
    """The size that the reference image is resized to.

    With `keep_aspect`, it has the aspect ratio of the image and the area `side_px`², in multiples of `multiple_px`.
    """

    side_px: Annotated[int, Field(ge=8, le=4096)]
    multiple_px: Literal[8, 16, 32, 64] = 64
    keep_aspect: bool = False

    @model_validator(mode="after")
    def _check_side(self) -> BucketParams:
        if self.side_px % self.multiple_px:
            raise ValueError(f"side_px {self.side_px} is not a multiple of multiple_px {self.multiple_px}")
        return self


class IngestionParams(Params):
    """How the reference image is prepared for training."""

    bucket: BucketParams
    fit: Literal["crop", "pad"] = "crop"
    background_color: str = "white"  # any PIL colour; of transparent pixels and padding
    max_pixels: PositiveInt = 100_000_000


# ------------------------------------------------------------------------------------------- prompts, regularization


class PromptsParams(Params):
    """How prompts are sampled from the prompt database."""

    column: str | int | None = None  # None: "prompt", "text" or "caption", or else the first
    num_prompts: NonNegativeInt  # 0 for no regularization set
    seed: Seed = 0


class RegularizationParams(Params):
    """How the base model generates the regularization set."""

    sampler: SamplerParams
    side_px: SidePx | None = None  # side of the square images; None for ingestion.bucket.side_px
    negative_prompt: Prompt = ""
    seed: Seed = 0


# ------------------------------------------------------------------------------------------------- training


_NUMBER = r"\d+(?:\.\d+)?(?:e\+?\d+)?"
_GUIDANCE = re.compile(rf"(?P<low>{_NUMBER})(?:-(?P<high>{_NUMBER})(?::(?P<curve>\w+))?)?")


class GuidanceScale(Params):
    """The guidance scale as a function of the noise level: `low` without noise, `high` for pure noise.

    In the configuration, a number, or "low-high:curve" with the curve ln (linear, the default), cos or cos2.
    """

    low: Guidance
    high: Guidance
    curve: Literal["ln", "cos", "cos2"] = "ln"

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: object) -> object:
        if isinstance(value, dict) or value is None:
            return value
        match = _GUIDANCE.fullmatch(str(value).strip())
        if match is None:
            raise ValueError(f"guidance_scale is a number or low-high:curve, got {value!r}")
        return {"low": match["low"], "high": match["high"] or match["low"], "curve": match["curve"] or "ln"}

    @property
    def num_branches(self) -> int:
        """1 for a constant scale of 1, where the negative branch cancels out; otherwise 2."""
        return 1 if self.low == self.high == 1 else 2

    @model_serializer
    def __str__(self) -> str:
        """Return the text form."""
        return f"{self.low}" if self.low == self.high else f"{self.low}-{self.high}:{self.curve}"


_BRANCHES = {"p": "positive", "n": "negative", None: "shared"}  # notation of the reference tutorial


def _branch_name(value: object) -> object:
    if value in _BRANCHES.values():  # from model_dump
        return value
    if isinstance(value, str | None) and value in _BRANCHES:
        return _BRANCHES[value]
    raise ValueError(f"a branch is p, n, or omitted for a group of both branches, got {value!r}")


BranchName = Annotated[Literal["positive", "negative", "shared"], BeforeValidator(_branch_name)]


class LoRAGroup(Params):
    """One item of `lora_unet` or `lora_text_encoder`, in the notation of the reference tutorial.

    Attributes:
        lr: learning rate.
        rank: an integer, or a float: the fraction of a layer's out_features, rounded, at least 1.
        layers: selectors, see layer_selectors.py.
        branch: `p`, `n`, or omitted for a group of both branches.
        alpha: the update is scaled by alpha / rank.
        dropout: dropout probability of the rank activations.
        timestep_min_rank: like `rank`, UNet only. The active rank of a row decreases linearly with its timestep t, from
            the full rank at t = 0 to this rank at t = T − 1; the last ranks are dropped first (T-LoRA, Soboleva et al.
            2025). None for all ranks at every t.
        bias: whether the update has a learned bias. As in the reference toolkit, it belongs to the up projection: it is
            scaled by alpha / rank, and has the learning rate and weight decay of the group. It starts at zero; in the
            toolkit (`hcpdiff.models.lora_layers`) it starts at random like that of nn.Linear, which changes the first
            outputs.
        svd_init: whether down and up start at the largest singular values of the weight, minus this initial product
            (PiSSA); see `core.adapters.PrincipalUpdate`.
        orthogonal_init: `random` or `weight` for three factors up · diag(values) · down that start at singular vectors
            and values of a random matrix (the smallest) or of the weight (the largest), minus this initial product:
            T-LoRA's orthogonal initialisation; see `core.adapters.OrthogonalUpdate`. None for the start of LoRA.
    """

    lr: LearningRate
    rank: int | float
    layers: Annotated[tuple[Annotated[str, Field(max_length=500)], ...], Field(min_length=1, max_length=1000)]
    branch: BranchName = "shared"
    alpha: PositiveFloat = 1.0
    dropout: Probability = 0.0
    timestep_min_rank: int | float | None = None
    bias: bool = False
    svd_init: bool = False
    orthogonal_init: Literal["random", "weight"] | None = None

    @field_validator("rank", "timestep_min_rank")
    @classmethod
    def _check_rank(cls, rank: int | float | None) -> int | float | None:
        if isinstance(rank, int) and not 1 <= rank <= MAX_RANK:
            raise ValueError(f"an integer rank is 1 to {MAX_RANK}, got {rank}")
        if isinstance(rank, float) and not 0 < rank < 1:
            raise ValueError(f"a float rank is a fraction of out_features between 0 and 1, got {rank}")
        return rank

    @model_validator(mode="after")
    def _check_options(self) -> LoRAGroup:
        if self.svd_init and self.timestep_min_rank is not None:
            raise ValueError("svd_init and timestep_min_rank exclude each other; leave out one of them")
        if self.svd_init and self.orthogonal_init is not None:
            raise ValueError("svd_init and orthogonal_init exclude each other; leave out one of them")
        return self

    @field_validator("layers")
    @classmethod
    def _check_selectors(cls, layers: tuple[str, ...]) -> tuple[str, ...]:
        for selector in layers:
            parse_selector(selector)
        return layers


class ResolvedGroup(LoRAGroup):
    """A LoRA group in a training or concept.

    Attributes:
        name: "<network>.<index>.<branch>".
        lr: including `scale_lr`; 0 in imported concepts.
        branch: "shared" in a training without a negative branch.
    """

    name: str
    lr: Annotated[float, Field(ge=0, le=1e9)]


InitText = Annotated[str, Field(max_length=500)]


class WordsParams(Params):
    """The trigger words and their embeddings; all pairs are (positive, negative)."""

    names: dict[str, tuple[str, str]] = Field(default_factory=dict)  # slot -> trigger words
    num_vectors: tuple[NumVectors, NumVectors] = (3, 6)
    # text, "*[std]", or "text, *[std]"
    init_text: tuple[InitText, InitText] = ("*[0.017]", "*[0.017]")
    lr: LearningRate = 2.5e-3
    weight_decay: NonNegativeFloat = 0.0
    optimizer: OptimizerName = "adamw"

    @field_validator("names")
    @classmethod
    def _check_names(cls, names: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
        for slot, (positive, negative) in names.items():
            if not _SLOT.fullmatch(slot):
                raise ValueError(f"a slot is a word of letters, digits and '_', at most 100, got {slot!r}")
            if max(len(positive), len(negative)) > MAX_WORD:
                raise ValueError(f"a trigger word has at most {MAX_WORD} characters, because it becomes a file name")
            if not positive or not negative:
                raise ValueError(f"slot {slot!r} needs a trigger word per branch, got {[positive, negative]}")
            if positive == negative:
                raise ValueError(f"slot {slot!r} has the same trigger word {positive!r} in both branches")
            for word in (positive, negative):
                for character, reason in (
                    (r"\s", "a space; use a hyphen"),
                    (r"[{}]", "a brace; write weights in templates"),
                    (r"[/\\]", "a slash; the word is part of a file name when exported"),
                ):
                    if re.search(character, word):
                        raise ValueError(f"trigger word {word!r} contains {reason}")
        return names


class CaptionTransformParams(Params):
    """One item of `caption_transforms`: `tag_shuffle`, `tag_dropout: p`, or `tag_erase: p`.

    Attributes:
        kind: "tag_shuffle" permutes the comma-separated tags; "tag_dropout" drops each one with probability p;
            "tag_erase" drops all of them together with probability p.
        p: probability.
    """

    kind: Literal["tag_shuffle", "tag_dropout", "tag_erase"]
    p: Fraction = 0.0

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, value: object) -> object:
        if value == "tag_shuffle":
            return {"kind": value}
        if isinstance(value, dict) and len(value) == 1 and set(value) <= {"tag_dropout", "tag_erase"}:
            ((kind, p),) = value.items()
            return {"kind": kind, "p": p}
        if isinstance(value, dict) and set(value) == {"kind", "p"}:  # from model_dump
            return value
        raise ValueError(f"a caption transform is tag_shuffle, tag_dropout: p, or tag_erase: p, got {value!r}")


class ScheduleParams(Params):
    """A learning-rate schedule; see `core.schedules.schedule_factor`."""

    kind: Literal["constant", "cosine", "one_cycle"] = "one_cycle"
    warmup_steps: NonNegativeInt = 0


class LossParams(Params):
    """The loss: kind of error, SNR weighting (Hang et al. 2023), and weights of its parts."""

    kind: Literal["mse", "huber"] = "mse"
    huber_delta: PositiveFloat = 0.1  # of huber: error above which the loss is linear
    weighting: Literal["none", "min_snr", "soft_min_snr"] = "min_snr"
    snr_gamma: PositiveFloat = 2.0
    regularization_weight: NonNegativeFloat = 1.0
    reconstruction_weight: NonNegativeFloat = 0.0  # compares the decoded image with the reference; 0 for off
    reconstruction_norm: Literal["l1", "l2"] = "l1"


class PreviewParams(Params):
    """Preview images during training, every `every` steps; 0 for none."""

    every: NonNegativeInt = 0
    prompts: Prompts = ()
    sampler: SamplerParams = SamplerParams()
    seed: Seed = 0


class Rungs(Params):
    """Steps at which trainings are compared; see `core.halving`.

    Attributes:
        first: step of the first rung; that of each further one is `factor` times as late.
        factor: of the trainings that have reached a rung, the best `1 / factor` go on.
    """

    first: Annotated[int, Field(ge=1, le=1_000_000)]
    factor: Annotated[int, Field(ge=2, le=100)] = 3


class HalvingParams(Rungs):
    """A training that ends early if others are better: asynchronous successive halving; see `core.halving`.

    Attributes:
        folder: in which the trainings that are compared note how good they are.
        run: the name of this one among them.
    """

    folder: Annotated[str, NODE_PATH]
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class ScoringParams(Params):
    """How a training is scored at intervals, so that a step can be chosen; without prompts it is not scored.

    Attributes:
        every: steps between two scorings; the last step is scored, too. 0: none. auto: so many that they cost a bounded
            share of a training that needs scores (`TrainingParams.needs_scores`), and none for others; see
            `core.choosing.scored_steps`.
        prompts: with '{pt1}' for the subject, for fidelity, agreement and copying.
        prior_prompts: without it, for the drift from the base model.
        images_per_prompt: of `prompts`; of a prior prompt there is one.
        seed: of the first image of each prompt.
        sampler: few steps are enough to compare.
        validation_rows: of the reference image, and as many of the regularization set, on noise and timesteps that the
            training does not draw.
        evaluator: as in `evaluation.evaluators`; efficientnet-lite0 in place of auto for a base model without towers.
        text_image_model: measures agreement, as in `evaluation`; None: agreement is not measured.
        agreement_loss: of the base model's agreement, the share that a chosen step may lose.
        max_drift: of a chosen step; 1: prior images are as far from the base model's as those are from each other.
        max_copying: of a chosen step; 0: as little as the base model's images, 1: images are copies of the reference.
        patience: scorings in a row without a better one, after which the training stops; None: it does not.
        halving: stops a training that is worse than others; `kedro sweep` sets it.
    """

    every: NonNegativeInt | Literal["auto"] = "auto"
    prompts: Prompts = ()
    prior_prompts: Prompts = ()
    images_per_prompt: ImagesPerPrompt = 2
    seed: Seed = 500
    sampler: SamplerParams = SamplerParams(num_inference_steps=6)
    validation_rows: Annotated[int, Field(ge=1, le=10_000)] = 8
    evaluator: Annotated[Annotated[str, AfterValidator(_check_evaluator)], KIND_AND_PATH] = "auto"
    text_image_model: Annotated[TextImageModelName | None, KIND_AND_PATH] = "auto"
    agreement_loss: Fraction = 0.25
    max_drift: PositiveFloat = 0.5
    max_copying: PositiveFloat = 0.5
    patience: PositiveInt | None = None
    halving: HalvingParams | None = None

    @model_validator(mode="after")
    def _check_prompts(self) -> ScoringParams:
        if bool(self.prompts) != bool(self.prior_prompts):
            raise ValueError("give both prompts and prior_prompts, or neither for a training without scoring")
        return self


class MemoryParams(Params):
    """How a step is made to fit into memory; `auto`, or nothing, for a decision before the training.

    Attributes:
        checkpointing: whether activations are computed again in the backward pass instead of being kept (Chen et al.
            2016). None: decided.
        micro_batch: rows of one forward and backward pass, in each branch; their gradients add up to those of the step.
            0: all rows of a step in one pass. None: decided.
        limit_gib: memory to stay below, such as 8 for a card of 8 GB that others use, too. None: what is free.
    """

    checkpointing: bool | None = None
    micro_batch: NonNegativeInt | None = None
    limit_gib: PositiveFloat | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand_auto(cls, value: object) -> object:
        if isinstance(value, str) and value != "auto":
            raise ValueError("expected auto, or {checkpointing: …, micro_batch: …, limit_gib: …}")
        return {} if value == "auto" else value


RUN_ONLY = "does not change the trained concept"
"""Marks parameters that are not part of `config_sha256`: `name: Annotated[Type, RUN_ONLY]`."""

_LORA = "lora_"


def _check_is_lora(key: str) -> str:
    if not key.startswith(_LORA):
        raise PydanticKnownError("extra_forbidden")
    return key


class TrainingParams(Params):
    """One training of a concept.

    `lora_<network>` is accepted for any network of the base model, besides `lora_unet` and `lora_text_encoder`.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Annotated[str, AfterValidator(_check_is_lora)], tuple[LoRAGroup, ...]]

    seed: Seed = 0
    num_steps: NonNegativeInt
    batch_size: BatchSize = 4  # rows of the reference image
    regularization_batch_size: Annotated[int, Field(ge=0, le=10_000)] = 1
    guidance_scale: GuidanceScale = GuidanceScale(low=3.0, high=3.0)
    lora_unet: tuple[LoRAGroup, ...] = ()
    lora_text_encoder: tuple[LoRAGroup, ...] = ()
    words: WordsParams = WordsParams()
    templates: Annotated[Prompts, Field(min_length=1)] = ("a photo of a {pt1}",)  # or a name in TEMPLATE_PRESETS
    caption_transforms: tuple[CaptionTransformParams, ...] = ()  # applied to '{caption}', in order
    clip_skip: NonNegativeInt = 0  # skip the last n layers of the text encoder, but apply its final norm
    class_word: Plain = ""
    scale_lr: bool = False  # multiply every lr by the total batch size, as in the reference toolkit
    weight_decay: NonNegativeFloat = 1e-3  # of the adapters
    schedule: ScheduleParams = ScheduleParams()
    words_schedule: ScheduleParams = ScheduleParams()
    max_grad_norm: PositiveFloat = 1.0
    clip: Literal["together", "apart"] = "together"  # whether adapters and words have a common gradient norm
    optimizer: OptimizerName = "adamw"  # of the adapters
    ema_decay: Probability = 0.0  # of running averages of adapters and words, which become the result; 0 for none
    timesteps: tuple[Fraction, Fraction] = (0.0, 1.0)  # [low, high) as fractions of all timesteps
    noise_offset: NonNegativeFloat = 0.0  # standard deviation of an offset of the noise per row and channel
    zero_terminal_snr: bool = False  # in training and generation; v-prediction only
    loss: LossParams = LossParams()
    choose: Literal["best", "last"] = "last"  # the step that becomes the concept, see `core.choosing`
    scoring: ScoringParams = ScoringParams()
    preview: Annotated[PreviewParams, RUN_ONLY] = PreviewParams()
    memory: Annotated[MemoryParams, RUN_ONLY] = MemoryParams()
    # eager: one kernel after the other; cudagraph: all kernels of a step by one call; compile: torch.compile
    backend: Annotated[Literal["eager", "cudagraph", "compile"], RUN_ONLY] = "eager"
    # What a run does with the state of an interrupted one: auto continues, and refuses a changed configuration; never
    # starts anew; force continues with the changes.
    resume: Annotated[Literal["auto", "never", "force"], RUN_ONLY] = "auto"
    # Folder of the last two states of an interrupted training; None keeps none.
    checkpoints: Annotated[str | None, RUN_ONLY, NODE_PATH] = None
    checkpoint_minutes: Annotated[NonNegativeFloat, RUN_ONLY] = 1.0  # between two saved states; 0 for every step
    max_minutes: Annotated[PositiveFloat | None, RUN_ONLY] = None  # of steps and previews; the same command continues
    # What a training does that diverges: stop, or go on from its last good state with half the rates. RUN_ONLY: it
    # decides whether such a training has a result, not which.
    on_divergence: Annotated[Literal["stop", "halve_lr"], RUN_ONLY] = "stop"
    # Concept file with the initial adapters and words. RUN_ONLY, because the metadata has the hash of the file instead.
    start_from: Annotated[str | None, RUN_ONLY, PATH] = None

    @field_validator("templates", mode="before")
    @classmethod
    def _expand_template_preset(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if re.fullmatch(r"\w+", value) and value not in TEMPLATE_PRESETS:
            raise ValueError(f"expected a template or one of the presets {', '.join(TEMPLATE_PRESETS)}")
        return TEMPLATE_PRESETS.get(value, value)

    @property
    def lora(self) -> dict[str, tuple[LoRAGroup, ...]]:
        """Network -> its LoRA groups, for all networks that have some."""
        return {name.removeprefix(_LORA): groups for name, groups in self if name.startswith(_LORA) and groups}

    @field_validator("timesteps")
    @classmethod
    def _check_timesteps(cls, timesteps: tuple[float, float]) -> tuple[float, float]:
        if timesteps[0] >= timesteps[1]:
            raise ValueError(f"timesteps is [low, high] with low below high, got {list(timesteps)}")
        return timesteps

    def result_values(self) -> dict[str, Any]:
        """Return all parameters that can change the concept, as JSON types."""
        run_only = {name for name, field in type(self).model_fields.items() if RUN_ONLY in field.metadata}
        if not self.needs_scores:
            run_only.add("scoring")
        values = self.model_dump(mode="json", exclude=run_only)
        values.get("scoring", {}).pop("halving", None)  # decides how far a training gets, not what it learns on the way
        return values

    @property
    def needs_scores(self) -> bool:
        """Whether the concept depends on scores."""
        scoring = self.scoring
        return self.choose == "best" or scoring.patience is not None or scoring.halving is not None

    @property
    def num_branches(self) -> int:
        """2, or 1 for a constant guidance scale of 1 (plain training, positive branch only)."""
        return self.guidance_scale.num_branches

    @property
    def _groups(self) -> list[LoRAGroup]:
        return [group for groups in self.lora.values() for group in groups]

    @model_validator(mode="after")
    def _check_branches(self) -> TrainingParams:
        groups = self._groups
        if not groups and not self.words.names:
            raise ValueError("nothing to train: give lora_unet, lora_text_encoder or words.names")
        if self.num_branches == 1 and any(group.branch == "negative" for group in groups):
            raise ValueError("guidance_scale is 1, so there is no negative branch, but a LoRA group has branch: n")
        if self.num_branches == 2 and groups and not self.words.names:
            for branch in ("positive", "negative"):
                if not any(group.branch in (branch, "shared") for group in groups):
                    raise ValueError(f"the {branch} branch has no LoRA group (branch: {branch[0]}) and no words")
        return self

    @model_validator(mode="after")
    def _check_group_options(self) -> TrainingParams:
        for network, groups in self.lora.items():
            if network.startswith("text_encoder") and any(group.timestep_min_rank is not None for group in groups):
                raise ValueError(f"lora_{network}: timestep_min_rank requires a timestep, which a text encoder lacks")
        options = {"svd_init": any(group.svd_init for group in self._groups)}
        options["orthogonal_init"] = any(group.orthogonal_init is not None for group in self._groups)
        if self.start_from and any(options.values()):
            given = next(name for name, is_given in options.items() if is_given)
            raise ValueError(f"start_from cannot be combined with {given}; leave out one of them")
        return self

    @model_validator(mode="after")
    def _check_scoring(self) -> TrainingParams:
        if self.needs_scores and not (self.scoring.prompts and self.scoring.every):
            raise ValueError(
                "choose=best, scoring.patience and scoring.halving require scoring.prompts, and scoring.every other "
                "than 0"
            )
        return self

    @model_validator(mode="after")
    def _check_optimizers(self) -> TrainingParams:
        rates = [group.lr for group in self._groups]
        if rates:
            self._check_optimizer("", self.optimizer, self.schedule, rates)
        if self.words.names:
            self._check_optimizer("words", self.words.optimizer, self.words_schedule, [self.words.lr])
        return self

    def _check_optimizer(self, kind: str, optimizer: str, schedule: ScheduleParams, rates: list[float]) -> None:
        key, schedule_key = (f"{kind}.optimizer", f"{kind}_schedule") if kind else ("optimizer", "schedule")
        if optimizer == "schedule_free" and schedule.kind != "constant":
            raise ValueError(f"{key}: schedule_free needs {schedule_key}.kind constant, got {schedule.kind}")
        if optimizer == "schedule_free" and self.ema_decay:
            raise ValueError(f"{key}: schedule_free has its own averages; set ema_decay to 0, got {self.ema_decay}")
        if optimizer == "prodigy" and self.scale_lr:
            raise ValueError(f"{key}: prodigy estimates the learning rate; set scale_lr to false")
        if optimizer == "prodigy" and not all(PRODIGY_LR[0] <= rate <= PRODIGY_LR[1] for rate in rates):
            raise ValueError(f"{key}: with prodigy, lr is a factor within {PRODIGY_LR}, usually 1.0, got {rates}")


# ------------------------------------------------------------------------------------------- evaluation, generation

KeptStep = PositiveInt | None
"""A scored step of the training, whose concept is used; None for the step that the training has chosen."""


SweepValues = Annotated[tuple[Annotated[float, Field(ge=0, le=100)], ...], Field(max_length=10)]


class SweepParams(Params):
    """Which strengths and guidance scales are compared after a training, to recommend some.

    The same prompts and seeds are drawn with every combination of strengths, then with every guidance scale and every
    step at the recommended strengths. The configured values are added to each list.
    """

    images: NonNegativeInt = 0  # per prompt, of the first seeds; 0: nothing is compared
    num_prompts: PositiveInt = 4  # the first of evaluation.prompts
    positive: SweepValues = (0.6, 0.8, 1.0, 1.2)
    negative: SweepValues = (0.0, 0.5, 1.0)
    guidance_scales: Annotated[tuple[Guidance, ...], Field(max_length=10)] = (2.0, 4.0, 8.0)
    max_steps: Annotated[int, Field(ge=1, le=20)] = 4  # of the training, the concept's own among them
    # The bounds of recommended values: the share of the base model's agreement that may be lost, and of copying.
    agreement_loss: Fraction = 0.25
    max_copying: Fraction = 0.5


class EvaluationParams(Params):
    """Which images are generated and measured after training."""

    step: KeptStep = None
    prompts: Annotated[Prompts, Field(min_length=1)]  # with '{pt1}' for the subject
    prior_prompts: Annotated[Prompts, Field(min_length=1)]  # without it, for prior preservation
    class_word: Plain = ""
    images_per_prompt: ImagesPerPrompt = 4
    seed: Seed = 1000
    negative_prompt: Prompt = ""
    sampler: SamplerParams = SamplerParams()
    strength: StrengthParams = StrengthParams()
    # Any of efficientnet-lite0, clip:FOLDER_OR_HUB_ID, siglip:… and dinov2:…, and auto for the image tower of the base
    # model, if it has one.
    evaluators: Annotated[Texts, KIND_AND_PATH] = ("efficientnet-lite0",)
    # For prompt agreement: "clip:FOLDER_OR_HUB_ID" or "siglip:…", None for none, or "auto" for the towers of the base
    # model, if it has some.
    text_image_model: Annotated[TextImageModelName | None, KIND_AND_PATH] = "auto"
    # Whether a concept may be compared with another picture than that of its training.
    other_picture: bool = False
    # Whether colours named in prompts are compared with the pixels; None for the embedded base model only.
    color_agreement: bool | None = None
    # Whether the judge names the object in each image; None: if there is one beside the base model.
    recognition: bool | None = None
    # Further pictures of the subject, which the training has not seen: files, or folders of pictures.
    views: Annotated[Texts, PATH] = ()
    # Images per prompt without the negative adapter, and as many with the negative word; 0 for none.
    branch_images: NonNegativeInt = 0
    # Images per prompt at each of these guidance scales; 0 for none.
    guidance_images: NonNegativeInt = 0
    guidance_scales: tuple[Guidance, ...] = ()
    sweep: SweepParams = SweepParams()
    # Pictures with maps of the trigger words' attention, one for each of the first prompts; 0 for none.
    attention_images: NonNegativeInt = 0

    @field_validator("evaluators")
    @classmethod
    def _check_evaluators(cls, evaluators: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_check_evaluator, evaluators))


class GenerateParams(Params):
    """Which images the generate pipeline creates."""

    step: KeptStep = None
    prompts: Annotated[Prompts, Field(min_length=1)]
    negative_prompt: Prompt = ""
    images_per_prompt: ImagesPerPrompt = 4
    seed: Seed = 0
    width: SidePx | None = None  # px; None for the size of the base model, with the aspect ratio of init_image
    height: SidePx | None = None
    # With init_image: fraction of the steps that is run, `strength` in diffusers. None for 0.8, or 1 with init_mask.
    denoise: Annotated[float, Field(gt=0, le=1)] | None = None
    sampler: SamplerParams = SamplerParams()
    strength: StrengthParams = StrengthParams()
    # Whether strength and sampler.guidance_scale are those that the evaluation of this concept recommends.
    recommended: bool = False

    @property
    def size_px(self) -> tuple[int, int] | None:
        """(width, height), if given."""
        return None if self.width is None or self.height is None else (self.width, self.height)

    @model_validator(mode="after")
    def _check_size_and_denoise(self) -> GenerateParams:
        if (self.width is None) != (self.height is None):
            raise ValueError("give both width and height, or neither for the size of the base model")
        if self.denoise is not None:
            check_denoise(self.denoise, self.sampler.num_inference_steps)
        return self


def check_denoise(denoise: float, num_inference_steps: int) -> None:
    """Check that `denoise · num_inference_steps`, rounded down as in diffusers, is at least one step.

    Raises:
        ValueError: it is 0.
    """
    if not int(num_inference_steps * denoise):
        raise ValueError(
            f"denoise {denoise:g} of {num_inference_steps} steps leaves none; "
            f"raise denoise to at least {1 / num_inference_steps:.3g}, or num_inference_steps"
        )


# ------------------------------------------------------------------------------------------------- export


class ExportParams(Params):
    """Which files for other tools are written, and the settings of the exported workflow and script."""

    step: KeptStep = None
    title: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # name of the LoRA files
    formats: Annotated[tuple[Literal["kohya", "peft", "toolkit", "embeddings"], ...], Field(min_length=1)] = (
        "kohya",
        "peft",
        "toolkit",
        "embeddings",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of kohya, peft and embeddings
    prompt: str = "a {pt1}"  # of the workflow and the script
    negative_prompt: str = ""
    seed: Seed = 0
    sampler: SamplerParams = SamplerParams()
    strength: StrengthParams = StrengthParams()
    # Whether strength and sampler.guidance_scale are those that the evaluation of this concept recommends.
    recommended: bool = False

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        if re.search(r"[{}]", re.sub(r"(?<!\$)\{\w+\}", "", prompt)):  # other than slots
            raise ValueError(
                f"expected no braces other than slots such as {{pt1}}, got {prompt!r}; weighted words cannot be "
                "exported, because ComfyUI has another formula for weights, and diffusers has none: remove the weights"
            )
        return prompt


# ------------------------------------------------------------------------------------------------- registration


class RegistrationParams(Params):
    """Whether and how a concept becomes a version of a registered model in MLflow."""

    enabled: bool = True
    max_copied_mb: NonNegativeInt = 100  # larger base models are referred to by their path; 10^6 bytes


# ------------------------------------------------------------------------------------------------- import

FilePair = Annotated[Texts, Field(min_length=1, max_length=2)]
"""(positive,), (positive, negative), or a single positive file."""

PositiveActsOn = Literal["both", "positive"]
"""The branches of a positive LoRA without a negative one; other tools apply it to both."""


class ImportParams(Params):
    """Which files of other tools are imported; the pipeline checks that there are any."""

    positive: Annotated[Texts, PATH] = ()  # LoRA files, kohya or peft; the updates of several files are summed
    negative: Annotated[Texts, PATH] = ()
    positive_acts_on: PositiveActsOn = "both"
    words: Annotated[dict[str, FilePair], PATH] = Field(default_factory=dict)  # slot -> embedding files
    names: dict[str, FilePair] = Field(default_factory=dict)  # slot -> trigger words; default: the file names
    toolkit: Annotated[str | None, PATH] = None  # folder with files of the reference toolkit, instead of the above
    step: NonNegativeInt | None = None  # of the files in `toolkit`; None for the latest
    class_word: Plain = ""
    clip_skip: NonNegativeInt = 0  # of the training; the files do not contain it
    replace: bool = False  # whether an existing concept of this subject may be replaced

    @model_validator(mode="after")
    def _check_sources(self) -> ImportParams:
        if self.toolkit is not None and (self.positive or self.negative or self.words):
            raise ValueError("give either toolkit, or positive, negative and words, not both")
        if self.toolkit is None and self.step is not None:
            raise ValueError(f"step can only be given with toolkit, got step {self.step}")
        for slot, names in self.names.items():
            files = self.words.get(slot)
            if self.toolkit is None and (files is None or len(files) != len(names)):
                raise ValueError(f"slot {slot!r} has names {list(names)}, but files {list(files or ())} in words")
        return self


# ------------------------------------------------------------------------------------------------- comparison


class ComparedMethod(Params):
    """One row of a comparison.

    Attributes:
        title: of the row.
        method: in parameters_training.yml; None for the row's own name.
        params: further parameters of its runs, nested, such as {training: {num_steps: 500}}. A reference to another
            value, `${...}`, has its value in the comparing run, not that of a subject.
    """

    title: str
    method: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)


MetricName = Annotated[str, Field(min_length=1, max_length=200)]


class ComparedMeasures(Params):
    """The metrics of evaluation_metrics.json that the plots show; higher is better, except for drift."""

    fidelity: MetricName
    controllability: MetricName
    drift: MetricName


SubjectNames = Annotated[Texts, Field(min_length=1, max_length=10_000)]


class StartedRuns(Params):
    """Runs that another run starts, each in a process of its own."""

    params: dict[str, Any] = Field(default_factory=dict)  # of all runs, nested
    workers: Annotated[int, Field(ge=1, le=1000)] | None = None  # runs at a time; None: 1, with Ray one per GPU
    threads: Annotated[int, Field(ge=1, le=1000)] | None = None  # of each run (OMP_NUM_THREADS); None: its own choice
    ray: Annotated[str, Field(min_length=1)] | None = None  # address of a Ray cluster, or `local`; None: without Ray

    @property
    def executed_by(self) -> Workers:
        """What executes the runs."""
        return Workers(self.workers, self.threads, self.ray)


class PersonalizeParams(StartedRuns):
    """Many subjects, each in a run of its own."""

    subjects: Annotated[str | None, ADDRESS] = None  # a table (.csv, .parquet), or a folder of pictures
    export: bool = True  # write the files for other tools, too


class CompareParams(StartedRuns):
    """A comparison: every method on every subject with every seed, each in a run of its own.

    Of the parameters of all runs, those of a method take precedence.
    """

    methods: Annotated[dict[str, ComparedMethod], Field(min_length=1)]  # name of the row -> method
    only: Texts = ()  # names of the rows that are compared; () for all
    reference: str  # name of the row that the others are subtracted from, by pairs
    subjects: SubjectNames  # without reporting subjects, nothing is chosen on them
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000)] = (0,)  # of the trainings
    images: Annotated[str, PATH]  # folder with <subject>.png
    measures: ComparedMeasures
    columns: Annotated[tuple[MetricName, ...], Field(min_length=1)]  # metrics in the table

    @property
    def rows(self) -> dict[str, ComparedMethod]:
        """The methods that are compared."""
        return {name: self.methods[name] for name in self.only} if self.only else self.methods

    @model_validator(mode="after")
    def _check_names(self) -> CompareParams:
        for key, names in {"only": self.only, "reference": (self.reference,)}.items():
            for name in names:
                if name not in self.methods:
                    raise ValueError(f"{key}: expected one of {', '.join(self.methods)}, got {name!r}")
        for key, values in {"subjects": self.subjects, "seeds": self.seeds, "only": self.only}.items():
            if len({*values}) < len(values):
                raise ValueError(f"{key}: expected each one once, got {', '.join(map(str, values))}")
        return self


class TuneParams(Params):
    """The tuning before a comparison: several settings of every method, and how one of them is chosen."""

    settings: dict[str, Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]]  # row of the comparison -> params
    subjects: SubjectNames
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000)] = (0,)
    # Metric -> weight: the setting with the highest weighted sum of the means over subjects and seeds is chosen.
    objective: Annotated[dict[MetricName, float], Field(min_length=1)]
    # Largest duration of a step, as a multiple of that of the method's first setting; slower settings are not chosen.
    max_step_cost: Annotated[float, Field(ge=1, le=1000)] = 1.25

    @model_validator(mode="after")
    def _check_budget(self) -> TuneParams:
        counts = {name: len(settings) for name, settings in self.settings.items()}
        if len({*counts.values()}) > 1:
            listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
            raise ValueError(f"settings: every method has the same number of them, got {listed}")
        return self


class SweptRange(Params):
    """The values between two bounds, both included."""

    low: float
    high: float
    log: bool = False  # whether factors are equally likely, in place of differences
    integer: bool = False

    @model_validator(mode="after")
    def _check_bounds(self) -> SweptRange:
        if not self.low < self.high:
            raise ValueError(f"expected low below high, got low {self.low:g} and high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"expected a low above 0 for log: true, got {self.low:g}")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"expected whole bounds for integer: true, got {self.low:g} and {self.high:g}")
        return self


class ParameterSearchParams(StartedRuns):
    """A search for the best values of some parameters: every trial trains and evaluates all subjects with some of them.

    Attributes:
        name: of its runs and their folder; the environment with the best values is `best-<name>`.
        space: parameters, nested as in the configuration; in place of a value, a list of values or a `SweptRange`.
        search: how values are chosen. grid: all combinations of lists; random; tpe: by a model of the trials so far
            (tree-structured Parzen estimators, Bergstra et al. 2011).
        trials: their number; of `grid`, at most.
        seed: of the search.
        subjects: pictures in `images`, named by their subjects.
        seeds: of the trainings; each trial has a run per subject and seed.
        images: folder with <subject>.png.
        folder: of the results, in a folder with the name of the sweep.
        objective: metric of evaluation_metrics.json -> weight; the highest weighted sum of the means is the best.
        halving: stops trainings that are worse than others by the scores of `training.scoring`; None: none.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=40)] = "sweep"
    space: dict[str, Any] = Field(default_factory=dict)
    search: Literal["grid", "random", "tpe"] = "tpe"
    trials: Annotated[int, Field(ge=1, le=100_000)] = 20
    seed: Seed = 0
    subjects: SubjectNames
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000)] = (0,)
    images: Annotated[str, NODE_PATH]
    folder: Annotated[str, NODE_PATH]
    objective: Annotated[dict[MetricName, float], Field(min_length=1)] = {"similarity/concept.efficientnet-lite0": 1.0}
    halving: Rungs | None = None

    @model_validator(mode="after")
    def _check_names(self) -> ParameterSearchParams:
        for key, values in {"subjects": self.subjects, "seeds": self.seeds}.items():
            if len({*values}) < len(values):
                raise ValueError(f"{key}: expected each one once, got {', '.join(map(str, values))}")
        return self


# ------------------------------------------------------------------------------------------------- pretraining


class EmbeddedModelSize(Params):
    """The architecture of the embedded base model."""

    image_px: PositiveInt = 64
    latent_channels: PositiveInt = 8
    autoencoder_channels: tuple[PositiveInt, ...] = (16, 32, 64)
    autoencoder_norm_groups: PositiveInt = 4  # several channels per group: a group of one would lose the channel's mean
    unet_channels: tuple[PositiveInt, ...] = (64, 128, 192)
    unet_attention: tuple[bool, ...] = (False, True, True)  # cross-attention per level
    unet_norm_groups: PositiveInt = 16
    text_width: PositiveInt = 192
    text_layers: PositiveInt = 3
    max_tokens: PositiveInt = 40
    vision_width: PositiveInt = 128
    vision_layers: PositiveInt = 4
    vision_patch_px: PositiveInt = 8

    @model_validator(mode="after")
    def _check_levels(self) -> EmbeddedModelSize:
        if len(self.unet_attention) != len(self.unet_channels):
            raise ValueError(
                f"unet_attention has {len(self.unet_attention)} entries for {len(self.unet_channels)} unet_channels"
            )
        if self.image_px % self.vision_patch_px:
            raise ValueError(f"vision_patch_px {self.vision_patch_px} does not divide image_px {self.image_px}")
        return self


class PublishedObjects(Params):
    """Which objects are captioned with their published names."""

    min_styles: PositiveInt  # with a drawing of the object
    max_words: PositiveInt = 3  # of its name
    look_alikes: dict[str, Texts] = Field(default_factory=dict)  # word -> names of drawings with the same look
    left_out: Texts = ()


class StageParams(Params):
    """One stage of pretraining: warm-up, constant learning rate, and decay to zero."""

    num_steps: PositiveInt
    batch_size: PositiveInt  # per process
    lr: PositiveFloat  # of AdamW, for embeddings, norms, biases, and the first and last layers
    matrix_lr: PositiveFloat | None = None  # of Muon, for all other matrices and kernels; None for AdamW
    warmup_steps: NonNegativeInt = 100
    decay_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2  # fraction of the steps with a decaying learning rate
    decay_now: bool = False  # start the decay at the last checkpoint, regardless of num_steps
    minutes: PositiveFloat | None = None  # duration; sets num_steps from the throughput of the first steps
    ema_decay: Probability = 0.999
    weight_decay: NonNegativeFloat = 0.0
    checkpoint_minutes: NonNegativeFloat = 10.0  # 0 for every step
    num_scenes: PositiveInt = 24_000  # distinct captioned scenes of the stage


class DenoiserParams(StageParams):
    """The stage of UNet and text encoder, with new scenes in every step."""

    tinted_share: Probability = 0.25  # fraction of tinted objects
    timestep_density: Literal["uniform", "logit_normal"] = "uniform"
    drawing_processes: NonNegativeInt = 0  # worker processes that render scenes; 0 for none


class PretrainParams(Params):
    """Pretraining of the embedded base model."""

    seed: Seed = 0
    num_processes: PositiveInt = 2  # on a CPU, whose threads they share; ignored on a GPU
    sprite_px: PositiveInt = 96
    size: EmbeddedModelSize = EmbeddedModelSize()
    styles: dict[str, str]  # sprite package -> its word in captions
    autoencoder_only_packages: tuple[str, ...] = ()
    held_out_styles: dict[str, str] = Field(default_factory=dict)
    objects: dict[str, str]  # word in captions -> code point
    published_objects: PublishedObjects | None = None  # further objects
    held_out_objects: dict[str, str] = Field(default_factory=dict)
    start: Annotated[str | None, PATH] = None  # folder of an embedded base model
    keep_autoencoder: bool = False  # use the autoencoder of `start`
    continue_denoiser: bool = False  # initialise UNet and text encoder from `start`, except for new words
    checkpoints: Annotated[str, NODE_PATH]  # folder
    autoencoder: StageParams
    towers: StageParams
    denoiser: DenoiserParams

    @model_validator(mode="after")
    def _check_start(self) -> PretrainParams:
        if self.start is None and (self.keep_autoencoder or self.continue_denoiser):
            raise ValueError("keep_autoencoder and continue_denoiser need start, a folder of an embedded base model")
        return self


# ------------------------------------------------------------------------------------------------- the judge


class JudgeParams(Params):
    """Training of the judge of images of the embedded base model."""

    seed: Seed = 1
    sprite_px: PositiveInt = 128  # different from the sprites of the base model
    channels: Annotated[tuple[Annotated[int, Field(ge=4, multiple_of=4)], ...], Field(min_length=1, max_length=5)]
    training: StageParams
    num_test_scenes: PositiveInt = 4000
    checkpoints: Annotated[str, NODE_PATH]  # folder


SECTIONS: dict[str, type[Params]] = {
    "device": DeviceParams,
    "ingestion": IngestionParams,
    "prompts": PromptsParams,
    "regularization": RegularizationParams,
    "training": TrainingParams,
    "evaluation": EvaluationParams,
    "generate": GenerateParams,
    "export": ExportParams,
    "registration": RegistrationParams,
    "import": ImportParams,
    "compare": CompareParams,
    "tune": TuneParams,
    "personalize": PersonalizeParams,
    "sweep": ParameterSearchParams,
    "pretrain": PretrainParams,
    "judge": JudgeParams,
}
"""Top-level section of the configuration -> its model; nodes receive it as `params:<section>`."""


RUN_SETTINGS = (
    "subject",
    "image",
    "mask",
    "init_image",
    "init_mask",
    "base_model",
    "vae",
    "base_model_config",
    "class_word",
    "caption",
    "method",
    "recipe",
    "prompt_database",
    "store",
)
"""Settings of a run beside the sections, each a text, such as `--params subject=cat`."""

PROMPT_KEYS = ("prompt", "prompts", "prior_prompts", "negative_prompt", "templates")
"""Last parts of the names of parameters with prompts: one is written as it is, several as a list in YAML."""


def is_prompt_text(name: str, text: str) -> bool:
    """Return whether the value of a parameter is a prompt that is written as it is, and no YAML."""
    return name.rpartition(".")[2] in PROMPT_KEYS and text != "null" and not text.startswith(("[", "'", '"'))


def takes_several(name: str) -> bool:
    """Return whether a parameter, such as "generate.prompts", is a list of any length."""
    section, *keys = name.split(".")
    annotation: Any = SECTIONS.get(section)
    for key in keys:
        field = getattr(annotation, "model_fields", {}).get(key)
        annotation = None if field is None else field.annotation
    return get_origin(annotation) is tuple and get_args(annotation)[-1] is Ellipsis
