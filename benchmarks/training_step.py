"""Time one training step in designs that compute the same: this project's layers, PEFT, hooks, frozen networks.

    python benchmarks/training_step.py                                        # default method, embedded base model
    python benchmarks/training_step.py --part unet --layers attention --threads 1
    python benchmarks/training_step.py --env sd15 --base-model FOLDER --device cuda --dtype bfloat16

`--part step` is a whole step: batch, text encoder, UNet, loss, backward, clipping, optimizer. `--part unet` is forward
and backward of the UNet alone. All designs have the same adapters, batches and optimizer. Their gradients are compared
first; if they differ, the benchmark stops. On a GPU the report has the model FLOPs utilization (MFU) too, and this
project and the frozen networks as CUDA graphs (`training.backend: cudagraph`).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence

from dreamartist_pipeline.backbones.base_model import load_outline
from dreamartist_pipeline.core.batches import TrainingData
from dreamartist_pipeline.core.step_graph import record
from dreamartist_pipeline.params import TrainingParams
from speed.ceilings import Ceilings, measure_ceilings, step_flops
from speed.designs import (
    COMPILED,
    FROZEN,
    OURS,
    Design,
    Pass,
    build_designs,
    check_agreement,
    make_data,
    make_pass,
    one_step,
    run_pass,
    step_seconds,
)
from speed.report import Report, Row
from speed.settings import Settings, add_options, attention_only, read_settings
from speed.timing import Spread, alternate, clock_for, describe_machine, peak_gib, timed

UNET_ONLY = "frozen UNet, forward and backward only"
GRAPHED = ", one CUDA graph"
_GRAPHED_DESIGNS = (OURS, COMPILED, FROZEN)  # PEFT and hooks change Python state in every pass
_ATTENTION_RANK = 4


def measure(
    settings: Settings,
    part: str,
    num_rounds: int,
    steps_per_round: int,
    with_others: bool = True,
    with_compiled: bool = False,
) -> dict[str, list[float]]:
    """Check that the designs agree, and return the seconds of a step, or of the UNet's part of it, by design."""
    backbone, params = settings.backbone, settings.params
    designs = build_designs(backbone, params, with_others, with_compiled)
    data = make_data(backbone, params, settings.side_px)
    if part == "unet":
        cases = _passes(designs, data, settings)
    else:
        num_gradients = check_agreement(designs, backbone.dtype, lambda design: one_step(design, data, params))
        print(f"The designs with adapters agree in {num_gradients} gradients.")
        timed_params = params.model_copy(update={"num_steps": steps_per_round})
        cases = _steps(designs, data, timed_params, settings)
    return alternate(cases, num_rounds, num_warmups=1)


def _steps(
    designs: Sequence[Design], data: TrainingData, params: TrainingParams, settings: Settings
) -> dict[str, Callable[[], float]]:
    clock = clock_for(settings.backbone.device)
    frozen = next(design for design in designs if not design.is_adapted)
    inputs = make_pass(frozen, data, params)
    return {
        UNET_ONLY: timed(lambda: run_pass(frozen, inputs), clock),
        **{design.name: step_seconds(design, data, params, clock) for design in designs},
        **{
            design.name + GRAPHED: step_seconds(design, data, params, clock, as_graph=True)
            for design in _graphed(designs, settings)
        },
    }


def _graphed(designs: Sequence[Design], settings: Settings) -> list[Design]:
    """Return the designs that are timed as a CUDA graph too: none on a CPU."""
    on_gpu = settings.backbone.device.type == "cuda"
    return [design for design in designs if design.name in _GRAPHED_DESIGNS] if on_gpu else []


def _passes(designs: Sequence[Design], data: TrainingData, settings: Settings) -> dict[str, Callable[[], float]]:
    inputs = make_pass(designs[0], data, settings.params)
    num_gradients = check_agreement(designs, settings.backbone.dtype, lambda design: run_pass(design, inputs))
    print(f"The designs with adapters agree in {num_gradients} gradients.")
    clock = clock_for(settings.backbone.device)
    names = {design.name: UNET_ONLY if design.name == FROZEN else design.name for design in designs}
    passes = {names[design.name]: _pass_of(design, inputs) for design in designs}
    graphs = {
        names[design.name] + GRAPHED: _recorded(_pass_of(design, inputs)) for design in _graphed(designs, settings)
    }
    return {name: timed(run, clock) for name, run in (passes | graphs).items()}


