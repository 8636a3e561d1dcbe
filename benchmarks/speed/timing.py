"""Timing by alternated rounds: medians with quartiles, of cases that other load affects alike."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

from dreamartist_pipeline.core.devices import peak_memory_bytes, processor_name

_LIBRARIES = ("torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of several measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of one or more values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def clock_for(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds.

    On a GPU it waits for the device. On one CPU thread it is the CPU time of the process, which other processes hardly
    affect; on several threads, wall-clock time.
    """
    if device.type == "cuda":

        def synchronized() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronized
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def timed(run: Callable[[], object], clock: Callable[[], float]) -> Callable[[], float]:
    """Return a function that calls `run` and returns its seconds."""

    def seconds() -> float:
        begun = clock()
        run()
        return clock() - begun

    return seconds


def alternate(
    cases: Mapping[str, Callable[[], float]], num_rounds: int, num_warmups: int = 1
) -> dict[str, list[float]]:
    """Measure every case once per round, in forward and reverse order by turns.

    Args:
        cases: name -> a function that runs the case once and returns its measurement.
        num_rounds: measurements per case.
        num_warmups: calls of every case before the first round.
    """
    for measure in cases.values():
        for _ in range(num_warmups):
            measure()
    measured: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(num_rounds):
        for name in cases if index % 2 == 0 else reversed(cases):
            measured[name].append(cases[name]())
        print(f"\rround {index + 1}/{num_rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return measured


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return the hardware, the load before the measurement, and the versions of the libraries."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    load = {"load average": f"{os.getloadavg()[0]:.1f}"} if hasattr(os, "getloadavg") else {}
    return {
        **gpu,
        "cpu": f"{processor_name()}, {os.cpu_count()} cores",
        "CPU threads": str(torch.get_num_threads()),
        **load,
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def peak_gib(device: torch.device) -> float | None:
    """Return the peak memory of this process so far: allocated on a GPU, otherwise resident; None if unknown."""
    peak = peak_memory_bytes(device)
    return None if peak is None else peak / 2**30
