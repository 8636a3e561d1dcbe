"""Trainings that diverge: what counts, where they stop, and how they go on with lower rates."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from core.test_training import CONSTANT, CONTINUED, make_data, make_model, trained_values, without_time
from dreamartist_pipeline.core import training
from dreamartist_pipeline.core.checkpoints import Checkpoint
from dreamartist_pipeline.core.course import Alarms, Checkpointing
from dreamartist_pipeline.core.divergence import GoodStates, Halving, LossBounds, StateBounds
from dreamartist_pipeline.core.processes import rank, run_on_processes
from dreamartist_pipeline.core.training import fit
from dreamartist_pipeline.core.training_step import Execution, TrainableModel, training_state
from dreamartist_pipeline.errors import TrainingError
from dreamartist_pipeline.params import TrainingParams
from refusals import says

MakeParams = Callable[..., TrainingParams]
NUM_STEPS = 40  # good states every 10 steps
CONSTANT_RATES = {"schedule": CONSTANT, "words_schedule": CONSTANT}


# --------------------------------------------------------------------------------------------- losses


def rows(losses: Sequence[float], **others: float) -> list[dict[str, float]]:
    return [{"step": step, "loss": loss, "loss_reference": loss} | others for step, loss in enumerate(losses, start=1)]


BOUNDS = LossBounds(null_losses=[1.0], regularization_weight=0.5)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_has_diverged(loss: float) -> None:
    found = BOUNDS.divergence(rows([0.1, loss]))
    assert found is not None and found.step == 2 and found.got == str(loss)


def test_gradients_that_are_not_finite_have_diverged_unless_a_scaler_skips_their_steps() -> None:
    history = rows([0.1] * 50, **{"grad_norm/negative/words": math.inf, "grad_norm/positive/words": 1.0})
    found = BOUNDS.divergence(history[:3])
    assert found is not None and "negative/words" in found.expected and "positive/words" not in found.expected
    scaled = dataclasses.replace(BOUNDS, skips=True)
    assert scaled.divergence(history[:39]) is None
    assert scaled.divergence(history) is not None  # no scale is small enough
    history[20]["grad_norm/negative/words"] = 1.0
    assert scaled.divergence(history) is None


def test_a_median_loss_of_ten_times_the_first_has_diverged() -> None:
    history = rows([0.5] * 20 + [9.0] * 40)
    assert [BOUNDS.divergence(history[:n]) is None for n in (20, 29, 31)] == [True, True, False]
    assert BOUNDS.divergence(rows([0.5] * 20 + [4.9] * 40)) is None


def test_a_single_high_loss_is_no_divergence() -> None:
    assert BOUNDS.divergence(rows([0.5, 1e6])) is None
    assert BOUNDS.divergence(rows([0.5] * 30 + [1e6])) is None


@pytest.mark.parametrize("num_steps", [1, 2, 30])
def test_losses_of_a_hundred_times_that_of_zeros_have_diverged_from_the_first_step_on(num_steps: int) -> None:
    assert BOUNDS.divergence(rows([101.0] * num_steps)) is not None
    assert BOUNDS.divergence(rows([90.0] * num_steps)) is None
    assert BOUNDS.divergence(rows([90.0] * num_steps, loss_regularization=19.0)) is None  # 90 + 0.5 · 19
    assert BOUNDS.divergence(rows([90.0] * num_steps, loss_regularization=21.0)) is not None


def test_the_reconstruction_loss_is_not_compared_with_that_of_zeros() -> None:
    history = rows([1e6], loss_reconstruction=1e6)
    history[0]["loss_reference"] = 0.1
    assert BOUNDS.divergence(history) is None


def test_a_result_is_doubtful_whose_losses_have_doubled() -> None:
    assert BOUNDS.doubts(rows([0.4] * 20 + [0.7] * 20)) == []
    assert "0.4" in BOUNDS.doubts(rows([0.4] * 20 + [0.9] * 20))[0]
    assert BOUNDS.doubts(rows([0.4] * 15 + [0.9] * 15)) == []  # too few steps
    assert BOUNDS.doubts(rows([0.4] * 20 + [0.9] * 50 + [0.4] * 80)) == []


def test_a_result_is_doubtful_whose_losses_nearly_diverged() -> None:
    assert "3" in BOUNDS.doubts(rows([0.5] * 40 + [3.0] * 20 + [0.5] * 60))[0]


@pytest.mark.parametrize(("first", "bound"), [(0.01, 0.5), (0.1, 0.5), (0.3, 0.9), (5.0, 2.0)])
def test_a_result_is_doubtful_that_predicts_no_better_than_zeros(first: float, bound: float) -> None:
    """The first step counts alone: the updates after it may be the bad ones."""
    assert BOUNDS.doubts(rows([first] + [bound - 0.01] * 60)) == []
    assert "zeros, 1" in BOUNDS.doubts(rows([first] + [bound + 0.01] * 60))[0]


# --------------------------------------------------------------------------------------------- parameters


def test_words_may_grow_to_a_thousand_times_their_initial_values() -> None:
    values = {"words.a": torch.full((4,), 0.1), "words.zero": torch.zeros(4), "unet.0": torch.zeros(4)}
    bounds = StateBounds(values, ["words.a", "words.zero"])
    values["words.a"].fill_(99.0)
    values["words.zero"].fill_(9.9)  # a thousand times 0.01
    values["unet.0"].fill_(1e6)
    assert bounds.divergence(1) is None
    assert len(bounds.doubts()) == 2
    values["words.zero"].fill_(10.1)
    found = bounds.divergence(7)
    assert found is not None and "words.zero" in found.expected and found.step == 7
    values["words.a"].fill_(1e30)  # the norm is infinite in float32, the values are not
    found = bounds.divergence(8)
    assert found is not None and "words.a" in found.expected


def test_parameters_and_their_averages_must_be_finite() -> None:
    values = {"a": torch.zeros(2), "b": torch.zeros(2)}
    bounds = StateBounds(values, [])
    assert bounds.divergence(1, [torch.zeros(2), torch.zeros(2)]) is None
    found = bounds.divergence(1, [torch.zeros(2), torch.tensor([0.0, math.nan])])
    assert found is not None and found.expected == "finite values in b"
    values["a"][0] = math.inf
    found = bounds.divergence(1)
    assert found is not None and found.expected == "finite values in a"


def test_a_training_goes_back_to_a_state_at_least_one_interval_before() -> None:
    for num_steps, interval in ((5, 10), (200, 10), (400, 20), (1001, 51)):
        assert GoodStates(num_steps).interval == interval
    kept = GoodStates(200)
    for step, left in ((5, [0]), (31, [20]), (40, [20, 30])):
        kept.states = []
        for good in [good for good in (0, 10, 20, 30) if good < step]:
            kept.keep({"step": good})
        kept.forget_from(step)
        assert [state["step"] for state in kept.states] == left


# --------------------------------------------------------------------------------------------- whole trainings


class Store:
    """Checkpoints of a training, in the order in which they were saved."""

    def __init__(self) -> None:
        self.saved: list[Checkpoint] = []
        self.discarded = 0

    def discard(self) -> None:
        self.discarded += 1

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep a copy: the tensors change with the next step."""
        self.saved.append(copy.deepcopy(checkpoint))

    def checkpointing(self, resumed: Checkpoint | None = None) -> Checkpointing:
        """Save every step of a training that is not resumed."""
        return Checkpointing(self.save, 60.0 if resumed else 0.0, resumed=resumed, discard=self.discard)


