"""The options of a call, as MLflow passes them."""

from __future__ import annotations

from typing import Any

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import GenerateParams, SamplerParams, StrengthParams
from dreamartist_pipeline.serving.options import call_options, drawing_of
from refusals import says

DEFAULTS = GenerateParams(
    prompts="a {pt1}",
    negative_prompt="blurry",
    seed=7,
    width=32,
    height=64,
    sampler=SamplerParams(
        scheduler="HeunDiscreteScheduler",
        scheduler_options={"use_karras_sigmas": True},
        num_inference_steps=3,
        guidance_scale=2.5,
        batch_size=5,
    ),
    strength=StrengthParams(positive=0.8, negative=0.6),
)


def options(**changes: Any) -> dict[str, Any]:
    return {name: default for name, (_, default) in call_options(DEFAULTS).items()} | changes


def test_the_defaults_of_a_call_are_those_the_model_is_saved_with() -> None:
    drawing = drawing_of(["a {pt1}"], options(), batch_size=5)
    assert drawing == DEFAULTS.model_copy(update={"images_per_prompt": 1})


def test_every_option_changes_what_is_drawn() -> None:
    changes: dict[str, Any] = {
        "negative_prompt": "grey",
        "seed": 8,
        "images_per_prompt": 2,
        "positive_strength": 0.1,
        "negative_strength": 0.2,
        "scheduler": "ddim",
        "scheduler_options": "{}",
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "width": 40,
        "height": 40,
    }
    assert changes.keys() == options().keys()
    before = drawing_of(["a {pt1}"], options(), batch_size=5)
    for name, value in changes.items():
        assert drawing_of(["a {pt1}"], options(**{name: value}), batch_size=5) != before, name


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"seed": -1}, "seed"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"positive_strength": -1.0}, "strength.positive"),
        ({"scheduler": "nosuch"}, "scheduler"),
        ({"scheduler_options": "{use_karras_sigmas"}, "scheduler_options"),
        ({"scheduler_options": "[1]"}, "scheduler_options"),
        ({"scheduler_options": "[" * 100_000}, "scheduler_options"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"images_per_prompt": 0}, "images_per_prompt"),
        ({"width": 33}, "width"),
        ({"width": None}, "width and height"),
    ],
)
def test_an_invalid_option_is_named(changes: dict[str, Any], got: str) -> None:
    with pytest.raises(InputError, check=says(got=got)):
        drawing_of(["a {pt1}"], options(**changes), batch_size=5)


@pytest.mark.parametrize("prompts", [[], ["a {my-fox:9e307}"], ["a \udcff"], [3]])
def test_invalid_prompts_are_named(prompts: list[Any]) -> None:
    with pytest.raises(InputError, check=says(got="prompts")):
        drawing_of(prompts, options(), batch_size=5)
