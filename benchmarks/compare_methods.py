"""Compare methods on the same subjects, prompts and seeds: a call of `kedro run --pipelines compare`.

python benchmarks/compare_methods.py                                 # ten subjects, ten methods: hours on a CPU
python benchmarks/compare_methods.py --subjects owl robot --methods lora dreamartist-plus-plus
python benchmarks/compare_methods.py --workers 2 --threads 1 --env tuned
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "data/08_reporting/compare/runs.json"


def command(params: Mapping[str, Any], further: Sequence[str] = (), options: Sequence[str] = ()) -> list[str]:
    """Return the command of a comparison.

    Args:
        params: of the section `compare`; those that are None, or have no items, keep their values in conf/base.
        further: `KEY=VALUE`, parameters of every run.
        options: of `kedro run`.
    """
    given = {name: value for name, value in params.items() if value not in (None, [], ())}
    values = [*(f"compare.{name}={json.dumps(value)}" for name, value in given.items()), *further]
    words = [sys.executable, "-m", "kedro", "run", "--pipelines", "compare", *options]
    return [*words, "--params", ",".join(values)] if values else words


def concepts(subjects: Sequence[str], method: str, params: Mapping[str, Any], further: Sequence[str]) -> list[Path]:
    """Train and evaluate subjects with one method, unless that has been done, and return the files of their concepts.

    Raises:
        SystemExit: a run failed.
    """
    wanted = {**params, "subjects": list(subjects), "only": [method], "reference": method}
    outcome = subprocess.run(command(wanted, further, ("--nodes", "run_methods")), cwd=ROOT, check=False)
    if outcome.returncode:
        raise SystemExit(f"the comparison ended with exit status {outcome.returncode}; see its message above")
    runs = json.loads(RUNS.read_text(encoding="utf-8"))
    if failed := [f"{run['subject']}: {run['message']}" for run in runs if run["message"] is not None]:
        raise SystemExit("\n".join(["expected all runs to finish; got", *failed]))
    return [ROOT / "data/06_models" / run["subject"] / "concept.safetensors" for run in runs]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; its exit status is that of the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=[])
    parser.add_argument("--methods", nargs="+", default=[], help="of conf/base/parameters_compare.yml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[])
    parser.add_argument("--params", nargs="*", default=[], metavar="KEY=VALUE", help="further parameters of every run")
    parser.add_argument("--env", default="local")
    parser.add_argument("--workers", type=int, help="runs at a time")
    parser.add_argument("--threads", type=int, help="of each run")
    options = parser.parse_args(arguments)
    params = {
        "subjects": options.subjects,
        "only": options.methods,
        "seeds": options.seeds,
        "workers": options.workers,
        "threads": options.threads,
    }
    sys.exit(subprocess.run(command(params, options.params, ("--env", options.env)), cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
