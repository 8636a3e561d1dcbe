"""Optimizers by name, and what FlatOptimizer keeps of them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from dreamartist_pipeline.core import optimizers
from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.core.optimizers import check_optimizer, make_optimizers
from dreamartist_pipeline.core.training import FlatOptimizer, ParameterGroup
from dreamartist_pipeline.params import ScheduleParams

CPU = torch.device("cpu")
_CONSTANT = ScheduleParams(kind="constant")


def flat_optimizer(
    lrs: tuple[float, ...], name: str = "adamw", ema_decay: float = 0.0
) -> tuple[list[nn.Parameter], FlatOptimizer]:
    """Return one parameter a rate, all ones, and their optimizer."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in lrs]
    groups = [
        ParameterGroup(str(index), "adapters", "positive", lr, (parameter,))
        for index, (lr, parameter) in enumerate(zip(lrs, parameters, strict=True))
    ]
    return parameters, FlatOptimizer(groups, 0.0, _CONSTANT, 100, 1e9, name, ema_decay)


def take_step(parameters: list[nn.Parameter], optimizer: FlatOptimizer, step: int) -> dict[str, float]:
    rates = optimizer.set_step(step)
    torch.stack([((p - 3) ** 2).sum() for p in parameters]).sum().backward()
    optimizer.update(torch.tensor(1.0), torch.amp.GradScaler("cpu", enabled=False))
    return rates


def test_eight_bit_adamw_needs_a_gpu() -> None:
    with pytest.raises(InputError, match="expected a CUDA GPU, because optimizer adamw8bit .* got cpu; choose adamw"):
        check_optimizer("adamw8bit", CPU)


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install prodigyopt"):
        check_optimizer("prodigy", CPU)
    with pytest.raises(InputError, match="pip install schedulefree"):
        check_optimizer("schedule_free", CPU)
    check_optimizer("adamw", CPU)


@pytest.mark.parametrize("name", ["adamw", "prodigy", "schedule_free"])
def test_the_libraries_of_the_environment_suffice(name: str) -> None:
    check_optimizer(name, CPU)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(InputError, match="expected an optimizer among adamw, adamw8bit, prodigy, schedule_free"):
        make_optimizers("lion", [nn.Parameter(torch.ones(1))], [1.0], 0.0)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes, an optional package for GPUs")
def test_eight_bit_adamw_comes_from_its_library() -> None:
    (optimizer,) = make_optimizers("adamw8bit", [nn.Parameter(torch.ones(1))], [1.0], 0.0)
    assert type(optimizer).__name__ == "AdamW8bit"


def test_prodigy_estimates_a_rate_per_group_and_multiplies_its_factor() -> None:
    from prodigyopt import Prodigy

    parameters, optimizer = flat_optimizer((1.0, 0.2), "prodigy")
    plain = nn.Parameter(torch.ones(3))
    reference = Prodigy([plain], lr=0.2, safeguard_warmup=True)
    first = take_step(parameters, optimizer, 0)
    assert first == {"0": pytest.approx(1e-6), "1": pytest.approx(0.2e-6)}  # d₀ of the library
    for step in range(30):
        if step:
            rates = take_step(parameters, optimizer, step)
            assert rates["1"] == pytest.approx(0.2 * reference.param_groups[0]["d"])
        reference.zero_grad()
        ((plain - 3) ** 2).sum().backward()
        reference.step()
    assert torch.equal(parameters[1], plain)
    assert rates["0"] > 2 * first["0"]


def test_schedule_free_keeps_the_evaluation_point_of_its_library() -> None:
    from schedulefree import AdamWScheduleFree

    (parameter,), optimizer = flat_optimizer((0.1,), "schedule_free")
    plain = nn.Parameter(torch.ones(3))
    reference = AdamWScheduleFree([plain], lr=0.1, weight_decay=0.0)
    reference.train()
    for step in range(5):
        take_step([parameter], optimizer, step)
        reference.zero_grad()
        ((plain - 3) ** 2).sum().backward()
        reference.step()
    assert torch.equal(parameter, plain)
    reference.eval()
    with optimizer.averaged():
        assert torch.equal(parameter, plain)
    assert not torch.equal(parameter, plain)
    optimizer.keep_averages()
    assert torch.equal(parameter, plain)


