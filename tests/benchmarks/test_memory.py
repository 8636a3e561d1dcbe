"""The table of memory by case."""

from __future__ import annotations

import dataclasses
import importlib
import json

import pytest
import torch

from markdown_tables import cells, numbers


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("memory")


def tiny(bench, **changes):
    """A case with two small networks."""
    unet = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
    }
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return bench.Case("tiny", bench.Architecture(unet, [text], 8), **changes)


def test_a_case_is_counted_with_its_method_and_plan(bench):
    plain, checkpointed, small, toolkit = (
        bench.count(tiny(bench, dtype=torch.float32, **changes))
        for changes in ({}, {"checkpointing": True}, {"micro_batch": 1}, {"method": "toolkit"})
    )
    assert list(plain) == ["case", "weights", "kept", "peak of activations", "optimizer", "total", "TFLOP"]
    assert plain["kept"] >= checkpointed["kept"]
    assert plain["kept"] >= small["kept"]
    assert toolkit["weights"] == plain["weights"]


def test_the_table_and_the_file_have_all_cases(bench, tmp_path, capsys):
    def counted(case):
        assert case.method == "toolkit"
        return {"case": case.name, "total": 1.5}

    bench.main(["--json", str(tmp_path / "out/memory.json"), "--method", "toolkit", "--cases", "SDXL"], counted)
    printed = capsys.readouterr().out
    assert numbers(*cells(printed, "SDXL 1024 px, checkpointing, passes")) == [1.5]
    written = json.loads((tmp_path / "out/memory.json").read_text())
    assert [row["case"] for row in written["counted"]] == [c.name for c in bench.CASES if "SDXL" in c.name]


def test_a_measured_case_is_compared_with_its_count(bench):
    measured = bench.measure(tiny(bench, dtype=torch.float32, num_rows=1))
    assert measured["seconds of a step"] >= 0
    assert measured["peak of resident memory"] > 0


def test_the_named_targets_are_counted_cases(bench):
    names = {case.name: case for case in bench.CASES}
    assert names["SD1.5 512 px, checkpointing"].checkpointing
    assert names["SDXL 1024 px, checkpointing, passes of 1 row"] == dataclasses.replace(
        names["SDXL 1024 px, checkpointing"], name="SDXL 1024 px, checkpointing, passes of 1 row", micro_batch=1
    )
