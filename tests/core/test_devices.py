"""The configured device: names, missing devices, and the dtype that a GPU has."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import torch
from pydantic import ValidationError

from dreamartist_pipeline.core.devices import (
    check_device,
    device_of_rank,
    free_memory_bytes,
    num_processes,
    peak_memory_bytes,
    pick_device,
    pick_dtype,
)
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams
from refusals import says


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:1", "mps", "xpu", "xpu:0"])
def test_devices_have_torchs_names(name: str) -> None:
    assert DeviceParams(device=name).device == name


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "mps:0", "", "tpu"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="'cuda:1'"):
        DeviceParams(device=name)


@pytest.mark.parametrize(
    ("name", "kind"), [("cuda", "CUDA"), ("cuda:1", "CUDA"), ("mps", "Mac"), ("xpu", "Intel"), ("xpu:2", "Intel")]
)
def test_a_missing_device_is_named(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: False)
    says_so = says(expected=f"device.device={name}", remedy="device=cpu")
    with pytest.raises(InputError, check=lambda error: says_so(error) and kind in error.expected):
        check_device(DeviceParams(device=name))


def test_a_number_beyond_the_cards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(DeviceParams(device="cuda:1")) == torch.device("cuda", 1)
    with pytest.raises(InputError, check=says(expected="cuda:0 to cuda:1", got="2 devices")):
        check_device(DeviceParams(device="cuda:2"))


@pytest.mark.parametrize("name", ["cuda:0", "mps", "xpu"])
def test_several_processes_need_a_device_each(name: str) -> None:
    assert DeviceParams(device=name, processes=1).processes == 1
    with pytest.raises(ValidationError, match="processes=2"):
        DeviceParams(device=name, processes=2)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert num_processes(DeviceParams(device="auto", processes=2)) == 2
    assert num_processes(DeviceParams(device="auto")) == 2
    with pytest.raises(InputError, check=says(expected="device.processes=3", got="2 that can compute together")):
        check_device(DeviceParams(device="auto", processes=3))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert num_processes(DeviceParams(device="auto")) == 1
    with pytest.raises(InputError, check=says(expected="device.processes=2", got="NCCL is not available")):
        check_device(DeviceParams(device="cuda", processes=2))


def test_rank_r_computes_on_the_gpu_r(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = DeviceParams(device="cpu", processes=2)
    assert device_of_rank(on_cpu, 1) == on_cpu
    assert num_processes(DeviceParams(device="cpu")) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    params = DeviceParams(device="auto", processes=2)
    assert device_of_rank(params, 0) == params
    assert pick_device(device_of_rank(params, 1)) == torch.device("cuda", 1)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_bfloat16_is_float16_on_cards_without_it(
    has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return has_bfloat16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    params = DeviceParams(device="cuda", dtype="bfloat16")
    with caplog.at_level(logging.WARNING):
        dtype = pick_dtype(params, torch.device("cuda"))
    assert dtype == (torch.bfloat16 if has_bfloat16 else torch.float16)
    assert ("Tesla T4" in caplog.text) is not has_bfloat16
    assert pick_dtype(params, torch.device("cpu")) == torch.bfloat16


def test_memory_of_the_cpu_is_that_of_the_machine() -> None:
    cpu = torch.device("cpu")
    assert 2**20 < free_memory_bytes(cpu) < 2**50
    peak = peak_memory_bytes(cpu)
    assert peak is None or peak > 2**20
