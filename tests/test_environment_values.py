"""Values of the environment in the configuration, and what of them is recorded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from omegaconf import OmegaConf

from dreamartist_pipeline import redaction
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks.parameters import plain_sections, recorded_parameters
from dreamartist_pipeline.hooks.record import reason_of, run_name
from dreamartist_pipeline.params import GenerateParams
from dreamartist_pipeline.redaction import redacted
from dreamartist_pipeline.settings import environment

SECRET = "abra-cadabra"


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SECRET", SECRET)
    monkeypatch.setenv("SHORT", "abc")
    monkeypatch.setattr(redaction, "_remembered", {})
    OmegaConf.register_new_resolver("env", environment, replace=True)
    yield


def resolved(text: str) -> str:
    return str(OmegaConf.create({"value": text}).value)


def test_a_value_of_the_environment_is_recorded_as_its_reference() -> None:
    params = GenerateParams(prompts=(resolved("a {pt1} by ${env:SECRET}"),))
    settings = {"subject": "fox", "base_model": resolved("hub:${env:SECRET}/model"), "method": None}

    recorded = recorded_parameters(settings, {"generate": params}, {"generate": GenerateParams(prompts=("a {pt1}",))})

    assert recorded["base_model"] == "hub:${env:SECRET}/model"
    assert recorded["generate.prompts"] == "['a {pt1} by ${env:SECRET}']"
    assert SECRET not in str(recorded) + str(plain_sections({"generate": params}))


def test_an_error_is_recorded_without_values_of_the_environment() -> None:
    value = resolved("${env:SECRET}")
    assert SECRET not in reason_of(InputError(expected="a file", got=value, remedy="correct it"))


def test_settings_and_lists_are_recorded_without_them() -> None:
    values = {"a": [resolved("${env:SECRET}")], "b": (1, resolved("x ${env:SECRET}"))}
    assert redacted(values) == {"a": ["${env:SECRET}"], "b": (1, "x ${env:SECRET}")}
    assert SECRET not in run_name(redacted({"subject": resolved("${env:SECRET}"), "method": None}), ["train"], {})


@pytest.mark.parametrize("text", ["${env:SHORT}", "${env:UNSET,default}"])
def test_defaults_and_short_values_are_recorded_as_they_are(text: str) -> None:
    value = resolved(text)
    assert redacted(f"a {value}") == f"a {value}"
