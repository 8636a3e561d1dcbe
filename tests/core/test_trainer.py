"""The training loop on toy problems: state, averages, and resuming."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from dreamartist_pipeline.core.optimizers import make_optimizers, rate_of
from dreamartist_pipeline.core.trainer import Averages, FinishedStep, TrainingState, normalized_ema, train, whole_batch
from dreamartist_pipeline.embedded.pretraining import Muon, Plan, warmed_up_ema, warmup_stable_decay
from dreamartist_pipeline.errors import InputError
from refusals import says


def new_state(
    lrs: tuple[float, ...] = (0.1,), name: str = "adamw", ema_decay: float = 0.0, scaler: Any = None
) -> TrainingState:
    """Return the state of one parameter per rate, all ones."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in lrs]
    groups = [{"params": [p], "lr": lr, "weight_decay": 0.0} for p, lr in zip(parameters, lrs, strict=True)]
    averages = Averages(parameters, normalized_ema(ema_decay)) if ema_decay else None
    return TrainingState(
        parameters, make_optimizers(name, groups), averages, scaler or torch.amp.GradScaler("cpu", enabled=False)
    )


def steps(
    state: TrainingState, num_steps: int, spoil: Callable[[int], float] = lambda step: 1.0
) -> Iterator[FinishedStep[None]]:
    """Optimise the parameters towards 3; `spoil` is a factor on the first gradient of a step, before unscaling."""

    def loss_of(step: int) -> tuple[torch.Tensor, None]:
        loss = torch.stack([((p - 3) ** 2).sum() for p in state.parameters]).sum()
        hook = state.parameters[0].register_hook(lambda gradient: gradient * spoil(step))
        hooks.append(hook)
        return loss, None

    hooks: list[Any] = []
    for done in train(
        state, num_steps, set_rates=lambda step: None, gradients_of=whole_batch(state, loss_of), clip=lambda norms: None
    ):
        hooks.pop().remove()
        yield done


def run(state: TrainingState, num_steps: int, spoil: Callable[[int], float] = lambda step: 1.0) -> TrainingState:
    for _ in steps(state, num_steps, spoil):
        pass
    return state


def values(state: TrainingState) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in state.parameters]


# --------------------------------------------------------------------------------------------- optimizers


def test_prodigy_estimates_a_rate_per_group_and_multiplies_its_factor() -> None:
    from prodigyopt import Prodigy

    state = new_state((1.0, 0.2), "prodigy")
    plain = nn.Parameter(torch.ones(3))
    reference = Prodigy([plain], lr=0.2, safeguard_warmup=True)
    assert estimate(state, 0) == estimate(state, 1) == pytest.approx(1e-6)  # d₀ of the library
    for _ in steps(state, 30):
        reference.zero_grad()
        ((plain - 3) ** 2).sum().backward()
        reference.step()
        assert estimate(state, 1) == pytest.approx(reference.param_groups[0]["d"], rel=1e-5)
    torch.testing.assert_close(state.parameters[1], plain, rtol=1e-6, atol=0)
    assert estimate(state, 0) > 2e-6


def estimate(state: TrainingState, index: int) -> float:
    """Return Prodigy's estimate of the learning rate, times its factor."""
    optimizer = state.optimizers[index]
    rate = rate_of(optimizer, optimizer.param_groups[0] | {"lr": 1.0})
    assert isinstance(rate, torch.Tensor)
    return rate.item()


def test_schedule_free_keeps_the_evaluation_point_of_its_library() -> None:
    from schedulefree import AdamWScheduleFree

    state = new_state((0.1,), "schedule_free")
    plain = nn.Parameter(torch.ones(3))
    reference = AdamWScheduleFree([plain], lr=0.1, weight_decay=0.0)
    reference.train()
    for _ in steps(state, 5):
        reference.zero_grad()
        ((plain - 3) ** 2).sum().backward()
        reference.step()
    (parameter,) = state.parameters
    torch.testing.assert_close(parameter, plain, rtol=1e-6, atol=0)
    training = parameter.detach().clone()
    reference.eval()
    with state.averaged():
        torch.testing.assert_close(parameter, plain, rtol=1e-6, atol=0)
        assert not torch.equal(parameter, training)
    assert torch.equal(parameter, training)
    state.keep_averages()
    torch.testing.assert_close(parameter, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["prodigy", "schedule_free"])
