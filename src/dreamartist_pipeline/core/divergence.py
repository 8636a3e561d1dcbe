"""What counts as a diverged training, and what makes a finished one doubtful.

All bounds are here. A training is judged by its losses and gradient norms in every step, and by its parameters after
some steps; `GoodStates` keeps the states to which it can go back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any

import numpy as np
import torch

WINDOW = 20
"""Number of losses of which the median is taken."""
EXPLOSION = 10.0
"""Median loss, relative to that of the first `WINDOW` steps, from which a training has diverged."""
WORSE_THAN_NOTHING = 100.0
"""Loss, relative to that of predicting zeros, from which a training has diverged, in the first step already."""
WORD_GROWTH, SMALLEST_RMS = 1000.0, 0.01
"""RMS of a word's vectors, relative to the initial one but at least this, from which they have diverged."""
SKIPPED_IN_A_ROW = 40
"""Steps skipped by the gradient scaler: its scale falls from 2¹⁶ to 2⁻²⁴, the smallest number of float16."""
MOST_HALVINGS = 5
"""Halvings of the learning rates in one training."""
_FINAL_WINDOW, _DOUBTFUL_LOSS, _NEARLY = 50, 2.0, 0.5
_LOWEST_DOUBTFUL_SHARE, _GROWTH_OF_SHARE = 0.5, 3.0


@dataclass(frozen=True)
class Divergence:
    """A divergence that was found.

    Attributes:
        step: after which it was found, counted from 1.
        expected: of a training that does not diverge.
        got: instead.
    """

    step: int
    expected: str
    got: str


# ------------------------------------------------------------------------------------------------- losses

_Row = Mapping[str, float]
"""A step of the history: `StepRecord.row`."""