def breaking(model: TrainableModel, params: TrainingParams, step: int) -> dict[str, Any]:
    """Return arguments of `fit` for a base model of which a weight becomes NaN in a step."""
    state = training_state(model, params)
    denoise = model.denoise

    def broken(*args: Any) -> torch.Tensor:
        return denoise(*args) * (math.nan if state.step >= step - 1 else 1.0)

    return {"model": dataclasses.replace(model, denoise=broken), "state": state}


def fragile(changes: dict[str, Any] | None = None, bound: float = 0.2) -> TrainableModel:
    """Return a model whose predictions are NaN once a value of a word is above a bound: low rates never get there."""
    options = changes or {}
    model = dataclasses.replace(
        make_model(dropout=options.get("dropout", 0.0)), dtype=options.get("dtype", torch.float32)
    )
    words = [parameter for group in model.groups if group.kind == "words" for parameter in group.parameters]
    denoise = model.denoise

    def predict(*args: Any) -> torch.Tensor:
        is_high = torch.stack([word.detach().abs().max() for word in words]).max() > bound
        return torch.where(is_high, math.nan, denoise(*args))

    return dataclasses.replace(model, denoise=predict)


def test_a_diverged_training_stops_and_keeps_its_last_good_state(make_training_params: MakeParams) -> None:
    params = make_training_params(num_steps=NUM_STEPS)
    whole, store = Store(), Store()
    fit(make_model(), make_data(), params, checkpointing=whole.checkpointing())
    steps: list[float] = []
    is_stop = says(
        expected="a finite loss",
        got=f"nan after step 26 of {NUM_STEPS} (base model in float32)",
        remedy="of step 10, is kept",
    )
    with pytest.raises(TrainingError, check=is_stop) as stopped:
        arguments = breaking(make_model(), params, step=26)
        on_step = lambda record: steps.append(record.step)  # noqa: E731
        fit(**arguments, data=make_data(), params=params, on_step=on_step, checkpointing=store.checkpointing())
    for part in ("learning rates", "guidance_scale=3.0", "weights", "resume=force", "on_divergence=halve_lr", "never"):
        assert part in stopped.value.remedy
    assert steps == list(range(1, 26))
    last = store.saved[-1]
    assert last["diverged_at"] == 26 and whole.saved[10]["diverged_at"] is None
    assert last["state"]["step"] == len(last["history"]["values"]) == 10
    assert all(map(torch.equal, last["state"]["parameters"], whole.saved[10]["state"]["parameters"]))
    assert [state["step"] for state in last["good_states"]] == [10]


