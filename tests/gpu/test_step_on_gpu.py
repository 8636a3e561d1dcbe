"""The step on a GPU: no synchronization, equal gradients of all plans and backends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dreamartist_pipeline.backbones.base_model import open_base_model
from dreamartist_pipeline.backbones.concepts import start_concept
from dreamartist_pipeline.core.parameter_groups import parameter_groups
from dreamartist_pipeline.core.trainer import train
from dreamartist_pipeline.core.training import fit
from dreamartist_pipeline.core.training_step import Execution, Steps, training_state
from dreamartist_pipeline.params import DeviceParams, TrainingParams
from dreamartist_pipeline.pipelines.training.data import training_data
from dreamartist_pipeline.pipelines.training.memory import MemoryPlan, first_that_fits, possible_plans, step_shape
from dreamartist_pipeline.pipelines.training.trainable import trainable_model
from pipelines.test_training_memory import CAPTION, DEMANDING, MASK, REGULARIZATION, picture

MakeParams = Callable[..., TrainingParams]
CONSTANT = {"kind": "constant"}
TRAINED_ALIKE = {"schedule": CONSTANT, "words_schedule": CONSTANT, "num_steps": 6, **DEMANDING}


@contextmanager
def synchronization_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def new_steps(
    folder: Path, params: TrainingParams, dtype: str = "float32", plan: MemoryPlan | None = None, as_graph: bool = False
) -> Steps:
    plan = plan or MemoryPlan()
    new = start_concept(open_base_model(folder, DeviceParams(device="cuda", dtype=dtype)), params, 1, 0)
    if plan.checkpointing:
        new.backbone.checkpoint_gradients()
    images = [(caption, read()) for caption, read in REGULARIZATION]
    data = training_data(new.backbone, new.prompts, picture(), MASK, images, params, CAPTION)
    model = trainable_model(new, parameter_groups(new.stacks, new.words, params.words.lr))
    execution = Execution(plan.micro_batch, as_graph=as_graph)
    return Steps(model, data, params, training_state(model, params), execution)


@pytest.mark.parametrize("plan", [MemoryPlan(), MemoryPlan(checkpointing=True, micro_batch=1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "schedule_free", "adamw8bit"])
def test_a_step_does_not_synchronize(
    tiny_base_model: Path, make_training_params: MakeParams, optimizer: str, dtype: str, plan: MemoryPlan
) -> None:
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    words = {"names": {"pt1": ("my-fox", "my-fox-neg")}, "optimizer": optimizer, "lr": 1.0}
    lora = {name: [group | {"lr": 1.0} for group in groups] for name, groups in DEMANDING.items()}
    params = make_training_params(**TRAINED_ALIKE | lora, optimizer=optimizer, words=words)
    steps = new_steps(tiny_base_model, params, dtype, plan)
    loop = train(steps.state, 6, set_rates=steps.set_rates, gradients_of=steps.gradients, clip=steps.clip)
    next(loop)
    next(loop)
    with synchronization_is_an_error():
        next(loop)
        next(loop)


@pytest.mark.parametrize("as_graph", [False, True])
@pytest.mark.parametrize(
    "plan",
    possible_plans(TrainingParams(num_steps=0, lora_unet=[{"lr": 1.0, "rank": 1, "layers": ["x"]}]).memory, 3),
    ids=str,
)
def test_every_plan_and_graph_has_the_gradients_of_the_plain_step(
    tiny_base_model: Path,
    make_training_params: MakeParams,
    plan: MemoryPlan,
    as_graph: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # rounds differently for other numbers of rows
    params = make_training_params(**TRAINED_ALIKE)
    plain, other = new_steps(tiny_base_model, params), new_steps(tiny_base_model, params, plan=plan, as_graph=as_graph)
    for step in range(2):
        for steps in (plain, other):
            for parameter in steps.state.parameters:
                assert parameter.grad is not None
                parameter.grad.zero_()
            steps.gradients(step)
        for ours, theirs in zip(other.state.parameters, plain.state.parameters, strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm()


def test_a_training_from_a_graph_is_that_of_single_kernels(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    params = make_training_params(**TRAINED_ALIKE)
    losses = []
    for as_graph in (False, True):
        steps = new_steps(tiny_base_model, params)
        execution = dataclasses.replace(steps.execution, as_graph=as_graph)
        history = fit(steps._model, steps._data, params, execution=execution)
        losses.append([row["loss"] for row in history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_plan_is_measured(tiny_base_model: Path, make_training_params: MakeParams) -> None:
    params = make_training_params(**TRAINED_ALIKE)
    backbone = open_base_model(tiny_base_model, DeviceParams(device="cuda"))
    shape = step_shape(start_concept(backbone, params, 1, 0), params, CAPTION, None)
    plans = possible_plans(params.memory, 3)
    assert first_that_fits(plans, backbone, params, shape, limit=2**40)[0] == plans[0]
    assert first_that_fits(plans, backbone, params, shape, limit=1)[0] == plans[-1]
