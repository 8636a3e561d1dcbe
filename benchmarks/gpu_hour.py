"""Run the GPU tests and all speed benchmarks on one GPU, within 25 minutes, the most important parts first.

    python benchmarks/gpu_hour.py
    python benchmarks/gpu_hour.py --device cpu --tiny          # tries every part on a CPU, in the smallest size
    python benchmarks/gpu_hour.py --parts step_sd15 sampling_sd15 --models FOLDER  # some parts; the models are kept

Nothing is downloaded. Every part is a process with a time limit of its own; one that fails or runs out of time does not
stop the others. Results are written after every part: `gpu_hour.json` and `gpu_hour.md` in the folder of the reports.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from speed.report import FOLDER, ROOT
from speed.timing import describe_machine

TOTAL_S = 25 * 60
_BENCHMARKS = Path(__file__).resolve().parent
_TAIL_LINES = 15


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: of its folder, too.
        arguments: of Python.
        limit_s: after which it is killed.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Result:
    """The outcome of a part; `reports` are the JSON files that it wrote."""

    name: str
    status: str
    seconds: float
    reports: list[Any] = field(default_factory=list)


def make_parts(device: str, models: Path, tiny: bool, rounds: int = 5) -> list[Part]:
    """Return all parts, the most important first.

    Args:
        device: "cuda", or "cpu" to try them.
        models: folder for random models.
        tiny: whether to use the smallest sizes.
        rounds: of each timing.
    """
    dtype = "float32" if tiny else "bfloat16"
    on = ("--device", device)
    size = ("--rounds", "1", "--steps", "2") if tiny else ("--rounds", str(rounds))
    few = size if tiny else ("--rounds", "2", "--steps", "5")
    whole = ("--rounds", "1", "--steps", "12") if tiny else ("--rounds", "2", "--steps", "400")
    small, compiled = (("--tiny",), ()) if tiny else ((), ("--compile",))
    sd15 = (*on, "--dtype", dtype, "--env", "sd15", "--base-model", str(models / "sd15"))
    sdxl = (*on, "--dtype", dtype, "--env", "sdxl", "--base-model", str(models / "sdxl"))
    embedded = (*on, *(("--base-model", str(models / "sd15")) if tiny else ()))
    unet = ("--part", "unet", "--layers", "attention")
    return [
        Part("tests", ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")), 240),
        _script("random_models", "full_size.py", ("--write", str(models), "--dtype", dtype, *small), 180),
        _script("step_sd15", "training_step.py", (*sd15, *size), 180),
        _script("step_sd15_one_row", "training_step.py", (*sd15, *size, "--rows", "1", "0"), 90),
        _script("step_sd15_compiled", "training_step.py", (*sd15, *size, "--designs", "ours", *compiled), 240),
        _script("sampling_sd15", "sampling.py", (*sd15, *size), 90),
        _script("kedro_run", "kedro_run.py", (*embedded, *whole), 300),
        _script("step_embedded", "training_step.py", (*embedded, *size), 60),
        _script("unet_attention_sd15", "training_step.py", (*sd15, *size, *unet), 90),
        _script("step_sdxl_one_row", "training_step.py", (*sdxl, *size, "--rows", "1", "0"), 150),
        _script("step_sdxl", "training_step.py", (*sdxl, "--designs", "ours", *few), 180),
        _script("full_size", "full_size.py", (*on, "--dtype", dtype, *small), 300),
    ]


def _script(name: str, file: str, arguments: Sequence[str], limit_s: float) -> Part:
    return Part(name, (str(_BENCHMARKS / file), *arguments), limit_s)


def run_part(part: Part, folder: Path, limit_s: float, environment: dict[str, str]) -> Result:
    """Run a part, with its output in `log.txt` of its folder, and kill it and its children at the limit."""
    folder.mkdir(parents=True, exist_ok=True)
    is_script = part.arguments[0].startswith(str(_BENCHMARKS)) and "--write" not in part.arguments
    output = ("--output", str(folder)) if is_script else ()
    begun = time.perf_counter()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *part.arguments, *output],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
            status = "done" if code == 0 else f"failed with exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    return Result(part.name, status, time.perf_counter() - begun, reports)


def run_parts(parts: Sequence[Part], folder: Path, total_s: float, environment: dict[str, str]) -> list[Result]:
    """Run the parts in order until the total time is over, and write the results after each."""
    machine = environment.get("GPU_HOUR_MACHINE", "")
    begun, results = time.perf_counter(), list[Result]()
    for part in parts:
        left_s = total_s - (time.perf_counter() - begun)
        if left_s <= 0:
            results.append(Result(part.name, "not started: no time left", 0.0))
        else:
            print(f"{part.name} (at most {min(part.limit_s, left_s):.0f} s) …", flush=True)
            results.append(run_part(part, folder / part.name, min(part.limit_s, left_s), environment))
            print(f"  {results[-1].status}, {results[-1].seconds:.0f} s", flush=True)
        write_results(results, folder, machine)
    return results


def write_results(results: Sequence[Result], folder: Path, machine: str) -> None:
    """Write `gpu_hour.json` and `gpu_hour.md`: the parts, their tables, and the end of the log of what failed."""
    content = {"machine": machine, "parts": [asdict(result) for result in results]}
    (folder / "gpu_hour.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    lines = ["# All GPU benchmarks", "", machine, "", "| part | result | s |", "|---|---|---:|"]
    lines += [f"| {result.name} | {result.status} | {result.seconds:.0f} |" for result in results]
    for result in results:
        tables = [file.read_text(encoding="utf-8") for file in sorted((folder / result.name).glob("*.md"))]
        log = folder / result.name / "log.txt"
        if log.is_file() and (result.status != "done" or not tables):
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
            tables.append("\n".join(f"    {line}" for line in tail))
        lines += ["", f"## {result.name}", "", *tables]
    (folder / "gpu_hour.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything, print the report, and end with an error if a part failed."""
    options = _parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("expected a CUDA GPU; got none; try the script with --device cpu --tiny")
    facts = describe_machine(torch.device(options.device))
    environment = os.environ | {
        "GPU_TESTS_DEVICE": options.device,
        "GPU_HOUR_MACHINE": "; ".join(f"{name}: {value}" for name, value in facts.items()),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as models:
        parts = make_parts(options.device, options.models or Path(models), options.tiny, options.rounds)
        parts = [part for part in parts if part.name in (options.parts or [part.name])]
        results = run_parts(parts, options.output, 60 * options.minutes, environment)
    print((options.output / "gpu_hour.md").read_text(encoding="utf-8"))
    print(f"written to {options.output}/gpu_hour.md and .json")
    if any(result.status != "done" for result in results):
        raise SystemExit(1)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to try the script")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these parts; default: all")
    parser.add_argument("--models", type=Path, help="folder for the random models, which stay there")
    parser.add_argument("--rounds", type=int, default=5, help="of each timing")
    parser.add_argument("--minutes", type=float, default=TOTAL_S / 60, help="for all parts together")
    parser.add_argument("--output", type=Path, default=FOLDER / "gpu_hour", help="folder of the reports")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