def test_optimizers_without_synchronization_equal_those_of_their_libraries(name: str) -> None:
    from prodigyopt import Prodigy
    from schedulefree import AdamWScheduleFree

    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    (optimizer,) = make_optimizers(name, [{"params": [ours], "lr": 1.0, "weight_decay": 0.1}])
    reference = (
        Prodigy([theirs], lr=1.0, weight_decay=0.1, safeguard_warmup=True)
        if name == "prodigy"
        else AdamWScheduleFree([theirs], lr=1.0, weight_decay=0.1)
    )
    if isinstance(reference, AdamWScheduleFree):
        reference.train()
    for step in range(40):
        rate = 0.0 if step == 20 else 1.0 / (1 + step)  # schedules reach 0
        for each in (optimizer, reference):
            each.param_groups[0]["lr"] = rate if name == "prodigy" else 0.1 * rate
        noise = torch.randn(50)
        for parameter in (ours, theirs):
            parameter.grad = (parameter.detach() - 3) + noise
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------- averages


@pytest.mark.parametrize(("name", "ema_decay"), [("schedule_free", 0.0), ("adamw", 0.5), ("prodigy", 0.5)])
def test_averaged_restores_the_training_values_exactly(name: str, ema_decay: float) -> None:
    results = []
    for use_averages in (False, True):
        state = new_state((0.3,), name, ema_decay)
        for done in steps(state, 4):
            if use_averages:
                before = values(state)
                with state.averaged():
                    assert done.step == 1 or not torch.equal(state.parameters[0], before[0])
        results += values(state)
    assert torch.equal(*results)


def test_averages_weigh_later_steps_more_and_exclude_the_initial_values() -> None:
    state = new_state(ema_decay=0.5)
    seen = [values(state)[0] for _ in steps(state, 3)]
    state.keep_averages()
    torch.testing.assert_close(values(state)[0], (seen[0] + 2 * seen[1] + 4 * seen[2]) / 7)


def test_without_averages_the_training_values_are_kept() -> None:
    state = run(new_state(), 1)
    before = values(state)[0]
    with state.averaged():
        assert torch.equal(state.parameters[0], before)
    state.keep_averages()
    assert torch.equal(state.parameters[0], before)


# --------------------------------------------------------------------------------------------- skipped steps


@pytest.mark.parametrize("spoiled", [float("inf"), float("nan")])
def test_a_step_that_the_scaler_skips_is_not_in_the_average(spoiled: float) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    state = new_state((0.1, 0.2), ema_decay=0.5, scaler=scaler)
    seen, before = [], values(state)
    for done in steps(state, 4, lambda step: 1.0 if step % 2 else spoiled):
        after = values(state)
        skipped = all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert skipped == (done.step % 2 == 1)
        seen.append(after)
        before = after
    assert scaler.get_scale() == 1.0  # halved twice
    state.keep_averages()
    for parameter, first, second in zip(values(state), seen[1], seen[3], strict=True):
        torch.testing.assert_close(parameter, (first + 2 * second) / 3)


def test_averages_of_skipped_steps_alone_are_the_initial_values() -> None:
    state = new_state(ema_decay=0.5, scaler=torch.amp.GradScaler("cpu"))
    run(state, 1, lambda step: float("inf")).keep_averages()
    assert torch.equal(values(state)[0], torch.ones(3))


@pytest.mark.parametrize("name", ["adamw", "prodigy", "schedule_free"])
def test_all_groups_skip_a_step_together(name: str) -> None:
    state = new_state((1.0, 1.0), name, scaler=torch.amp.GradScaler("cpu"))
    run(state, 1, lambda step: float("nan"))
    assert all(torch.equal(value, torch.ones(3)) for value in values(state))


