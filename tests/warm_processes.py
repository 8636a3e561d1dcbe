"""Python programs in processes of their own that need not import the large libraries anew.

A short `kedro run` spends most of its time on imports. Here it is forked from a process that has imported
warm_libraries.py.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}  # read by imports; no thread may exist yet


def run_warm(
    arguments: tuple[str, ...], folder: Path, environment: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` (`-m MODULE …` or `FILE …`) in a folder, with these environment variables alone.

    Raises:
        subprocess.TimeoutExpired: the program took longer, and was killed.
    """
    with tempfile.TemporaryDirectory() as outputs:
        program = start_warm(arguments, folder, environment, Path(outputs))
        return program.wait(timeout_s)


@dataclass(frozen=True)
class WarmProgram:
    """A running program.

    Attributes:
        arguments: of Python.
        process: it runs in.
        outputs: files with what it has written so far: stdout, stderr.
    """

    arguments: tuple[str, ...]
    process: BaseProcess
    outputs: tuple[Path, Path]

    def wait(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: the program took longer, and was killed.
        """
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired(self.arguments, timeout_s)
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *map(_text_of, self.outputs))

    def read(self) -> str:
        """Return all that it has written so far, first to stdout, then to stderr."""
        return "".join(map(_text_of, self.outputs))


def _text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def start_warm(arguments: tuple[str, ...], folder: Path, environment: Mapping[str, str], outputs: Path) -> WarmProgram:
    """Start `python ARGUMENTS` as `run_warm` does; `outputs` is a folder for what it writes."""
    files = outputs / "stdout", outputs / "stderr"
    process = warm_context().Process(target=_run, args=(arguments, folder, dict(environment), files))
    process.start()
    return WarmProgram(arguments, process, files)


@functools.cache
def warm_context() -> ForkServerContext:
    """Return the context of processes that are forked from the one with the libraries, which ends with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm_libraries"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # it ignores what it cannot import
        forkserver.ensure_running()
    return context


def _run(arguments: tuple[str, ...], folder: Path, environment: dict[str, str], outputs: tuple[Path, Path]) -> None:
    """Run a program in the forked process."""
    for descriptor, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [str(folder), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    assert "warm_libraries" in sys.modules, "not imported before the run"
    assert not {"kedro", "dreamartist_pipeline"} & sys.modules.keys(), "imported before the run"
    if arguments[0] == "-m":
        sys.argv[1:] = arguments[2:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        runpy.run_path(arguments[0], run_name="__main__")
