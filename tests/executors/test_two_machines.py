"""A Ray cluster of two machines, here two network namespaces: `kedro personalize` by the head's address alone."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from project_copy import copy_project

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None,
        reason="needs network namespaces: root, and the command ip",
    ),
]

_TOKEN = secrets.token_hex(32)
_HEAD, _OTHER, _PORT = "10.77.0.1", "10.77.0.2", 6379
_PARAMS = (
    "base_model=tiny,prompt_database=prompts.parquet,ingestion.bucket.side_px=32,training.num_steps=30,"
    "training.preview.every=0,evaluation.branch_images=0,evaluation.guidance_images=0,evaluation.attention_images=0,"
    "evaluation.sweep.images=0,personalize.export=false"
)
_RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", "--num-cpus=1", "--block")


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def inside(namespace: str, *command: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", namespace, *command)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Two connected network namespaces."""
    head, other = f"head{os.getpid()}", f"other{os.getpid()}"
    try:
        for name in (head, other):
            run("ip", "netns", "add", name)
        run("ip", "link", "add", "veth0", "netns", head, "type", "veth", "peer", "name", "veth0", "netns", other)
        for name, address in ((head, _HEAD), (other, _OTHER)):
            run(*inside(name, "ip", "address", "add", f"{address}/24", "dev", "veth0"))
            for device in ("veth0", "lo"):
                run(*inside(name, "ip", "link", "set", device, "up"))
        yield head, other
    finally:
        for name in (head, other):
            subprocess.run(["ip", "netns", "delete", name], check=False)


def start(command: tuple[str, ...], folder: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment = {name: value for name, value in environment.items() if not name.lower().endswith("_proxy")}
    environment |= {"OMP_NUM_THREADS": "1", "KEDRO_ENV": "", "RAY_health_check_period_ms": "1000"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN}
    with log.open("wb") as output:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_until(condition: Callable[[], bool], seconds: float, process: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end_s
        time.sleep(0.2)


def test_a_machine_that_is_lost_in_mid_run_is_survived(
    machines: tuple[str, str], tiny_base_model: Path, tmp_path: Path
) -> None:
    project = copy_project(tmp_path / "project", tiny_base_model)
    (project / "pictures").mkdir()
    names = ("ant", "bee", "cat", "dog")
    for name, color in zip(names, ("red", "green", "blue", "orange"), strict=True):
        Image.new("RGB", (32, 32), color).save(project / f"pictures/{name}.png")
    head, other = machines
    short = tempfile.mkdtemp(prefix="ray")  # names of sockets have 107 characters at most
    started: list[subprocess.Popen[bytes]] = []
    try:
        ray_head = (*_RAY, "--head", f"--node-ip-address={_HEAD}", f"--port={_PORT}", "--include-dashboard=false")
        started.append(start(inside(head, *ray_head, f"--temp-dir={short}"), project, tmp_path / "head.log"))
        wait_until(lambda: b"Ray runtime started" in (tmp_path / "head.log").read_bytes(), 60, started[0])
        ray_other = (*_RAY, f"--address={_HEAD}:{_PORT}", f"--node-ip-address={_OTHER}")
        started.append(start(inside(other, *ray_other), project, tmp_path / "other.log"))
        wait_until(lambda: b"Ray runtime started" in (tmp_path / "other.log").read_bytes(), 60, started[1])
        options = (
            "--env",
            "test",
            "--workers",
            "2",
            "--threads",
            "1",
            "--ray",
            f"{_HEAD}:{_PORT}",
            "--params",
            _PARAMS,
        )
        command = (sys.executable, "-m", "kedro", "personalize", "pictures", *options)
        started.append(start(inside(head, *command), project, tmp_path / "command.log"))
        logs = project / "data/09_tracking/run_logs"
        begun = lambda: sum("train_concept" in log.read_text(errors="replace") for log in logs.glob("*.log")) >= 2  # noqa: E731
        wait_until(begun, 300, started[2])
        run(*inside(other, "ip", "link", "set", "veth0", "down"))
        assert started[2].wait(600) == 0, (tmp_path / "command.log").read_text(errors="replace")[-3000:]
    finally:
        for process in reversed(started):
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
        shutil.rmtree(short, ignore_errors=True)
    text = (tmp_path / "command.log").read_text(errors="replace")
    assert "is lost" in text
    assert all((project / f"data/06_models/{name}/concept.safetensors").exists() for name in names)
