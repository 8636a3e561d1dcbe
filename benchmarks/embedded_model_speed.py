"""Time the embedded base model on this machine: one image, one training step, one complete training.

    python benchmarks/embedded_model_speed.py
    python benchmarks/embedded_model_speed.py --device cuda

One image is 20 guided steps (40 UNet rows) and the decoder. The training is `kedro run --pipeline train` with defaults;
the times of its steps come from its history.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.backbones.concepts import attach, generate
from dreamartist_pipeline.params import DeviceParams, SamplerParams, StrengthParams

ROOT = Path(__file__).resolve().parents[1]
SUBJECT = "speed"
NUM_WARMUPS, NUM_ROUNDS = 2, 11


def image_seconds(base_model: Path, device: str, num_inference_steps: int) -> list[float]:
    """Return the seconds of single images."""
    backbone = load_backbone(BaseModelFiles(base_model), DeviceParams.model_validate({"device": device}))
    loaded = attach(backbone, None, StrengthParams())
    sampler = SamplerParams(num_inference_steps=num_inference_steps, batch_size=1)
    seconds = []
    for seed in range(NUM_WARMUPS + NUM_ROUNDS):
        start = time.perf_counter()
        generate(backbone, loaded, ["a red butterfly, noto style, blue background"], "", [seed], sampler)
        seconds.append(time.perf_counter() - start)
    return seconds[NUM_WARMUPS:]


def train(base_model: Path, device: str, image: Path) -> tuple[list[float], float]:
    """Train with the defaults; return the seconds of every step, and of the whole command.

    Raises:
        SystemExit: the run failed.
    """
    settings = {"subject": SUBJECT, "image": image, "base_model": base_model, "device.device": device}
    command = [sys.executable, "-m", "kedro", "run", "--pipeline", "train", "--params"]
    start = time.perf_counter()
    outcome = subprocess.run(
        [*command, ",".join(f"{key}={value}" for key, value in settings.items())], cwd=ROOT, check=False
    )
    elapsed = time.perf_counter() - start
    if outcome.returncode:
        raise SystemExit(f"the training failed with exit status {outcome.returncode}; see its message above")
    history = pd.read_csv(ROOT / "data/08_reporting" / SUBJECT / "training_history.csv")
    return history["seconds"].tolist(), elapsed


def row(label: str, seconds: Sequence[float]) -> str:
    """Return one line of the table: median and quartiles."""
    low, middle, high = pd.Series(seconds).quantile([0.25, 0.5, 0.75])
    return f"| {label} | {middle:.3f} | {low:.3f} to {high:.3f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Time everything, print and write the table."""
    options = _parse(arguments)
    base_model = options.base_model.resolve()
    images = image_seconds(base_model, options.device, options.steps)
    steps, elapsed = train(base_model, options.device, options.image.resolve())
    report = "\n".join(
        [
            f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, device {options.device}\n",
            "| | seconds, median | quartiles |",
            "|---|---:|---:|",
            row(f"one image, {options.steps} guided steps", images),
            row("one training step of the default method", steps),
            f"| all {len(steps)} training steps | {sum(steps):.0f} | |",
            f"| the whole `kedro run --pipeline train`, regularization set and previews included | {elapsed:.0f} | |",
        ]
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "speed.md").write_text(report + "\n", encoding="utf-8")
    print(f"\n{report}\n\nwritten to {options.output}/speed.md")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", type=Path, default=ROOT / "data/01_raw/base_model")
    parser.add_argument("--image", type=Path, default=ROOT / "data/01_raw/reference_images/fox.png")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of one image")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, default=ROOT / "data/08_reporting/embedded_model_speed")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
