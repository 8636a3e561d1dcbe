"""Schedules against torch's OneCycleLR, and for the shortest trainings and longest warm-ups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dreamartist_pipeline.core.schedules import schedule_factor, scheduled_beta1
from dreamartist_pipeline.params import ScheduleParams

END = 1 / 25e4


def one_cycle(num_steps: int, warmup_steps: int) -> tuple[list[float], list[float | None]]:
    """Return the rate's factor and β₁ of every step."""
    schedule = ScheduleParams(kind="one_cycle", warmup_steps=warmup_steps)
    return (
        [schedule_factor(schedule, step, num_steps) for step in range(num_steps)],
        [scheduled_beta1(schedule, step, num_steps) for step in range(num_steps)],
    )


def torchs_one_cycle(num_steps: int, warmup_steps: int) -> tuple[list[float], list[float]]:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=num_steps, pct_start=warmup_steps / num_steps
    )
    rates, beta1s = [], []
    for step in range(num_steps):
        if step:
            optimizer.step()
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
        beta1s.append(optimizer.param_groups[0]["betas"][0])
    return rates, beta1s


@pytest.mark.parametrize(
    ("num_steps", "warmup_steps"),
    [(1000, 200), (400, 30), (51, 11), (7, 2), (50, 0), (5, 5), (3, 2), (2, 2), (2, 0), (1, 0)],
)
def test_one_cycle_is_torchs_wherever_that_is_defined(num_steps: int, warmup_steps: int) -> None:
    rates, beta1s = one_cycle(num_steps, warmup_steps)
    expected_rates, expected_beta1s = torchs_one_cycle(num_steps, warmup_steps)
    assert rates == pytest.approx(expected_rates, rel=1e-9, abs=1e-12)
    assert beta1s == pytest.approx(expected_beta1s, rel=1e-9)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_torchs_one_cycle_is_not_defined_for_a_warm_up_of_one_step(num_steps: int) -> None:
    with pytest.raises(ZeroDivisionError):
        torchs_one_cycle(num_steps, 1)


@pytest.mark.parametrize(
    ("num_steps", "warmup_steps", "rates", "beta1s"),
    [
        (3, 1, [1, 0.5, 0], [0.85, 0.9, 0.95]),  # the peak is step warmup − 1 = 0
        (2, 1, [1, 0], [0.85, 0.95]),
        (1, 1, [1], [0.85]),
        (3, 0, [0.75, 0.25, 0], [0.875, 0.925, 0.95]),  # the peak would be step −1: cos π/3 = 1/2, cos 2π/3 = −1/2
        (2, 0, [0.5, 0], [0.9, 0.95]),
        (1, 0, [0], [0.95]),
        (3, 3, [0.04, 0.52, 1], [0.95, 0.9, 0.85]),
        (3, 9, [0.04, 0.52, 1], [0.95, 0.9, 0.85]),  # a warm-up beyond the end is one of all steps
        (2, 9, [0.04, 1], [0.95, 0.85]),
        (1, 9, [1], [0.85]),
    ],
)
def test_one_cycle_of_the_shortest_trainings_and_longest_warm_ups(
    num_steps: int, warmup_steps: int, rates: list[float], beta1s: list[float]
) -> None:
    found = one_cycle(num_steps, warmup_steps)
    assert found[0] == pytest.approx(rates, abs=1.01 * END)
    assert min(found[0]) >= END * 0.999
    assert found[1] == pytest.approx(beta1s)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("constant", [1 / 3, 2 / 3, 1, 1, 1]), ("cosine", [1 / 3, 2 / 3, 1, 0.5, 0])],
)
def test_a_schedule_warms_up_and_then_holds_or_falls(kind: str, expected: list[float]) -> None:
    schedule = ScheduleParams(kind=kind, warmup_steps=2)
    assert [schedule_factor(schedule, step, 5) for step in range(5)] == pytest.approx(expected)
    assert [scheduled_beta1(schedule, step, 5) for step in range(5)] == [None] * 5


@pytest.mark.parametrize("kind", ["constant", "cosine"])
@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (1, 5), (2, 2), (3, 1)])
def test_a_schedule_holds_for_the_shortest_trainings(kind: str, num_steps: int, warmup_steps: int) -> None:
    schedule = ScheduleParams(kind=kind, warmup_steps=warmup_steps)
    factors = [schedule_factor(schedule, step, num_steps) for step in range(num_steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) > 0