# --------------------------------------------------------------------------------------------- the state


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "averages": {"ema_decay": 0.5},
    "prodigy": {"name": "prodigy", "ema_decay": 0.5},
    "schedule_free": {"name": "schedule_free"},
    "scaler": {"ema_decay": 0.5, "scaler": {"init_scale": 8.0, "growth_interval": 2}},
}
NUM_STEPS = 6
PLAN = Plan.lasting(NUM_STEPS, 0.5)


def case_state(name: str) -> TrainingState:
    changes = dict(CASES[name])
    if "scaler" in changes:
        changes["scaler"] = torch.amp.GradScaler("cpu", **changes["scaler"])
    return new_state((0.3, 0.1), **changes)


def spoil_third(state: TrainingState) -> Callable[[int], float]:
    """Make the third gradient infinite where the scaler can skip it."""
    return lambda step: float("inf") if step == 2 and state.scaler.is_enabled() else 1.0


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    return read


def same(one: Any, other: Any) -> bool:
    """Compare nested containers bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("taken_after", [0, 1, NUM_STEPS // 2, NUM_STEPS])
def test_a_continued_training_ends_in_the_same_bytes(name: str, taken_after: int) -> None:
    whole = case_state(name)
    saved = [through_a_file(whole.state_dict())]
    for _ in steps(whole, NUM_STEPS, spoil_third(whole)):
        saved.append(through_a_file(whole.state_dict()))
    continued = case_state(name)
    for parameter in continued.parameters:
        parameter.data.fill_(7.0)  # nothing of the fresh state may remain
    continued.load_state_dict(saved[taken_after])
    assert continued.step == taken_after
    run(continued, NUM_STEPS, spoil_third(continued))
    assert same(continued.state_dict(), whole.state_dict())
    for state in (continued, whole):
        state.keep_averages()
    assert same(values(continued), values(whole))


@pytest.mark.parametrize("name", CASES)
def test_a_state_is_a_value_that_later_steps_do_not_change(name: str) -> None:
    state = run(case_state(name), 2)
    saved = state.state_dict()
    kept = copy.deepcopy(saved)
    run(state, NUM_STEPS)
    assert same(saved, kept)
    state.load_state_dict(saved)
    run(state, NUM_STEPS)
    assert same(saved, kept)


def test_a_state_holds_nothing_but_tensors_numbers_lists_and_dictionaries() -> None:
    def leaves(value: Any) -> Iterator[Any]:
        if type(value) in (list, dict):
            for item in value.values() if isinstance(value, dict) else value:
                yield from leaves(item)
        else:
            yield value

    for name in CASES:
        kinds = {type(leaf) for leaf in leaves(run(case_state(name), 2).state_dict())}
        assert kinds <= {torch.Tensor, int, float, bool, type(None)}


@pytest.mark.parametrize(
    ("other", "check"),
    [
        (new_state((0.1,)), says(expected="[(3,), (3,)]", got="[(3,)]")),
        (new_state((0.1, 0.1), ema_decay=0.5), says(expected="averages=False", got="averages=True")),
    ],
)
def test_the_state_of_another_training_is_refused(other: TrainingState, check: Callable[[InputError], bool]) -> None:
    with pytest.raises(InputError, check=check):
        new_state((0.1, 0.1)).load_state_dict(other.state_dict())


# --------------------------------------------------------------------------------------------- a stage of pretraining


ROUNDING = {"rtol": 1e-4, "atol": 1e-4}  # orthogonalizing gradients of rank 4 amplifies it


class ToyStage:
    """A toy stage of pretraining: two optimizers, averages, and gradients of several processes.

    The batch of a step is random, with the step as its seed. A second process is simulated by adding its gradient in
    `average_gradients`, which is called before clipping.
    """

    def __init__(self, process_gradient: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(16, 16, generator=generator))
        self.bias = nn.Parameter(torch.zeros(16))
        self.process_gradient = process_gradient
        adamw = torch.optim.AdamW([self.bias], 0.1, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        optimizers = [adamw, Muon([self.matrix], 0.2, weight_decay=0.01)]
        parameters = [self.matrix, self.bias]
        self.state = TrainingState(parameters, optimizers, Averages(parameters, warmed_up_ema(0.9)))
        self.clipped_norms: list[float] = []

    def set_rates(self, step: int) -> None:
        for optimizer in self.state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * warmup_stable_decay(step, PLAN, 2)

    def loss_of(self, step: int) -> tuple[torch.Tensor, None]:
        target = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        return (target @ self.matrix + self.bias - 1).pow(2).mean(), None

    def average_gradients(self, parameters: Any) -> None:
        for parameter in parameters:
            parameter.grad.add_(self.process_gradient)

    def clip(self, norms: torch.Tensor) -> None:
        nn.utils.clip_grads_with_norm_(self.state.parameters, 1.0, norms.norm())
        self.clipped_norms.append(nn.utils.get_total_norm([p.grad for p in self.state.parameters]).item())  # type: ignore[misc]

    def run(self, num_steps: int = NUM_STEPS) -> list[FinishedStep[None]]:
        loop = train(
            self.state,
            num_steps,
            set_rates=self.set_rates,
            gradients_of=whole_batch(self.state, self.loss_of),
            clip=self.clip,
            average_gradients=self.average_gradients,
        )
        return list(loop)


def test_a_stage_of_muon_and_adamw_equals_an_explicit_loop() -> None:
    stage = ToyStage()
    matrix, bias = (nn.Parameter(p.detach().clone()) for p in (stage.matrix, stage.bias))
    adamw = torch.optim.AdamW([bias], 0.1, betas=(0.9, 0.99), weight_decay=0.01)
    muon = Muon([matrix], 0.2, weight_decay=0.01)
    averages = [p.detach().clone() for p in (matrix, bias)]
    done = stage.run()
    for step in range(NUM_STEPS):
        factor = warmup_stable_decay(step, PLAN, 2)
        adamw.param_groups[0]["lr"], muon.param_groups[0]["lr"] = 0.1 * factor, 0.2 * factor
        target = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        matrix.grad = bias.grad = None
        loss = (target @ matrix + bias - 1).pow(2).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([matrix, bias], 1.0)
        adamw.step()
        muon.step()
        for average, parameter in zip(averages, (matrix, bias), strict=True):
            average.lerp_(parameter.detach(), 1 - min(0.9, (1 + step) / (10 + step)))
        torch.testing.assert_close([done[step].loss, done[step].grad_norms.norm()], [loss.detach(), norm], **ROUNDING)
    stage.state.keep_averages()
    torch.testing.assert_close([stage.matrix.detach(), stage.bias.detach()], averages, **ROUNDING)


def test_gradients_are_averaged_before_they_are_clipped() -> None:
    alone, together = ToyStage(), ToyStage(process_gradient=100.0)
    norms = [stage.run(1)[0].grad_norms.norm().item() for stage in (alone, together)]
    assert norms[1] > 10 * norms[0]
    assert together.clipped_norms[0] == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("taken_after", [0, 1, NUM_STEPS // 2, NUM_STEPS])
def test_a_continued_stage_ends_in_the_same_bytes(taken_after: int) -> None:
    whole, continued = ToyStage(), ToyStage()
    whole.run(taken_after)
    continued.state.load_state_dict(through_a_file(whole.state.state_dict()))
    whole.run()
    continued.run()
    assert same(continued.state.state_dict(), whole.state.state_dict())


def test_between_two_steps_the_caller_reports_and_saves() -> None:
    stage, saved = ToyStage(), {}
    loop = train(
        stage.state,
        NUM_STEPS,
        set_rates=stage.set_rates,
        gradients_of=whole_batch(stage.state, stage.loss_of),
        clip=stage.clip,
    )
    for done in loop:
        if done.step % 2 == 0:
            saved[done.step] = stage.state.state_dict()
    assert {step: state["step"] for step, state in saved.items()} == {2: 2, 4: 4, 6: 6}
    assert same(saved[6], stage.state.state_dict())
