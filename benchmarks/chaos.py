"""Interrupt commands at random moments, and run them again: the same bytes, nothing stuck, nothing left over.

    python benchmarks/chaos.py                       # 360 interruptions, 60 of two runs at once
    python benchmarks/chaos.py --interruptions 20 --pairs 5 --workers 2

A copy of the project with the tiniest model trains, evaluates, draws, exports and imports. Each command is interrupted
by SIGKILL, SIGTERM or SIGINT (the last two once or twice) at a random moment, then run again; the files are compared
with those of an uninterrupted run. Pairs are two trainings at once, of one subject, of two subjects, or of a new
project without a tracking database, of which one is killed. Every trial is a line of `trials.jsonl` in the work folder:
the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
from PIL import Image

from speed.report import FOLDER, ROOT, Report, Row

sys.path.insert(0, str(ROOT / "tests"))  # processes that need no imports; they import this file, but nothing of Kedro

from project_copy import copy_project
from warm_processes import WarmProgram, start_warm

NUM_STEPS, TRACKING = 12, "data/09_tracking"
STUCK_S, ANSWERED_S = 120, 20
COMMON = {"base_model": "tiny", "device": "cpu"}
TRAINING = COMMON | {
    "image": "stripes.png",
    "prompt_database": "prompts.parquet",
    "ingestion.bucket.side_px": 32,
    "ingestion.bucket.multiple_px": 8,
    "training.num_steps": NUM_STEPS,
    "training.preview.every": 6,
    "training.checkpoint_minutes": 0,  # a state after every step: at most one step is lost
}
SIGNALS = {  # name -> what is sent, and how often of 20
    "SIGKILL": ((signal.SIGKILL,), 12),
    "SIGTERM": ((signal.SIGTERM,), 2),
    "SIGTERM twice": ((signal.SIGTERM, signal.SIGTERM), 2),
    "SIGINT": ((signal.SIGINT,), 2),
    "SIGINT twice": ((signal.SIGINT, signal.SIGINT), 2),
}
_TRIALS = "trials.jsonl"
PAIRS = ("one subject", "two subjects", "a new project")
_NOT_COMPARED = ("manifest.json", ".lock")  # times and run ids; locks
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d[^/]*")  # a folder of images


@dataclass(frozen=True)
class Command:
    """A `kedro run`.

    Attributes:
        name: of the pipeline.
        params: `--params`, without the subject.
        state: the command after which it runs; None for an empty project.
        subject: its subject.
    """

    name: str
    params: dict[str, object]
    state: str | None = "train"
    subject: str = "x"

    def arguments(self, subject: str | None = None) -> tuple[str, ...]:
        """Return the arguments of Python."""
        given = {"subject": subject or self.subject, "class_word": "x", **self.params}
        params = ",".join(f"{name}={value}" for name, value in given.items())
        return "-m", "kedro", "run", "--env", "test", "--pipeline", self.name, "--params", params


_IMPORTED = {"import.positive": "x.safetensors", "import.negative": "x-neg.safetensors"}
_WORDS = {"training.words.names.pt1": "[my-x, my-x-neg]"}  # the same for two subjects: equal bytes
COMMANDS = {
    command.name: command
    for command in (
        Command("train", TRAINING | _WORDS, state=None),
        Command("evaluate", COMMON),
        Command("generate", COMMON),
        Command("export", COMMON),
        Command("import", COMMON | _IMPORTED, "export", "y"),
    )
}


@dataclass(frozen=True)
class Trial:
    """One interruption and what came of it.

    Attributes:
        number: of the trial.
        command: its name; of a pair, what the pair is.
        sent: name of the signals.
        after_s: from the start of the command to the signal.
        problems: what is not as it should be; () for a good end.
        lost_steps: finished steps that were computed again; None where nothing was trained.
    """

    number: int
    command: str
    sent: str
    after_s: float
    problems: tuple[str, ...] = ()
    lost_steps: int | None = None


@dataclass
class Project:
    """A copy of the project, and what its commands make of it.

    Attributes:
        folder: of the work: `project`, `states`.
        seconds: command -> of an uninterrupted run.
    """

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The copy of the project."""
        return self.folder / "project"

    def prepare(self) -> None:
        """Copy the project, and run every command once, keeping the data after each."""
        if not self.root.exists():
            from conftest import build_tiny_base_model

            model = build_tiny_base_model(self.folder / "model" / "tiny", seed=0)
            copy_project(self.root, model)
            picture = Image.new("RGB", (32, 32), "orange")
            picture.paste("purple", (8, 0, 16, 32))
            picture.save(self.root / "stripes.png")
        durations = self.folder / "seconds.json"
        if durations.exists():
            self.seconds = json.loads(durations.read_text())
            return
        self.set_up_tracking()
        for name, command in COMMANDS.items():
            self.restore(command.state)
            for _ in range(2):  # the second one without the imports of the first
                self.restore(command.state)
                started = time.monotonic()
                finished = self.run(command.arguments())
                self.seconds[name] = time.monotonic() - started
                if finished.returncode:
                    raise SystemExit(f"expected {name} to succeed; got {finished.stderr[-2000:]}")
            self.keep(name)
            if name == "export":
                for file in (self.root / "data/07_model_output").rglob("x*.safetensors"):
                    shutil.copy(file, self.root / file.name)
        durations.write_text(json.dumps(self.seconds))

    def set_up_tracking(self) -> None:
        """Make the state of a project whose tracking database exists and that has no results."""
        self.restore("none")
        finished = self.run(COMMANDS["train"].arguments())
        if finished.returncode:
            raise SystemExit(f"expected a training to succeed; got {finished.stderr[-2000:]}")
        for path in (self.root / "data").iterdir():
            if path.name != Path(TRACKING).name:
                shutil.rmtree(path)
        self.keep("")

    def keep(self, state: str) -> None:
        """Keep the data as a state."""
        kept = self.folder / "states" / (state or "empty")
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(self.root / "data", kept)

    def restore(self, state: str | None) -> None:
        """Put the data of a state in place; "none" for a new project."""
        data = self.root / "data"
        shutil.rmtree(data, ignore_errors=True)
        if state == "none":
            (data / "09_tracking").mkdir(parents=True)
        else:
            shutil.copytree(self.folder / "states" / (state or "empty"), data)

    def start(self, arguments: tuple[str, ...], outputs: Path) -> WarmProgram:
        """Start a command."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        environment |= {"OMP_NUM_THREADS": "1", "KEDRO_ENV": "", "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false"}
        outputs.mkdir(parents=True, exist_ok=True)
        return start_warm(arguments, self.root, environment, outputs)

    def run(self, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        with tempfile.TemporaryDirectory() as outputs:
            return self.start(arguments, Path(outputs)).wait(STUCK_S)


def results(data: Path) -> dict[str, str]:
    """Return path -> hash of all files in a data folder; without tracking, locks, times and durations."""
    found = {}
    for file in sorted(data.rglob("*")):
        path = file.relative_to(data).as_posix()
        if file.is_file() and not path.startswith(Path(TRACKING).name) and not path.endswith(_NOT_COMPARED):
            content = file.read_bytes()
            if file.name == "training_history.csv":
                content = pd.read_csv(file).drop(columns="seconds").to_csv().encode()
            found[_TIME.sub("TIME", path)] = hashlib.sha256(content).hexdigest()
    return found


def differences(expected: dict[str, str], got: dict[str, str]) -> Iterator[str]:
    """Yield missing, stray and changed files."""
    yield from (f"missing {path}" for path in expected.keys() - got.keys())
    yield from (f"stray {path}" for path in got.keys() - expected.keys())
    yield from (f"other bytes {path}" for path in expected.keys() & got.keys() if expected[path] != got[path])


def problems_of(project: Project, again: subprocess.CompletedProcess[str], expected: dict[str, str]) -> Iterator[str]:
    """Yield what is wrong after the second run of a command."""
    if again.returncode:
        yield f"the same command ended with {again.returncode}: {again.stderr.strip()[-300:]}"
    yield from differences(expected, results(project.root / "data"))
    with contextlib.closing(sqlite3.connect(project.root / TRACKING / "mlflow.db")) as database:
        (num_running,) = database.execute("select count(*) from runs where status = 'RUNNING'").fetchone()
    if num_running:
        yield f"{num_running} runs RUNNING"


def interrupt(program: WarmProgram, signals: Sequence[signal.Signals], after_s: float) -> bool:
    """Send signals to a program after some time; return whether it was still running."""
    was_running = not program.ends_within(after_s)
    for number in signals:
        program.send(number)
        time.sleep(0.05)
    return was_running


def lost_steps(interrupted: str, again: str) -> int | None:
    """Return the steps that were computed twice, from the outputs of both runs; None if none was finished."""
    shown = [int(step) for step in re.findall(rf"training:[^\r\n]*?(\d+)/{NUM_STEPS}", interrupted)]
    if not shown or not max(shown):
        return None
    kept = re.search(r"Continuing the interrupted training after step (\d+)", again)
    finished = max(shown) == NUM_STEPS and not kept
    return 0 if finished else max(0, max(shown) - (int(kept[1]) if kept else 0))


def answer_problems(sent: str, stopped: subprocess.CompletedProcess[str], seconds: float) -> list[str]:
    """Return what is wrong with the end of a command after a signal; it may have been nearly finished."""
    if sent == "SIGKILL" or "INFO" not in stopped.stderr:  # before, Python itself is imported
        return []
    answer = stopped.stderr.strip()
    says_so = stopped.returncode == 0 or "the same command" in answer.splitlines()[-1]
    if "Traceback" in answer or not says_so or seconds > ANSWERED_S:
        return [f"{sent} is answered by {stopped.returncode} after {seconds:.0f} s: {answer[-400:]}"]
    return []


def interruption(project: Project, number: int) -> Trial | None:
    """Run one trial; None if the command ended before the signal."""
    draw = random.Random(number)
    command = draw.choice(list(COMMANDS.values()))
    (sent,) = draw.choices(list(SIGNALS), [weight for _, weight in SIGNALS.values()])
    after_s = draw.uniform(0.02, 1.0) * project.seconds[command.name]
    project.restore(command.state)
    with tempfile.TemporaryDirectory() as outputs:
        program = project.start(command.arguments(), Path(outputs))
        if not interrupt(program, SIGNALS[sent][0], after_s):
            program.wait(STUCK_S)
            return None
        sent_s = time.monotonic()
        try:
            stopped = program.wait(STUCK_S)
        except subprocess.TimeoutExpired:
            return Trial(number, command.name, sent, after_s, (f"runs on {STUCK_S} s after the signal",))
    problems = answer_problems(sent, stopped, time.monotonic() - sent_s)
    try:
        again = project.run(command.arguments())
    except subprocess.TimeoutExpired:
        return Trial(number, command.name, sent, after_s, ("the same command is stuck",))
    expected = results(project.folder / "states" / command.name)
    problems += problems_of(project, again, expected)
    lost = lost_steps(stopped.stderr, again.stderr) if command.name == "train" else None
    if lost is not None and lost > 1:
        problems.append(f"{lost} steps lost")
    return Trial(number, command.name, sent, after_s, tuple(problems), lost)


def pair(project: Project, number: int) -> Trial | None:
    """Train twice at once, and kill one of both; None if it ended before."""
    draw = random.Random(-1 - number)
    kind = PAIRS[number % len(PAIRS)]
    train = COMMANDS["train"]
    subjects = ("x", "x") if kind == "one subject" else ("x", "z")
    after_s = draw.uniform(0.02, 1.0) * project.seconds["train"]
    project.restore("none" if kind == "a new project" else None)
    with tempfile.TemporaryDirectory() as outputs:
        programs = [
            project.start(train.arguments(subject), Path(outputs) / str(index))
            for index, subject in enumerate(subjects)
        ]
        killed = programs[draw.randrange(2)]
        was_running = interrupt(killed, (signal.SIGKILL,), after_s)
        try:
            ended = [program.wait(STUCK_S) for program in programs]
        except subprocess.TimeoutExpired:
            return Trial(number, kind, "SIGKILL", after_s, ("stuck beside the killed run",))
    if not was_running:
        return None
    problems = [
        f"the other run ended with {run.returncode} and a traceback: {run.stderr.strip()[-300:]}"
        for program, run in zip(programs, ended, strict=True)
        if program is not killed and run.returncode and "Traceback" in run.stderr
    ]
    expected = results(project.folder / "states" / "train")
    if "z" in subjects:
        expected |= {path.replace("/x/", "/z/"): digest for path, digest in expected.items()}
    for subject in dict.fromkeys(subjects):
        again = project.run(train.arguments(subject))
        if again.returncode:
            problems.append(f"the same command ended with {again.returncode}: {again.stderr.strip()[-300:]}")
    problems += problems_of(project, again, expected)
    return Trial(number, kind, "SIGKILL", after_s, tuple(problems))


def read_trials(file: Path) -> list[Trial]:
    """Return the trials so far."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [Trial(**{**json.loads(line), "problems": tuple(json.loads(line)["problems"])}) for line in lines]


