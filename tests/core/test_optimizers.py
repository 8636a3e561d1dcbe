"""Optimizers by name."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from dreamartist_pipeline.core import optimizers
from dreamartist_pipeline.core.optimizers import check_optimizer, flatten, make_optimizers
from dreamartist_pipeline.errors import InputError
from refusals import says

CPU = torch.device("cpu")
GROUPS = [{"params": [nn.Parameter(torch.ones(1))], "lr": 1.0, "weight_decay": 0.0}]


def test_eight_bit_adamw_needs_a_gpu() -> None:
    with pytest.raises(InputError, check=says(expected="adamw8bit", got="cpu")):
        check_optimizer("adamw8bit", CPU)


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(InputError, check=says(expected="prodigy", remedy="pip install prodigyopt")):
        check_optimizer("prodigy", CPU)
    with pytest.raises(InputError, check=says(expected="schedule_free", remedy="pip install schedulefree")):
        check_optimizer("schedule_free", CPU)
    check_optimizer("adamw", CPU)


@pytest.mark.parametrize("name", ["adamw", "prodigy", "schedule_free"])
def test_the_libraries_of_the_environment_suffice(name: str) -> None:
    check_optimizer(name, CPU)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="adamw, adamw8bit, prodigy, schedule_free", got="'lion'")):
        make_optimizers("lion", GROUPS)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes, an optional package for GPUs")
def test_eight_bit_adamw_comes_from_its_library() -> None:
    (optimizer,) = make_optimizers("adamw8bit", GROUPS)
    assert type(optimizer).__name__ == "AdamW8bit"


def test_a_flat_parameter_holds_values_and_gradients_of_its_parts() -> None:
    parts = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(3))]
    flat = flatten(parts)
    (parts[0].sum() + 2 * parts[1].sum()).backward()
    assert flat.tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert flat.grad is not None
    assert flat.grad.tolist() == [1, 1, 1, 1, 2, 2, 2]
    flat.data.fill_(5)
    assert parts[1].tolist() == [5, 5, 5]
