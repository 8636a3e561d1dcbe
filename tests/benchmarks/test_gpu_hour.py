"""The script that runs everything on a GPU: time limits, failures, and that every part runs in the smallest size."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import gpu_hour
from gpu_hour import Part, Result, make_parts, run_parts, write_results

PRINT = ("-c", "print('hello')")


def statuses(results: list[Result]) -> list[str]:
    return [result.status for result in results]


def run(parts: list[Part], folder: Path, total_s: float = 60.0) -> list[Result]:
    return run_parts(parts, folder, total_s, {"GPU_HOUR_MACHINE": "a GPU", "PATH": "/usr/bin:/bin"})


def test_a_part_that_fails_or_runs_out_of_time_does_not_stop_the_others(tmp_path: Path) -> None:
    parts = [
        Part("broken", ("-c", "raise SystemExit(3)"), 20),
        Part("endless", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), 1),
        Part("good", PRINT, 20),
    ]

    results = run(parts, tmp_path)

    assert [status.split()[0] for status in statuses(results)] == ["failed", "stopped", "done"]
    report = (tmp_path / "gpu_hour.md").read_text()
    assert "a GPU" in report
    assert "    begun" in report
    written = json.loads((tmp_path / "gpu_hour.json").read_text())["parts"]
    assert [part["name"] for part in written] == ["broken", "endless", "good"]


def test_parts_that_there_is_no_time_for_are_named(tmp_path: Path) -> None:
    (result,) = run([Part("late", PRINT, 20)], tmp_path, total_s=0)

    assert result.status.startswith("not started")


def test_reports_of_a_part_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    folder.mkdir()
    (folder / "speed.md").write_text("| a table |")

    write_results([Result("step", "done", 1.0, [{"rows": [1]}])], tmp_path, "a GPU")

    assert "| a table |" in (tmp_path / "gpu_hour.md").read_text()
    assert json.loads((tmp_path / "gpu_hour.json").read_text())["parts"][0]["reports"] == [{"rows": [1]}]


def test_without_a_gpu_it_says_how_to_try_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_hour.torch.cuda, "is_available", lambda: False)

    with pytest.raises(SystemExit, match="--device cpu --tiny"):
        gpu_hour.main(())


def test_the_limits_leave_the_first_parts_their_whole_time() -> None:
    parts = make_parts("cuda", Path("models"), tiny=False)

    assert sum(part.limit_s for part in parts[:6]) <= gpu_hour.TOTAL_S


@pytest.mark.slow
def test_every_part_runs_in_the_smallest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts run in this process; those of whole commands have tests of their own, with the same arguments."""
    calls: list[str] = []
    monkeypatch.setattr("speed.commands.finish", lambda command, *_: calls.append(" ".join(command)) or _stop())
    for part in make_parts("cpu", tmp_path, tiny=True)[1:]:
        script = importlib.import_module(Path(part.arguments[0]).stem)
        output = () if "--write" in part.arguments else ("--output", str(tmp_path / part.name))
        try:
            script.main((*part.arguments[1:], "--threads", "1", *output))
        except _Stopped:
            assert part.name in ("kedro_run", "full_size")
        else:
            assert (tmp_path / "sd15").is_dir()
            assert part.name == "random_models" or list((tmp_path / part.name).glob("*.json"))
    assert len(calls) == 2


class _Stopped(Exception):
    pass


def _stop() -> None:
    raise _Stopped
