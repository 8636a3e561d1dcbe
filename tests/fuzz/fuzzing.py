"""Targets of the fuzzer, and a worker that reads mutated inputs within a limit of time and memory."""

from __future__ import annotations

import importlib
import pkgutil
import re
import resource
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dreamartist_pipeline.errors import InputError
from fuzz.mutations import mutated

LIMIT_S = 5.0
MEMORY_BYTES = 2 * 1024**3
MODULES = "fuzz.targets"


@dataclass(frozen=True)
class Target:
    """A reader of files.

    A module of fuzz/targets holds a list of them as TARGETS.

    Attributes:
        name: in reports and on the command line.
        samples: makes the valid inputs, file name -> bytes.
        read: reads the file at a path; the file has the name of its sample.
        errors: what it may raise; everything else is a finding, also MemoryError.
        mutate: (bytes, seed) -> bytes of the mutated file.
    """

    name: str
    samples: Callable[[], Mapping[str, bytes]]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = (InputError,)
    mutate: Callable[[bytes, int], bytes] = mutated

    @cached_property
    def _samples(self) -> list[tuple[str, bytes]]:
        return sorted(self.samples().items())

    def input(self, seed: int) -> tuple[str, bytes]:
        """Return the file name and the bytes of an input; seeds below the number of samples give the samples."""
        name, data = self._samples[seed % len(self._samples)]
        return name, data if seed < len(self._samples) else self.mutate(data, seed)


@dataclass(frozen=True)
class Finding:
    """An input that a reader does not handle.

    Attributes:
        target: its name.
        seed: of the input.
        problem: the error, "slower than 5 s", or how the process ended.
    """

    target: str
    seed: int
    problem: str

    @property
    def kind(self) -> str:
        """Return the problem without numbers and quoted values, to count those of one cause once."""
        return re.sub(r"'[^']*'|\d+", "…", self.problem.splitlines()[-1])


class TooSlowError(BaseException):
    """A reading takes longer than the limit; no `except Exception` of a reader catches it."""


def all_targets() -> dict[str, Target]:
    """Return the targets of all modules in fuzz/targets."""
    package = importlib.import_module(MODULES)
    modules = [importlib.import_module(f"{MODULES}.{module.name}") for module in pkgutil.iter_modules(package.__path__)]
    return {target.name: target for module in modules for target in module.TARGETS}


def problem_of(target: Target, seed: int, limit_s: float = LIMIT_S) -> Finding | None:
    """Read one mutated input; return what is wrong with how it is handled, if anything."""
    name, data = target.input(seed)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(data)
        try:
            with _time_limit(limit_s):
                target.read(file)
        except target.errors as error:
            str(error).encode()  # the message can be printed
        except TooSlowError:
            return Finding(target.name, seed, f"{traceback.format_exc(limit=-4)}slower than {limit_s:g} s of CPU time")
        except Exception as error:  # noqa: BLE001 # whatever a reader raises is the result
            return Finding(
                target.name, seed, f"{traceback.format_exc(limit=-4)}{type(error).__name__} at {_place(error)}"
            )
    return None


def _place(error: Exception) -> str:
    """Return the last line of the project that an error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "dreamartist_pipeline" in frame.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].name}"


@contextmanager
def _time_limit(limit_s: float) -> Iterator[None]:
    """Raise TooSlowError after this much CPU time; the time on the wall depends on what else the machine does."""

    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def limit_memory(num_bytes: int = MEMORY_BYTES) -> None:
    """Let this process take at most `num_bytes` more than it has now; more is a MemoryError, or ends the process."""
    status = Path("/proc/self/status").read_text()
    present = sum(int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) for name in ("VmData", "VmStk")) * 1024  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_DATA, (present + num_bytes, resource.RLIM_INFINITY))
