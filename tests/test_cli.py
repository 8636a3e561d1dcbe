"""The `kedro run` command: parameters with commas, readable errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from kedro.io import DatasetError

from dreamartist_pipeline.cli import _report, parse_params, readable_message, run
from dreamartist_pipeline.core.errors import InputError

CONTEXT = click.Context(run)
OPTION = next(param for param in run.params if param.name == "params")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("subject=cat", {"subject": "cat"}),
        ("subject=cat,training.num_steps=10", {"subject": "cat", "training": {"num_steps": 10}}),
        (
            "generate.prompts=a red fox, blue background,subject=fox",
            {"generate": {"prompts": "a red fox, blue background"}, "subject": "fox"},
        ),
        ("generate.prompts=[one, two]", {"generate": {"prompts": ["one", "two"]}}),
        ("subject=007, caption=no: 1, mask=null", {"subject": "007", "caption": "no: 1", "mask": None}),
        ("training.scale_lr=true, device.device=cpu", {"training": {"scale_lr": True}, "device": {"device": "cpu"}}),
    ],
)
def test_a_comma_separates_parameters_only_before_another_key(text: str, expected: dict[str, Any]) -> None:
    assert parse_params(CONTEXT, OPTION, text) == expected


def test_a_parameter_without_a_value_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="expected key=value; got 'subject'"):
        parse_params(CONTEXT, OPTION, "subject")


def test_a_picture_may_lie_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_params(CONTEXT, OPTION, "image=~/cat.jpg") == {"image": "/home/me/cat.jpg"}


def test_an_interrupted_run_is_recorded_as_killed(tmp_path: Path) -> None:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    run = mlflow.start_run(experiment_id=mlflow.create_experiment("x", artifact_location=str(tmp_path / "artifacts")))

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _report(interrupted)(traceback=False)
    ended = mlflow.get_run(run.info.run_id)
    assert (ended.info.status, ended.data.tags["error"]) == ("KILLED", "interrupted")
    mlflow.set_tracking_uri(None)


def test_the_message_is_the_innermost_input_error() -> None:
    try:
        try:
            raise InputError("expected a; got b; do c")
        except InputError as error:
            raise DatasetError("Failed while loading data from dataset X") from error
    except DatasetError as error:
        assert readable_message(error) == "expected a; got b; do c"


def test_another_error_says_its_own_text() -> None:
    assert readable_message(DatasetError("no such file")) == "no such file"


def test_the_command_keeps_kedros_options() -> None:
    names = {param.name for param in run.params}
    assert {"pipeline", "pipelines", "env", "from_nodes", "only_missing_outputs", "params", "traceback"} <= names
