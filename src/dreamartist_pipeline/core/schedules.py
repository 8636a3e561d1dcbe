"""Learning rates by step, as factors of their peak, and the momentum that belongs to them."""

from __future__ import annotations

import math

from dreamartist_pipeline.params import ScheduleParams

# Defaults of torch.optim.lr_scheduler.OneCycleLR: the rate as a fraction of its peak, and Adam's β₁.
_ONE_CYCLE_RATES = (1 / 25, 1.0, 1 / 25e4)  # at the start, the peak and the end
_ONE_CYCLE_BETA1 = (0.95, 0.85, 0.95)


def schedule_factor(schedule: ScheduleParams, step: int, num_steps: int) -> float:
    """Return the learning rate at `step` (from 0) as a fraction of its peak.

    constant: linear warm-up, then 1. cosine: linear warm-up, then half a cosine to 0. one_cycle: half a cosine from
    1/25 to 1, reached at step `warmup_steps` − 1, then another down to 1/250000 (Smith & Topin 2018; torch's OneCycleLR
    with its defaults and pct_start = warmup_steps / num_steps).
    """
    warmup = min(schedule.warmup_steps, num_steps)
    match schedule.kind:
        case "constant":
            return min(1.0, (step + 1) / (warmup + 1))
        case "cosine":
            progress = (step - warmup) / max(1, num_steps - warmup - 1)
            return min(1.0, (step + 1) / (warmup + 1)) * _cosine(1.0, 0.0, max(0.0, progress))
        case "one_cycle":
            return _one_cycle(_ONE_CYCLE_RATES, step, warmup, num_steps)


def scheduled_beta1(schedule: ScheduleParams, step: int, num_steps: int) -> float | None:
    """Return Adam's β₁ at `step` (from 0), or None where the schedule leaves it to the optimizer.

    one_cycle: 0.95 at the start, 0.85 at the peak of the learning rate, 0.95 at the end, as OneCycleLR with
    cycle_momentum.
    """
    if schedule.kind != "one_cycle":
        return None
    return _one_cycle(_ONE_CYCLE_BETA1, step, min(schedule.warmup_steps, num_steps), num_steps)


def _one_cycle(values: tuple[float, float, float], step: int, warmup: int, num_steps: int) -> float:
    """Go from the first value to the second, at step `warmup` − 1, and on to the third, at the last step.

    Without warm-up the second belongs to the step before the first one, so that it is never used. OneCycleLR divides by
    zero where the warm-up is one step; here that step has the second value, its limit.
    """
    start, peak, end = values
    peak_step = warmup - 1
    if step < peak_step:
        return _cosine(start, peak, step / peak_step)
    if step == peak_step:
        return peak
    return _cosine(peak, end, (step - peak_step) / (num_steps - 1 - peak_step))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
