"""The same training of both branches in several designs: this project's layers, PEFT, hooks, and no adapters.

All designs have the same adapters and words to start from, the same training loop (`core.training.fit`), batches and
optimizer. They differ in how the adapters are applied in the UNet and the text encoder.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dreamartist_pipeline.backbones.concepts import NewConcept, start_concept
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.batches import TrainingData
from dreamartist_pipeline.core.branches import BRANCH_NAMES, rows_of
from dreamartist_pipeline.core.course import StepRecord
from dreamartist_pipeline.core.lora_factors import SHARED
from dreamartist_pipeline.core.parameter_groups import ADAPTERS, parameter_groups
from dreamartist_pipeline.core.prompt_tokens import Conditioning, PromptTokens
from dreamartist_pipeline.core.training import fit
from dreamartist_pipeline.core.training_step import (
    Execution,
    TrainableModel,
    lr_factor,
    packed_factors,
    training_state,
)
from dreamartist_pipeline.params import ResolvedGroup, TrainingParams
from dreamartist_pipeline.pipelines.training.data import training_data
from dreamartist_pipeline.pipelines.training.trainable import trainable_model

OURS = "this project"
COMPILED = "this project, compiled"
PEFT = "PEFT, two passes"
PEFT_HALF = "PEFT, two passes, bfloat16 adapters"
HOOK = "hook that adds to a slice of the batch"
FROZEN = "frozen networks, trigger words only"
_TOLERANCE = {  # relative, of a single gradient and of all together
    torch.float32: (5e-3, 1e-3),
    torch.bfloat16: (0.25, 0.05),
    torch.float16: (0.05, 0.01),
}
_UP_STD = 0.05  # up is not zero, so that down has a gradient
_SEED = 0


@dataclass(frozen=True)
class Update:
    """The update of one LoRA group in one layer, as a training starts with it.

    Attributes:
        network: such as `unet`.
        layer: its name.
        group: the LoRA group.
        down: `[rank, in]`, or `[rank, in, kh, kw]`.
        up: `[out, rank]`, or `[out, rank, 1, 1]`.
    """

    network: str
    layer: str
    group: ResolvedGroup
    down: torch.Tensor
    up: torch.Tensor

    @property
    def rows(self) -> tuple[int, ...]:
        """The branches that it acts on."""
        return tuple(row for row, name in enumerate(BRANCH_NAMES) if self.group.branch in (name, SHARED))

    @property
    def scale(self) -> float:
        """The factor alpha / rank."""
        return self.group.alpha / self.down.shape[0]


@dataclass(frozen=True)
class Design:
    """One way to run both branches; `model` has the same parameter groups in all designs with adapters."""

    name: str
    model: TrainableModel

    @property
    def is_adapted(self) -> bool:
        """Whether it trains adapters."""
        return any(group.kind == ADAPTERS for group in self.model.groups)

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """Return the gradient of every trained tensor by group and position."""
        return {
            f"{group.name}[{index}]": parameter.grad
            for group in self.model.groups
            for index, parameter in enumerate(group.parameters)
        }


# ---------------------------------------------------------------------------------------------- making the designs


def our_design(backbone: Backbone, params: TrainingParams) -> Design:
    """Return this project's training, its adapters without effect at the start."""
    new = start_concept(backbone, params, lr_factor(params), _SEED)
    return Design(OURS, trainable_model(new, parameter_groups(new.stacks, new.words, _words_lr(params))))