def make_report(trials: Sequence[Trial]) -> Report:
    """Return the table: a line per command and signal."""
    import torch

    from speed.timing import describe_machine

    rows = []
    for command in [*COMMANDS, *PAIRS]:
        for sent in SIGNALS:
            here = [trial for trial in trials if (trial.command, trial.sent) == (command, sent)]
            if not here:
                continue
            steps = [trial.lost_steps for trial in here if trial.lost_steps is not None]
            values = {"interrupted": len(here), "as uninterrupted": sum(not trial.problems for trial in here)}
            rows.append(Row(f"{command}, {sent}", values | ({"steps lost, at most": max(steps)} if steps else {})))
    rows.append(
        Row("all", {"interrupted": len(trials), "as uninterrupted": sum(not trial.problems for trial in trials)})
    )
    notes = [
        f"{trial.command}, {trial.sent} after {trial.after_s:.2f} s: {'; '.join(trial.problems)}"
        for trial in trials
        if trial.problems
    ]
    return Report("chaos", "Interrupted commands", describe_machine(torch.device("cpu")), rows, "interrupted", notes)


def run_share(folder: Path, share: int, num_shares: int, wanted: Mapping[str, int]) -> None:
    """Run every `num_shares`-th trial, until this share has its part of the wanted numbers.

    Args:
        folder: of this share, where its trials so far are.
        share: from 0.
        num_shares: of all trials.
        wanted: "interruption" and "pair" -> their number in all shares.
    """
    folder.mkdir(parents=True, exist_ok=True)
    project, file = Project(folder), folder / _TRIALS
    project.prepare()
    for kind, run, commands in (("interruption", interruption, COMMANDS), ("pair", pair, PAIRS)):
        done = [trial for trial in read_trials(file) if trial.command in commands]
        number = max((trial.number + num_shares for trial in done), default=share)
        part = wanted[kind] // num_shares + (share < wanted[kind] % num_shares)
        while len(done) < part:
            if (trial := run(project, number)) is not None:
                done.append(trial)
                with file.open("a") as opened:
                    opened.write(json.dumps(asdict(trial)) + "\n")
                print(f"{len(done)}/{part} {trial.command}, {trial.sent}: {'; '.join(trial.problems) or 'good'}")
            number += num_shares


def main() -> None:
    """Parse the options and run the trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interruptions", type=int, default=360)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--workers", type=int, default=1, help="trials at a time, each in a project of its own")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "chaos", help="folder of the trials")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the report")
    options = parser.parse_args()
    wanted = {"interruption": options.interruptions, "pair": options.pairs}
    folders = [options.work / str(share) for share in range(options.workers)]
    context = multiprocessing.get_context("spawn")
    shares = [
        context.Process(target=run_share, args=(folder, share, options.workers, wanted))
        for share, folder in enumerate(folders)
    ]
    for process in shares:
        process.start()
    for process in shares:
        process.join()
    make_report([trial for folder in folders for trial in read_trials(folder / _TRIALS)]).write(options.output)
    if any(process.exitcode for process in shares):
        raise SystemExit("expected all trials; a worker has failed, see above")


if __name__ == "__main__":
    main()
