"""`kedro run` as a user types it, with its duration and peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed.report import ROOT

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True)
class Finished:
    """A finished command.

    Attributes:
        started: Unix time in seconds.
        seconds: of the whole command.
        peak_gib: the largest resident memory of its process.
    """

    started: float
    seconds: float
    peak_gib: float


def kedro_run(
    pipelines: str,
    params: Mapping[str, Any],
    env: str | None = None,
    tracking_uri: str | None = None,
    threads: int | None = None,
    project: Path = ROOT,
) -> Finished:
    """Run pipelines in a process of their own.

    Args:
        pipelines: comma-separated.
        params: `--params`.
        env: of the configuration, or None.
        tracking_uri: of MLflow, or None for the configured one.
        threads: of the CPU, or None for all.
        project: the folder of the project.

    Raises:
        SystemExit: the run failed.
    """
    command = [sys.executable, "-m", "kedro", "run", "--pipelines", pipelines, *(["--env", env] if env else [])]
    command += ["--params", ",".join(f"{name}={value}" for name, value in params.items())]
    environment = os.environ | ({"MLFLOW_TRACKING_URI": tracking_uri} if tracking_uri else {})
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return finish(command, environment, project)


def finish(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Finished:
    """Run a command and wait for it.

    Raises:
        SystemExit: it failed.
    """
    started, begun = time.time(), time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"expected {' '.join(command)} to succeed; got exit status {process.returncode}")
    return Finished(started, time.perf_counter() - begun, usage.ru_maxrss * _RSS_UNIT / 2**30)