def test_a_training_that_diverges_before_a_good_step_keeps_nothing(make_training_params: MakeParams) -> None:
    params, store = make_training_params(num_steps=NUM_STEPS), Store()
    with pytest.raises(TrainingError, check=says(got="step 9", remedy="the corrected command starts anew")):
        fit(**breaking(make_model(), params, 9), data=make_data(), params=params, checkpointing=store.checkpointing())
    assert store.discarded == 1
    assert not any(checkpoint["diverged_at"] for checkpoint in store.saved)


@pytest.mark.parametrize("kind", ["adapters", "words"])
def test_enormous_rates_stop_a_training(make_training_params: MakeParams, kind: str) -> None:
    model = make_model()
    groups = [dataclasses.replace(group, lr=1e9) if group.kind == kind else group for group in model.groups]
    params = make_training_params(num_steps=NUM_STEPS, **CONSTANT_RATES)
    with pytest.raises(TrainingError, check=says(remedy="up to 1e+09")):
        fit(dataclasses.replace(model, groups=groups), make_data(), params)


def test_an_enormous_guidance_scale_stops_at_the_first_step(make_training_params: MakeParams) -> None:
    params = make_training_params(guidance_scale="1000", on_divergence="halve_lr")
    with pytest.raises(TrainingError, check=says(expected="predicting zeros", got="step 1")) as stopped:
        model = make_model()
        model.groups[-1].parameters[0].data.fill_(0.2)  # the words of both branches differ
        fit(model, make_data(), params)
    assert "guidance_scale=1000" in stopped.value.remedy
    assert "learning rates" not in stopped.value.remedy  # the first loss does not depend on them


def with_infinite_gradients(model: TrainableModel, params: TrainingParams, steps: range) -> dict[str, Any]:
    """Return arguments of `fit` for a model with finite losses and infinite gradients in some steps."""
    state = training_state(model, params)
    model.groups[-1].parameters[0].register_hook(lambda g: g * math.inf if state.step in steps else g)
    return {"model": model, "state": state}


