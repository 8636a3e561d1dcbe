"""How a training is made to fit into memory: decided before the first step, kept in the plan, and said."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, open_base_model
from dreamartist_pipeline.backbones.concepts import NewConcept, start_concept
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.backbones.placement import off_device
from dreamartist_pipeline.backbones.quantization import stored_bytes
from dreamartist_pipeline.core.devices import (
    empty_cache,
    free_memory_bytes,
    peak_memory_bytes,
    pick_device,
    reset_peak_memory,
)
from dreamartist_pipeline.core.memory import StepShape, count_step, measure_step
from dreamartist_pipeline.core.parameter_groups import parameter_groups
from dreamartist_pipeline.core.training_step import lr_factor
from dreamartist_pipeline.errors import InputError, is_out_of_memory
from dreamartist_pipeline.params import DeviceParams, MemoryParams, TrainingParams
from dreamartist_pipeline.pipelines.training.data import training_prompts
from dreamartist_pipeline.pipelines.training.trainable import idle_modules, trainable_model

_GIB = 2**30
_OPTIMIZER_VALUES = 4  # float32 per trained value: itself, its gradient, two moments
_ALLOCATOR_SHARE = 0.1  # of the counted memory: fragments and work space of kernels
_MATRIX_SIDE, _USABLE_SHARE = 512, 0.4  # of a matrix product's speed: reached by whole steps, seen on a CPU

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------- the decision


@dataclass(frozen=True)
class MemoryPlan:
    """How the steps of a training are computed; gradients are those of the plain step.

    Attributes:
        checkpointing: whether activations are computed again in the backward pass.
        micro_batch: rows of one pass, in each branch; None for all rows of a step.
    """

    checkpointing: bool = False
    micro_batch: int | None = None

    def __str__(self) -> str:
        rows = "all rows in one pass" if self.micro_batch is None else f"passes of {self.micro_batch} rows"
        return f"{rows}, {'with' if self.checkpointing else 'without'} gradient checkpointing"

    def as_options(self) -> str:
        """Return the options that repeat this decision, as in `--params`."""
        return (
            f"training.memory.checkpointing={str(self.checkpointing).lower()},"
            f"training.memory.micro_batch={self.micro_batch or 0}"
        )


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of a training, in bytes.

    Attributes:
        weights: of the base model's parts that the steps use.
        activations: the most during a forward and backward pass.
        optimizer: trained values, gradients and the optimizer's state.
        flops: of a step.
    """

    weights: int
    activations: int
    optimizer: int
    flops: int

    @property
    def total(self) -> int:
        """Everything, with the allocator's share."""
        return round((self.weights + self.activations + self.optimizer) * (1 + _ALLOCATOR_SHARE))

    def __str__(self) -> str:
        parts = (("weights", self.weights), ("activations", self.activations), ("optimizer", self.optimizer))
        return f"{gib(self.total)} GiB ({', '.join(f'{name} {gib(size)}' for name, size in parts)})"


def gib(size: int) -> str:
    """Return bytes as GiB with two digits."""
    return f"{size / _GIB:.2g}"


