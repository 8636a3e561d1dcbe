"""Judge the choice of the step: how much better the chosen step is than the last, and how near to the best one.

    OMP_NUM_THREADS=1 python benchmarks/chosen_steps.py --workers 12 --device cuda
    OMP_NUM_THREADS=1 python benchmarks/chosen_steps.py --tiny              # tries every part in minutes on a CPU

Every subject is trained with `training.choose=best` (`kedro run`), and every kept step is judged on other prompts and
seeds than those of its scores, by the same measures and by an image tower that has not chosen it. What is done is kept:
the same command continues. Results are `chosen_steps.json`, `.md` and `.html` in the folder of the output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from chosen.judging import JUDGED, Judging, judge_steps
from chosen.report import Judged, Outcome, compare, figure, to_markdown
from dreamartist_pipeline.api import read_concept
from score_one_shot import GROUPS, HELD_OUT_STYLE
from speed.report import FOLDER, ROOT
from speed.timing import describe_machine

SUBJECTS = tuple(name for name in GROUPS["reporting"] if name != HELD_OUT_STYLE)
_TINY = {"training.scoring.every": 1}  # with the environment `test`: two steps, and everything in the smallest size


@dataclasses.dataclass(frozen=True)
class Training:
    """A training of one subject.

    Attributes:
        subject: whose picture is learned.
        device: `device.device`.
        tiny: whether it is only tried.
        further: parameters of the command line, KEY=VALUE.
    """

    subject: str
    device: str
    tiny: bool
    further: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run's `subject`, which names its folders."""
        return f"chosen-{'tiny-' if self.tiny else ''}{self.subject}"

    @property
    def steps(self) -> Path:
        """Folder of the kept steps."""
        return ROOT / "data/06_models" / self.name / "steps"

    def params(self) -> str:
        """Return the argument of `--params`."""
        values = {
            "subject": self.name,
            "class_word": self.subject,
            "image": ROOT / f"data/01_raw/reference_images/{self.subject}.png",
            "device.device": self.device,
            "training.choose": "best",
            **(_TINY if self.tiny else {}),
        }
        return ",".join([*(f"{name}={value}" for name, value in values.items()), *self.further])


# ------------------------------------------------------------------------------------------- training


def train_if_needed(training: Training, logs: Path) -> None:
    """Train, unless that was done with the same parameters; an interrupted training is continued.

    Raises:
        SystemExit: the run failed.
    """
    record = logs / f"{training.name}.done"
    if record.is_file() and record.read_text(encoding="utf-8") == training.params():
        return
    run_pipelines("train", training, logs / f"{training.name}.log")
    record.write_text(training.params(), encoding="utf-8")