@pytest.mark.parametrize(("name", "ema_decay"), [("schedule_free", 0.0), ("adamw", 0.5), ("prodigy", 0.5)])
def test_looking_at_the_averages_changes_no_bit_of_what_trains(name: str, ema_decay: float) -> None:
    results = []
    for look in (False, True):
        parameters, optimizer = flat_optimizer((0.3,), name, ema_decay)
        for step in range(4):
            take_step(parameters, optimizer, step)
            if look:
                before = parameters[0].detach().clone()
                with optimizer.averaged():
                    assert step == 0 or not torch.equal(parameters[0], before)
        results.append(parameters[0].detach().clone())
    assert torch.equal(*results)


def test_averages_weigh_later_steps_more_and_the_beginning_not_at_all() -> None:
    (parameter,), optimizer = flat_optimizer((0.1,), ema_decay=0.5)
    seen = []
    for step in range(3):
        take_step([parameter], optimizer, step)
        seen.append(parameter.detach().clone())
    optimizer.keep_averages()
    torch.testing.assert_close(parameter.detach(), (seen[0] + 2 * seen[1] + 4 * seen[2]) / 7)


def test_without_averages_what_trains_is_kept() -> None:
    (parameter,), optimizer = flat_optimizer((0.1,))
    take_step([parameter], optimizer, 0)
    before = parameter.detach().clone()
    with optimizer.averaged():
        assert torch.equal(parameter, before)
    optimizer.keep_averages()
    assert torch.equal(parameter, before)


# --------------------------------------------------------------------------------------------- skipped steps


def scaled_step(
    parameters: list[nn.Parameter], optimizer: FlatOptimizer, scaler: torch.amp.GradScaler, step: int, factor: float
) -> None:
    """Take a step as a float16 base model does; `factor` spoils the gradient of the first parameter alone."""
    optimizer.set_step(step)
    scaler.scale(torch.stack([((p - 3) ** 2).sum() for p in parameters]).sum()).backward()
    assert parameters[0].grad is not None
    parameters[0].grad *= factor
    optimizer.unscale(scaler)
    optimizer.update(torch.stack(list(optimizer.grad_norms().values())).norm(), scaler)
    scaler.update()


@pytest.mark.parametrize("spoiled", [float("inf"), float("nan")])
def test_a_step_that_the_scaler_skips_is_not_in_the_average(spoiled: float) -> None:
    parameters, optimizer = flat_optimizer((0.1, 0.2), ema_decay=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    seen = []
    for step, factor in enumerate((spoiled, 1.0, spoiled, 1.0)):
        before = [parameter.detach().clone() for parameter in parameters]
        scaled_step(parameters, optimizer, scaler, step, factor)
        after = [parameter.detach().clone() for parameter in parameters]
        skipped = all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert skipped == (factor != 1)
        seen.append(after)
    assert scaler.get_scale() == 1.0  # halved twice
    optimizer.keep_averages()
    for parameter, first, second in zip(parameters, seen[1], seen[3], strict=True):
        torch.testing.assert_close(parameter.detach(), (first + 2 * second) / 3)


def test_averages_of_skipped_steps_alone_are_the_initial_values() -> None:
    parameters, optimizer = flat_optimizer((0.1,), ema_decay=0.5)
    scaled_step(parameters, optimizer, torch.amp.GradScaler("cpu"), 0, float("inf"))
    optimizer.keep_averages()
    assert torch.equal(parameters[0].detach(), torch.ones(3))


@pytest.mark.parametrize("name", ["adamw", "prodigy", "schedule_free"])
def test_all_groups_skip_a_step_together(name: str) -> None:
    parameters, optimizer = flat_optimizer((1.0, 1.0), name)
    scaled_step(parameters, optimizer, torch.amp.GradScaler("cpu"), 0, float("nan"))
    assert all(torch.equal(parameter.detach(), torch.ones(3)) for parameter in parameters)