def build_designs(
    backbone: Backbone, params: TrainingParams, with_others: bool = True, with_compiled: bool = False
) -> list[Design]:
    """Return all designs over copies of the base model that share its weights.

    Args:
        backbone: the base model.
        params: of the training.
        with_others: whether PEFT and hooks are among them.
        with_compiled: whether this project with a compiled denoiser is (`training.backend: compile`).

    Raises:
        SystemExit: a training that the other designs cannot express.
    """
    _check(params)
    ours = start_concept(backbone, params, lr_factor(params), _SEED)
    updates = randomize_updates(ours)
    groups = parameter_groups(ours.stacks, ours.words, _words_lr(params))
    designs = [Design(OURS, trainable_model(ours, groups))]
    if with_compiled:
        designs.append(_compiled_design(backbone, params))
    others = {PEFT: _two_passes, HOOK: _slice_hooks} if with_others else {}
    if with_others and backbone.dtype == torch.bfloat16:
        others[PEFT_HALF] = functools.partial(_two_passes, dtype=torch.bfloat16)
    for name, make in others.items():
        new = _without_adapters(backbone, params, ours)
        parameters, changed = make(new, updates)
        adapters = [
            dataclasses.replace(group, parameters=tuple(parameters[group.name]))
            for group in groups
            if group.kind == ADAPTERS
        ]
        model = trainable_model(new, (*adapters, *parameter_groups({}, new.words, _words_lr(params))))
        designs.append(Design(name, dataclasses.replace(model, **changed)))
    frozen = _without_adapters(backbone, params, ours)
    words = parameter_groups({}, frozen.words, _words_lr(params))
    return [*designs, Design(FROZEN, trainable_model(frozen, words))]


def _compiled_design(backbone: Backbone, params: TrainingParams) -> Design:
    new = start_concept(backbone, params, lr_factor(params), _SEED)
    randomize_updates(new)
    new.backbone.compile_denoiser()
    return Design(COMPILED, trainable_model(new, parameter_groups(new.stacks, new.words, _words_lr(params))))


def _words_lr(params: TrainingParams) -> float:
    return params.words.lr * lr_factor(params)


def _check(params: TrainingParams) -> None:
    groups = [group for groups in params.lora.values() for group in groups]
    special = [g for g in groups if g.dropout or g.bias or g.svd_init or g.timestep_min_rank is not None]
    if params.num_branches != len(BRANCH_NAMES) or special or not groups:
        raise SystemExit(
            "expected a training of two branches with LoRA groups without dropout, bias, svd_init and "
            f"timestep_min_rank; got {params.num_branches} branch(es) and {len(special)} group(s) with these"
        )


def without_dropout(params: TrainingParams) -> TrainingParams:
    """Return the training without dropout, whose masks are random in every design."""
    lora = {
        f"lora_{network}": tuple(group.model_copy(update={"dropout": 0.0}) for group in groups)
        for network, groups in params.lora.items()
    }
    return params.model_copy(update=lora)


def _without_adapters(backbone: Backbone, params: TrainingParams, ours: NewConcept) -> NewConcept:
    """Return a concept with words only, equal to those of `ours`."""
    new = start_concept(backbone, params.model_copy(update={f"lora_{n}": () for n in params.lora}), 1, _SEED)
    for encoder, words in new.words.items():
        for vectors, others in zip(words.vectors, ours.words[encoder].vectors, strict=True):
            vectors.data.copy_(others)
    return new


def randomize_updates(new: NewConcept) -> list[Update]:
    """Draw `up` of all updates, and return copies of all factors in the order of the parameter groups."""
    generator = torch.Generator().manual_seed(_SEED)
    updates = []
    for network, adapters in new.stacks.items():
        for layer, module in adapters.layers.items():
            for update in module.updates:
                up = torch.randn(update.up.shape, generator=generator) * _UP_STD
                update.up.data.copy_(up)
                updates.append(
                    Update(network, layer, update.group, update.down.detach().clone(), update.up.detach().clone())
                )
    return updates


_Parameters = dict[str, list[nn.Parameter]]
"""Group name -> its parameters, down and up of every layer."""


