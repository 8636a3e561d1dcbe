"""Compare methods on the same subjects, prompts and seeds, by the pipelines of the project.

    python benchmarks/compare_methods.py                                 # ten subjects, all of METHODS: hours on a CPU
    python benchmarks/compare_methods.py --subjects owl --params training.num_steps=500
    OMP_NUM_THREADS=1 python benchmarks/compare_methods.py --workers 2

Each pair of subject and method is one `kedro run` (train, evaluate) with its own folders under data/. Results of an
earlier run with the same configuration, base model and picture are reused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
EVALUATOR = "efficientnet-lite0"
SUBJECTS = (  # not in the training data of the embedded base model
    "fox",
    "octopus",
    "strawberry",
    "owl",
    "robot",
    "rocket",
    "mushroom",
    "penguin",
    "snail",
    "umbrella",
)
METHODS = {  # method in conf/base/parameters_training.yml -> row of the table
    "textual-inversion": "textual inversion",
    "lora": "LoRA, no negative branch",
    "dreambooth-lora": "DreamBooth by LoRA, rare word",
    "pivotal-tuning": "pivotal tuning: word and LoRA",
    "dreamartist": "DreamArtist: a pair of words",
    "tutorial": "DreamArtist++, the tutorial's values",
    "toolkit": "DreamArtist++, the toolkit's preset",
    "dreamartist-plus-plus": "DreamArtist++",
}
BASE_ROW, CEILING_ROW = "base model, class word", "autoencoder's reconstruction (ceiling)"
COLUMNS = {
    "similarity": "similarity to the reference",
    "background": "background as asked",
    "color": "object colour as asked",
    "diversity": "diversity",
    "copying": "copying",
    "prior_drift_pixels": "prior drift, pixels",
    "prior_drift": "prior drift, embedding",
    "seconds": "training, s",
}


@dataclass(frozen=True)
class Run:
    """A Kedro run of one subject and method, which name its outputs."""

    subject: str
    method: str
    image: Path
    base_model: Path
    overrides: tuple[str, ...]
    env: str

    @property
    def name(self) -> str:
        """The run's `subject`, which names its folders."""
        return f"{self.subject}-{self.method}"

    @property
    def folder(self) -> Path:
        """Where its reports are."""
        return ROOT / "data/08_reporting" / self.name

    def parameters(self) -> list[str]:
        """Return the runtime parameters of `kedro run`."""
        own = {
            "subject": self.name,
            "class_word": self.subject,
            "method": self.method,
            "image": self.image,
            "base_model": self.base_model,
        }
        return [*(f"{key}={value}" for key, value in own.items()), *self.overrides]

    def request(self) -> dict[str, Any]:
        """Return everything that affects the result; results are reused for an equal request only."""
        return {
            "parameters": self.parameters(),
            "env": self.env,
            "configuration": _digest([*_yaml_files("base"), *_yaml_files(self.env)]),
            "image": _digest([self.image]),
            "base_model": _digest(sorted(self.base_model.rglob("*.safetensors"))),
        }


def _yaml_files(env: str) -> list[Path]:
    return sorted((ROOT / "conf" / env).glob("*.yml"))


def _digest(files: Sequence[Path]) -> str:
    """Return the SHA-256 of some files' names and contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- running


def run_if_needed(run: Run, again: bool) -> None:
    """Train and evaluate, unless there are results of the same request.

    Raises:
        SystemExit: the Kedro run failed.
    """
    record = run.folder / "comparison_request.json"
    request = run.request()
    if not again and record.is_file() and json.loads(record.read_text(encoding="utf-8")) == request:
        print(f"{run.name}: reusing earlier results")
        return
    print(f"{run.name}: training and evaluating")
    record.unlink(missing_ok=True)
    command = [sys.executable, "-m", "kedro", "run", "--pipeline", "__default__", "--env", run.env]
    outcome = subprocess.run([*command, "--params", ",".join(run.parameters())], cwd=ROOT, check=False)
    if outcome.returncode:
        raise SystemExit(f"{run.name}: the run failed with exit status {outcome.returncode}; see its message above")
    record.write_text(json.dumps(request, indent=1), encoding="utf-8")


def run_all(runs: Sequence[Run], workers: int, again: bool = False) -> None:
    """Run `workers` at a time; the first one alone, because it draws the common regularization set."""
    run_if_needed(runs[0], again)
    with ThreadPoolExecutor(workers) as pool:
        for _ in tqdm(pool.map(lambda run: run_if_needed(run, again), runs[1:]), "runs", len(runs), initial=1):
            pass


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Results:
    """Results of one run: metrics by name, a row per image, and the seconds of the training."""

    metrics: dict[str, float]
    images: pd.DataFrame
    seconds: float


def read(run: Run) -> Results:
    """Read one run's reports."""
    metrics = json.loads((run.folder / "evaluation_metrics.json").read_text(encoding="utf-8"))
    seconds = pd.read_csv(run.folder / "training_history.csv")["seconds"].sum()
    return Results(metrics, pd.read_csv(run.folder / "evaluation_table.csv"), float(seconds))


