"""Run models of real size with random weights: one regularization picture, two training steps, one picture.

    python benchmarks/full_size.py                                # SD 1.5 at 512 px and SDXL at 1024 px, bfloat16, CPU
    python benchmarks/full_size.py --models sd15 --device cuda

Nothing is downloaded. Every part is `kedro run` in a process of its own, with the environment of the model: a
regularization picture of two steps, a training of two steps with 1 + 0 rows, and a picture of two steps. The table has
minutes and peak memory (resident memory of the process, on a GPU too). Pictures are noise.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from speed.commands import kedro_run
from speed.random_models import TINY_PX, WRITERS, write_model
from speed.report import FOLDER, ROOT, Report, Row
from speed.timing import describe_machine

LIMIT_GIB = 20
_SAMPLER = {"num_inference_steps": 2, "batch_size": 1}
_PARTS = {  # row of the table -> pipelines
    "one regularization picture of two steps": "prompts,regularization",
    "two training steps of 1 + 0 rows": "ingestion,training",
    "one picture of two steps": "generate",
}


def run_parts(model: str, device: str, dtype: str, folder: Path, threads: int, tiny: bool = False) -> list[Row]:
    """Write the model, run every part, and return minutes and peak memory."""
    params: dict[str, Any] = {
        "subject": f"full-size-{model}",
        "image": ROOT / "data/01_raw/reference_images/fox.png",
        "base_model": write_model(model, folder / model, getattr(torch, dtype), tiny),
        "device": device,
        "device.dtype": dtype,
        "prompts.num_prompts": 1,
        **{f"regularization.sampler.{name}": value for name, value in _SAMPLER.items()},
        "training.num_steps": 2,
        "training.batch_size": 1,
        "training.regularization_batch_size": 0,
        "training.preview.every": 0,
        **{f"generate.sampler.{name}": value for name, value in _SAMPLER.items()},
        "generate.images_per_prompt": 1,
        "generate.prompts": "a {pt1}",
        **({"ingestion.bucket.side_px": TINY_PX} if tiny else {}),
    }
    tracking_uri = f"sqlite:///{folder}/mlflow.db"
    rows = []
    for label, pipelines in _PARTS.items():
        finished = kedro_run(pipelines, params, model, tracking_uri, threads)
        columns = {"minutes": finished.seconds / 60, "peak memory, GiB": finished.peak_gib}
        rows.append(Row(f"{model}: {label}", columns))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every model, print and write the table; or write the models only."""
    options = _parse(arguments)
    if options.write:
        for model in options.models:
            print(write_model(model, options.write / model, getattr(torch, options.dtype), options.tiny))
        return
    torch.set_num_threads(options.threads)
    facts = describe_machine(torch.device(options.device)) | {"dtype": options.dtype}
    rows: list[Row] = []
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            rows += run_parts(model, options.device, options.dtype, Path(folder), options.threads, options.tiny)
    peak = max(row.values["peak memory, GiB"] for row in rows)
    notes = [
        f"Largest peak {peak:.1f} GiB; the limit is {LIMIT_GIB} GiB: {'kept' if peak <= LIMIT_GIB else 'exceeded'}."
    ]
    Report("full_size", "Models of real size", facts, rows, "minutes", notes).write(options.output)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(WRITERS), choices=list(WRITERS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--write", type=Path, help="only write the models to this folder, one folder each")
    parser.add_argument("--tiny", action="store_true", help="models with few channels, to try the script")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the report")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
