"""The pages of MLflow and kedro-viz after two trainings, in a real browser.

`BROWSER_SHOTS=FOLDER` keeps the screenshots.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import mlflow
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from headless import BROWSER, visited

from mlflow_servers import free_port, mlflow_server, wait_for
from project_copy import copy_project
from warm_processes import run_warm

pytestmark = [pytest.mark.skipif(BROWSER is None, reason="no headless browser"), pytest.mark.slow]

_SIMILARITY = "similarity/concept.efficientnet-lite0"
_GIVEN = "image=button.png,base_model=tiny,prompt_database=prompts.parquet,ingestion.bucket.side_px=32"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_model: Path) -> Path:
    """Return a project with a concept of each of two methods, both registered in MLflow."""
    folder = copy_project(tmp_path_factory.mktemp("project"), tiny_base_model)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KEDRO_ENV": ""}
    for method in ("lora", "dreamartist-plus-plus"):
        given = f"subject=button,method={method},training.num_steps=30,training.choose=best,{_GIVEN}"
        command = ("-m", "kedro", "run", "--env", "test", "--pipelines", "train,evaluate,register", "--params", given)
        result = run_warm(command, folder, environment, timeout_s=600)
        assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for screenshots."""
    folder = Path(os.environ.get("BROWSER_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --------------------------------------------------------------------------------------------- MLflow


@pytest.fixture(scope="module")
def store(project: Path) -> str:
    return f"sqlite:///{project}/data/09_tracking/mlflow.db"


@pytest.fixture(scope="module")
def ui(project: Path, store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of MLflow's pages."""
    with mlflow_server(tmp_path_factory.mktemp("server"), store) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def runs(store: str) -> list[str]:
    """Return the ids of both runs."""
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("dreamartist")
    found = [run.info.run_id for run in client.search_runs([experiment.experiment_id])]
    assert len(found) == 2
    return found


def test_mlflow_charts_the_curves_of_all_runs(ui: str, shots: Path, runs: list[str]) -> None:
    page = visited(
        f"{ui}/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART", shots / "mlflow_charts.png"
    )
    assert "copying/background.concept.pixels" in page and "button · train+evaluate+register" in page


def test_mlflow_compares_two_runs(ui: str, shots: Path, runs: list[str]) -> None:
    compared = quote(str(runs).replace("'", '"'))
    page = visited(f'{ui}/#/compare-runs?runs={compared}&experiments=["1"]', shots / "mlflow_compare.png", 1500, 2400)
    assert "copying/crop_distance.concept.efficientnet-lite0" in page and "evaluation.prompts" in page


def test_mlflow_shows_a_run_with_its_contact_sheet(ui: str, shots: Path, runs: list[str]) -> None:
    page = visited(f"{ui}/#/experiments/1/runs/{runs[0]}", shots / "mlflow_run.png", 1500, 2000)
    assert _SIMILARITY in page and "evaluation/contact_sheet.png" in page


def test_mlflow_shows_a_version_of_the_model_with_its_aliases(ui: str, shots: Path, runs: list[str]) -> None:
    page = visited(f"{ui}/#/models/button/versions/2", shots / "mlflow_model.png")
    assert "my-button, my-button-neg" in page and "dreamartist-plus-plus" in page
    assert re.search(r"@[^<]*last", page.replace("<!-- -->", "")), page[:2000]


# --------------------------------------------------------------------------------------------- kedro-viz


@pytest.fixture(scope="module")
def viz(project: Path) -> Iterator[str]:
    """Return the address of kedro-viz."""
    port = free_port(highest=49151)  # of those that kedro-viz accepts
    command = [sys.executable, "-m", "kedro", "viz", "run", "--no-browser", "--env", "test", "--port", str(port)]
    with (project / "viz.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--params", "subject=button,image=button.png"],
            cwd=project,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/api/main", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it serves in a process that it has started
        process.wait()


@pytest.mark.parametrize("dataset", ["contact_sheet", "training_curves"])
def test_kedro_viz_shows_the_graph_with_an_open_preview(viz: str, shots: Path, dataset: str) -> None:
    page = visited(f"{viz}/?pid=__default__&sn={dataset}", shots / f"kedro_viz_{dataset}.png")
    assert "train_concept" in page.lower().replace(" ", "_")
    assert ("data:image/png;base64" if dataset == "contact_sheet" else "js-plotly-plot") in page
