"""The only schema of the configuration: every parameter of every pipeline, with its bounds and its source.

Values live in conf/; the models here say what is allowed. Unknown keys are errors, models are frozen, and checks that
span several fields run before any base model is loaded.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

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

from dreamartist_pipeline.prompt_weights import checked_weights
from dreamartist_pipeline.schedulers import SCHEDULERS, UNFIT_SCHEDULERS

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SidePx = Annotated[int, Field(ge=8, le=4096, multiple_of=8)]
OptimizerName = Literal["adamw", "adamw8bit", "prodigy", "schedule_free"]
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""Several texts; a single one may stand alone, as in `--params generate.prompts=a red fox`."""
Plain = Annotated[str, Field(pattern=r"^[^{}]*$")]
"""A text without braces, to be put into templates."""
Prompt = Annotated[str, AfterValidator(checked_weights)]
"""A prompt or template whose weighted words, `{cat:1.2}`, can be read."""
Prompts = Annotated[tuple[Prompt, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]

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
PRODIGY_LR = (0.01, 10.0)  # Prodigy multiplies lr with a rate that it estimates; AdamW's rates would never train


class Params(BaseModel):
    """Base of all parameter models: misspelt keys and infinite numbers are errors, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# ------------------------------------------------------------------------------------------------- shared


class DeviceParams(Params):
    """Where and in which precision the frozen base model runs; adapters and words always train in float32."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


_BASE_MODELS_OWN = (  # what a scheduler takes from the base model, or from the concept trained on it
    *("beta_end", "beta_schedule", "beta_start", "num_train_timesteps", "prediction_type", "rescale_betas_zero_snr"),
    *("timestep_type", "trained_betas"),
)


class SamplerParams(Params):
    """How images are sampled: `scheduler` is one of the table in schedulers.py."""

    scheduler: str = "dpmsolver++"
    scheduler_options: dict[str, Any] = Field(default_factory=dict)  # further arguments of the scheduler's class
    num_inference_steps: Count = 20
    guidance_scale: Annotated[float, Field(ge=1)] = 4.0
    batch_size: Count = 8

    @field_validator("scheduler")
    @classmethod
    def _scheduler_can_draw(cls, name: str) -> str:
        if name in SCHEDULERS:
            return name
        for reason, classes in UNFIT_SCHEDULERS.items():
            if name in classes:
                raise ValueError(f"{name} {reason}; choose one of {', '.join(SCHEDULERS)}")
        near = difflib.get_close_matches(name, SCHEDULERS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(SCHEDULERS)}"
        raise ValueError(f"there is no scheduler of this name that can be used here; {hint}")

    @field_validator("scheduler_options")
    @classmethod
    def _options_leave_the_base_model(cls, options: dict[str, Any]) -> dict[str, Any]:
        if described := sorted(options.keys() & set(_BASE_MODELS_OWN)):
            raise ValueError(f"{', '.join(described)} are fixed by the base model; leave them out")
        if options.get("use_flow_sigmas"):
            raise ValueError("use_flow_sigmas is for models trained by flow matching; leave it out")
        return options


STRENGTH_PRESETS = {"reference": {"positive": 0.8, "negative": 0.65}}  # `strength: NAME`; the reference toolkit's


class StrengthParams(Params):
    """How strongly each branch's adapter acts when drawing; 1 is as trained. Or the name of a STRENGTH_PRESETS."""

    positive: NonNegative = 1.0
    negative: NonNegative = 1.0

    @model_validator(mode="before")
    @classmethod
    def _preset_is_its_strengths(cls, value: object) -> object:
        if isinstance(value, str):
            if value not in STRENGTH_PRESETS:
                raise ValueError(
                    f"a strength is {{positive: …, negative: …}} or {', '.join(STRENGTH_PRESETS)}, got {value!r}"
                )
            return STRENGTH_PRESETS[value]
        return value

    def __str__(self) -> str:
        """Say both, for people."""
        return f"{self.positive:g} positive, {self.negative:g} negative"


# ------------------------------------------------------------------------------------------------- ingestion


class BucketParams(Params):
    """The size the reference image is brought to.

    With `keep_aspect` the sides follow the image's aspect ratio at the area `side_px`², in multiples of `multiple_px`.
    """

    side_px: Annotated[int, Field(ge=8, le=4096)]
    multiple_px: Literal[8, 16, 32, 64] = 64
    keep_aspect: bool = False

    @model_validator(mode="after")
    def _side_is_a_multiple(self) -> BucketParams:
        if self.side_px % self.multiple_px:
            raise ValueError(f"side_px {self.side_px} is not a multiple of multiple_px {self.multiple_px}")
        return self


class IngestionParams(Params):
    """How the one reference image becomes training data."""

    bucket: BucketParams
    fit: Literal["crop", "pad"] = "crop"
    background_color: str = "white"  # any PIL colour: behind transparent pixels and around padded ones
    max_pixels: Annotated[int, Field(ge=1)] = 100_000_000


# ------------------------------------------------------------------------------------------- prompts, regularization


class PromptsParams(Params):
    """Which prompts are drawn from the prompt database."""

    column: str | int = 0
    num_prompts: Annotated[int, Field(ge=0)]  # 0: no regularization set
    seed: Seed = 0


class RegularizationParams(Params):
    """How the base model draws the regularization set."""

    sampler: SamplerParams
    negative_prompt: Prompt = ""
    seed: Seed = 0


# ------------------------------------------------------------------------------------------------- training


_NUMBER = r"\d+(?:\.\d+)?(?:e\+?\d+)?"
_GUIDANCE = re.compile(rf"(?P<low>{_NUMBER})(?:-(?P<high>{_NUMBER})(?::(?P<curve>\w+))?)?")


class GuidanceScale(Params):
    """The guidance scale as a function of the noise: `low` without noise, `high` at full noise.

    Written as a number, or as "low-high:curve" with curve ln (linear, the default), cos or cos2.
    """

    low: Annotated[float, Field(ge=1)]
    high: Annotated[float, Field(ge=1)]
    curve: Literal["ln", "cos", "cos2"] = "ln"

    @model_validator(mode="before")
    @classmethod
    def _text_is_parsed(cls, value: object) -> object:
        if isinstance(value, dict) or value is None:
            return value
        match = _GUIDANCE.fullmatch(str(value).strip())
        if match is None:
            raise ValueError(f"guidance_scale is a number or 'low-high:curve', got {value!r}")
        return {"low": match["low"], "high": match["high"] or match["low"], "curve": match["curve"] or "ln"}

    @property
    def num_branches(self) -> int:
        """1 when the scale is constantly 1, so that the negative branch would cancel out; otherwise 2."""
        return 1 if self.low == self.high == 1 else 2

    @model_serializer
    def __str__(self) -> str:
        """Return the text that is parsed to this scale."""
        return f"{self.low}" if self.low == self.high else f"{self.low}-{self.high}:{self.curve}"


_BRANCHES = {"p": "positive", "n": "negative", None: "shared"}  # as the reference tutorial writes them


def _branch_name(value: object) -> object:
    if value in _BRANCHES.values():  # as dumped
        return value
    if isinstance(value, str | None) and value in _BRANCHES:
        return _BRANCHES[value]
    raise ValueError(f"a branch is p or n, or left out where both share the group, got {value!r}")


BranchName = Annotated[Literal["positive", "negative", "shared"], BeforeValidator(_branch_name)]


class LoRAGroup(Params):
    """One item of `lora_unet` / `lora_text_encoder`, as the reference tutorial writes it.

    Attributes:
        lr: learning rate.
        rank: an integer, or a float: the fraction of a layer's out_features, rounded, at least 1.
        layers: selectors, see `core.adapters.select_layers`.
        branch: `p`, `n`, or left out where both branches share the group.
        alpha: the update is scaled by alpha / rank.
        dropout: probability with which a rank activation is dropped while training.
        timestep_min_rank: as `rank`, UNet only; the active rank of a row falls linearly in its timestep t, from the
            full rank at t = 0 to this one at t = T − 1, the last ranks being left out (T-LoRA, Soboleva et al. 2025,
            without its orthogonal initialisation). None: all ranks at every t.
        bias: whether the update has a learned bias. Like the reference toolkit's, it belongs to the up projection, so
            that alpha / rank scales it too, and it trains by the group's learning rate and weight decay. It starts at
            zero; the toolkit's (`hcpdiff.models.lora_layers`) starts as any nn.Linear's, at random, which changes the
            first outputs. Its later form (`lora_layers_patch`) means to start at zero, too.
        svd_init: whether down and up start at the weight's largest singular values, less that start (PiSSA); see
            `core.adapters.PrincipalUpdate`.
    """

    lr: Positive
    rank: int | float
    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    branch: BranchName = "shared"
    alpha: Positive = 1.0
    dropout: Probability = 0.0
    timestep_min_rank: int | float | None = None
    bias: bool = False
    svd_init: bool = False

    @field_validator("rank", "timestep_min_rank")
    @classmethod
    def _rank_is_usable(cls, rank: int | float | None) -> int | float | None:
        if isinstance(rank, int) and rank < 1:
            raise ValueError(f"an integer rank is at least 1, got {rank}")
        if isinstance(rank, float) and not 0 < rank < 1:
            raise ValueError(f"a float rank is a fraction of out_features between 0 and 1, got {rank}")
        return rank

    @model_validator(mode="after")
    def _ranks_have_one_meaning(self) -> LoRAGroup:
        if self.svd_init and self.timestep_min_rank is not None:
            raise ValueError("svd_init and timestep_min_rank exclude each other; leave out one of them")
        return self

    @field_validator("layers")
    @classmethod
    def _patterns_compile(cls, layers: tuple[str, ...]) -> tuple[str, ...]:
        for selector in layers:
            if "re:" in selector:
                try:
                    re.compile(selector.split("re:", 1)[1])
                except re.error as error:
                    raise ValueError(f"layer selector {selector!r} is not a regular expression: {error}") from error
        return layers


class ResolvedGroup(LoRAGroup):
    """A LoRA group as it trains and as a concept keeps it.

    Attributes:
        name: "<network>.<index>.<branch>".
        lr: as applied, with `scale_lr`; 0 in concepts that were imported.
        branch: "shared" in a training without a negative branch.
    """

    name: str
    lr: NonNegative


class WordsParams(Params):
    """The trigger words and their embeddings: (positive, negative) everywhere."""

    names: dict[str, tuple[str, str]] = Field(default_factory=dict)  # slot -> trigger words
    num_vectors: tuple[Count, Count] = (3, 6)
    init_text: tuple[str, str] = ("*[0.017]", "*[0.017]")  # text, "*[std]", or "text, *[std]"
    lr: Positive = 2.5e-3
    weight_decay: NonNegative = 0.0
    optimizer: OptimizerName = "adamw"

    @field_validator("names")
    @classmethod
    def _branches_differ(cls, names: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
        for slot, (positive, negative) in names.items():
            if not positive or not negative:
                raise ValueError(f"slot {slot!r} needs a trigger word per branch, got {[positive, negative]}")
            if positive == negative:
                raise ValueError(
                    f"slot {slot!r} has the same trigger word {positive!r} in both branches; they must differ"
                )
            for word in (positive, negative):
                if re.search(r"\s", word):
                    raise ValueError(f"trigger word {word!r} contains a space; use a hyphen")
                if re.search(r"[{}]", word):
                    raise ValueError(f"trigger word {word!r} contains a brace; weights belong into templates")
                if re.search(r"[/\\]", word):
                    raise ValueError(f"trigger word {word!r} contains a slash; it names a file when exported")
        return names


class CaptionTransformParams(Params):
    """One item of `caption_transforms`: `tag_shuffle`, or `tag_dropout: p`, or `tag_erase: p`."""

    kind: Literal["tag_shuffle", "tag_dropout", "tag_erase"]
    p: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        if value == "tag_shuffle":
            return {"kind": value}
        if isinstance(value, dict) and len(value) == 1 and set(value) <= {"tag_dropout", "tag_erase"}:
            ((kind, p),) = value.items()
            return {"kind": kind, "p": p}
        if isinstance(value, dict) and set(value) == {"kind", "p"}:  # as dumped
            return value
        raise ValueError(f"a caption transform is tag_shuffle, 'tag_dropout: p' or 'tag_erase: p', got {value!r}")


class ScheduleParams(Params):
    """A learning-rate schedule as a factor of the peak rate."""

    kind: Literal["constant", "cosine", "one_cycle"] = "one_cycle"
    warmup_steps: Annotated[int, Field(ge=0)] = 0


class LossParams(Params):
    """The loss: its form, its SNR weighting (min-SNR, Hang et al. 2023, its soft form, or none), and its parts."""

    kind: Literal["mse", "huber"] = "mse"
    huber_delta: Positive = 0.1  # of huber: the error above which the loss grows linearly
    weighting: Literal["none", "min_snr", "soft_min_snr"] = "min_snr"
    snr_gamma: Positive = 2.0
    regularization_weight: NonNegative = 1.0
    reconstruction_weight: NonNegative = 0.0  # of the decoded image against the reference; 0: never decoded
    reconstruction_norm: Literal["l1", "l2"] = "l1"


class PreviewParams(Params):
    """Images drawn while training; `every` 0 draws none."""

    every: Annotated[int, Field(ge=0)] = 0
    prompts: Prompts = ()
    sampler: SamplerParams = SamplerParams()
    seed: Seed = 0


RUN_ONLY = "says how a training runs, and changes nothing of what comes out of it"
"""Marks parameters that a concept's `config_sha256` leaves out: `name: Annotated[Type, RUN_ONLY]`."""

_LORA = "lora_"


def _check_is_lora(key: str) -> str:
    if not key.startswith(_LORA):
        raise PydanticKnownError("extra_forbidden")
    return key


class TrainingParams(Params):
    """One training of a concept.

    Beside `lora_unet` and `lora_text_encoder` there may be `lora_<network>` for any other network of the base model.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Annotated[str, AfterValidator(_check_is_lora)], tuple[LoRAGroup, ...]]

    seed: Seed = 0
    num_steps: Annotated[int, Field(ge=0)]
    batch_size: Count = 4  # rows of the reference image
    regularization_batch_size: Annotated[int, Field(ge=0)] = 1
    guidance_scale: GuidanceScale = GuidanceScale(low=3.0, high=3.0)
    lora_unet: tuple[LoRAGroup, ...] = ()
    lora_text_encoder: tuple[LoRAGroup, ...] = ()
    words: WordsParams = WordsParams()
    templates: Annotated[Prompts, Field(min_length=1)] = ("a photo of a {pt1}",)  # or the name of a TEMPLATE_PRESETS
    caption_transforms: tuple[CaptionTransformParams, ...] = ()  # of the tags of '{caption}', in order
    clip_skip: Annotated[int, Field(ge=0)] = 0  # text states of the n-th layer before the last, final norm applied
    class_word: Plain = ""
    scale_lr: bool = False  # multiply every lr by the total batch size, as the reference toolkit does
    weight_decay: NonNegative = 1e-3  # of the adapters
    schedule: ScheduleParams = ScheduleParams()
    words_schedule: ScheduleParams = ScheduleParams()
    max_grad_norm: Positive = 1.0
    clip: Literal["together", "apart"] = "together"  # the gradients of adapters and words, to max_grad_norm
    optimizer: OptimizerName = "adamw"  # of the adapters; the words have their own
    ema_decay: Probability = 0.0  # above 0, what is kept are running averages of adapters and words
    timesteps: tuple[Fraction, Fraction] = (0.0, 1.0)  # [low, high) as fractions of all timesteps
    noise_offset: NonNegative = 0.0  # standard deviation of a shift of the noise per row and channel
    zero_terminal_snr: bool = False  # no signal at the last timestep, in training and drawing; v-prediction only
    loss: LossParams = LossParams()
    preview: Annotated[PreviewParams, RUN_ONLY] = PreviewParams()
    # A concept file, whose adapters and words are the initial values; the path says nothing about what is in it.
    start_from: Annotated[str | None, RUN_ONLY] = None

    @field_validator("templates", mode="before")
    @classmethod
    def _preset_is_its_templates(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if re.fullmatch(r"\w+", value) and value not in TEMPLATE_PRESETS:
            raise ValueError(f"expected a template or a preset out of {', '.join(TEMPLATE_PRESETS)}")
        return TEMPLATE_PRESETS.get(value, value)

    @property
    def lora(self) -> dict[str, tuple[LoRAGroup, ...]]:
        """The networks that have LoRA groups -> these."""
        return {name.removeprefix(_LORA): groups for name, groups in self if name.startswith(_LORA) and groups}

    @field_validator("timesteps")
    @classmethod
    def _timesteps_are_in_order(cls, timesteps: tuple[float, float]) -> tuple[float, float]:
        if timesteps[0] >= timesteps[1]:
            raise ValueError(f"timesteps is [low, high] with low below high, got {list(timesteps)}")
        return timesteps

    def result_values(self) -> dict[str, Any]:
        """Return what can change the concept, as JSON types: all parameters but those marked RUN_ONLY."""
        run_only = {name for name, field in type(self).model_fields.items() if RUN_ONLY in field.metadata}
        return self.model_dump(mode="json", exclude=run_only)

    @property
    def num_branches(self) -> int:
        """2, or 1 when the guidance scale is constantly 1 (plain training, positive branch only)."""
        return self.guidance_scale.num_branches

    @model_validator(mode="after")
    def _text_has_no_timestep(self) -> TrainingParams:
        for network, groups in self.lora.items():
            if network.startswith("text_encoder") and any(group.timestep_min_rank is not None for group in groups):
                raise ValueError(
                    f"lora_{network}: timestep_min_rank is for denoisers: the text encoder does not know the timestep"
                )
        return self

    @property
    def _groups(self) -> list[LoRAGroup]:
        return [group for groups in self.lora.values() for group in groups]

    @model_validator(mode="after")
    def _something_trains_in_every_branch(self) -> TrainingParams:
        groups = self._groups
        if not groups and not self.words.names:
            raise ValueError("nothing to train: give lora_unet, lora_text_encoder or words.names")
        if self.num_branches == 1 and any(group.branch == "negative" for group in groups):
            raise ValueError("guidance_scale is 1, so there is no negative branch, but a LoRA group has branch: n")
        if self.num_branches == 2 and groups and not self.words.names:
            for branch in ("positive", "negative"):
                if not any(group.branch in (branch, "shared") for group in groups):
                    raise ValueError(
                        f"no LoRA group trains the {branch} branch (branch: {branch[0]}) and there are no words"
                    )
        return self

    @model_validator(mode="after")
    def _optimizers_fit_their_rates(self) -> TrainingParams:
        rates = [group.lr for group in self._groups]
        if rates:
            self._check_optimizer("", self.optimizer, self.schedule, rates)
        if self.words.names:
            self._check_optimizer("words", self.words.optimizer, self.words_schedule, [self.words.lr])
        return self

    @model_validator(mode="after")
    def _one_beginning(self) -> TrainingParams:
        if self.start_from and any(group.svd_init for group in self._groups):
            raise ValueError("start_from cannot be combined with svd_init; leave out one of them")
        return self

    def _check_optimizer(self, kind: str, optimizer: str, schedule: ScheduleParams, rates: list[float]) -> None:
        key, schedule_key = (f"{kind}.optimizer", f"{kind}_schedule") if kind else ("optimizer", "schedule")
        if optimizer == "schedule_free" and schedule.kind != "constant":
            raise ValueError(f"{key}: schedule_free needs {schedule_key}.kind constant, got {schedule.kind}")
        if optimizer == "schedule_free" and self.ema_decay:
            raise ValueError(f"{key}: schedule_free averages by itself; set ema_decay to 0, got {self.ema_decay}")
        if optimizer == "prodigy" and self.scale_lr:
            raise ValueError(f"{key}: prodigy finds the rate itself; set scale_lr to false")
        if optimizer == "prodigy" and not all(PRODIGY_LR[0] <= rate <= PRODIGY_LR[1] for rate in rates):
            raise ValueError(f"{key}: prodigy takes lr as a factor, usually 1.0, within {PRODIGY_LR}, got {rates}")


# ------------------------------------------------------------------------------------------- evaluation, generation


class EvaluationParams(Params):
    """What is drawn and measured after training."""

    prompts: Annotated[Prompts, Field(min_length=1)]  # with '{pt1}' where the subject goes
    prior_prompts: Annotated[Prompts, Field(min_length=1)]  # without it: what must not change
    class_word: Plain = ""
    images_per_prompt: Count = 4
    seed: Seed = 1000
    negative_prompt: Prompt = ""
    sampler: SamplerParams = SamplerParams()
    strength: StrengthParams = StrengthParams()
    evaluators: Texts = ("efficientnet-lite0",)  # or "clip:FOLDER_OR_HUB_ID", "dinov2:FOLDER_OR_HUB_ID"
    # CLIPScore: "clip:FOLDER_OR_HUB_ID", None for none, or the towers that were trained with the base model, if any.
    text_image_model: Annotated[str, Field(pattern="^(auto|clip:.+)$")] | None = "auto"
    # Colours as named in prompts, read from the pixels. None: for the embedded base model, which has such prompts.
    color_agreement: bool | None = None

    @field_validator("evaluators")
    @classmethod
    def _evaluators_are_known(cls, evaluators: tuple[str, ...]) -> tuple[str, ...]:
        for name in evaluators:
            if not re.fullmatch(r"efficientnet-lite0|(clip|dinov2):.+", name):
                raise ValueError(f"an evaluator is efficientnet-lite0, clip:… or dinov2:…, got {name!r}")
        return evaluators


class GenerateParams(Params):
    """What the generate pipeline draws."""

    prompts: Annotated[Prompts, Field(min_length=1)]
    negative_prompt: Prompt = ""
    images_per_prompt: Count = 4
    seed: Seed = 0
    width: SidePx | None = None  # px, with height; None: the base model's size, in the proportions of init_image
    height: SidePx | None = None
    # With init_image: the share of the steps that is taken, diffusers' `strength`; 1 keeps little of the picture.
    # None: 0.8, and 1 with init_mask, as in diffusers.
    denoise: Annotated[float, Field(gt=0, le=1)] | None = None
    sampler: SamplerParams = SamplerParams()
    strength: StrengthParams = StrengthParams()

    @property
    def size_px(self) -> tuple[int, int] | None:
        """(width, height), if given."""
        return None if self.width is None or self.height is None else (self.width, self.height)

    @model_validator(mode="after")
    def _size_is_whole(self) -> GenerateParams:
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height belong together: give both, or neither for the base model's size")
        return self

    @model_validator(mode="after")
    def _a_step_is_left(self) -> GenerateParams:
        if self.denoise is not None:
            check_denoise(self.denoise, self.sampler.num_inference_steps)
        return self


def check_denoise(denoise: float, num_inference_steps: int) -> None:
    """Confirm that a step is left of `denoise · num_inference_steps`, rounded down as in diffusers.

    Raises:
        ValueError: none is.
    """
    if not int(num_inference_steps * denoise):
        raise ValueError(
            f"denoise {denoise:g} of {num_inference_steps} steps leaves none; "
            f"raise denoise to at least {1 / num_inference_steps:.3g}, or take more steps"
        )


# ------------------------------------------------------------------------------------------------- export


class ExportParams(Params):
    """Which files for other tools are written, and how the examples among them draw."""

    title: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # names the LoRA files
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

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _has_no_weights(cls, prompt: str) -> str:
        if re.search(r"[{}]", re.sub(r"\{\w+\}", "", prompt)):  # beside slots
            raise ValueError(
                f"braces are for slots such as {{pt1}} here, got {prompt!r}; weighted words cannot be exported, "
                "because ComfyUI weights by another formula and diffusers not at all: leave the weights out"
            )
        return prompt


# ------------------------------------------------------------------------------------------------- import

FilePair = Annotated[Texts, Field(min_length=1, max_length=2)]
"""(positive,) or (positive, negative); a positive one may stand alone."""

PositiveActsOn = Literal["both", "positive"]
"""What a positive LoRA acts on where there is no negative one; both sides, as in other tools."""


class ImportParams(Params):
    """Which files of other tools become a concept; whether there are any is checked when the pipeline runs."""

    positive: Texts = ()  # LoRA files, kohya or peft; several add up
    negative: Texts = ()
    positive_acts_on: PositiveActsOn = "both"
    words: dict[str, FilePair] = Field(default_factory=dict)  # slot -> embedding files
    names: dict[str, FilePair] = Field(default_factory=dict)  # slot -> trigger words; default: the files' names
    toolkit: str | None = None  # a folder of the reference toolkit's files, in place of the above
    step: Annotated[int, Field(ge=0)] | None = None  # of these; None: the newest
    class_word: Plain = ""
    clip_skip: Annotated[int, Field(ge=0)] = 0  # as it was trained; no file says it
    replace: bool = False  # whether a concept of this subject may be replaced

    @model_validator(mode="after")
    def _sources_fit_together(self) -> ImportParams:
        if self.toolkit is not None and (self.positive or self.negative or self.words):
            raise ValueError("give either toolkit, or positive, negative and words, not both")
        if self.toolkit is None and self.step is not None:
            raise ValueError(f"step is for toolkit, the folder of the reference toolkit's files; got step {self.step}")
        for slot, names in self.names.items():
            files = self.words.get(slot)
            if self.toolkit is None and (files is None or len(files) != len(names)):
                raise ValueError(
                    f"names of slot {slot!r} need as many files in words; got {list(names)} for {list(files or ())}"
                )
        return self


# ------------------------------------------------------------------------------------------------- pretraining


class EmbeddedModelSize(Params):
    """The architecture of the embedded base model."""

    image_px: Count = 64
    latent_channels: Count = 8
    autoencoder_channels: tuple[Count, ...] = (16, 32, 64)
    autoencoder_norm_groups: Count = 4  # several channels a group: alone, each channel would lose its mean
    unet_channels: tuple[Count, ...] = (64, 128, 192)
    unet_attention: tuple[bool, ...] = (False, True, True)  # cross-attention by level
    unet_norm_groups: Count = 16
    text_width: Count = 192
    text_layers: Count = 3
    max_tokens: Count = 40
    vision_width: Count = 128
    vision_layers: Count = 4
    vision_patch_px: Count = 8

    @model_validator(mode="after")
    def _levels_fit(self) -> EmbeddedModelSize:
        if len(self.unet_attention) != len(self.unet_channels):
            raise ValueError(
                f"unet_attention has {len(self.unet_attention)} entries for {len(self.unet_channels)} unet_channels"
            )
        if self.image_px % self.vision_patch_px:
            raise ValueError(f"vision_patch_px {self.vision_patch_px} does not divide image_px {self.image_px}")
        return self


class PublishedObjects(Params):
    """Which drawings captions name by their published names."""

    min_styles: Count  # that draw an object
    max_words: Count = 3  # of its name
    look_alikes: dict[str, Texts] = Field(default_factory=dict)  # word -> names of drawings that one of them stands for
    left_out: Texts = ()


class StageParams(Params):
    """One stage of pretraining: warm-up, a constant rate, and a decay to zero at its end."""

    num_steps: Count
    batch_size: Count  # per process
    lr: Positive  # AdamW's: of embeddings, norms, biases and the outermost layers
    matrix_lr: Positive | None = None  # Muon's: of the matrices and kernels between them; None: AdamW's too
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    decay_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2  # of all steps, over which the rate falls to 0
    decay_now: bool = False  # begin the decay where the last checkpoint is, whatever num_steps says
    minutes: Positive | None = None  # size num_steps by the throughput of the first steps instead
    ema_decay: Probability = 0.999
    weight_decay: NonNegative = 0.0
    checkpoint_minutes: NonNegative = 10.0  # 0: after every step
    num_scenes: Count = 24_000  # distinct captioned scenes drawn for the stage


class DenoiserParams(StageParams):
    """The stage of UNet and text encoder, whose scenes are drawn anew for every step."""

    tinted_share: Probability = 0.25  # of objects
    timestep_density: Literal["uniform", "logit_normal"] = "uniform"
    drawing_processes: Annotated[int, Field(ge=0)] = 0  # that draw scenes ahead; 0: between the steps


class PretrainParams(Params):
    """The recipe of the embedded base model."""

    seed: Seed = 0
    num_processes: Count = 2  # on CPU: one thread each; ignored on a GPU
    sprite_px: Count = 96
    size: EmbeddedModelSize = EmbeddedModelSize()
    styles: dict[str, str]  # sprite package -> its word in captions
    autoencoder_only_packages: tuple[str, ...] = ()
    held_out_styles: dict[str, str] = Field(default_factory=dict)
    objects: dict[str, str]  # word in captions -> code point
    published_objects: PublishedObjects | None = None  # beside these, by their published names
    held_out_objects: dict[str, str] = Field(default_factory=dict)
    start: str | None = None  # folder of an embedded base model
    keep_autoencoder: bool = False  # take that of `start`
    continue_denoiser: bool = False  # begin with UNet and text encoder of `start`; words that it lacks begin fresh
    autoencoder: StageParams
    towers: StageParams
    denoiser: DenoiserParams

    @model_validator(mode="after")
    def _start_is_given_where_it_is_used(self) -> PretrainParams:
        if self.start is None and (self.keep_autoencoder or self.continue_denoiser):
            raise ValueError("keep_autoencoder and continue_denoiser need start, a folder of an embedded base model")
        return self


# ------------------------------------------------------------------------------------------------- the judge


class JudgeParams(Params):
    """The recipe of the judge of the embedded base model's pictures."""

    seed: Seed = 1
    sprite_px: Count = 128  # another size than the base model's sprites
    channels: Annotated[tuple[Annotated[int, Field(ge=4, multiple_of=4)], ...], Field(min_length=1, max_length=5)]
    training: StageParams
    num_test_scenes: Count = 4000


SECTIONS: dict[str, type[Params]] = {
    "device": DeviceParams,
    "ingestion": IngestionParams,
    "prompts": PromptsParams,
    "regularization": RegularizationParams,
    "training": TrainingParams,
    "evaluation": EvaluationParams,
    "generate": GenerateParams,
    "export": ExportParams,
    "import": ImportParams,
    "pretrain": PretrainParams,
    "judge": JudgeParams,
}
"""Every top-level section of the configuration; nodes get them as `params:<section>`."""