def _pass_of(design: Design, inputs: Pass) -> Callable[[], None]:
    return lambda: run_pass(design, inputs)


def _recorded(run: Callable[[], None]) -> Callable[[], None]:
    """Return a function that records a CUDA graph at its first call, and replays it."""
    replay: Callable[[], None] | None = None

    def call() -> None:
        nonlocal replay
        if replay is None:
            _, replay = record(run)
        replay()

    return call


def make_rows(
    seconds: dict[str, list[float]], num_rows: int, flops: float | None = None, ceilings: Ceilings | None = None
) -> list[Row]:
    """Return medians, quartiles, rates and ratios; with `flops` of a step and ceilings, the MFU too."""
    spreads = {name: Spread.of(values) for name, values in seconds.items()}
    frozen, ours = spreads[UNET_ONLY].median, spreads[OURS].median
    rows = []
    for name, spread in spreads.items():
        values = {
            "ms": spread.median * 1000,
            "lower quartile": spread.low * 1000,
            "upper quartile": spread.high * 1000,
            "per second": 1 / spread.median,
            "rows per second": num_rows / spread.median,
            "× frozen UNet": spread.median / frozen,
            "× this project": spread.median / ours,
        }
        if flops and ceilings:
            values["MFU, %"] = 100 * flops / spread.median / ceilings.flops_per_second
        rows.append(Row(name, values))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Check and time the designs, print and write the table."""
    options = _parse(arguments)
    settings = read_settings(options)
    if options.layers == "attention":
        settings = dataclasses.replace(settings, params=attention_only(settings.params, _ATTENTION_RANK))
    elif options.part == "unet":
        settings = dataclasses.replace(settings, params=unet_only(settings.params))
    device = settings.backbone.device
    on_gpu = device.type == "cuda"
    facts = describe_machine(device) | settings.facts() | {"LoRA layers": options.layers, "part": options.part}
    ceilings = measure_ceilings(device) if on_gpu or options.ceilings else None
    flops = _flops(settings, options.part) if ceilings else None
    per_round = options.steps or (30 if on_gpu else 4)
    with_others = options.designs == "all"
    seconds = measure(settings, options.part, options.rounds, per_round, with_others, options.compile)
    if ceilings and flops:
        facts |= ceilings.facts() | {"model TFLOP": f"{flops / 1e12:.3g}"}
    if (peak := peak_gib(device)) is not None:
        facts["peak memory of all designs together"] = f"{peak:.1f} GiB"
    num_rows = settings.params.batch_size + settings.params.regularization_batch_size
    rows = make_rows(seconds, num_rows, flops, ceilings)
    title = f"One training step, {options.part}, {options.layers} layers, {settings.backbone.name}"
    ratio = next(row for row in rows if row.label == OURS).values["× frozen UNet"]
    notes = [f"This project: {ratio:.2f} × the frozen UNet's forward and backward."]
    name = f"training_step_{options.part}_{options.layers}_{settings.backbone.name}"
    Report(name, title, facts, rows, "ms", notes).write(options.output)


def _flops(settings: Settings, part: str) -> float:
    return step_flops(load_outline(settings.files), settings.params, settings.side_px, part)


def unet_only(params: TrainingParams) -> TrainingParams:
    """Return the training without trigger words and adapters of other networks than the UNet."""
    others = {f"lora_{network}" for network in params.lora if network != "unet"}
    return TrainingParams.model_validate(params.model_dump(exclude={"words", *others}))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--part", default="step", choices=("step", "unet"))
    parser.add_argument("--layers", default="method", choices=("method", "attention"), help="attention: rank 4")
    parser.add_argument("--designs", default="all", choices=("all", "ours"), help="ours: without PEFT and hooks")
    parser.add_argument("--compile", action="store_true", help="also this project with a compiled denoiser")
    parser.add_argument("--steps", type=int, help="per round; default: 30 on a GPU, 4 on a CPU")
    parser.add_argument("--ceilings", action="store_true", help="also on a CPU: measure the ceilings, report the MFU")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
