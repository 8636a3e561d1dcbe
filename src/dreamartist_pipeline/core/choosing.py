"""Which step of a training becomes the concept: when it is scored, what a score is, and the choice.

The objective is the highest fidelity among the steps whose agreement, drift and copying are within bounds. Nothing here
depends on time: when a training is scored follows from counted forward passes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dreamartist_pipeline.params import ScoringParams, TrainingParams

BUDGET = 0.15
"""Of the forward passes of a training, the share that scoring may cost, at every scoring."""
MOST_KEPT = 20
MOST_KEPT_BYTES = 500_000_000
"""Kept concepts of one training. The chosen and the last are kept in any case."""

_BACKWARD = 1  # forward passes that cost as much as a backward pass: the weights are frozen
_DRAWING_BRANCHES = 2
_ROUND_ABOVE, _ROUND_TO = 10, 10  # intervals, so that the numbers of scored steps are round


# ------------------------------------------------------------------------------------------------- when


@dataclass(frozen=True)
class ScoringCost:
    """Forward passes of the denoiser, each of one row of one branch.

    Attributes:
        step: of a training step, with its backward pass.
        base: of the base model's images, which are drawn once.
        scoring: of one scoring.
    """

    step: int
    base: int
    scoring: int

    @classmethod
    def of(cls, params: TrainingParams) -> ScoringCost:
        """Count the passes of a training."""
        scoring = params.scoring
        num_images = len(scoring.prompts) * scoring.images_per_prompt + len(scoring.prior_prompts)
        drawing = num_images * scoring.sampler.num_inference_steps * _DRAWING_BRANCHES
        sets = 1 + bool(params.regularization_batch_size)
        rows = params.batch_size + params.regularization_batch_size
        return cls(
            step=rows * params.num_branches * (1 + _BACKWARD),
            base=drawing,
            scoring=drawing + sets * scoring.validation_rows * params.num_branches,
        )


def scored_steps(params: TrainingParams) -> tuple[int, ...]:
    """Return the steps after which a training is scored; the last is one of them, if there are any.

    With `every: auto`, a training whose concept does not depend on scores has none. For others, the interval is the
    shortest with which scoring costs at most `BUDGET` of all passes up to every scored step, the base model's images
    included. The first interval is longer. A training too short for two scored steps is not scored: there is nothing to
    choose.
    """
    every, last = params.scoring.every, params.num_steps
    if not params.scoring.prompts or not last or every == 0:
        return ()
    if every != "auto":
        return (*range(every, last, every), last)
    if not params.needs_scores:
        return ()
    cost = ScoringCost.of(params)
    first = math.ceil((cost.base + cost.scoring) / (BUDGET * cost.step))
    interval = math.ceil(cost.scoring / (BUDGET * cost.step))
    if interval > _ROUND_ABOVE:
        interval = math.ceil(interval / _ROUND_TO) * _ROUND_TO
    steps = range(last, first - 1, -interval)
    return tuple(steps[::-1]) if len(steps) > 1 else ()


# ------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Score:
    """How good the concept of one step is; images are drawn from the same prompts and seeds at every step.

    Attributes:
        step: of the training.
        fidelity: mean cosine of the object and the reference's object.
        agreement: of images with their prompts: share with the asked background, or mean CLIPScore; None: unmeasured.
        drift: mean distance of prior images from the base model's, relative to the mean distance among those.
        copying: of the reference image, from 0 for the base model's images to 1 for copies.
        loss_reference: mean loss of the reference image on validation noise and timesteps.
        loss_regularization: of the regularization set, or None without one.
    """

    step: int
    fidelity: float
    agreement: float | None
    drift: float
    copying: float
    loss_reference: float
    loss_regularization: float | None = None

    def values(self) -> dict[str, float]:
        """Return the measured values by name, without the step."""
        named = dataclasses.asdict(self)
        return {name: value for name, value in named.items() if name != "step" and value is not None}


def least_agreement(base_agreement: float | None, loss: float) -> float | None:
    """Return the bound on agreement: that of the base model, less a share of it; None if that is not measured."""
    return None if base_agreement is None else (1 - loss) * base_agreement


@dataclass(frozen=True)
class Bounds:
    """What a chosen step has to keep.

    Attributes:
        agreement: at least; None: unmeasured.
        drift: at most.
        copying: at most.
    """

    agreement: float | None
    drift: float
    copying: float

    @classmethod
    def of(cls, params: ScoringParams, base_agreement: float | None) -> Bounds:
        """Return the bounds, relative to the base model's agreement."""
        return cls(least_agreement(base_agreement, params.agreement_loss), params.max_drift, params.max_copying)

    def passed(self, score: Score) -> tuple[str, ...]:
        """Return the names of the bounds that a score has passed."""
        found = [name for name in ("drift", "copying") if not getattr(score, name) <= getattr(self, name)]
        if self.agreement is not None and not (score.agreement is not None and score.agreement >= self.agreement):
            found.insert(0, "agreement")
        return tuple(found)

    def __str__(self) -> str:
        agreement = "" if self.agreement is None else f"agreement of at least {self.agreement:.2f}, "
        return f"{agreement}drift of at most {self.drift:g}, copying of at most {self.copying:g}"


