"""Operators on the meta device, which are called once for equal arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dreamartist_pipeline.core import meta_operators
from dreamartist_pipeline.core.meta_operators import call_on_meta, storages_in

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_operators, "_known", {})


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype, value.device)
    return tuple(map(described, value)) if isinstance(value, tuple | list) else value


CALLS: list[tuple[Any, Sequence[Any]]] = [
    (aten.add.Tensor, (zeros(2, 3), zeros(3))),
    (aten.add.Tensor, (zeros(2, 3, dtype=torch.int64), 1)),
    (aten.add.Tensor, (zeros(2, 3, dtype=torch.int64), 1.0)),  # another dtype than that of `1`, which equals `1.0`
    (aten.mm.default, (zeros(2, 3), zeros(3, 4))),
    (aten.native_group_norm.default, (zeros(2, 4, 8), None, None, 2, 4, 8, 2, 1e-5)),
    (aten.clone.default, (zeros(4, 3).t(),)),
    (aten.split.Tensor, (zeros(4, 3), 2)),
    (aten.t.default, (zeros(4, 3),)),
    (aten._unsafe_view.default, (zeros(4, 3), [12])),
]


@pytest.mark.parametrize(("operator", "args"), CALLS, ids=lambda value: str(value)[:30])
def test_the_second_result_is_as_the_first(operator: Any, args: Sequence[Any]) -> None:
    expected = operator(*args)
    first, second = call_on_meta(operator, args, {}), call_on_meta(operator, args, {})
    assert described(first) == described(second) == described(expected)
    shared = {storage._cdata for storage in storages_in([*args])}
    for result in (expected, first, second):  # a view shares its storage with its argument, anything else does not
        assert {s._cdata in shared for s in storages_in(result)} == {s._cdata in shared for s in storages_in(expected)}


def test_equal_calls_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Add:
        _schema = aten.add.Tensor._schema

        def __call__(self, *args: Any) -> Any:
            calls.append(1)
            return aten.add.Tensor(*args)

    add = Add()
    for _ in range(3):
        call_on_meta(add, (zeros(2, 3), 1), {})
    call_on_meta(add, (zeros(2, 4), 1), {})
    assert len(calls) == 2
    monkeypatch.setattr(meta_operators, "_MOST", 2)
    call_on_meta(add, (zeros(2, 5), 1), {})
    assert len(meta_operators._known) == 1


def test_an_operator_that_changes_its_argument_is_called_every_time() -> None:
    changed = zeros(2, 3)
    for _ in range(2):
        assert call_on_meta(aten.add_.Tensor, (changed, 1), {}) is changed
    assert not meta_operators._known
