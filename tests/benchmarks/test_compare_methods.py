"""The quality benchmark: how runs become rows, and when a run is repeated."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

_FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "compare_methods.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_methods", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_methods"] = module
    spec.loader.exec_module(module)
    return module


bench = _load()


def _results(similarities: tuple[float, float], agrees: list[bool | None], seconds: float = 10.0) -> object:
    rows = [
        {"kind": "subject", "group": group, "prompt": "a", "seed": seed, "efficientnet-lite0/similarity": value}
        for group, shift in (("base", 0.0), ("concept", 0.5))
        for seed, value in enumerate(s + shift for s in similarities)
    ]
    images = pd.DataFrame(rows).assign(background_agrees=agrees * 2, color_agrees=None)
    images = pd.concat([images, pd.DataFrame([{"kind": "prior", "group": "concept", "prompt": "b", "seed": 0}])])
    metrics = {
        f"efficientnet-lite0/{name}": 0.25
        for name in ("diversity/base", "diversity/concept", "copying/base", "copying/concept", "prior_drift")
    }
    metrics |= {"prior_drift_pixels": 0.01, "efficientnet-lite0/similarity/ceiling": 0.9}
    metrics |= {"efficientnet-lite0/similarity/base": sum(similarities) / 2}
    return bench.Results(metrics, images, seconds)


def test_a_row_is_the_mean_over_all_images_of_all_subjects() -> None:
    row = bench.row([_results((0.1, 0.3), [True, False]), _results((0.2, 0.2), [True, None], 20.0)], "concept")
    assert row["similarity"] == pytest.approx(0.7)
    assert row["similarity_std"] == pytest.approx(math.sqrt(0.02 / 4))
    assert row["background"] == pytest.approx(2 / 3)
    assert math.isnan(row["color"])
    assert row["seconds"] == 15.0


def test_the_table_has_base_methods_and_ceiling() -> None:
    results = {
        "fox": {
            "lora": _results((0.1, 0.3), [True, True]),
            "dreamartist-plus-plus": _results((0.1, 0.3), [True, False]),
        }
    }
    table = bench.tabulate(results, ["lora", "dreamartist-plus-plus"])
    assert list(table.index) == [bench.BASE_ROW, "LoRA, no negative branch", "DreamArtist++", bench.CEILING_ROW]
    lines = bench.to_markdown(table).splitlines()
    assert lines[2] == "| base model, class word | 0.200 ± 0.100 | 50% | — | 0.250 | 0.250 | — | — | — |"
    assert lines[4].startswith("| DreamArtist++ | 0.700 ± 0.100 | 50% | — | 0.250 | 0.250 | 1.00% | 0.250 | 10 |")
    assert lines[5].startswith("| autoencoder's reconstruction (ceiling) | 0.900 ± 0.000 | — |")


def test_methods_compared_with_different_base_images_are_refused() -> None:
    results = {"fox": {"a": _results((0.1, 0.3), [True, True]), "b": _results((0.2, 0.3), [True, True])}}
    with pytest.raises(SystemExit, match="fox: expected the same base images for all methods"):
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


def test_a_run_is_repeated_only_when_what_decides_it_changes(run: object, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _calls(monkeypatch, status=0)
    bench.run_if_needed(run, again=False)
    bench.run_if_needed(run, again=False)
    assert len(calls) == 1
    (bench.ROOT / "conf" / "base" / "parameters.yml").write_text("a: 1")
    bench.run_if_needed(run, again=False)
    assert len(calls) == 2
    bench.run_if_needed(run, again=True)
    assert len(calls) == 3


def test_a_run_passes_subject_method_and_overrides_on(run: object, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _calls(monkeypatch, status=0)
    bench.run_if_needed(run, again=False)
    params = calls[0][calls[0].index("--params") + 1]
    assert params.startswith("subject=fox-lora,class_word=fox,method=lora,image=")
    assert params.endswith(",training.num_steps=2")


def test_a_failed_run_is_named_and_not_recorded(run: object, monkeypatch: pytest.MonkeyPatch) -> None:
    _calls(monkeypatch, status=1)
    with pytest.raises(SystemExit, match="fox-lora: the run failed with exit status 1"):
        bench.run_if_needed(run, again=False)
    assert not list(run.folder.glob("*.json"))  # type: ignore[attr-defined]
