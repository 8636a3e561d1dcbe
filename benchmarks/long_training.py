"""Train 100,000 steps of the tiniest model twice: at a stretch, and stopped and continued every 1,000 steps.

    python benchmarks/long_training.py
    python benchmarks/long_training.py --steps 10000 --stop-every 500

Memory has to stay flat, checkpoints bounded and the speed constant, and both trainings have to give the same bytes. The
two run side by side in processes of their own. The checkpoints are in the work folder: the same command continues.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import psutil
import torch
from PIL import Image

from speed.report import FOLDER, ROOT, Report, Row
from speed.timing import describe_machine

sys.path.insert(0, str(ROOT / "tests"))  # the tiniest model

from conftest import build_tiny_base_model
from dreamartist_pipeline.core.tracking import NoTracker
from dreamartist_pipeline.errors import StoppedEarly
from dreamartist_pipeline.interop.concept_file import write_concept
from dreamartist_pipeline.params import DeviceParams, TrainingParams
from dreamartist_pipeline.pipelines.training.nodes import check_training, train_concept

_ATTENTION = (r"re:.*\.attn.?$",)
_CAPTION, _CPU = "white background", DeviceParams(device="cpu")


@dataclass
class Watch(NoTracker):
    """Notes time, memory and size of the checkpoints as losses are logged, and stops the training at some steps.

    Attributes:
        folder: of the training.
        stop_every: steps; None never stops.
        notes: step -> (seconds since the epoch, resident MiB, MiB of checkpoints), kept in a file.
    """

    folder: Path
    stop_every: int | None
    notes: dict[int, tuple[float, float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the notes of a training that was stopped."""
        self._file = self.folder / "notes.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self.notes |= {step: tuple(values) for step, *values in map(json.loads, lines)}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Note a step; steps that a continued training repeats from its history are known already."""
        if step in self.notes or "loss/total" not in metrics:
            return
        size = sum(file.stat().st_size for file in (self.folder / "checkpoints").glob("*.pt"))
        self.notes[step] = (time.time(), psutil.Process().memory_info().rss / 2**20, size / 2**20)
        with self._file.open("a") as opened:
            opened.write(json.dumps([step, *self.notes[step]]) + "\n")
        if self.stop_every and step % self.stop_every == 0:
            signal.raise_signal(signal.SIGTERM)


def parameters(num_steps: int, checkpoints: Path) -> TrainingParams:
    """Return a training of one reference row and one of the regularization set, both branches and the words."""
    return TrainingParams.model_validate(
        {
            "num_steps": num_steps,
            "batch_size": 1,
            "regularization_batch_size": 1,
            "templates": ["a photo of a {pt1}"],
            "words": {"names": {"pt1": ["my-fox", "my-fox-neg"]}, "num_vectors": [2, 3]},
            "lora_unet": [
                {"lr": 1e-4, "rank": 2, "branch": "p", "layers": _ATTENTION},
                {"lr": 4e-5, "rank": 1, "branch": "n", "layers": _ATTENTION},
            ],
            "preview": {"every": 0},
            "checkpoints": str(checkpoints),
        }
    )


def train(model: Path, folder: Path, num_steps: int, stop_every: int | None) -> None:
    """Train to the end, with all stops, and write the notes and the concept's hash into the folder."""
    torch.set_num_threads(1)
    params = parameters(num_steps, folder / "checkpoints")
    picture = Image.new("RGB", (32, 32), "orange")
    picture.paste("purple", (8, 0, 16, 32))
    watch = Watch(folder, stop_every)
    plan = check_training(str(model), params, _CAPTION, _CPU)
    while True:
        try:
            concept, history, *_ = train_concept(
                base_model=str(model),
                prepared_image=picture,
                prepared_mask=Image.new("L", (32, 32), 127),
                regularization_set=[("a cat", functools.partial(Image.new, "RGB", (32, 32), "red"))],
                training_plan=plan,
                params=params,
                caption=_CAPTION,
                device=_CPU,
                tracker=watch,
            )
        except StoppedEarly:
            continue
        break
    steps = history["step"].tolist()
    write_concept(concept, folder / "concept.safetensors")
    result = {
        "notes": watch.notes,
        "sha256": sha256((folder / "concept.safetensors").read_bytes()).hexdigest(),
        "losses": sha256(history.drop(columns="seconds").to_csv().encode()).hexdigest(),
        "steps are 1, 2, …": steps == list(range(1, num_steps + 1)),
    }
    (folder / "result.json").write_text(json.dumps(result))


def rows_of(label: str, notes: Mapping[str, Sequence[float]], num_steps: int) -> list[Row]:
    """Return a line for each tenth of a training."""
    rows, ends = [], [num_steps * tenth // 10 for tenth in range(1, 11)]
    steps = sorted(map(int, notes))
    begin = steps[0]
    for end in ends:
        inside = [step for step in steps if begin < step <= end]
        if not inside:
            continue
        (started, _, _), (ended, memory, size) = notes[str(begin)], notes[str(inside[-1])]
        rate = (inside[-1] - begin) / (ended - started)
        values = {"steps per second": rate, "resident, MiB": memory, "checkpoints, MiB": size}
        rows.append(Row(f"{label}, to step {inside[-1]:,}", values))
        begin = inside[-1]
    return rows


def main() -> None:
    """Run both trainings side by side, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--stop-every", type=int, default=1_000)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "long_training")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the report")
    options = parser.parse_args()
    model = options.work / "tiny"
    if not model.exists():
        build_tiny_base_model(model, seed=0)
    trainings = {"at a stretch": None, f"stopped every {options.stop_every:,} steps": options.stop_every}
    context, processes = multiprocessing.get_context("spawn"), []
    for index, stop_every in enumerate(trainings.values()):
        folder = options.work / str(index)
        folder.mkdir(parents=True, exist_ok=True)
        processes.append(context.Process(target=train, args=(model, folder, options.steps, stop_every)))
        processes[-1].start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("expected both trainings to finish; one has failed, see above")
    results = [json.loads((options.work / str(index) / "result.json").read_text()) for index in range(len(trainings))]
    rows = [
        row
        for label, result in zip(trainings, results, strict=True)
        for row in rows_of(label, result["notes"], options.steps)
    ]
    same = {name: results[0][name] == results[1][name] for name in ("sha256", "losses")}
    complete = all(result["steps are 1, 2, …"] for result in results)
    told = f"Same bytes of the concept: {same['sha256']}; same losses: {same['losses']}"
    notes = [f"{told}; no gap and no doubled step: {complete}."]
    report = Report(
        "long_training", "A long training", describe_machine(torch.device("cpu")), rows, "steps per second", notes
    )
    report.write(options.output)
    if not (all(same.values()) and complete):
        raise SystemExit("expected the same bytes; got others")


if __name__ == "__main__":
    main()
