"""The quality benchmark: how runs become rows, and when a run is repeated."""

from __future__ import annotations

import dataclasses
import math
import subprocess
from pathlib import Path

import pandas as pd
import pytest

import compare_methods as bench
from markdown_tables import cells, numbers


def _results(similarities: tuple[float, float], agrees: list[bool | None], seconds: float = 10.0) -> object:
    rows = [
        {"kind": "subject", "group": group, "prompt": "a", "seed": seed, "efficientnet-lite0/similarity": value}
        for group, shift in (("base", 0.0), ("concept", 0.5))
        for seed, value in enumerate(s + shift for s in similarities)
    ]
    images = pd.DataFrame(rows).assign(background_agrees=agrees * 2, color_agrees=None)
    images = pd.concat([images, pd.DataFrame([{"kind": "prior", "group": "concept", "prompt": "b", "seed": 0}])])
    names = ("variety/diversity.base", "variety/diversity.concept", "variety/copying.base", "variety/copying.concept")
    metrics = {f"{name}.efficientnet-lite0": 0.25 for name in names} | {"prior_drift/efficientnet-lite0": 0.25}
    metrics |= {"prior_drift/pixels": 0.01, "similarity/ceiling.efficientnet-lite0": 0.9}
    metrics |= {"similarity/base.efficientnet-lite0": sum(similarities) / 2}
    return bench.Results(metrics, images, seconds)


def test_a_subjects_value_is_the_mean_over_images_with_a_value() -> None:
    values = bench.of_subject(_results((0.1, 0.5), [True, None]), "concept")
    assert values["similarity"] == pytest.approx(0.8)
    assert values["background"] == 1.0
    assert math.isnan(values["color"])


def test_a_row_is_mean_and_standard_deviation_over_subjects() -> None:
    results = [_results((0.1, 0.3), [True, False]), _results((0.4, 0.4), [True, None], 20.0)]
    row = bench.row([bench.of_subject(result, "concept") for result in results])
    assert row["similarity"] == pytest.approx(0.8)
    assert row["similarity_std"] == pytest.approx(0.1)
    assert (row["background"], row["background_std"]) == (0.75, 0.25)
    assert math.isnan(row["color"])
    assert (row["seconds"], row["seconds_std"]) == (15.0, 5.0)


def test_the_table_has_base_methods_and_ceiling() -> None:
    results = {
        "fox": {
            "lora": _results((0.1, 0.3), [True, True]),
            "dreamartist-plus-plus": _results((0.1, 0.3), [True, False]),
        }
    }
    table = bench.tabulate(results, ["lora", "dreamartist-plus-plus"])
    assert list(table.index) == [bench.BASE_ROW, "LoRA, no negative branch", "DreamArtist++", bench.CEILING_ROW]
    markdown = bench.to_markdown(table)
    rows = {label: [numbers(cell) for cell in cells(markdown, label)] for label in table.index}
    none: list[float] = []
    assert rows[bench.BASE_ROW] == [[0.2, 0], [50, 0], none, [0.25, 0], [0.25, 0], none, none, none]
    assert rows["DreamArtist++"][:4] == [[0.7, 0], [50, 0], none, [0.25, 0]]
    assert rows["DreamArtist++"][-3:] == [[1, 0], [0.25, 0], [10, 0]]
    assert rows[bench.CEILING_ROW] == [[0.9, 0], *[none] * 7]


def test_methods_compared_with_different_base_images_are_refused() -> None:
    results = {"fox": {"a": _results((0.1, 0.3), [True, True]), "b": _results((0.2, 0.3), [True, True])}}
    with pytest.raises(SystemExit, match="fox.*--again"):
        bench.check_same_base(results)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    (tmp_path / "fox.png").write_bytes(b"picture")
    (tmp_path / "model").mkdir()
    (tmp_path / "conf" / "base").mkdir(parents=True)
    found = bench.Run("fox", "lora", tmp_path / "fox.png", tmp_path / "model", ("training.num_steps=2",), "base")
    found.folder.mkdir(parents=True)
    return found


def _calls(monkeypatch: pytest.MonkeyPatch, status: int) -> list[list[str]]:
    calls: list[list[str]] = []

    def fake(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        calls.append(command)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", fake)
    return calls


def test_results_are_reused_until_the_request_changes(run: object, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _calls(monkeypatch, status=0)
    bench.run_if_needed(run, again=False)
    bench.run_if_needed(run, again=False)
    assert len(calls) == 1
    (bench.ROOT / "conf" / "base" / "parameters.yml").write_text("a: 1")
    bench.run_if_needed(run, again=False)
    assert len(calls) == 2
    bench.run_if_needed(run, again=True)
    assert len(calls) == 3


def test_the_first_run_is_over_before_others_start_and_each_runs_once(
    run: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def fake(one: object, _: bool) -> None:
        events.append(f"start {one.method}")  # type: ignore[attr-defined]
        events.append(f"end {one.method}")  # type: ignore[attr-defined]

    monkeypatch.setattr(bench, "run_if_needed", fake)
    bench.run_all([dataclasses.replace(run, method=method) for method in ("a", "b", "c")], workers=2)  # type: ignore[type-var]
    assert events[:2] == ["start a", "end a"]
    assert sorted(events) == sorted(f"{what} {method}" for what in ("start", "end") for method in "abc")


def test_a_run_passes_subject_method_and_overrides_on(run: object, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _calls(monkeypatch, status=0)
    bench.run_if_needed(run, again=False)
    params = calls[0][calls[0].index("--params") + 1]
    assert params.startswith("subject=fox-lora,class_word=fox,method=lora,image=")
    assert params.endswith(",training.num_steps=2")


def test_a_failed_run_is_named_and_not_recorded(run: object, monkeypatch: pytest.MonkeyPatch) -> None:
    _calls(monkeypatch, status=1)
    with pytest.raises(SystemExit, match="fox-lora.* 1"):
        bench.run_if_needed(run, again=False)
    assert not list(run.folder.glob("*.json"))  # type: ignore[attr-defined]