# ------------------------------------------------------------------------------------------------- the choice


@dataclass(frozen=True)
class Choice:
    """The chosen step.

    Attributes:
        step: of the training.
        reason: one sentence, without a full stop.
        is_within_bounds: whether the step is known to be within them; always true without scores.
    """

    step: int
    reason: str
    is_within_bounds: bool = True


def choose_step(scores: Sequence[Score], bounds: Bounds) -> Choice:
    """Choose among the scored steps, which are in order and not empty.

    The step with the highest fidelity within the bounds, the earlier of equal ones. Where agreement is not measured,
    fidelity alone would choose copies: the last step within the bounds. If no step is within them, the last.
    """
    last = scores[-1]
    within = [score for score in scores if not bounds.passed(score)]
    if not within:
        return Choice(last.step, f"no step is within the bounds ({bounds}), so it is the last", False)
    if bounds.agreement is None:
        if within[-1] is last:
            return Choice(last.step, f"it is the last, and within the bounds ({bounds}); agreement is not measured")
        passed = " and ".join(bounds.passed(last))
        reason = f"it is the latest within the bounds ({bounds}); the last step passes that of {passed}"
        return Choice(within[-1].step, f"{reason}, and agreement is not measured")
    best = max(within, key=lambda score: score.fidelity)
    compared = "" if best is last else f" (the last step: {last.fidelity:.3f})"
    among = f"{len(within)} of {len(scores)} scored steps are within the bounds ({bounds})"
    return Choice(best.step, f"it has the highest fidelity, {best.fidelity:.3f}{compared}; {among}")


def standing(scores: Sequence[Score], bounds: Bounds) -> float:
    """Return how good a training is so far: the highest fidelity within the bounds.

    Without a step within them, it is the last fidelity less 2, which is below that of any such step.
    """
    within = [score.fidelity for score in scores if not bounds.passed(score)]
    return max(within) if within else scores[-1].fidelity - 2


def has_stalled(scores: Sequence[Score], choice: Choice, patience: int | None) -> bool:
    """Return whether the last `patience` scorings gave no better step; False without patience, or without any good."""
    if patience is None or not choice.is_within_bounds:
        return False
    return sum(score.step > choice.step for score in scores) >= patience


# ------------------------------------------------------------------------------------------------- what is kept


def most_kept(concept_bytes: int) -> int:
    """Return how many concepts of this size are kept: at least the chosen one and the last."""
    return max(2, min(MOST_KEPT, MOST_KEPT_BYTES // max(1, concept_bytes)))


def thinned(steps: Collection[int], needed: Collection[int], most: int) -> list[int]:
    """Return at most `most` of the steps, evenly spread: the step whose neighbours are nearest goes first.

    Args:
        steps: in any order.
        needed: steps that stay.
        most: at least the number of needed ones.
    """
    left = sorted(steps)
    while len(left) > most:
        spans = {
            step: (left[index + 1] if index + 1 < len(left) else math.inf) - (left[index - 1] if index else 0)
            for index, step in enumerate(left)
            if step not in needed
        }
        left.remove(min(spans, key=spans.__getitem__))
    return left


def rows_of_scores(
    scores: Sequence[Score], bounds: Bounds, floor: Mapping[str, float], chosen: int
) -> list[dict[str, float]]:
    """Return one row per score, with the constants that a figure of them needs in every row.

    Args:
        scores: of a training.
        bounds: of a chosen step.
        floor: the base model's values, by name.
        chosen: the chosen step.
    """
    limits = {f"{name}_bound": value for name, value in dataclasses.asdict(bounds).items() if value is not None}
    floors = {f"{name}_of_base": value for name, value in floor.items()}
    return [
        {
            "step": score.step,
            **score.values(),
            "within_bounds": not bounds.passed(score),
            "chosen": score.step == chosen,
            **limits,
            **floors,
        }
        for score in scores
    ]