def _two_passes(
    new: NewConcept, updates: Sequence[Update], dtype: torch.dtype = torch.float32
) -> tuple[_Parameters, dict[str, Any]]:
    """Inject PEFT adapters of this dtype, one per LoRA group; a pass per branch, with `set_adapter` between.

    `set_adapter` disables the gradients of the other branch's adapters; they are enabled again before each pass.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    parameters: _Parameters = {}
    for update in updates:
        parameters.setdefault(update.group.name, [])
    for name in parameters:
        _inject_peft(new, [update for update in updates if update.group.name == name], parameters[name], dtype)
    for words in new.words.values():
        words.requires_grad_(True)  # PEFT freezes everything but its adapters
        words.base.requires_grad_(False)
    tuners = {
        network: [module for module in new.backbone.networks[network].modules() if isinstance(module, BaseTunerLayer)]
        for network in {update.network for update in updates}
    }
    names = [
        list(dict.fromkeys(_adapter_name(update.group) for update in updates if row in update.rows))
        for row in range(len(BRANCH_NAMES))
    ]

    def activate(row: int) -> None:
        for modules in tuners.values():
            for module in modules:
                module.set_adapter(names[row])
        for group in parameters.values():
            for parameter in group:
                parameter.requires_grad_(True)

    return parameters, _by_branch(new, activate)


def _inject_peft(
    new: NewConcept, updates: Sequence[Update], parameters: list[nn.Parameter], dtype: torch.dtype
) -> None:
    """Inject the adapter of one group, copy its factors, and append its parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    network, group, name = new.backbone.networks[updates[0].network], updates[0].group, _adapter_name(updates[0].group)
    ranks = {update.layer: update.down.shape[0] for update in updates}
    config = LoraConfig(
        r=next(iter(ranks.values())),
        rank_pattern=ranks if len(set(ranks.values())) > 1 else {},
        lora_alpha=group.alpha,  # type: ignore[arg-type]  # a float works
        target_modules=list(ranks),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # intended
        inject_adapter_in_model(config, network, adapter_name=name)
    for update in updates:
        tuner: Any = network.get_submodule(update.layer)
        for factors, values in ((tuner.lora_A, update.down), (tuner.lora_B, update.up)):
            factors[name].weight.data = values.to(dtype, copy=True)
            parameters.append(factors[name].weight)


def _adapter_name(group: ResolvedGroup) -> str:
    return group.name.replace(".", "_")  # a module name


def _by_branch(new: NewConcept, activate: Callable[[int], None]) -> dict[str, Any]:
    """Return `denoise` and `encode` that run one pass per branch, after `activate(branch)`."""

    def denoise(
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        framing: torch.Tensor | None = None,
    ) -> torch.Tensor:
        predictions = []
        for row, rows in enumerate(_branch_rows(latents)):
            activate(row)
            framed = None if framing is None else framing[rows]
            predictions.append(new.backbone.denoise(latents[rows], timesteps[rows], conditioning[rows], framed))
        return torch.cat(predictions)

    def encode(tokens: PromptTokens) -> Conditioning:
        encoded = []
        for row, rows in enumerate(_branch_rows(tokens.ids)):
            activate(row)
            encoded.append(new.prompts.encode(tokens[rows]))
        return _concatenate(encoded)

    return {"denoise": denoise, "encode": encode}


def _branch_rows(stacked: torch.Tensor) -> Sequence[torch.Tensor]:
    return torch.arange(len(stacked), device=stacked.device).chunk(len(BRANCH_NAMES))


def _concatenate(parts: Sequence[Any]) -> Any:
    """Concatenate the conditioning of several prompts: tensors, or dataclasses of tensors and None."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(list(parts))
    fields = {field.name: [getattr(part, field.name) for part in parts] for field in dataclasses.fields(parts[0])}
    return type(parts[0])(**{name: None if values[0] is None else torch.cat(values) for name, values in fields.items()})


def _slice_hooks(new: NewConcept, updates: Sequence[Update]) -> tuple[_Parameters, dict[str, Any]]:
    """Register a forward hook per update that adds it to its branch's slice of the batch."""
    parameters: _Parameters = {}
    for update in updates:
        down, up = nn.Parameter(update.down.clone()), nn.Parameter(update.up.clone())
        parameters.setdefault(update.group.name, []).extend([down, up])
        layer = new.backbone.networks[update.network].get_submodule(update.layer)
        for row in update.rows:
            layer.register_forward_hook(_slice_hook(row, down, up, update.scale))
    return parameters, {}


def _slice_hook(row: int, down: nn.Parameter, up: nn.Parameter, scale: float) -> Callable[..., torch.Tensor]:
    def hook(layer: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        size = len(output) // len(BRANCH_NAMES)
        rows = slice(row * size, (row + 1) * size)
        x = inputs[0][rows]
        lowered, raised = down.to(x.dtype), up.to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            hidden = F.conv2d(x, lowered, None, layer.stride, layer.padding, layer.dilation)
            update = F.conv2d(hidden, raised)
        else:
            update = F.linear(F.linear(x, lowered), raised)
        output[rows] = output[rows] + update * scale
        return output

    return hook


# ---------------------------------------------------------------------------------------------- data and steps


def make_data(backbone: Backbone, params: TrainingParams, side_px: int) -> TrainingData:
    """Return the training data of a random picture, with regularization pictures of random content."""
    new = start_concept(backbone, params, 1, _SEED)
    generator = torch.Generator().manual_seed(_SEED)

    def picture() -> Image.Image:
        pixels = torch.randint(0, 256, (side_px, side_px, 3), generator=generator, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())

    num_others = 4 * params.regularization_batch_size
    others = [(f"a photo of {number} birds", picture()) for number in range(2, 2 + num_others)]
    mask = Image.new("L", (side_px, side_px), 127)
    return training_data(backbone, new.prompts, picture(), mask, others, params, "white background")


def step_seconds(
    design: Design, data: TrainingData, params: TrainingParams, clock: Callable[[], float], as_graph: bool = False
) -> Callable[[], float]:
    """Return a function that trains and returns the mean seconds of `params.num_steps` steps.

    On a GPU, as many steps run before them, in which libraries choose algorithms and the CUDA graph is recorded.

    Args:
        design: to train.
        data: of the training.
        params: of the training.
        clock: in seconds, see `clock_for`.
        as_graph: whether the passes of a step are one CUDA graph.
    """
    num_before = params.num_steps if data.reference.mean.device.type == "cuda" else 0
    num_run = num_before + params.num_steps
    # The last twentieth of a training: no good state is copied in it (`core.divergence.GoodStates`).
    whole = params.model_copy(update={"num_steps": 20 * num_run})
    first_step = whole.num_steps - num_run
    execution = Execution(as_graph=as_graph, read_every=params.num_steps)

    def run() -> float:
        state = training_state(design.model, params)
        state.step = first_step
        times = {first_step: clock()}

        def on_step(record: StepRecord) -> None:  # after the device has finished the step
            if record.step in (first_step + num_before, whole.num_steps):
                times[record.step] = clock()

        fit(design.model, data, whole, on_step, state=state, execution=execution)
        if as_graph:  # its memory is apart from that of other designs, and kept until the graph is deleted
            gc.collect()
            torch.cuda.empty_cache()
        return (times[whole.num_steps] - times[first_step + num_before]) / params.num_steps

    return run


@dataclass(frozen=True)
class Pass:
    """Inputs of a forward and backward pass of the UNet alone, of both branches.

    Attributes:
        latents: noisy, `[2B, C, h, w]`.
        timesteps: `[2B]`.
        conditioning: of 2B rows; its tensors are leaves with gradients.
        target: `[2B, C, h, w]`.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    conditioning: Any
    target: torch.Tensor


def make_pass(design: Design, data: TrainingData, params: TrainingParams) -> Pass:
    """Draw the inputs of one pass with the rows of a step."""
    num_rows = params.batch_size + params.regularization_batch_size
    generator = torch.Generator().manual_seed(1)
    device, shape = data.reference.mean.device, (2 * num_rows, *data.reference.mean.shape[1:])
    tokens = data.reference.tokens.branches_in_rows()
    first = rows_of(torch.zeros(num_rows, dtype=torch.long, device=device), len(tokens) // 2, 2)
    with torch.no_grad():
        conditioning = design.model.encode(tokens)[first]
    return Pass(
        torch.randn(shape, generator=generator).to(device),
        torch.randint(0, 1000, (2 * num_rows,), generator=generator).to(device),
        leaves(conditioning),
        torch.randn(shape, generator=generator).to(device),
    )


def leaves(conditioning: Any) -> Any:
    """Return a copy whose floating-point tensors are leaves with gradients."""
    if isinstance(conditioning, torch.Tensor):
        return conditioning.detach().clone().requires_grad_(conditioning.is_floating_point())
    values = {field.name: getattr(conditioning, field.name) for field in dataclasses.fields(conditioning)}
    return type(conditioning)(**{name: None if value is None else leaves(value) for name, value in values.items()})


def run_pass(design: Design, inputs: Pass) -> None:
    """Run forward and backward of the UNet; afterwards the gradients are in the parameters."""
    for group in design.model.groups:
        for parameter in group.parameters if group.kind == ADAPTERS else ():  # words get no gradient here
            parameter.grad = None
    with packed_factors(design.model):
        prediction = design.model.denoise(inputs.latents, inputs.timesteps, inputs.conditioning, None)
        F.mse_loss(prediction.float(), inputs.target).backward()  # type: ignore[no-untyped-call]


def check_agreement(designs: Sequence[Design], dtype: torch.dtype, run: Callable[[Design], object]) -> int:
    """Run all designs with adapters once, compare their gradients with the first one's, and return their number.

    Args:
        designs: to compare.
        dtype: of the base model.
        run: leaves the gradients of a design in its parameters.

    Raises:
        SystemExit: a gradient differs, is missing or zero.
    """
    adapted = [design for design in designs if design.is_adapted]
    gradients = []
    for design in adapted:
        with _without_tensor_float():
            run(design)
        gradients.append(
            {name: None if gradient is None else gradient.clone() for name, gradient in design.gradients().items()}
        )
    for design, other in zip(adapted[1:], gradients[1:], strict=True):
        if wrong := _differences(gradients[0], other, _TOLERANCE[dtype]):
            raise SystemExit(
                f"expected '{design.name}' and '{adapted[0].name}' to compute the same; "
                f"got {len(wrong)} differences: {', '.join(wrong[:4])}"
            )
    return len(gradients[0])


@contextmanager
def _without_tensor_float() -> Iterator[None]:
    """Compute float32 products of a GPU in float32: TensorFloat-32 rounds differently for each number of rows."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def _differences(
    ours: dict[str, torch.Tensor | None], theirs: dict[str, torch.Tensor | None], tolerance: tuple[float, float]
) -> list[str]:
    found = [f"parameter {name}" for name in sorted(ours.keys() ^ theirs.keys())]
    compared = []  # squared norms of difference and gradient
    for name in ours.keys() & theirs.keys():
        mine, other = ours[name], theirs[name]
        if mine is None or other is None or not mine.any() or not other.any():
            found.append(f"missing gradient of {name}")
            continue
        compared.append(((mine.double() - other.double()).square().sum(), other.double().square().sum()))
        if _ratio(*compared[-1]) > tolerance[0]:
            found.append(f"gradient of {name}")
    if compared and _ratio(*(torch.stack(sums).sum() for sums in zip(*compared, strict=True))) > tolerance[1]:
        found.append("all gradients together")
    return found


def _ratio(squared_difference: torch.Tensor, squared_norm: torch.Tensor) -> float:
    return (squared_difference / squared_norm).sqrt().item()


def one_step(design: Design, data: TrainingData, params: TrainingParams) -> None:
    """Train one step, which leaves the (clipped) gradients in the parameters."""
    fit(design.model, data, params.model_copy(update={"num_steps": 1}), state=training_state(design.model, params))
