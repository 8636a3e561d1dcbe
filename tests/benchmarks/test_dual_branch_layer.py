"""The speed benchmark: its designs agree on a tiny UNet, and it notices when they do not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from markdown_tables import cells, numbers

_FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "dual_branch_layer.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dual_branch_layer", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dual_branch_layer"] = module
    spec.loader.exec_module(module)
    return module


bench = _load()
CPU, DOUBLE = torch.device("cpu"), torch.float64


@pytest.fixture(scope="module")
def unet(tiny_base_model: Path) -> nn.Module:
    return bench.load_unet(tiny_base_model, CPU, DOUBLE)[0]


@pytest.fixture
def batch(unet: nn.Module) -> object:
    return bench.make_batch(unet, num_rows=2, num_tokens=5, device=CPU, dtype=DOUBLE)


def test_all_designs_agree_in_double_precision(unet: nn.Module, batch: object) -> None:
    pytest.importorskip("peft")
    bench.check_agreement(bench.build_designs(unet, rank=2), batch, DOUBLE)


def test_designs_share_the_frozen_tensors_and_leave_the_unet_alone(unet: nn.Module) -> None:
    before = list(unet.state_dict())
    design = bench.Stacked(bench.share_weights(unet), bench.make_factors(unet, rank=2))
    assert list(unet.state_dict()) == before
    assert design.unet.conv_out.weight is unet.conv_out.weight


def test_another_gradient_is_refused(unet: nn.Module, batch: object) -> None:
    factors = bench.make_factors(unet, rank=2)
    changed = {key: (down, up * 1.01) for key, (down, up) in factors.items()}
    designs = [
        bench.SliceHook(bench.share_weights(unet), factors),
        bench.Stacked(bench.share_weights(unet), changed),
    ]
    with pytest.raises(SystemExit, match="prediction"):
        bench.check_agreement(designs, batch, DOUBLE)


def test_a_missing_gradient_is_refused(unet: nn.Module, batch: object) -> None:
    factors = bench.make_factors(unet, rank=2)
    silent = bench.Stacked(bench.share_weights(unet), factors)
    name = next(iter(silent.parameters()))
    silent.parameters()[name].requires_grad_(False)
    with pytest.raises(SystemExit, match=f"missing gradient of {name}"):
        bench.check_agreement([bench.SliceHook(bench.share_weights(unet), factors), silent], batch, DOUBLE)


def test_the_table_reports_medians_and_ratios() -> None:
    times = {bench.Frozen.name: [1.0, 2.0, 3.0], bench.Stacked.name: [4.0, 4.0, 4.0]}
    median, quartiles, *ratios = cells(bench.table(times), bench.Stacked.name)
    assert (median, numbers(quartiles), ratios) == ("4.0", [4.0, 4.0], ["2.00", "1.00"])