def check_same_base(results: dict[str, dict[str, Results]]) -> None:
    """Check that all methods of a subject have the same images of the base model.

    Raises:
        SystemExit: they differ, so the rows of the table are not comparable.
    """
    name = f"similarity/base.{EVALUATOR}"
    for subject, by_method in results.items():
        values = {method: round(result.metrics[name], 6) for method, result in by_method.items()}
        if len(set(values.values())) > 1:
            raise SystemExit(f"{subject}: expected the same base images for all methods, got {values}; use --again")


# ---------------------------------------------------------------------------------------------- tabulating


def of_subject(result: Results, group: str) -> dict[str, float]:
    """Return a subject's mean over prompts and seeds by column; NaN where no prompt has a value."""
    images = result.images[(result.images["kind"] == "subject") & (result.images["group"] == group)]
    values = {
        "similarity": float(images[f"{EVALUATOR}/similarity"].mean()),
        "background": _share(images["background_agrees"]),
        "color": _share(images["color_agrees"]),
        "diversity": _metric(result, f"variety/diversity.{group}.{EVALUATOR}"),
        "copying": _metric(result, f"variety/copying.{group}.{EVALUATOR}"),
    }
    if group == "concept":
        values |= {
            "prior_drift_pixels": _metric(result, "prior_drift/pixels"),
            "prior_drift": _metric(result, f"prior_drift/{EVALUATOR}"),
            "seconds": result.seconds,
        }
    return values


def row(subjects: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return mean and standard deviation (`<column>_std`) over subjects by column."""
    values = pd.DataFrame(subjects)
    return values.mean().to_dict() | values.std(ddof=0).add_suffix("_std").to_dict()


def _share(answers: pd.Series[Any]) -> float:
    """Return the share of True among known values."""
    known = answers.dropna()
    return float((known.astype(str) == "True").mean()) if len(known) else float("nan")


def _metric(result: Results, name: str) -> float:
    return result.metrics.get(name, float("nan"))


def tabulate(results: dict[str, dict[str, Results]], methods: Sequence[str]) -> pd.DataFrame:
    """Return the table: base model, one row per method, upper limit."""
    any_method = [by_method[methods[-1]] for by_method in results.values()]
    rows = {BASE_ROW: row([of_subject(result, "base") for result in any_method])}
    for method in methods:
        of_method = [of_subject(by_method[method], "concept") for by_method in results.values()]
        rows[METHODS.get(method, method)] = row(of_method)
    ceilings = [{"similarity": result.metrics[f"similarity/ceiling.{EVALUATOR}"]} for result in any_method]
    rows[CEILING_ROW] = row(ceilings)
    return pd.DataFrame.from_dict(rows, orient="index", columns=[c + end for c in COLUMNS for end in ("", "_std")])


_FORMATS = {"background": ".0%", "color": ".0%", "prior_drift_pixels": ".2%", "seconds": ".0f"}


def to_markdown(table: pd.DataFrame) -> str:
    """Return the table as markdown."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name, values in table.iterrows():
        cells = [_cell(column, values) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(column: str, values: pd.Series[Any]) -> str:
    if pd.isna(values[column]):
        return "—"
    return " ± ".join(format(values[name], _FORMATS.get(column, ".3f")) for name in (column, f"{column}_std"))


# ---------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run missing pairs, then print and write the table."""
    options = _parse(arguments)
    for subject in options.subjects:
        if not _image(options, subject).is_file():
            raise SystemExit(f"expected the picture of {subject!r} at {_image(options, subject)}; got no such file")
    runs = [
        Run(subject, method, _image(options, subject), options.base_model.resolve(), tuple(options.params), options.env)
        for subject in options.subjects
        for method in options.methods
    ]
    run_all(runs, options.workers, options.again)
    results: dict[str, dict[str, Results]] = {}
    for run in runs:
        results.setdefault(run.subject, {})[run.method] = read(run)
    check_same_base(results)
    table = tabulate(results, options.methods)
    report = f"Subjects: {', '.join(options.subjects)}. {_legend(results)}\n\n{to_markdown(table)}\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "comparison.md").write_text(report, encoding="utf-8")
    table.to_csv(options.output / "comparison.csv", index_label="method")
    print(f"\n{report}\nwritten to {options.output}/comparison.md and comparison.csv")


def _legend(results: dict[str, dict[str, Results]]) -> str:
    images = next(iter(next(iter(results.values())).values())).images
    subject_images = images[(images["kind"] == "subject") & (images["group"] == "concept")]
    return (
        f"{subject_images['prompt'].nunique()} prompts × {subject_images['seed'].nunique()} seeds each; similarity, "
        f"diversity, copying and drift by {EVALUATOR}; mean ± standard deviation over subjects."
    )


def _image(options: argparse.Namespace, subject: str) -> Path:
    return Path(options.images).resolve() / f"{subject}.png"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="of conf/base/parameters_training.yml")
    parser.add_argument("--images", type=Path, default=ROOT / "data/01_raw/reference_images")
    parser.add_argument("--base-model", type=Path, default=ROOT / "data/01_raw/base_model")
    parser.add_argument("--params", nargs="*", default=[], metavar="KEY=VALUE", help="further parameters of every run")
    parser.add_argument("--env", default="local")
    parser.add_argument("--workers", type=int, default=1, help="parallel runs; set OMP_NUM_THREADS=1 too")
    parser.add_argument("--again", action="store_true", help="run everything again")
    parser.add_argument("--output", type=Path, default=ROOT / "data/08_reporting/comparison")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