def run_pipelines(pipelines: str, training: Training, log: Path) -> None:
    """Run pipelines with the parameters of a training.

    Raises:
        SystemExit: the run failed.
    """
    command = [sys.executable, "-m", "kedro", "run", "--pipelines", pipelines, "--params", training.params()]
    env = ("--env", "test") if training.tiny else ()
    with log.open("w", encoding="utf-8") as file:
        outcome = subprocess.run([*command, *env], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
    if outcome.returncode:
        raise SystemExit(f"{training.name}: the run failed with exit status {outcome.returncode}; see {log}")


def train_all(trainings: Sequence[Training], logs: Path, workers: int) -> None:
    """Draw the regularization set, which all have in common, then train `workers` at a time."""
    logs.mkdir(parents=True, exist_ok=True)
    run_pipelines("ingestion,prompts,regularization", trainings[0], logs / "regularization.log")
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(lambda training: train_if_needed(training, logs), trainings)
        for _ in tqdm(done, "trainings", len(trainings)):
            pass


def scoring_share(name: str) -> float:
    """Return the time of the scoring as a share of that of the steps, as MLflow has recorded it; NaN without a run."""
    import mlflow

    tracking = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{ROOT}/data/09_tracking/mlflow.db")
    mlflow.set_tracking_uri(tracking)
    runs = mlflow.search_runs(
        search_all_experiments=True, filter_string=f"tags.subject = '{name}'", output_format="list"
    )
    shares = [run.data.metrics.get("training/scoring_share") for run in runs]
    return next((float(share) for share in shares if share is not None), float("nan"))


# ------------------------------------------------------------------------------------------- judging


def judge_all(trainings: Sequence[Training], judging: Judging, folder: Path, workers: int) -> None:
    """Judge the kept steps of all trainings, each in a process of its own, with one file per step."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = [
            pool.submit(judge_steps, one.name, one.subject, one.steps, folder / one.name, judging) for one in trainings
        ]
        for each in tqdm(waiting, "judged", unit="subject"):
            each.result()


def read_judged(training: Training, folder: Path) -> Judged:
    """Return what is known of a subject."""
    steps = sorted(int(file.stem) for file in training.steps.glob("*.safetensors"))
    files = {step: folder / training.name / f"{step}.json" for step in steps}
    halves = {step: json.loads(file.read_text(encoding="utf-8"))["halves"] for step, file in files.items()}
    limits = json.loads((folder / training.name / "limits.json").read_text(encoding="utf-8"))
    chosen = read_concept(training.steps.with_name("concept.safetensors")).metadata.step
    history = pd.read_csv(ROOT / "data/08_reporting" / training.name / "training_history.csv")
    return Judged(
        subject=training.subject,
        chosen=int(chosen or steps[-1]),
        halves=halves,
        **limits,
        training_s=float(history["seconds"].sum()),
        scoring_share=scoring_share(training.name),
    )


# ------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, judge, compare, and write the results."""
    options = _parse(arguments)
    trainings = [Training(name, options.device, options.tiny, tuple(options.params)) for name in options.subjects]
    if missing := [one.subject for one in trainings if not _picture(one.subject).is_file()]:
        raise SystemExit(f"expected a picture of every subject; got none of {', '.join(missing)}")
    train_all(trainings, options.output / "logs", options.workers)
    judging = dataclasses.replace(JUDGED, device=options.device, seeds_per_half=options.seeds)
    if options.tiny:
        judging = dataclasses.replace(judging, seeds_per_half=1, num_prompts=2, num_inference_steps=2, env="test")
    judge_all(trainings, judging, options.output / "judged", options.workers)
    judged = [read_judged(one, options.output / "judged") for one in trainings]
    outcomes = compare(judged, options.fixed_step)
    facts = {**describe_machine(torch.device(options.device)), "images of a kept step": judging.num_images}
    _write(options.output, judged, outcomes, facts)


def _write(folder: Path, judged: Sequence[Judged], outcomes: Sequence[Outcome], facts: dict[str, Any]) -> None:
    report = to_markdown(judged, outcomes, facts)
    content = {
        "facts": facts,
        "outcomes": [dataclasses.asdict(one) for one in outcomes],
        "subjects": [dataclasses.asdict(one) for one in judged],
    }
    (folder / "chosen_steps.md").write_text(report + "\n", encoding="utf-8")
    (folder / "chosen_steps.json").write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    figure(judged).write_html(folder / "chosen_steps.html", div_id="chosen_steps")
    print(f"\n{report}\n\nwritten to {folder}/chosen_steps.md, .json and .html")


def _picture(subject: str) -> Path:
    return ROOT / f"data/01_raw/reference_images/{subject}.png"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=None, help="names of bundled pictures")
    parser.add_argument("--params", nargs="*", default=[], metavar="KEY=VALUE", help="further parameters of every run")
    parser.add_argument("--device", default="cpu", help="of trainings and judging")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time; set OMP_NUM_THREADS=1 too")
    parser.add_argument("--seeds", type=int, default=4, help="of each prompt, in each of the two halves of the images")
    parser.add_argument("--fixed-step", type=int, default=None, help="compared with; default: the middle of the kept")
    parser.add_argument("--tiny", action="store_true", help="two subjects, two steps, few images")
    parser.add_argument("--output", type=Path, default=FOLDER / "chosen_steps")
    options = parser.parse_args(arguments)
    options.subjects = options.subjects or list(SUBJECTS[:2] if options.tiny else SUBJECTS)
    if options.tiny:
        options.output = options.output / "tiny"
    return options


if __name__ == "__main__":
    main()
