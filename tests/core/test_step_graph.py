"""Steps from a recorded graph, with a recorder that runs on the CPU, and the backends that a machine has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from core.test_training import AT_ONCE, make_data, make_model, trained_values
from dreamartist_pipeline.core import step_graph
from dreamartist_pipeline.core.step_graph import check_backend
from dreamartist_pipeline.core.training import fit
from dreamartist_pipeline.core.training_step import Execution
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import PreviewParams, TrainingParams
from refusals import says

MakeParams = Callable[..., TrainingParams]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def recorded_on_the_cpu(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Do as `step_graph.record`, by calling `run` again; like a graph, it sees only the tensors of the first call."""
    run()  # warm-up
    loss, parts = run()

    def replay() -> None:
        new_loss, new_parts = run()
        loss.copy_(new_loss)
        for name, part in new_parts.items():
            parts[name].copy_(part)

    return (loss, parts), replay


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], Execution]] = {
    "plain": ({}, {}, AT_ONCE),
    "dropout": ({"guidance_scale": "1.5-3.0"}, {"dropout": 0.5}, Execution()),
    "micro-batches": ({}, {"dropout": 0.5}, Execution(micro_batch=1)),
    "averages and previews": ({"ema_decay": 0.9, "preview": PreviewParams(every=2)}, {}, Execution()),
    "float16": ({}, {"dtype": torch.float16}, Execution()),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_training_from_a_graph_ends_in_the_same_bytes(
    make_training_params: MakeParams, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(step_graph, "record", recorded_on_the_cpu)
    changes, of_model, execution = OPTIONS[name]
    params = make_training_params(num_steps=5, regularization_batch_size=2, **changes)
    results = []
    for as_graph in (False, True):
        model = make_model(dropout=of_model.get("dropout", 0.0))
        model = dataclasses.replace(model, dtype=of_model.get("dtype", torch.float32))
        changed = dataclasses.replace(execution, as_graph=as_graph)
        history = fit(model, make_data(), params, on_preview=lambda step: None, execution=changed)
        results.append((trained_values(model), [{**row, "seconds": 0} for row in history]))
    (plain, plain_history), (graphed, graphed_history) = results
    assert all(map(torch.equal, plain, graphed))
    assert plain_history == graphed_history


def test_only_the_first_batch_is_recorded(make_training_params: MakeParams, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []

    def count(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        recorded.append(1)
        return recorded_on_the_cpu(run)

    monkeypatch.setattr(step_graph, "record", count)
    fit(make_model(), make_data(), make_training_params(num_steps=4), execution=Execution(as_graph=True))
    assert recorded == [1]


def test_a_graph_needs_a_cuda_gpu() -> None:
    check_backend("cudagraph", CUDA)
    for device in (CPU, torch.device("mps"), torch.device("xpu")):
        with pytest.raises(InputError, check=says(expected="training.backend=cudagraph", got=device.type)):
            check_backend("cudagraph", device)
        check_backend("eager", device)


def test_compilation_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graph.shutil, "which", lambda name: "/usr/bin/g++")
    check_backend("compile", CPU)
    monkeypatch.setattr(step_graph.shutil, "which", lambda name: None)
    with pytest.raises(InputError, check=says(expected="C++ compiler", remedy="eager")):
        check_backend("compile", CPU)
    monkeypatch.setattr(step_graph, "find_spec", lambda name: None)
    with pytest.raises(InputError, check=says(expected="triton", remedy="eager")):
        check_backend("compile", CUDA)
