"""A training that is stopped by SIGTERM, in a process of its own as users start it, and continued."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from project_copy import copy_project
from warm_processes import run_warm, start_warm

NUM_STEPS, TIMEOUT_S = 16, 600
GIVEN = {
    "image": "stripes.png",
    "base_model": "tiny",
    "prompt_database": "prompts.parquet",
    "ingestion.bucket.side_px": "32",
    "ingestion.bucket.multiple_px": "8",
    "training.num_steps": str(NUM_STEPS),
    "training.preview.every": "0",
    "training.checkpoint_minutes": "0",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_model: Path) -> Path:
    """Return a copy of the project with a picture."""
    folder = copy_project(tmp_path_factory.mktemp("project"), tiny_base_model)
    picture = Image.new("RGB", (32, 32), "orange")
    picture.paste("purple", (8, 0, 16, 32))
    picture.save(folder / "stripes.png")
    return folder


def command(subject: str, **others: str) -> tuple[str, ...]:
    """Return the arguments of Python for `kedro run`; all subjects have the same trigger words and class word."""
    words = "training.words.names.pt1=[my-x, my-x-neg]"
    given = {"subject": subject, "class_word": "x", **GIVEN, **others}
    params = ",".join([*(f"{name}={value}" for name, value in given.items()), words])
    return "-m", "kedro", "run", "--env", "test", "--pipeline", "train", "--params", params


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "KEDRO_ENV": "", "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false"}


def run(project: Path, subject: str, **others: str) -> subprocess.CompletedProcess[str]:
    return run_warm(command(subject, **others), project, environment(), TIMEOUT_S)


def stop(project: Path, subject: str, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Start the run, and send it a signal as soon as it has saved a checkpoint."""
    with tempfile.TemporaryDirectory() as outputs:
        program = start_warm(command(subject), project, environment(), Path(outputs))
        end_s = time.monotonic() + TIMEOUT_S
        while not program.ends_within(0.02) and time.monotonic() < end_s:
            if (checkpoints(project, subject) / "concept.pt").exists():
                program.send(number)
                break
        return program.wait(TIMEOUT_S)


def checkpoints(project: Path, subject: str) -> Path:
    return project / "data/06_models" / subject / "checkpoints"


def concept(project: Path, subject: str) -> Path:
    return project / "data/06_models" / subject / "concept.safetensors"


def history(project: Path, subject: str) -> pd.DataFrame:
    return pd.read_csv(project / "data/08_reporting" / subject / "training_history.csv").drop(columns="seconds")


def runs(project: Path, subject: str) -> list[Any]:
    """Return the MLflow runs of a subject, in the order of their start."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project}/data/09_tracking/mlflow.db")
    experiment = client.get_experiment_by_name("dreamartist")
    query = f"tags.subject = '{subject}'"
    return list(client.search_runs([experiment.experiment_id], query, order_by=["attributes.start_time ASC"]))


@pytest.mark.slow
def test_a_training_stopped_by_sigterm_is_continued_by_the_same_command_to_the_same_bytes(project: Path) -> None:
    whole = subprocess.run(  # by a new Python, whose hashes of texts are others
        [sys.executable, *command("whole")],
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert not checkpoints(project, "whole").exists()

    stopped = stop(project, "stopped", signal.SIGTERM)
    assert stopped.returncode == 130, stopped.stderr[-3000:]
    assert "Traceback" not in stopped.stderr
    last_line = stopped.stderr.strip().splitlines()[-1]
    assert f"of {NUM_STEPS}" in last_line and "the same command continues" in last_line
    assert not concept(project, "stopped").exists()

    changed = run(project, "stopped", **{"training.weight_decay": "0.5"})
    assert changed.returncode == 1
    for part in ("training.weight_decay 0.001 → 0.5", "training.resume=never", "training.resume=force"):
        assert part in changed.stderr

    again = run(project, "stopped")
    assert again.returncode == 0, again.stderr[-3000:]
    assert concept(project, "stopped").read_bytes() == concept(project, "whole").read_bytes()
    pd.testing.assert_frame_equal(history(project, "stopped"), history(project, "whole"))
    assert not checkpoints(project, "stopped").exists()

    killed, _, continued = runs(project, "stopped")
    assert killed.info.status == "KILLED"
    assert last_line == killed.data.tags["error"]
    assert continued.info.status == "FINISHED"
    assert continued.data.tags["resumed_from"] == killed.info.run_id
