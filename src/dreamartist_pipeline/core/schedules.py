"""Schedules of learning rate and momentum."""

from __future__ import annotations

import math

from dreamartist_pipeline.params import ScheduleParams

# Defaults of torch.optim.lr_scheduler.OneCycleLR: learning rate relative to its peak, and β₁ of Adam.
_ONE_CYCLE_RATES = (1 / 25, 1.0, 1 / 25e4)  # at the start, the peak and the end
_ONE_CYCLE_BETA1 = (0.95, 0.85, 0.95)


def schedule_factor(schedule: ScheduleParams, step: int, num_steps: int) -> float:
    """Return the learning rate at `step` (from 0), relative to its peak.

    - constant: linear warm-up, then 1.
    - cosine: linear warm-up, then half a cosine to 0.
    - one_cycle: half a cosine from 1/25 to 1 at step `warmup_steps` − 1, then half a cosine to 1/250000 (Smith and
      Topin 2018; OneCycleLR of torch with its defaults and pct_start = warmup_steps / num_steps).
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
    """Return β₁ of Adam at `step` (from 0), or None if it is not scheduled.

    one_cycle: 0.95 at the start, 0.85 at the peak of the learning rate, 0.95 at the end (cycle_momentum of OneCycleLR).
    """
    if schedule.kind != "one_cycle":
        return None
    return _one_cycle(_ONE_CYCLE_BETA1, step, min(schedule.warmup_steps, num_steps), num_steps)


def _one_cycle(values: tuple[float, float, float], step: int, warmup: int, num_steps: int) -> float:
    """Interpolate from the first value to the second at step `warmup` − 1, and to the third at the last step.

    Without warm-up, the second value would be at step −1 and is not used. For a warm-up of one step, where OneCycleLR
    divides by zero, the first step has the second value.
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