def possible_plans(params: MemoryParams, num_rows: int) -> list[MemoryPlan]:
    """Return the plans that the options allow, from the fastest to the one with the least memory.

    Smaller passes come before checkpointing, which computes about half as much again. (Unmeasured on a GPU.)
    """
    sizes = dict.fromkeys([None, -(-num_rows // 2), 1]) if params.micro_batch is None else [params.micro_batch or None]
    sizes = dict.fromkeys(None if size is None or size >= num_rows else size for size in sizes)
    switches = (False, True) if params.checkpointing is None else (params.checkpointing,)
    return [MemoryPlan(checkpointing, size) for checkpointing in switches for size in sizes]


def step_shape(
    planned: NewConcept, params: TrainingParams, caption: str, side_px: int | None, num_processes: int = 1
) -> StepShape:
    """Return the sizes of a training's steps, as the process with the most rows computes them.

    Args:
        planned: on the meta device.
        params: of the training.
        caption: of the reference image.
        side_px: side of a square with the area of the reference image; None for the size of the base model.
        num_processes: that share the rows.
    """
    backbone = planned.backbone
    side = (side_px or backbone.image_px) // backbone.latent_scale
    num_prompts = min(params.batch_size, len(training_prompts(params, caption)))
    num_rows = -(-(params.batch_size + params.regularization_batch_size) // num_processes)
    return StepShape(
        latents=(backbone.latent_channels, side, side),
        num_rows=num_rows,
        num_prompts=num_prompts + params.regularization_batch_size,
        num_tokens=planned.prompts.tokenize([""]).ids.shape[-1],
        num_reconstructed=min(num_rows, params.batch_size) if params.loss.reconstruction_weight else 0,
    )


def plan_memory(
    files: BaseModelFiles,
    planned: NewConcept,
    params: TrainingParams,
    device: DeviceParams,
    shape: StepShape,
    num_processes: int = 1,
) -> dict[str, Any]:
    """Decide how the steps are computed, by an estimate and, on a GPU, by measured steps, and log it with the duration.

    Processes have a GPU each, or share the memory and the arithmetic of the CPU.

    Args:
        files: of the base model; on a GPU, it is loaded.
        planned: on the meta device, in the dtype of the training; see `estimate_memory`.
        params: of the training.
        device: of the training.
        shape: of a step.
        num_processes: that share its rows.

    Returns:
        The entries of the training plan: `memory`, a `MemoryPlan`, and `memory_estimate`.

    Raises:
        InputError: no plan fits into the memory of the GPU.
    """
    chosen = pick_device(device)
    per_device = num_processes if chosen.type == "cpu" else 1
    limit = (round((params.memory.limit_gib or 0) * _GIB) or free_memory_bytes(chosen)) // per_device
    plans = possible_plans(params.memory, shape.num_rows)
    estimates = []
    for plan in plans:
        estimates.append(estimate_memory(planned, params, shape, plan))
        if estimates[-1].total <= limit:
            break
    estimate = estimates[-1]
    if chosen.type == "cpu":
        seconds = expected_seconds(estimate.flops * per_device, planned.backbone.dtype)
    else:
        backbone = open_base_model(files.path, device)
        plan, seconds = first_that_fits(plans[plans.index(plan) :], backbone, params, shape, limit)
    of_each = f", in each of {num_processes} processes" if num_processes > 1 else ""
    log.info("A step takes about %s of %s GiB on %s%s: %s.", estimate, gib(limit), chosen, of_each, plan)
    if estimate.total > limit:
        log.warning("This may be too much: %s.", remedy(plan))
    _log_duration(seconds, params.num_steps, is_measured=chosen.type != "cpu")
    return {"memory": dataclasses.asdict(plan), "memory_estimate": dataclasses.asdict(estimate)}


def first_that_fits(
    plans: Sequence[MemoryPlan], backbone: Backbone, params: TrainingParams, shape: StepShape, limit: int
) -> tuple[MemoryPlan, float]:
    """Run a step by each plan, and return the first that fits into `limit` bytes, and the seconds of a step.

    Raises:
        InputError: none fits.
    """
    device = backbone.device
    for plan in plans:
        is_last = plan is plans[-1]
        try:
            with out_of_memory_explained(device, plan):
                seconds, peak = _run_step(backbone, params, shape, plan)
        except InputError:
            if is_last:
                raise
        else:
            if is_last or peak is None or peak <= limit:
                return plan, seconds
        log.info("Too much memory: %s.", plan)
        empty_cache(device)
    raise ValueError("expected at least one plan, got none")


def _run_step(
    backbone: Backbone, params: TrainingParams, shape: StepShape, plan: MemoryPlan
) -> tuple[float, int | None]:
    """Return the seconds of a step, and the peak memory if it is known."""
    new = start_concept(backbone, params, lr_factor(params), seed=0)
    if plan.checkpointing:
        new.backbone.checkpoint_gradients()
    model = trainable_model(new, parameter_groups(new.stacks, new.words, params.words.lr))
    reset_peak_memory(backbone.device)
    with off_device(idle_modules(new, params), backbone.device):
        seconds = measure_step(model, shape, backbone.device, plan.micro_batch)
    return seconds, peak_memory_bytes(backbone.device)


def estimate_memory(planned: NewConcept, params: TrainingParams, shape: StepShape, plan: MemoryPlan) -> MemoryEstimate:
    """Return the memory of a training, counted on the meta device.

    Args:
        planned: on the meta device, in the dtype of the training; a plan with checkpointing turns it on there.
        params: of the training.
        shape: of a step.
        plan: how steps are computed.
    """
    if plan.checkpointing:
        planned.backbone.checkpoint_gradients()
    groups = parameter_groups(planned.stacks, planned.words, params.words.lr)
    counted = count_step(trainable_model(planned, groups), shape, plan.micro_batch)
    idle = {id(module) for module in idle_modules(planned, params)}
    networks = (*planned.backbone.networks.values(), planned.backbone.autoencoder)
    used = [module for module in networks if id(module) not in idle]
    return MemoryEstimate(
        weights=sum(_frozen_bytes(module) for module in used),
        activations=counted.peak_bytes,
        optimizer=4 * _OPTIMIZER_VALUES * sum(group.num_parameters for group in groups),
        flops=counted.flops,
    )


def _frozen_bytes(module: nn.Module) -> int:
    return sum(stored_bytes(parameter) for parameter in module.parameters() if not parameter.requires_grad)


# ------------------------------------------------------------------------------------------------- the plan


def memory_plan(training_plan: Mapping[str, Any], params: TrainingParams) -> MemoryPlan:
    """Return the decision of a training plan; options given since then take precedence.

    Raises:
        InputError: the plan has none, because its file is damaged.
    """
    try:
        decided, given = MemoryParams.model_validate(training_plan["memory"]), params.memory
    except (KeyError, TypeError, ValidationError) as error:
        raise InputError(
            expected="memory: {checkpointing: …, micro_batch: …} in training_plan",
            got="a damaged file",
            remedy="run the node check_training again",
        ) from error
    checkpointing = decided.checkpointing if given.checkpointing is None else given.checkpointing
    micro_batch = decided.micro_batch if given.micro_batch is None else given.micro_batch
    return MemoryPlan(bool(checkpointing), micro_batch or None)


# ------------------------------------------------------------------------------------------------- the duration


def expected_seconds(flops: int, dtype: torch.dtype) -> float:
    """Return the expected seconds of a step on the CPU, from the speed of a matrix product."""
    return flops / (_flops_per_second(dtype, torch.get_num_threads()) * _USABLE_SHARE)


@functools.cache
def _flops_per_second(dtype: torch.dtype, _num_threads: int) -> float:
    matrix = torch.ones(_MATRIX_SIDE, _MATRIX_SIDE, dtype=dtype)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - started)
    return 2 * _MATRIX_SIDE**3 / min(times)


def _log_duration(seconds: float, num_steps: int, is_measured: bool) -> None:
    log.info(
        "The %d steps take about %s (hours:minutes:seconds), %.2g s each, as %s, and the time of previews.",
        num_steps,
        timedelta(seconds=round(seconds * num_steps)),
        seconds,
        "measured" if is_measured else "estimated",
    )


# ------------------------------------------------------------------------------------------------- out of memory


@contextmanager
def out_of_memory_explained(device: torch.device, plan: MemoryPlan) -> Iterator[None]:
    """Convert an error of an allocation into an InputError that says what to lower.

    Raises:
        InputError: the memory is exhausted.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            expected=f"a training that fits into the memory of {device}, of which {gib(free_memory_bytes(device))} GiB "
            "are free",
            got=f"more, with {plan} ({str(error).splitlines()[0] if str(error) else type(error).__name__})",
            remedy=f"{remedy(plan)}; earlier results are unchanged, and the regularization set is kept",
        ) from error


def remedy(plan: MemoryPlan) -> str:
    """Return what lowers the memory of a training that is computed by this plan."""
    steps: Sequence[str] = [
        *([] if plan.micro_batch == 1 else ["training.memory.micro_batch=1"]),
        *([] if plan.checkpointing else ["training.memory.checkpointing=true"]),
        "device.dtype=bfloat16",
        "device.quantize=int8",
        "a lower ingestion.bucket.side_px",
    ]
    return f"use {', '.join(steps[:-1])}, or {steps[-1]}; or close other programs"
