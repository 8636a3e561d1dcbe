"""`kedro run` with a tracking server that is away, or goes away in mid-run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_servers import Gate, free_port, mlflow_server
from project_copy import copy_project
from warm_processes import WarmProgram, start_warm

_PARAMS = "subject=button,image=button.png,base_model=tiny,prompt_database=prompts.parquet,"
_PARAMS += "ingestion.bucket.side_px=32,ingestion.bucket.multiple_px=8"
_TIMEOUT_S = 600  # a run takes seconds; the machine may be shared


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_model: Path) -> Path:
    return copy_project(tmp_path_factory.mktemp("project"), tiny_base_model)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as port:
        opened = Gate(port)
        yield opened
        opened.set("closed")


def start(project: Path, uri: str, pipelines: str, outputs: Path) -> WarmProgram:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KEDRO_ENV": "", "MLFLOW_TRACKING_URI": uri}
    arguments = ("-m", "kedro", "run", "--env", "test", "--pipelines", pipelines, "--params", _PARAMS)
    return start_warm(arguments, project, environment, outputs)


def finished(program: WarmProgram) -> tuple[int, str]:
    result = program.wait(_TIMEOUT_S)
    output = result.stdout + result.stderr
    assert "pa55word" not in output
    return result.returncode, output


def test_a_server_that_is_away_ends_the_run_before_any_work(project: Path, tmp_path: Path) -> None:
    port = free_port()
    code, output = finished(start(project, f"http://user:pa55word@127.0.0.1:{port}", "ingestion", tmp_path))
    assert code == 1
    (message,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert f"http://127.0.0.1:{port}" in message and "MLFLOW_TRACKING_URI" in message
    assert "Traceback" not in output
    assert not (project / "data/02_intermediate").exists()


@pytest.mark.slow
def test_a_training_outlives_its_server_and_the_next_run_delivers_the_rest(
    project: Path, gate: Gate, tmp_path: Path
) -> None:
    import mlflow

    program = start(project, gate.uri, "train", tmp_path)
    end_s = time.monotonic() + _TIMEOUT_S
    while not program.ends_within(0.02) and time.monotonic() < end_s:
        if "train_concept" in program.read():
            gate.set("closed")
            break
    code, output = finished(program)
    assert code == 0, output[-3000:]
    (kept,) = (project / "data/09_tracking/outbox").iterdir()
    assert str(kept) in output and "Traceback" not in output
    gate.set("open")
    code, output = finished(start(project, gate.uri, "ingestion", tmp_path))
    assert code == 0, output[-3000:]
    assert not kept.exists()
    client = mlflow.MlflowClient(gate.uri)
    run = client.get_run(kept.name)
    assert run.info.status == "FINISHED" and run.data.tags["delivery"].startswith("complete")
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert {metric.step for metric in client.get_metric_history(kept.name, "loss/total")} == {1, 2}
    assert "concept" in {file.path for file in client.list_artifacts(kept.name)}
