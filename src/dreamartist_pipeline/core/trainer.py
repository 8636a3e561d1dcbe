"""The training loop and its state, the same for a concept and for the stages of pretraining.

`train` iterates over optimizer steps; what differs between trainings is passed in as functions of the step. All that a
training changes is in its `TrainingState`: a training continues from its `state_dict` exactly where it was taken.
Reporting, previews and checkpoints are the caller's, between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from dreamartist_pipeline.errors import InputError

_Parts = TypeVar("_Parts")


# ------------------------------------------------------------------------------------------------- the state


class Averages:
    """Running averages of parameters over the steps taken; before the first one, the initial values.

    Attributes:
        values: the averages, in the order of the parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], weight: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Start from the parameters' values.

        Args:
            parameters: what is averaged.
            weight: the weight of the newest values, by the number of steps averaged with them: float64 `[]` to `[]`.
        """
        self._parameters, self._weight = tuple(parameters), weight
        self.values = [parameter.detach().clone() for parameter in parameters]
        self._num_steps = torch.zeros((), dtype=torch.float64, device=parameters[0].device)

    def update(self, taken: torch.Tensor) -> None:
        """Add the parameters' values where `taken`, a boolean `[]` on their device, is true; else change nothing."""
        self._num_steps += taken
        weight = torch.where(taken, self._weight(self._num_steps), 0)
        for average, parameter in zip(self.values, self._parameters, strict=True):
            average.lerp_(parameter.detach(), weight.to(average.dtype))

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and how many steps they hold."""
        return {"values": self.values, "num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for average, value in zip(self.values, state["values"], strict=True):
            average.copy_(value)
        self._num_steps.copy_(state["num_steps"])


def normalized_ema(decay: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the weight with which n steps average to Σ βⁿ⁻ⁱ θᵢ / Σ βⁿ⁻ⁱ: the initial values weigh nothing."""
    return lambda num_steps: (1 - decay) / (1 - decay**num_steps)


@runtime_checkable
class AveragingOptimizer(Protocol):
    """An optimizer whose parameters hold its average in eval mode, such as schedule-free AdamW."""

    def train(self) -> None:
        """Put the values that train into the parameters."""

    def eval(self) -> None:
        """Put the average into the parameters."""


@dataclass
class TrainingState:
    """All that a training changes.

    Attributes:
        parameters: what trains, in a fixed order; each with a gradient after a backward pass.
        optimizers: together they update all parameters.
        averages: of the parameters, or None.
        scaler: of the loss, against underflow of float16 gradients; disabled by default.
        step: how many steps are done.
    """

    parameters: Sequence[nn.Parameter]
    optimizers: Sequence[Optimizer]
    averages: Averages | None = None
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    step: int = 0

    def update(self, finite: torch.Tensor) -> None:
        """Take one step with all optimizers, without reading from the device where there is but one optimizer.

        While the scaler is on, gradients that are not finite skip the step for all parameters. It is not averaged
        then, but counts as a step.

        Args:
            finite: whether all gradients were finite before clipping; a boolean `[]` on the device.
        """
        # The scaler asks every optimizer about its own gradients only, and clipping has spread a NaN to all.
        if not (self.scaler.is_enabled() and len(self.optimizers) > 1 and not finite):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        if self.averages:
            self.averages.update(finite)
        self.step += 1

    def keep_averages(self) -> None:
        """Put the averages into the parameters, where there are any; training goes on only within `averaged`."""
        for optimizer in self._averaging_optimizers():
            optimizer.eval()
        if self.averages:
            _copy_into(self.parameters, self.averages.values)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the averages in the parameters within, and afterwards exactly the values that train."""
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
        """Return a copy of the state: dicts and lists of tensors, numbers, booleans and None."""
        state: dict[str, Any] = _plain_copy(
            {
                "step": self.step,
                "parameters": self.parameters,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "averages": self.averages.state_dict() if self.averages else {},
                "scaler": self.scaler.state_dict(),
            }
        )
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; the given state is not changed by further steps.

        Raises:
            InputError: it belongs to a training of other parameters.
        """
        expected, got = ([tuple(p.shape) for p in ps] for ps in (self.parameters, state["parameters"]))
        if got != expected or bool(state["averages"]) != bool(self.averages):
            raise InputError(
                expected=(
                    f"the state of a training of parameters of shapes {expected}, "
                    f"{'with' if self.averages else 'without'} averages"
                ),
                got=f"shapes {got}, {'with' if state['averages'] else 'without'} them",
                remedy="continue with the parameters it was started with",
            )
        state = _plain_copy(state)
        _copy_into(self.parameters, state["parameters"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        if self.averages:
            self.averages.load_state_dict(state["averages"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = int(state["step"])


def _copy_into(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


def _plain_copy(value: Any) -> Any:
    """Copy nested containers: tensors are cloned, tuples become lists."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _plain_copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_copy(item) for item in value]
    return value


# ------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class FinishedStep(Generic[_Parts]):
    """What one step did; its tensors are still on the device.

    Attributes:
        step: from 1.
        loss: `[]`.
        parts: what the loss function returned beside the loss.
        grad_norms: of each parameter's gradient before clipping, `[num_parameters]`.
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
    loss_of: Callable[[int], tuple[torch.Tensor, _Parts]],
    clip: Callable[[torch.Tensor], None],
    average_gradients: Callable[[Sequence[nn.Parameter]], None] | None = None,
) -> Iterator[FinishedStep[_Parts]]:
    """Train until `num_steps` steps are done, and yield each; between two of them the state may be read and saved.

    Args:
        state: changed in place; its `step` says where to continue.
        num_steps: of the whole training.
        set_rates: sets the optimizers' learning rates for a step, from 0.
        loss_of: draws a step's batch, from 0, and returns its scalar loss and what is to be reported of it.
        clip: clips the gradients in place; it is given their norms, `[num_parameters]`, and may refuse them.
        average_gradients: over processes that train together; it is given the parameters.
    """
    while state.step < num_steps:
        step = state.step
        set_rates(step)
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=False)  # parameters' gradients may be views of one tensor
        loss, parts = loss_of(step)
        torch.autograd.backward(state.scaler.scale(loss))
        if average_gradients:
            average_gradients(state.parameters)
        for optimizer in state.optimizers:
            state.scaler.unscale_(optimizer)
        norms = gradient_norms(state.parameters)
        clip(norms)
        state.update(norms.isfinite().all())
        yield FinishedStep(state.step, loss.detach(), parts, norms)


def gradient_norms(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return the norm of each parameter's gradient, `[num_parameters]`; 0 where there is none."""
    gradients = [p.new_zeros(()) if p.grad is None else p.grad for p in parameters]
    return torch.stack(torch._foreach_norm(gradients))
