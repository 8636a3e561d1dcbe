"""Time pictures drawn with a concept against those of the base model alone, alternated in one process.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --env sd15 --base-model FOLDER --device cuda --dtype bfloat16 --batch-size 4

The concept has the layers and ranks of the method, with random values; all draw the same number of words from the same
seeds: 20 guided steps and the decoder. The branches of a concept have weights of their own. What that costs without any
adapter is measured, too: the base model draws with a copy of its denoiser for the negative rows.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dreamartist_pipeline.backbones.concepts import attach, concept_metadata, generate, start_concept
from dreamartist_pipeline.backbones.families import Backbone
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.prompt_tokens import Conditioning
from dreamartist_pipeline.core.training_step import lr_factor
from dreamartist_pipeline.params import SamplerParams, StrengthParams
from speed.designs import randomize_updates
from speed.report import Report, Row
from speed.settings import Settings, add_options, read_settings
from speed.timing import Spread, alternate, clock_for, describe_machine, timed

BASE, TWO, CONCEPT = "base model", "base model, twice", "concept"
_PROMPT = "two birds on a green hill"


def random_concept(settings: Settings) -> Concept:
    """Return a concept of the training's layers, ranks and words, none of whose values are zero."""
    new = start_concept(settings.backbone, settings.params, lr_factor(settings.params), seed=0)
    randomize_updates(new)
    return new.snapshot(concept_metadata(settings.backbone, settings.params, lr_factor(settings.params)))


class TwoDenoisers:
    """A base model whose negative rows have a denoiser of their own, with equal weights in other memory."""

    def __init__(self, backbone: Backbone) -> None:
        self._positive = backbone
        networks = {
            name: module if name in backbone.tokenizers else copy.deepcopy(module)
            for name, module in backbone.networks.items()
        }
        self.negative = dataclasses.replace(backbone, networks=networks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._positive, name)

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the predictions for stacked rows, each half by its denoiser."""
        halves = torch.arange(len(latents), device=latents.device).chunk(2)
        return torch.cat(
            [
                denoiser.denoise(latents[rows], timesteps[rows], conditioning[rows])
                for denoiser, rows in zip((self.negative, self._positive), halves, strict=True)
            ]
        )


def measure(settings: Settings, sampler: SamplerParams, num_rounds: int) -> dict[str, list[float]]:
    """Return the seconds of one picture, of every round."""
    backbone, side_px = settings.backbone, settings.side_px
    base = attach(backbone, None, StrengthParams())
    loaded = {
        BASE: base,
        TWO: dataclasses.replace(base, backbone=TwoDenoisers(backbone)),
        CONCEPT: attach(backbone, random_concept(settings), StrengthParams()),
    }
    prompts, seeds = [_PROMPT] * sampler.batch_size, range(sampler.batch_size)
    clock = clock_for(backbone.device)

    def per_image(name: str) -> Callable[[], float]:
        draw = timed(
            lambda: generate(backbone, loaded[name], prompts, "", seeds, sampler, size_px=(side_px, side_px)), clock
        )
        return lambda: draw() / len(prompts)

    return alternate({name: per_image(name) for name in loaded}, num_rounds)


def make_rows(seconds: dict[str, list[float]]) -> list[Row]:
    """Return medians, quartiles and ratios."""
    base = Spread.of(seconds[BASE]).median
    rows = []
    for name, values in seconds.items():
        spread = Spread.of(values)
        columns = {"s a picture": spread.median, "lower quartile": spread.low, "upper quartile": spread.high}
        rows.append(Row(name, {**columns, "× base model": spread.median / base}))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Time them, print and write the table."""
    options = _parse(arguments)
    settings = read_settings(options)
    sampler = SamplerParams(num_inference_steps=options.steps, batch_size=options.batch_size)
    facts = describe_machine(settings.backbone.device) | settings.facts()
    facts |= {"denoising steps": options.steps, "pictures at a time": options.batch_size}
    rows = make_rows(measure(settings, sampler, options.rounds))
    name, title = f"sampling_{settings.backbone.name}", f"Drawing a picture, {settings.backbone.name}"
    Report(name, title, facts, rows, "s a picture").write(options.output)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of one picture")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures at a time")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
