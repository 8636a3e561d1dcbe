"""The benchmark of a training step: its designs agree on a tiny base model, and it notices when they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import training_step
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone, load_outline
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.batches import TrainingData
from dreamartist_pipeline.params import DeviceParams, TrainingParams
from speed.ceilings import Ceilings, step_flops
from speed.designs import (
    FROZEN,
    HOOK,
    OURS,
    PEFT,
    PEFT_HALF,
    Design,
    build_designs,
    check_agreement,
    make_data,
    make_pass,
    one_step,
    run_pass,
    without_dropout,
)
from speed.random_models import TINY_PX, write_model
from speed.settings import attention_only, read_training

SIDE_PX = 32
FLOAT = torch.float32


@pytest.fixture(scope="module")
def backbone(tiny_base_model: Path) -> Backbone:
    return load_backbone(BaseModelFiles(tiny_base_model), DeviceParams(device="cpu"))


@pytest.fixture(scope="module")
def params(make_training_params: Callable[..., TrainingParams]) -> TrainingParams:
    layers = [r"re:.*\.attn.?$", r"re:.*resnets\.0$"]  # Linear and Conv2d
    groups = [{"lr": 1e-3, "rank": 2, "alpha": 4.0, "branch": branch, "layers": layers} for branch in ("p", "n")]
    return make_training_params(lora_unet=groups)


@pytest.fixture(scope="module")
def data(backbone: Backbone, params: TrainingParams) -> TrainingData:
    return make_data(backbone, params, SIDE_PX)


def steps_agree(designs: list[Design], data: TrainingData, params: TrainingParams) -> int:
    return check_agreement(designs, FLOAT, lambda design: one_step(design, data, params))


def test_all_designs_compute_the_same_step(backbone: Backbone, params: TrainingParams, data: TrainingData) -> None:
    designs = build_designs(backbone, params)

    assert [design.name for design in designs] == [OURS, PEFT, HOOK, FROZEN]
    assert steps_agree(designs, data, params) == len(designs[0].gradients()) > 20


def test_all_designs_compute_the_same_step_of_sdxl(tmp_path: Path) -> None:
    folder = write_model("sdxl", tmp_path, FLOAT, tiny=True)
    sdxl, sdxl_params = load_backbone(BaseModelFiles(folder), DeviceParams(device="cpu")), read_training("sdxl")

    agreed = steps_agree(build_designs(sdxl, sdxl_params), make_data(sdxl, sdxl_params, TINY_PX), sdxl_params)

    assert agreed > 100
    assert step_flops(load_outline(BaseModelFiles(folder)), sdxl_params, TINY_PX) > 0


def test_all_designs_compute_the_same_pass_of_the_unet(backbone: Backbone, params: TrainingParams) -> None:
    only = attention_only(params, rank=2)
    designs = build_designs(backbone, only)
    inputs = make_pass(designs[0], make_data(backbone, only, SIDE_PX), only)

    check_agreement(designs, FLOAT, lambda design: run_pass(design, inputs))

    assert inputs.conditioning.grad.any()
    assert not [group for group in designs[-1].model.groups if group.parameters]


def test_the_base_model_is_left_alone(backbone: Backbone, params: TrainingParams, data: TrainingData) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.networks["unet"].state_dict().items()}

    steps_agree(build_designs(backbone, params), data, params)

    after = backbone.networks["unet"].state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_another_gradient_is_refused(backbone: Backbone, params: TrainingParams, data: TrainingData) -> None:
    ours, peft, *_ = build_designs(backbone, params)
    peft.model.groups[0].parameters[1].data *= 1.1

    with pytest.raises(SystemExit, match="gradient of"):
        steps_agree([ours, peft], data, params)


def test_a_missing_gradient_is_refused(backbone: Backbone, params: TrainingParams) -> None:
    only = attention_only(params, rank=2)
    ours, _, hook, _ = build_designs(backbone, only)
    inputs = make_pass(ours, make_data(backbone, only, SIDE_PX), only)
    group = hook.model.groups[0]
    group.parameters[0].requires_grad_(False)

    with pytest.raises(SystemExit, match=rf"missing gradient of {group.name}\[0\]"):
        check_agreement([ours, hook], FLOAT, lambda design: run_pass(design, inputs))


def test_half_precision_has_peft_with_half_precision_adapters_too(tiny_base_model: Path) -> None:
    half = load_backbone(BaseModelFiles(tiny_base_model), DeviceParams(device="cpu", dtype="bfloat16"))

    designs = {design.name: design for design in build_designs(half, without_dropout(read_training()))}

    dtypes = {
        name: {p.dtype for g in design.model.groups if g.kind == "adapters" for p in g.parameters}
        for name, design in designs.items()
    }
    assert dtypes == {
        OURS: {torch.float32},
        PEFT: {torch.float32},
        HOOK: {torch.float32},
        PEFT_HALF: {torch.bfloat16},
        FROZEN: set(),
    }


def test_options_that_other_designs_lack_are_refused(
    backbone: Backbone, make_training_params: Callable[..., TrainingParams]
) -> None:
    groups = [{"lr": 1e-3, "rank": 2, "bias": True, "branch": b, "layers": ["conv_in"]} for b in ("p", "n")]

    with pytest.raises(SystemExit, match="bias"):
        build_designs(backbone, make_training_params(lora_unet=groups))


def test_the_toolkits_dropout_is_turned_off() -> None:
    groups = [group for groups in read_training(method="toolkit").lora.values() for group in groups]

    assert {group.dropout for group in groups} == {0.0}


def test_flops_are_those_of_the_frozen_networks(tiny_base_model: Path, params: TrainingParams) -> None:
    rows = 2 * (params.batch_size + params.regularization_batch_size)
    outline = load_outline(BaseModelFiles(tiny_base_model))
    unet = outline.networks["unet"]
    latents, timesteps = torch.zeros(rows, 4, 8, 8, device="meta"), torch.zeros(rows, device="meta")
    states = torch.zeros(rows, 24, 32, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        unet(latents, timesteps, states, return_dict=False)[0].sum().backward()

    only_unet, whole = (step_flops(outline, params, SIDE_PX, part) for part in ("unet", "step"))

    assert only_unet == counter.get_total_flops()
    assert only_unet < whole < 1.5 * only_unet


def test_the_table_has_rates_ratios_and_the_utilization() -> None:
    seconds = {training_step.UNET_ONLY: [1.0, 2.0, 3.0], OURS: [4.0, 4.0, 4.0]}

    frozen, ours = training_step.make_rows(seconds, num_rows=5, flops=1e12, ceilings=Ceilings(1e12, 1.0))

    assert ours.values == {
        "ms": 4000.0,
        "lower quartile": 4000.0,
        "upper quartile": 4000.0,
        "per second": 0.25,
        "rows per second": 1.25,
        "× frozen UNet": 2.0,
        "× this project": 1.0,
        "MFU, %": 25.0,
    }
    assert frozen.values["× this project"] == 0.5


@pytest.mark.parametrize("part", ["step", "unet"])
def test_the_benchmark_runs(tiny_base_model: Path, tmp_path: Path, part: str) -> None:
    size = ("--rounds", "1", "--steps", "2", "--threads", "1", "--rows", "1", "1")
    arguments = (
        "--base-model",
        str(tiny_base_model),
        "--part",
        part,
        "--layers",
        "attention" if part == "unet" else "method",
    )

    training_step.main((*size, *arguments, "--output", str(tmp_path)))

    (report,) = tmp_path.glob("training_step_*.md")
    assert OURS in report.read_text()