def test_steps_that_the_scaler_of_float16_skips_are_no_divergence(make_training_params: MakeParams) -> None:
    params = make_training_params(num_steps=50, **CONSTANT_RATES)

    def train(dtype: torch.dtype, steps: range) -> list[dict[str, float]]:
        model = dataclasses.replace(make_model(), dtype=dtype)
        return fit(**with_infinite_gradients(model, params, steps), data=make_data(), params=params)

    history = train(torch.float16, range(3, 40))
    assert len(history) == 50
    assert not math.isfinite(history[3]["grad_norm/positive/words"])
    with pytest.raises(TrainingError, check=says(expected="gradients of positive/words", got="step 4")):
        train(torch.float32, range(3, 5))
    with pytest.raises(TrainingError, check=says(expected="loss scaling", got="step 43 of 50 (base model in float16)")):
        train(torch.float16, range(3, 50))


@pytest.mark.parametrize("name", CONTINUED)
def test_without_a_divergence_the_option_changes_nothing(make_training_params: MakeParams, name: str) -> None:
    changes, of_model = CONTINUED[name]
    results = []
    for on_divergence in ("stop", "halve_lr"):
        model = fragile(of_model, bound=math.inf)
        options = {"num_steps": 25, "lora_text_encoder": (), "on_divergence": on_divergence, **changes}
        history = fit(model, make_data(), make_training_params(**options))
        results.append((trained_values(model), [without_time(row) for row in history]))
    assert all(map(torch.equal, results[0][0], results[1][0]))
    assert results[0][1] == results[1][1]


def halving_params(make_training_params: MakeParams, **changes: Any) -> TrainingParams:
    options = {"num_steps": NUM_STEPS, "on_divergence": "halve_lr", "lora_text_encoder": (), **CONSTANT_RATES}
    return make_training_params(**options | changes)


def test_half_the_rates_go_on_from_the_last_good_state(make_training_params: MakeParams) -> None:
    seen: list[list[Halving]] = []
    records: list[int] = []
    doubts: list[str] = []
    alarms = Alarms(lambda halvings: seen.append(list(halvings)), doubts.extend)
    params = halving_params(make_training_params)
    history = fit(fragile(), make_data(), params, lambda record: records.append(record.step), alarms=alarms)
    assert len(seen) >= 2 and [len(halvings) for halvings in seen] == list(range(1, len(seen) + 1))
    assert [row["step"] for row in history] == list(range(1, NUM_STEPS + 1))
    assert all(math.isfinite(row["loss"]) for row in history)
    back_to = {halving.back_to for halving in seen[-1]}
    assert all(step % 10 == 0 for step in back_to)
    for row in history:
        factor = 0.5 ** sum(halving.back_to < row["step"] for halving in seen[-1])
        assert row["lr/toy.0"] == factor * 1e-2
    assert str(seen[-1][-1].diverged_at) in doubts[0]
    assert len(records) > NUM_STEPS  # repeated steps are reported again


@pytest.mark.parametrize("name", CONTINUED)
def test_a_training_interrupted_around_a_divergence_has_the_bytes_of_an_uninterrupted_one(
    make_training_params: MakeParams, name: str
) -> None:
    changes, of_model = CONTINUED[name]
    params = halving_params(make_training_params, **changes)
    whole, store, halvings = fragile(of_model), Store(), []
    alarms = Alarms(on_halving=lambda each: halvings.append(list(each)))
    history = fit(whole, make_data(), params, checkpointing=store.checkpointing(), alarms=alarms)
    assert halvings
    first = halvings[0][0]
    steps = [checkpoint["state"]["step"] for checkpoint in store.saved]
    after = next(i for i in range(len(steps) - 1) if steps[i + 1] < steps[i])  # the last before the divergence
    for index in (after, after + 1, steps.index(first.back_to)):
        continued = fragile(of_model)
        resumed = Store().checkpointing(store.saved[index])
        rest = fit(continued, make_data(), params, checkpointing=resumed)
        assert all(map(torch.equal, trained_values(continued), trained_values(whole))), steps[index]
        assert [without_time(row) for row in rest] == [without_time(row) for row in history]


