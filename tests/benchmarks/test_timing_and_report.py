"""What the speed benchmarks share: medians, alternation, tables."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from markdown_tables import cells, numbers
from speed.ceilings import measure_ceilings
from speed.report import Report, Row
from speed.timing import Spread, alternate, clock_for, describe_machine, timed

CPU = torch.device("cpu")


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([9.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_cases_alternate_forward_and_backward_after_the_warm_ups() -> None:
    calls: list[str] = []

    def case(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    measured = alternate({name: lambda name=name: case(name) for name in "ab"}, num_rounds=2, num_warmups=1)

    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert measured == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_seconds_are_those_between_two_looks_at_the_clock() -> None:
    times = iter([10.0, 12.5])

    assert timed(lambda: None, lambda: next(times))() == 2.5


def test_one_thread_is_timed_by_its_own_cpu_time() -> None:
    assert torch.get_num_threads() == 1
    assert clock_for(CPU).__name__ == "process_time"


def test_a_report_is_written_as_a_table_as_json_and_as_a_chart(tmp_path: Path) -> None:
    rows = [Row("ours", {"ms": 12.345, "x": 1.0}), Row("frozen", {"ms": 12345.6})]

    Report("speed", "Speed", describe_machine(CPU) | {"rows": 4}, rows, "ms", ["Reached."]).write(tmp_path)

    table = (tmp_path / "speed.md").read_text()
    assert [numbers(cell) for cell in cells(table, "ours")] == [[12.3], [1.0]]
    assert cells(table, "frozen") == ["12,346", ""]
    content = json.loads((tmp_path / "speed.json").read_text())
    assert content["rows"] == [{"label": "ours", "ms": 12.345, "x": 1.0}, {"label": "frozen", "ms": 12345.6}]
    assert content["facts"]["torch"] == torch.__version__
    assert content["notes"] == ["Reached."]
    assert "frozen" in (tmp_path / "speed.html").read_text()


def test_ceilings_are_rates() -> None:
    ceilings = measure_ceilings(CPU, matrix_side=16, copy_bytes=1024)

    assert ceilings.flops_per_second > 0
    assert ceilings.bytes_per_second > 0