@dataclass(frozen=True)
class LossBounds:
    """Bounds of losses and gradient norms.

    Attributes:
        null_losses: of predicting zeros in the first steps, without the reconstruction loss.
        regularization_weight: of `loss_regularization`.
        skips: whether a gradient scaler skips steps with gradients that are not finite.
    """

    null_losses: Sequence[float]
    regularization_weight: float
    skips: bool = False

    @property
    def null_loss(self) -> float:
        """The median loss of predicting zeros."""
        return median(self.null_losses)

    def divergence(self, history: Sequence[_Row]) -> Divergence | None:
        """Judge the last step of a history."""
        last = history[-1]
        if not math.isfinite(last["loss"]):  # with a scaler, too: it scales gradients alone
            problem: tuple[str, str] | None = "a finite loss", str(last["loss"])
        else:
            problem = self._exploded(history) or self._not_finite(history)
        return Divergence(int(last["step"]), *problem) if problem else None

    def _not_finite(self, history: Sequence[_Row]) -> tuple[str, str] | None:
        """Check the gradients of the last step, or of many steps if a scaler skips some."""
        last = history[-1]
        names = _infinite_gradients(last)
        if not names:
            return None
        if not self.skips:
            return f"finite gradients of {', '.join(names)}", str(last[f"{_NORM}{names[0]}"])
        recent = history[-SKIPPED_IN_A_ROW:]
        if len(recent) < SKIPPED_IN_A_ROW or not all(map(_infinite_gradients, recent)):
            return None
        return f"finite gradients within {SKIPPED_IN_A_ROW} steps of loss scaling", "none"

    def _exploded(self, history: Sequence[_Row]) -> tuple[str, str] | None:
        recent = history[-WINDOW:]
        if len(history) > WINDOW:
            now, first = _median(recent), _median(history[:WINDOW])
            if now > EXPLOSION * first:
                return f"a median loss of at most {EXPLOSION:g} times {first:.3g}, as in the first steps", f"{now:.3g}"
        # the lower median: single steps may be far off
        now, bound = median_low(map(self._denoising, recent)), WORSE_THAN_NOTHING * self.null_loss
        if now > bound:
            return f"a loss of at most {bound:.3g}, {WORSE_THAN_NOTHING:g} times that of predicting zeros", f"{now:.3g}"
        return None

    def _denoising(self, row: _Row) -> float:
        return row["loss_reference"] + self.regularization_weight * row.get("loss_regularization", 0.0)

    def doubts(self, history: Sequence[_Row]) -> list[str]:
        """Return what makes the result of a finished training doubtful, by its losses; nothing for a few steps."""
        found = []
        size = min(_FINAL_WINDOW, len(history) // 2)
        if size >= WINDOW:
            first, last = _median(history[:size]), _median(history[-size:])
            start, highest = _median(history[:WINDOW]), _highest_median(history)
            if last > _DOUBTFUL_LOSS * first:
                found.append(f"the median loss of {size} steps rose from {first:.3g} at first to {last:.3g} at the end")
            elif highest > _NEARLY * EXPLOSION * start:
                found.append(f"the median loss of {WINDOW} steps rose from {start:.3g} at first to {highest:.3g}")
        if len(history) >= WINDOW:
            last = median(map(self._denoising, history[-max(size, WINDOW) :]))
            if last > self._doubtful_share(history[0]) * self.null_loss:
                found.append(f"the last losses, {last:.3g}, are near or above that of zeros, {self.null_loss:.3g}")
        return found

    def _doubtful_share(self, first: _Row) -> float:
        """Return the share of the loss of zeros from which the last losses are doubtful.

        It depends on the first step, which no update has changed: learning rates that are too high can spoil the next
        ones, so that their median says nothing.
        """
        at_first = self._denoising(first) / self.null_losses[0] if self.null_losses[0] else 0.0
        return min(max(_LOWEST_DOUBTFUL_SHARE, _GROWTH_OF_SHARE * at_first), _DOUBTFUL_LOSS)


_NORM = "grad_norm/"


def _infinite_gradients(row: _Row) -> list[str]:
    return [name.removeprefix(_NORM) for name in row if name.startswith(_NORM) and not math.isfinite(row[name])]


def _median(rows: Sequence[_Row]) -> float:
    return median(row["loss"] for row in rows)


def _highest_median(history: Sequence[_Row]) -> float:
    """Return the highest median of `WINDOW` losses in a row."""
    losses = np.array([row["loss"] for row in history])
    return float(np.median(np.lib.stride_tricks.sliding_window_view(losses, WINDOW), axis=1).max())


# ------------------------------------------------------------------------------------------------- parameters


class StateBounds:
    """Bounds of parameters, relative to their initial values."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], words: Sequence[str]) -> None:
        """Measure the initial values.

        Args:
            parameters: by name, before the first step; updated in place by the training.
            words: the names of those that are vectors of words.
        """
        self._parameters, self._words = dict(parameters), list(words)
        self._bounds = [WORD_GROWTH * max(rms, SMALLEST_RMS) for rms in self._rms()]

    def divergence(self, step: int, averages: Sequence[torch.Tensor] = ()) -> Divergence | None:
        """Judge the parameters after a step, and their averages if there are some, in the same order."""
        values = zip(self._parameters, self._parameters.values(), strict=True)
        named = [*values, *zip(self._parameters, averages, strict=False)]
        flags = are_finite([tensor for _, tensor in named])
        for (name, _), is_finite in zip(named, flags, strict=True):
            if not is_finite:
                return Divergence(step, f"finite values in {name}", "infinite values or NaN")
        for name, rms, bound in zip(self._words, self._rms(), self._bounds, strict=True):
            if rms > bound:
                expected = (
                    f"vectors of {name} with an RMS of at most {bound:.3g}, {WORD_GROWTH:g} times the initial one"
                )
                return Divergence(step, expected, f"{rms:.3g}")
        return None

    def doubts(self) -> list[str]:
        """Return the words whose vectors have nearly reached their bound."""
        return [
            f"the vectors of {name} have an RMS of {rms:.3g}; at {bound:.3g} the training would have been stopped"
            for name, rms, bound in zip(self._words, self._rms(), self._bounds, strict=True)
            if rms > _NEARLY * bound
        ]

    def _rms(self) -> list[float]:
        """Return the root mean square of each word's vectors."""
        vectors = [self._parameters[name].detach() for name in self._words]
        if not vectors:
            return []
        norms: list[float] = torch.stack(torch._foreach_norm(vectors)).tolist()
        return [norm / math.sqrt(tensor.numel()) for norm, tensor in zip(norms, vectors, strict=True)]


def are_finite(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Return whether all values of each tensor are finite, read from the device at once, without temporary tensors."""
    bounds = torch.stack([torch.stack(tensor.detach().aminmax()) for tensor in tensors])  # NaN if any value is NaN
    flags: list[bool] = bounds.isfinite().all(dim=1).tolist()
    return flags


# ------------------------------------------------------------------------------------------------- going back


@dataclass(frozen=True)
class Halving:
    """A return to a good state, from which the training goes on with half the learning rates.

    Attributes:
        diverged_at: the step after which the divergence was found.
        back_to: the last step of the good state.
    """

    diverged_at: int
    back_to: int


class GoodStates:
    """The last two states of a training that were found good, in memory.

    The newest state before a divergence may be affected already. The training goes back to one that is at least
    `interval` steps older than the divergence, if there is one.

    Attributes:
        interval: steps between two states; it depends on the training alone, so that results do not depend on time.
        states: of `TrainingState.state_dict`, the older one first.
    """

    def __init__(self, num_steps: int) -> None:
        self.interval = max(10, math.ceil(num_steps / 20))
        self.states: list[dict[str, Any]] = []

    def is_due(self, step: int) -> bool:
        """Return whether a state is checked and kept after a step."""
        return step % self.interval == 0

    def keep(self, state: dict[str, Any]) -> None:
        """Keep a state in place of the older one."""
        self.states = [*self.states[-1:], state]

    def forget_from(self, step: int) -> None:
        """Keep what a training that diverged at `step` can go back to."""
        old_enough = [state for state in self.states if step - state["step"] >= self.interval]
        self.states = old_enough or self.states[:1]


def likely_causes(found: Divergence, rates: Mapping[str, float], guidance_scale: str, dtype: torch.dtype) -> str:
    """Return the likely causes of a divergence, as a part of a sentence.

    Args:
        found: the divergence; the loss of the first step does not depend on the learning rates.
        rates: peak learning rates by group.
        guidance_scale: of the training.
        dtype: of the base model.
    """
    causes = [f"guidance_scale={guidance_scale} too high", "damaged weights of the base model"]
    if found.step > 1:
        causes.insert(0, f"learning rates too high (here up to {max(rates.values()):g})")
    if dtype in (torch.float16, torch.bfloat16):
        causes.append(f"{str(dtype).removeprefix('torch.')}, where device.dtype=float32 may help")
    return ", ".join(causes)
