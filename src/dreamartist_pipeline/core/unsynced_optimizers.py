"""Prodigy and schedule-free AdamW without waiting for the device.

prodigyopt reads two numbers from the device for every parameter and step, to estimate the learning rate. schedulefree
counts its steps on the CPU, where a step that loss scaling skips cannot be taken back without reading from the device.
Here these numbers are tensors `[]` in the state of each parameter. Everything else (arguments, defaults, switching to
the averages) is the libraries' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from torch.optim import Optimizer


class UnsyncedProdigy(Prodigy):  # type: ignore[misc]
    """Prodigy (Mishchenko and Defazio 2024) with one parameter, and its estimate d of the learning rate on the device.

    The options are those of this project: decoupled weight decay and safeguard_warmup, no bias correction, no limit of
    the growth of d. The estimate is float32 (float64 on the CPU in prodigyopt).
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group, parameter in _parameters(self):
            d0 = parameter.new_tensor(group["d0"])
            self.state[parameter] = {
                "d": d0,
                "numerator": torch.zeros_like(d0),
                "start": parameter.detach().clone(),
                "progress": torch.zeros_like(parameter.data),
                "exp_avg": torch.zeros_like(parameter.data),
                "exp_avg_sq": torch.zeros_like(parameter.data),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update the estimate and the parameter (algorithm 4 of the paper, as in prodigyopt)."""
        for group, parameter in _parameters(self):
            lr, state = group["lr"], self.state[parameter]
            rate = lr * state["d"]
            if lr > 0:
                self._update_averages(state, group, parameter, rate)
            denominator = state["exp_avg_sq"].sqrt().add_(state["d"] * group["eps"])
            if group["weight_decay"]:
                parameter.sub_(parameter * (group["weight_decay"] * rate))
            parameter.sub_(state["exp_avg"] / denominator * rate)

    @staticmethod
    def _update_averages(
        state: dict[str, torch.Tensor], group: dict[str, Any], parameter: torch.Tensor, rate: torch.Tensor
    ) -> None:
        """Add the gradient to all averages, and raise d to the new lower bound of the distance to the solution."""
        (beta1, beta2), grad, d = group["betas"], parameter.grad, state["d"]
        assert grad is not None
        beta3 = math.sqrt(beta2)
        growth = d / group["d0"]
        moved = torch.dot(grad.flatten(), (state["start"] - parameter).flatten())
        state["numerator"].mul_(beta3).add_(growth * rate * moved)
        state["exp_avg"].mul_(beta1).add_(grad * (d * (1 - beta1)))
        state["exp_avg_sq"].mul_(beta2).add_(grad * grad * (d * d * (1 - beta2)))
        state["progress"].mul_(beta3).add_(grad * (growth * d))
        total = state["progress"].abs().sum()
        bound = torch.where(total > 0, group["d_coef"] * state["numerator"] / total, d)
        d.copy_(torch.maximum(d, bound))


class UnsyncedScheduleFree(AdamWScheduleFree):  # type: ignore[misc]
    """Schedule-free AdamW (Defazio et al. 2024) with its step count and sum of weights on the device.

    The options are those of this project: no warm-up of its own, averaging weights proportional to the squared maximum
    of the learning rate so far.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for _, parameter in _parameters(self):
            zero = parameter.new_zeros(())
            self.state[parameter] = {
                "z": parameter.detach().clone(),
                "exp_avg_sq": torch.zeros_like(parameter.data),
                "num_steps": zero,
                "largest_lr": zero.clone(),
                "weight_sum": zero.clone(),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Run one step, as `AdamWScheduleFree.step` without foreach."""
        for group, y in _parameters(self):
            (beta1, beta2), lr, state = group["betas"], group["lr"], self.state[y]
            num_steps, largest = state["num_steps"].add_(1), state["largest_lr"].clamp_(min=lr)
            weight = largest ** group["weight_lr_power"]
            weight_sum = state["weight_sum"].add_(weight)
            share = torch.where(weight_sum > 0, weight / weight_sum, 0.0)
            state["exp_avg_sq"].mul_(beta2).addcmul_(y.grad, y.grad, value=1 - beta2)
            correction = -torch.expm1(num_steps * math.log(beta2))  # 1 − β₂ⁿ without cancellation
            denominator = (state["exp_avg_sq"] / correction).sqrt_().add_(group["eps"])
            direction = y.grad / denominator
            if group["weight_decay"]:
                direction.add_(y, alpha=group["weight_decay"])
            y.lerp_(state["z"], share)
            y.add_(direction * (lr * (beta1 * (1 - share) - 1)))
            state["z"].sub_(direction, alpha=lr)


def _parameters(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield (group, parameter)."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter
