"""Many subjects by `kedro personalize` on a Ray cluster of this machine: speed of two workers, and what is lost.

    python benchmarks/many_subjects.py
    python benchmarks/many_subjects.py --subjects 6 --rounds 1

A copy of the project with the tiniest model personalizes random pictures. First, one worker and two take turns, each
with one thread; beside them stands what this machine gives to two processes that only compute. Then one worker is
killed in mid-run and one picture cannot be read: all others have to finish with the files of single runs, and a second
call has nothing to do.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from PIL import Image
from tqdm import tqdm

from chaos import results
from speed.commands import finish
from speed.report import FOLDER, ROOT, Report, Row
from speed.timing import describe_machine

sys.path.insert(0, str(ROOT / "tests"))  # the tiniest model

from conftest import build_tiny_base_model
from project_copy import copy_project

_PICTURES, _TORN, _DATA, _REPORT = "pictures", "torn", "data", "report.html"
_SIDE_PX = 64
_PARAMS = {
    "base_model": "tiny",
    "prompt_database": "prompts.parquet",
    "class_word": "picture",
    "ingestion.bucket.side_px": 32,
    "training.num_steps": 20,
    "training.preview.every": 0,
    **{f"evaluation.{name}_images": 0 for name in ("branch", "guidance", "attention")},
    "evaluation.sweep.images": 0,
}
_COMPUTES = "import torch; m = torch.ones(600, 600)\nfor _ in range(400): m @ m"


@dataclass(frozen=True)
class Project:
    """A copy of the project with pictures of many subjects.

    Attributes:
        folder: of the copy.
    """

    folder: Path

    def prepare(self, num_subjects: int) -> None:
        """Copy the project, and draw the pictures."""
        if not self.folder.exists():
            model = build_tiny_base_model(self.folder.with_name("model") / "tiny", seed=0)
            copy_project(self.folder, model)
        pictures = self.folder / _PICTURES
        shutil.rmtree(pictures, ignore_errors=True)
        pictures.mkdir()
        random = np.random.default_rng(0)
        for number in range(num_subjects):
            blocks = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            blocks.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.NEAREST).save(pictures / f"s{number:02}.png")

    def clear(self) -> None:
        """Remove all results."""
        shutil.rmtree(self.folder / _DATA, ignore_errors=True)
        (self.folder / _DATA / "09_tracking").mkdir(parents=True)

    def personalize(self, workers: int) -> subprocess.Popen[str]:
        """Start the command on a cluster of this machine."""
        options = ["--workers", str(workers), "--threads", "1", "--ray", "local", "--params", _text(_PARAMS)]
        return subprocess.Popen(
            [sys.executable, "-m", "kedro", "personalize", _PICTURES, "--env", "test", *options],
            cwd=self.folder,
            env=_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run_alone(self, subject: str) -> None:
        """Train, evaluate and export one subject by a single `kedro run`."""
        given = {"subject": subject, "image": f"{_PICTURES}/{subject}.png"} | _PARAMS
        options = ["--env", "test", "--pipelines", "train,evaluate,export", "--params", _text(given)]
        log = self.folder / f"{subject}.log"
        with log.open("w") as output:
            subprocess.run(
                [sys.executable, "-m", "kedro", "run", *options],
                cwd=self.folder,
                env=_environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                check=True,
            )

    def files_of(self, subject: str) -> dict[str, str]:
        """Return path -> hash of the results of a subject; without its report, which has durations."""
        found = results(self.folder / _DATA)
        return {path: sha for path, sha in found.items() if f"/{subject}/" in path and not path.endswith(_REPORT)}


def _text(params: Mapping[str, object]) -> str:
    return ",".join(f"{name}={value}" for name, value in params.items())


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return kept | {"OMP_NUM_THREADS": "1", "KEDRO_ENV": "", "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false"}


# ------------------------------------------------------------------------------------------------- speed


def seconds_of(project: Project, workers: int) -> tuple[float, float]:
    """Return the seconds of the whole command, and of its runs alone: from the first to the last.

    Raises:
        SystemExit: the command failed.
    """
    project.clear()
    started = time.perf_counter()
    process = project.personalize(workers)
    _, printed = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"expected the subjects to be personalized; got {printed[-2000:]}")
    took = re.findall(r"run_subjects took ([\d.]+) s", printed)
    return seconds, float(took[-1])


def gain_of_machine() -> float:
    """Return how much more two processes compute than one, with one thread each."""

    def compute(count: int) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            commands = [
                pool.submit(finish, [sys.executable, "-c", _COMPUTES], _environment(), ROOT) for _ in range(count)
            ]
            for command in commands:
                command.result()
        return time.perf_counter() - started

    return 2 * compute(1) / compute(2)


def measure_speed(project: Project, rounds: int) -> tuple[list[Row], list[str]]:
    """Personalize all subjects with one worker and with two, in turns."""
    seconds: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    gains = []
    for _ in tqdm(range(rounds), "rounds"):
        gains.append(gain_of_machine())
        for workers, measured in seconds.items():
            measured.append(seconds_of(project, workers))
    medians = {
        workers: [median(values) for values in zip(*measured, strict=True)] for workers, measured in seconds.items()
    }
    rows = [
        Row(f"{workers} worker{'s' if workers > 1 else ''}", {"command, s": command, "runs, s": runs})
        for workers, (command, runs) in medians.items()
    ]
    gain, of_machine = medians[1][1] / medians[2][1], median(gains)
    rows.append(Row("two workers against one", {"runs, s": gain}))
    rows.append(Row("two processes that only compute, against one", {"runs, s": of_machine}))
    return rows, [f"Two workers: {gain:.2f} × one; this machine gives two processes {of_machine:.2f} × one."]


# ------------------------------------------------------------------------------------------------- losses


def kill_a_worker(command: subprocess.Popen[str], project: Project) -> bool:
    """Kill one worker once a third of the subjects has a concept; return whether there was one that did something."""
    wanted = len([*(project.folder / _PICTURES).glob("s*.png")]) // 3
    while command.poll() is None:
        if len([*(project.folder / _DATA / "06_models").glob("s*/concept.safetensors")]) >= wanted:
            workers = [
                process
                for process in psutil.process_iter(["cmdline", "cwd"])
                if "dreamartist_pipeline.worker" in (process.info["cmdline"] or ())
                and process.info["cwd"] == str(project.folder)
            ]
            if workers:
                workers[0].kill()
                return True
        time.sleep(0.2)
    return False


def check_losses(project: Project, num_alone: int) -> tuple[list[Row], list[str]]:
    """Lose a worker, have a picture that cannot be read, call again, and compare with single runs."""
    project.clear()
    (project.folder / _PICTURES / f"{_TORN}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    subjects = sorted(file.stem for file in (project.folder / _PICTURES).glob("s*.png"))
    command = project.personalize(2)
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_a_worker, command, project)
        _, printed = command.communicate()
    finished = [one for one in subjects if (project.folder / _DATA / "08_reporting" / one / _REPORT).exists()]
    expected = {one: project.files_of(one) for one in subjects[:num_alone]}
    again = project.personalize(2)
    _, printed_again = again.communicate()
    started_again = int(re.findall(r"runs: +\d+%\|[^|]*\| \d+/(\d+)", printed_again)[-1])
    project.clear()
    with ThreadPoolExecutor(2) as pool:
        list(tqdm(pool.map(project.run_alone, expected), "single runs", len(expected)))
    same = sum(project.files_of(one) == files for one, files in expected.items())
    values = {
        "subjects": len(subjects) + 1,
        "finished": len(finished),
        "compared with single runs": len(expected),
        "same bytes": same,
        "started by a second call": started_again,
    }
    notes = [
        f"A worker was killed: {killed.result()}; exit status {command.returncode}; "
        f"the picture that cannot be read is listed: {_TORN in printed and '1 that failed' in printed}."
    ]
    return [Row("one worker killed, one picture unreadable", values)], notes


def main() -> None:
    """Parse the options, measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1, help="of one worker and two")
    parser.add_argument("--alone", type=int, help="how many subjects are compared with single runs; default: all")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "many_subjects")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the report")
    options = parser.parse_args()
    project = Project(options.work / "project")
    project.prepare(options.subjects)
    rows, notes = measure_speed(project, options.rounds) if options.rounds else ([], [])
    project.prepare(options.subjects - 1)  # and one that cannot be read
    lost, more = check_losses(project, options.subjects if options.alone is None else options.alone)
    facts = {**describe_machine(torch.device("cpu")), "subjects": options.subjects}
    title = f"{options.subjects} subjects on a Ray cluster of this machine"
    Report("many_subjects", title, facts, [*rows, *lost], "runs, s", [*notes, *more]).write(options.output)


if __name__ == "__main__":
    main()
