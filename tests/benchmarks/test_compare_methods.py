"""The quality benchmark is a call of the comparison."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import compare_methods as bench
from dreamartist_pipeline.cli.params import parse_params


def calls(monkeypatch: pytest.MonkeyPatch, status: int = 0) -> list[list[str]]:
    made: list[list[str]] = []

    def fake(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        made.append(command)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", fake)
    return made


def given(command: list[str]) -> dict[str, Any]:
    return parse_params(None, None, command[command.index("--params") + 1])  # type: ignore[arg-type]


def test_options_become_parameters_of_the_comparison_and_of_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls(monkeypatch, status=3)
    options = ["--subjects", "owl", "fox", "--methods", "lora", "--workers", "2", "--params", "training.num_steps=5"]
    with pytest.raises(SystemExit) as ended:
        bench.main(options)
    assert ended.value.code == 3
    assert made[0][1:8] == ["-m", "kedro", "run", "--pipelines", "compare", "--env", "local"]
    assert given(made[0]) == {
        "compare": {"subjects": ["owl", "fox"], "only": ["lora"], "workers": 2},
        "training": {"num_steps": 5},
    }


def test_without_options_everything_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls(monkeypatch)
    with pytest.raises(SystemExit):
        bench.main([])
    assert "--params" not in made[0]


def test_concepts_of_one_method_are_those_of_its_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = calls(monkeypatch)
    monkeypatch.setattr(bench, "RUNS", tmp_path / "runs.json")
    bench.RUNS.write_text(json.dumps([{"subject": "fox-lora-0", "message": None}]))
    files = bench.concepts(["fox"], "lora", {"workers": 1}, ["base_model=elsewhere"])
    assert files == [bench.ROOT / "data/06_models/fox-lora-0/concept.safetensors"]
    assert made[0][-4:-1] == ["--nodes", "run_methods", "--params"]
    wanted = {"workers": 1, "subjects": ["fox"], "only": ["lora"], "reference": "lora"}
    assert given(made[0]) == {"compare": wanted, "base_model": "elsewhere"}
    bench.RUNS.write_text(json.dumps([{"subject": "fox-lora-0", "message": "no picture"}]))
    with pytest.raises(SystemExit, match="fox-lora-0: no picture"):
        bench.concepts(["fox"], "lora", {}, [])
