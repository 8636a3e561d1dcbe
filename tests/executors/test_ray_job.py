"""`kedro personalize` as a job that is submitted to a Ray cluster, with the file in deploy."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mlflow_servers import free_port
from project_copy import PROJECT, copy_project, empty_database

pytest.importorskip("ray")
pytest.importorskip("aiohttp_cors", reason="needs ray[default]")
pytestmark = pytest.mark.slow

_TIMEOUT_S = 400
_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_PARAMS = (
    "base_model=tiny,prompt_database=prompts.parquet,ingestion.bucket.side_px=32,training.num_steps=600,"
    "training.preview.every=0,evaluation.branch_images=0,evaluation.guidance_images=0,evaluation.attention_images=0,"
    "evaluation.sweep.images=0,personalize.export=false"
)


def ray(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_RAY, *arguments], env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )


@pytest.fixture
def environment() -> dict[str, str]:
    """Variables of the cluster and of who submits jobs to it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RAY_"))}
    kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return kept | secret | {"OMP_NUM_THREADS": "1", "KEDRO_ENV": "", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def dashboard(environment: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """The address that takes jobs, of a cluster of this machine."""
    port, log = free_port(), tmp_path / "head.log"
    short = tempfile.mkdtemp(prefix="ray")  # names of sockets have 107 characters at most
    options = (f"--port={free_port()}", f"--dashboard-port={port}", "--include-dashboard=true", f"--temp-dir={short}")
    command = (*_RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=1", *options)
    with log.open("wb") as output:
        head = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end_s = time.monotonic() + 120
        while b"Ray runtime started" not in log.read_bytes():
            assert head.poll() is None and time.monotonic() < end_s, log.read_text(errors="replace")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:  # not `ray stop`, which stops all clusters of the machine
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(short, ignore_errors=True)


def test_subjects_are_personalized_by_a_submitted_job_also_after_a_stop(
    dashboard: str, environment: dict[str, str], tiny_base_model: Path, tmp_path: Path
) -> None:
    project = copy_project(tmp_path / "project", tiny_base_model)
    (project / "pictures").mkdir()
    for name in ("ant", "bee"):
        Image.new("RGB", (32, 32), "red").save(project / f"pictures/{name}.png")
    runtime_env = yaml.safe_load((PROJECT / "deploy/ray_job.yml").read_text())
    runtime_env["env_vars"]["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/runs.db"
    (tmp_path / "ray_job.yml").write_text(yaml.safe_dump(runtime_env))
    command = f"cd {project} && {sys.executable} -m kedro personalize pictures --env test --ray auto --params {_PARAMS}"
    address = ("--address", dashboard)
    submit = ("job", "submit", *address, "--runtime-env", str(tmp_path / "ray_job.yml"))

    saving = f"{command},training.checkpoint_minutes=0"
    begun = ray(environment, *submit, "--submission-id", "first", "--no-wait", "--", "bash", "-c", saving)
    assert begun.returncode == 0, begun.stdout[-3000:] + begun.stderr[-3000:]
    logs = project / "data/09_tracking/run_logs"
    end_s = time.monotonic() + _TIMEOUT_S
    while not list(project.glob("data/06_models/*/checkpoints/*.pt")):
        assert time.monotonic() < end_s, ray(environment, "job", "logs", *address, "first").stdout[-3000:]
        time.sleep(0.2)
    stopped = ray(environment, "job", "stop", *address, "first")
    assert "was stopped" in stopped.stdout, stopped.stdout[-3000:] + stopped.stderr[-3000:]
    assert not list(project.glob("data/06_models/*/concept.safetensors"))

    done = ray(environment, *submit, "--", "bash", "-c", command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout
    assert all((project / f"data/06_models/{name}/concept.safetensors").exists() for name in ("ant", "bee"))
    assert any("Continuing the interrupted training" in file.read_text(errors="replace") for file in logs.glob("*.log"))
    assert (tmp_path / "runs.db").exists()
    assert (project / "data/09_tracking/mlflow.db").read_bytes() == empty_database()
