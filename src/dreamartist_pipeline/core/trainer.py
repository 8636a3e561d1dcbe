"""The training loop and its state, for concepts and for the stages of pretraining.

`train` iterates over optimizer steps and calls functions of the step for everything that is specific to a training. The
complete state is in `TrainingState`: a training resumed from its `state_dict` gives the same bits. Logging, previews
and checkpoints are up to the caller, between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from dreamartist_pipeline.core.optimizers import step_unless
from dreamartist_pipeline.errors import InputError

_Parts = TypeVar("_Parts")
Backward = Callable[[torch.Tensor], None]
"""Runs the backward pass of a scalar loss, with the loss scaling of the training."""


# ------------------------------------------------------------------------------------------------- the state


class Averages:
    """Running averages of parameters over steps; the initial values before the first step.

    Attributes:
        values: the averages, in the order of the parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], weight: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Initialise the averages with the current values.

        Args:
            parameters: to average.
            weight: maps the number of steps, including the newest, to the weight of the newest: float64 `[]` to `[]`.
        """
        self._parameters, self._weight = tuple(parameters), weight
        self.values = [parameter.detach().clone() for parameter in parameters]
        self._num_steps = torch.zeros((), dtype=torch.float64, device=parameters[0].device)

    def update(self, taken: torch.Tensor) -> None:
        """Add the current values if `taken`, a boolean `[]` on their device, is true."""
        self._num_steps += taken
        weight = torch.where(taken, self._weight(self._num_steps), 0)
        changes = torch._foreach_sub([parameter.detach() for parameter in self._parameters], self.values)
        torch._foreach_mul_(changes, weight.to(changes[0].dtype))
        torch._foreach_add_(self.values, changes)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and their number of steps."""
        return {"values": self.values, "num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        for average, value in zip(self.values, state["values"], strict=True):
            average.copy_(value)
        self._num_steps.copy_(state["num_steps"])


def normalized_ema(decay: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the weight function of the average Σ βⁿ⁻ⁱ θᵢ / Σ βⁿ⁻ⁱ over n steps, without the initial values."""
    return lambda num_steps: (1 - decay) / (1 - decay**num_steps)


@runtime_checkable
class AveragingOptimizer(Protocol):
    """An optimizer that averages its iterates, such as schedule-free AdamW."""

    def train(self) -> None:
        """Set the parameters to the training values."""

    def eval(self) -> None:
        """Set the parameters to the averages."""


@dataclass
class TrainingState:
    """The complete state of a training.

    Attributes:
        parameters: trainable, in a fixed order; each has a gradient after the backward pass.
        optimizers: of all parameters.
        averages: of the parameters, or None.
        scaler: scales the loss, against underflow of float16 gradients; disabled by default.
        step: number of finished steps.
    """

    parameters: Sequence[nn.Parameter]
    optimizers: Sequence[Optimizer]
    averages: Averages | None = None
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    step: int = 0

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar loss, scaled by the scaler if it is enabled."""
        torch.autograd.backward(self.scaler.scale(loss))

    def update(self, finite: torch.Tensor) -> None:
        """Run one step of all optimizers, without synchronizing with the device.

        If the scaler is enabled, gradients that are not finite skip the step for all parameters. A skipped step is not
        averaged, but counts as a step.

        Args:
            finite: whether all gradients were finite before clipping, a boolean `[]` on the device.
        """
        for optimizer in self.optimizers:
            if self.scaler.is_enabled():
                step_unless(~finite, optimizer)
            else:
                optimizer.step()
        self.scaler.update()
        if self.averages:
            self.averages.update(finite)
        self.step += 1

    def keep_averages(self) -> None:
        """Set the parameters to the averages, if any, at the end of a training."""
        for optimizer in self._averaging_optimizers():
            optimizer.eval()
        if self.averages:
            _copy_into(self.parameters, self.averages.values)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Set the parameters to the averages within this context, and restore the exact training values afterwards."""
        if not self.averages and not self._averaging_optimizers():
            yield
            return
        training = [parameter.detach().clone() for parameter in self.parameters]
        self.keep_averages()
        try:
            yield
        finally:
            for optimizer in self._averaging_optimizers():
                optimizer.train()
            _copy_into(self.parameters, training)

    def _averaging_optimizers(self) -> list[AveragingOptimizer]:
        return [optimizer for optimizer in self.optimizers if isinstance(optimizer, AveragingOptimizer)]

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state as dicts and lists of tensors on the CPU, numbers, booleans and None."""
        state: dict[str, Any] = _plain(self.to_save(), copy=True)
        return state

    def to_save(self) -> dict[str, Any]:
        """Return the state with the tensors of the training itself, to be saved before the next step."""
        return {
            "step": self.step,
            "parameters": _plain(self.parameters),
            "optimizers": _plain([optimizer.state_dict() for optimizer in self.optimizers]),
            "averages": _plain(self.averages.state_dict()) if self.averages else {},
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a copy of the result of `state_dict`.

        Raises:
            InputError: the parameters or averages do not match.
        """
        expected, got = ([tuple(p.shape) for p in ps] for ps in (self.parameters, state["parameters"]))
        groups, saved_groups = (
            [len(each["param_groups"]) for each in optimizers]
            for optimizers in ([each.state_dict() for each in self.optimizers], state["optimizers"])
        )
        if got != expected or saved_groups != groups or bool(state["averages"]) != bool(self.averages):
            raise InputError(
                expected=f"a state with shapes {expected}, averages={bool(self.averages)} and optimizers of {groups} "
                "groups",
                got=f"shapes {got}, averages={bool(state['averages'])} and optimizers of {saved_groups} groups",
                remedy="resume with the configuration of the interrupted training",
            )
        state = _plain(state, copy=True)
        _copy_into(self.parameters, state["parameters"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            decays = [group["weight_decay"] for group in optimizer.param_groups]
            optimizer.load_state_dict(optimizer_state)
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay  # an option, like the learning rate, which is set in every step
        if self.averages:
            self.averages.load_state_dict(state["averages"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = int(state["step"])


def _copy_into(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


def _plain(value: Any, copy: bool = False) -> Any:
    """Return nested containers with tensors on the CPU, copied if they are not there or if asked; lists for tuples."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=copy)
    if isinstance(value, dict):
        return {key: _plain(item, copy) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, copy) for item in value]
    return value


# ------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class FinishedStep(Generic[_Parts]):
    """The results of one step; tensors are on the device.

    Attributes:
        step: counted from 1.
        loss: `[]`.
        parts: second result of `gradients_of`.
        grad_norms: gradient norm of each parameter before clipping, `[num_parameters]`.
    """

    step: int
    loss: torch.Tensor
    parts: _Parts
    grad_norms: torch.Tensor


def train(
    state: TrainingState,
    num_steps: int,
    *,
    set_rates: Callable[[int], None],
    gradients_of: Callable[[int], tuple[torch.Tensor, _Parts]],
    clip: Callable[[torch.Tensor], None],
    average_gradients: Callable[[Sequence[nn.Parameter]], None] | None = None,
) -> Iterator[FinishedStep[_Parts]]:
    """Run steps until `num_steps` are done, and yield each one; the state may be saved between two steps.

    Steps passed to the functions count from 0.

    Args:
        state: updated in place; `state.step` is the first step to run.
        num_steps: of the whole training.
        set_rates: sets the learning rates of a step.
        gradients_of: runs the backward passes of a step with `state.backward`; it returns the scalar loss, detached,
            and values to report. See `whole_batch`.
        clip: takes the gradient norms `[num_parameters]` and clips the gradients in place; it may raise.
        average_gradients: averages the gradients of the parameters over processes.
    """
    while state.step < num_steps:
        step = state.step
        set_rates(step)
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=False)  # parameters' gradients may be views of one tensor
        loss, parts = gradients_of(step)
        if average_gradients:
            average_gradients(state.parameters)
        for optimizer in state.optimizers:
            state.scaler.unscale_(optimizer)
        norms = gradient_norms(state.parameters)
        clip(norms)
        state.update(norms.isfinite().all())
        yield FinishedStep(state.step, loss, parts, norms)


def whole_batch(
    state: TrainingState, loss_of: Callable[[int], tuple[torch.Tensor, _Parts]]
) -> Callable[[int], tuple[torch.Tensor, _Parts]]:
    """Return `gradients_of` of `train` for steps with one backward pass.

    Args:
        state: of the training.
        loss_of: returns the scalar loss of a step, and values to report.
    """

    def gradients_of(step: int) -> tuple[torch.Tensor, _Parts]:
        loss, parts = loss_of(step)
        state.backward(loss)
        return loss.detach(), parts

    return gradients_of


def gradient_norms(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return the gradient norm of each parameter, `[num_parameters]`; 0 without a gradient."""
    gradients = [p.new_zeros(()) if p.grad is None else p.grad for p in parameters]
    return torch.stack(torch._foreach_norm(gradients))
