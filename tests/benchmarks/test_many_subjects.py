"""The benchmark of many subjects on a Ray cluster of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import many_subjects

pytest.importorskip("ray")


@pytest.mark.slow
def test_two_processes_that_only_compute_are_compared_with_one() -> None:
    assert 0.3 < many_subjects.gain_of_machine() < 4


@pytest.mark.slow
def test_a_killed_worker_and_a_torn_picture_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--subjects", "4", "--rounds", "0", "--alone", "1", "--work", str(tmp_path), "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["many_subjects.py", *options])
    many_subjects.main()
    (row,) = json.loads((tmp_path / "many_subjects.json").read_text())["rows"]
    assert (row["subjects"], row["finished"], row["same bytes"], row["started by a second call"]) == (4, 3, 1, 1)
