"""Learning rates by step, as factors of their peak."""

from __future__ import annotations

import math

from dreamartist_pipeline.params import ScheduleParams

_ONE_CYCLE_START, _ONE_CYCLE_END = 1 / 25, 1 / 25e4  # of the peak; torch.optim.lr_scheduler.OneCycleLR's defaults


def schedule_factor(schedule: ScheduleParams, step: int, num_steps: int) -> float:
    """Return the learning rate at `step` (from 0) as a fraction of its peak.

    constant: linear warm-up, then 1. cosine: linear warm-up, then half a cosine to 0. one_cycle: half a cosine from
    1/25 to 1 over the warm-up, then another down to 1/250000 (Smith & Topin 2018, with torch's OneCycleLR defaults).
    """
    warmup = min(schedule.warmup_steps, num_steps)
    progress = (step - warmup) / max(1, num_steps - warmup - 1)
    match schedule.kind:
        case "constant":
            return min(1.0, (step + 1) / (warmup + 1))
        case "cosine":
            return min(1.0, (step + 1) / (warmup + 1)) * _cosine(1.0, 0.0, max(0.0, progress))
        case "one_cycle":
            if step < warmup:
                return _cosine(_ONE_CYCLE_START, 1.0, step / warmup)
            return _cosine(1.0, _ONE_CYCLE_END, progress)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
