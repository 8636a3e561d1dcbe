"""`kedro personalize` with PostgreSQL and an S3-like store: of an MLflow server, and of the project's own files."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from dreamartist_pipeline.object_stores import ObjectStore
from mlflow_servers import mlflow_server
from project_copy import copy_project, empty_database
from remote_servers import bucket, object_store, postgres, postgres_program
from warm_processes import run_warm

_TIMEOUT_S = 900
_OWN = ("pytest-", "popen-")  # folders of pytest and of its workers around a temporary one
_PARAMS = (
    "base_model=tiny,prompt_database=prompts.parquet,ingestion.bucket.side_px=32,training.num_steps=2,"
    "personalize.export=false,evaluation.branch_images=0,evaluation.guidance_images=0,evaluation.attention_images=0,"
    "evaluation.sweep.images=0"
)


@pytest.mark.slow
@pytest.mark.skipif(postgres_program("initdb") is None, reason="PostgreSQL is not installed")
def test_subjects_are_personalized_with_postgresql_and_an_object_store(tmp_path: Path, tiny_base_model: Path) -> None:
    boto3, psycopg = pytest.importorskip("boto3"), pytest.importorskip("psycopg")
    tmp_path.chmod(0o755)
    for folder in itertools.takewhile(lambda each: each.name.startswith(_OWN), tmp_path.parents):
        folder.chmod(0o755)  # for the user of PostgreSQL
    project = copy_project(tmp_path / "project", tiny_base_model)
    (project / "pictures").mkdir()
    for name, color in {"dot": "orange", "ink": "navy"}.items():
        Image.new("RGB", (32, 32), color).save(project / f"pictures/{name}.png")

    with postgres(tmp_path) as database, object_store() as variables:
        bucket = boto3.client("s3", endpoint_url=variables["AWS_ENDPOINT_URL"], region_name="us-east-1",
                              aws_access_key_id="key", aws_secret_access_key="secret")  # fmt: skip
        bucket.create_bucket(Bucket="studio")
        with mlflow_server(tmp_path, database, "s3://studio/mlflow", variables) as port:
            uri = f"http://127.0.0.1:{port}"
            environment = {**os.environ, "KEDRO_ENV": "", "MLFLOW_TRACKING_URI": uri}
            arguments = ("personalize", "pictures", "--env", "test", "--threads", "1", "--params", _PARAMS)
            result = run_warm(("-m", "kedro", *arguments), project, environment, _TIMEOUT_S)
            assert result.returncode == 0, result.stderr[-4000:]

            client = MlflowClient(uri)
            experiment = client.get_experiment_by_name("dreamartist")
            runs = {run.data.tags["subject"]: run for run in client.search_runs([experiment.experiment_id])}
            children = {name: runs.pop(name) for name in ("dot", "ink")}
            (parent,) = runs.values()
            for run in children.values():
                assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == parent.info.run_id
                assert run.data.metrics["similarity/concept.efficientnet-lite0"] > 0
                names = {Path(file).name for file in _files(client, run.info.run_id)}
                assert {"contact_sheet.png", "report.html", "training_history.csv"} <= names
            assert any(file.endswith("subjects.html") for file in _files(client, parent.info.run_id))
        keys = [entry["Key"] for entry in bucket.list_objects_v2(Bucket="studio")["Contents"]]
        assert any(key.startswith("mlflow/") and key.endswith("contact_sheet.png") for key in keys)
        with psycopg.connect(database) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'")
            assert cursor.fetchone() == (3,)
    assert (project / "data/09_tracking/mlflow.db").read_bytes() == empty_database()
    assert not (project / "mlruns").exists()
    assert not [*(project / "data/09_tracking").glob("outbox/*")]


@pytest.mark.slow
def test_machines_share_pictures_models_and_results_in_an_object_store(tmp_path: Path, tiny_base_model: Path) -> None:
    """Two machines without a common disk: what one has made, the other finds done, and draws with."""
    pytest.importorskip("s3fs")
    with bucket("studio") as url:
        pictures = ObjectStore(f"{url}/pictures")
        for name, color in {"dot": "orange", "ink": "navy"}.items():
            Image.new("RGB", (32, 32), color).save(tmp_path / f"{name}.png")
            pictures.copy_to(f"{name}.png", tmp_path / f"{name}.png")
        for file in (file for file in tiny_base_model.rglob("*") if file.is_file()):
            place = file.relative_to(tiny_base_model)
            ObjectStore(f"{url}/tiny").folder(*place.parent.parts).copy_to(place.name, file)
        remote = f"base_model={url}/tiny,store={url}/studio"
        given = ("--params", _PARAMS.replace("base_model=tiny", remote))
        machines = [copy_project(tmp_path / name, tiny_base_model) for name in ("first", "second")]
        for machine in machines:
            shutil.rmtree(machine / "tiny")

        def kedro(machine: Path, *arguments: str) -> str:
            environment = {**os.environ, "KEDRO_ENV": "", "DREAMARTIST_CACHE": str(machine / "cache")}
            result = run_warm(("-m", "kedro", *arguments, "--env", "test", *given), machine, environment, _TIMEOUT_S)
            assert result.returncode == 0, result.stderr[-4000:]
            return result.stdout + result.stderr

        command = ("personalize", f"{url}/pictures", "--threads", "1")
        assert "come from" not in kedro(machines[0], *command)
        said = kedro(machines[1], *command)
        assert "2 of 2 runs are finished already" in said
        concepts = [machine / "data/06_models/dot/concept.safetensors" for machine in machines]
        assert concepts[0].read_bytes() == concepts[1].read_bytes()
        assert (machines[1] / "data/08_reporting/personalize/subjects.html").exists()

        shutil.rmtree(machines[1] / "data/06_models/ink")
        given = ("--params", f"subject=ink,{remote}")
        assert f"The results of ink come from {url}/studio" in kedro(machines[1], "run", "--pipeline", "generate")
        assert [*(machines[1] / "data/07_model_output/ink").rglob("000_0.png")]
        assert len(ObjectStore(f"{url}/studio/regularization").find("")) > 2


def _files(client: MlflowClient, run_id: str, folder: str = "") -> list[str]:
    """Return all files of a run."""
    entries = client.list_artifacts(run_id, folder)
    found = [entry.path for entry in entries if not entry.is_dir]
    return found + [file for entry in entries if entry.is_dir for file in _files(client, run_id, entry.path)]