def test_a_training_that_stopped_can_go_on_with_half_the_rates(make_training_params: MakeParams) -> None:
    params = halving_params(make_training_params)
    whole, stopped, store = fragile(), fragile(), Store()
    fit(whole, make_data(), params)
    with pytest.raises(TrainingError):
        stop = params.model_copy(update={"on_divergence": "stop"})
        fit(stopped, make_data(), stop, checkpointing=store.checkpointing())
    continued = fragile()
    assert store.saved[-1]["state"]["step"] > 0
    fit(continued, make_data(), params, checkpointing=Store().checkpointing(store.saved[-1]))
    assert all(map(torch.equal, trained_values(continued), trained_values(whole)))


def test_five_halvings_are_enough(make_training_params: MakeParams) -> None:
    params, store = halving_params(make_training_params), Store()
    seen: list[int] = []
    alarms = Alarms(on_halving=lambda halvings: seen.append(len(halvings)))
    with pytest.raises(TrainingError, check=says(got="step 26", remedy="is kept")) as stopped:
        arguments = breaking(make_model(), params, step=26)
        fit(**arguments, data=make_data(), params=params, checkpointing=store.checkpointing(), alarms=alarms)
    assert seen == [1, 2, 3, 4, 5]
    assert "halve_lr" not in stopped.value.remedy
    assert len(store.saved[-1]["halvings"]) == 5


def test_parameters_that_are_not_finite_are_not_saved(make_training_params: MakeParams) -> None:
    params, store, model = make_training_params(num_steps=NUM_STEPS), Store(), make_model()
    state = training_state(model, params)

    def poison(record: Any) -> None:
        if record.step == 25:
            state.parameters[0].data[0] = math.nan

    with pytest.raises(TrainingError, check=says(got="step 26")):
        fit(model, make_data(), params, poison, None, state, Execution(read_every=1), store.checkpointing())
    assert [checkpoint["state"]["step"] for checkpoint in store.saved] == [*range(25), 10]


def _train_on_ranks(params: TrainingParams) -> tuple[list[torch.Tensor], list[Halving], list[float], TrainingError]:
    """Return the results of a training whose rates are halved, and the error of one that stops."""
    if rank() == 0:
        training._READ_AFTER_S = 0.0  # reads every step at once: a divergence is found before the other rank finds it
    halvings: list[Halving] = []

    def keep(each: Sequence[Halving]) -> None:
        halvings[:] = each

    model = fragile()
    history = fit(model, make_data(), params, alarms=Alarms(on_halving=keep))
    with pytest.raises(TrainingError) as stopped:
        fit(fragile(), make_data(), params.model_copy(update={"on_divergence": "stop"}))
    return trained_values(model), halvings, [row["step"] for row in history], stopped.value


@pytest.mark.usefixtures("warm_ranks")
def test_two_processes_go_back_or_stop_after_the_same_step(
    make_training_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_READ_AFTER_S", training._READ_AFTER_S)  # restored afterwards
    params = halving_params(make_training_params)
    values, halvings, steps, error = run_on_processes(_train_on_ranks, 2, params)
    alone_values, alone_halvings, _, alone_error = _train_on_ranks(params)
    assert halvings == alone_halvings
    assert str(error) == str(alone_error)
    assert steps == list(range(1, NUM_STEPS + 1))
    for value, alone in zip(values, alone_values, strict=True):
        torch.testing.assert_close(value, alone, rtol=1e-3, atol=1e-5)


def test_a_doubtful_result_is_reported_after_the_last_step(make_training_params: MakeParams) -> None:
    seen: list[str] = []
    alarms = Alarms(on_doubts=seen.extend)
    params = make_training_params(num_steps=150, batch_size=8, regularization_batch_size=0)
    fit(make_model(), make_data(), params, alarms=alarms)
    before = list(seen)
    data = make_data()
    model = make_model()
    denoise = model.denoise
    state = training_state(model, params)
    worse = dataclasses.replace(model, denoise=lambda *args: denoise(*args) * (1 + state.step / 10))
    fit(worse, data, params.model_copy(update={"num_steps": 60}), state=state, alarms=alarms)
    assert before == [] and seen
