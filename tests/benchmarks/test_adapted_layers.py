"""The benchmark of adapted layers: its designs agree with the plain computation, and a table comes out."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    return importlib.import_module("adapted_layers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_design_computes_the_same(bench: ModuleType, dtype: torch.dtype) -> None:
    pointwise, striding = (
        bench.ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1)),
        bench.ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1)),
    )
    for kind in (bench.Kind((6, 4), (4, 3, 4), None), bench.Kind((6, 4, 1, 1), (4, 4, 5, 3), pointwise)):
        designs = bench.LINEAR if kind.geometry is None else bench.CONVOLUTION
        bench.check_agreement(designs, bench.make_case(kind, 2, torch.device("cpu"), dtype))
    case = bench.make_case(bench.Kind((6, 4, 3, 3), (4, 4, 6, 4), striding), 2, torch.device("cpu"), dtype)
    bench.check_agreement(bench.CONVOLUTION, case)


def test_another_result_is_refused(bench: ModuleType) -> None:
    case = bench.make_case(bench.Kind((6, 4), (4, 3, 4), None), 2, torch.device("cpu"), torch.float64)
    with pytest.raises(SystemExit, match="'doubled' differs from the plain computation in outputs"):
        bench.check_agreement({"doubled": lambda case: 2 * bench.ours(case)}, case)


def test_the_table_has_every_design_of_both_kinds_of_layers(
    bench: ModuleType, tiny_base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--base-model", str(tiny_base_model), "--rounds", "2", "--rows", "1", "--tokens", "5", "--rank", "2"]
    bench.main([*options, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "adapted_layers.json").read_text())["rows"]
    assert [row["design"] for row in rows if row["layers"].endswith("linear")] == list(bench.LINEAR)
    assert [row["design"] for row in rows if row["layers"].endswith("convolution")] == list(bench.CONVOLUTION)
    assert all(row["ms"] > 0 and row["low"] <= row["ms"] <= row["high"] for row in rows)
    assert (tmp_path / "adapted_layers.md").read_text() in capsys.readouterr().out
