"""The project's commands: `kedro run` with commas and readable errors, `kedro import-config`."""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from kedro.io import DatasetError
from omegaconf import OmegaConf

from dreamartist_pipeline.cli import (
    _report,
    cli,
    command_with,
    parse_params,
    readable_message,
    run,
    with_memory_explained,
)
from dreamartist_pipeline.cli.selection import check_selection, check_words
from dreamartist_pipeline.core.devices import check_device
from dreamartist_pipeline.errors import InputError, StoppedEarly
from dreamartist_pipeline.hooks.parameters import flatten
from dreamartist_pipeline.params import DeviceParams
from dreamartist_pipeline.pipeline_registry import register_pipelines
from refusals import says
from tracking_stores import tracking_uri
from warm_processes import warm_python

PYPROJECT = '[tool.kedro]\npackage_name = "x"\nproject_name = "x"\nkedro_init_version = "1.7.0"\n'
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
        ("generate.prompts=a 🦊 asleep", {"generate": {"prompts": "a 🦊 asleep"}}),
        ("generate.prompts={cat:1.2} asleep, blue", {"generate": {"prompts": "{cat:1.2} asleep, blue"}}),
        ("generate.negative_prompt=a {cat: 1.2}", {"generate": {"negative_prompt": "a {cat: 1.2}"}}),
        ("training.templates={pt1}", {"training": {"templates": "{pt1}"}}),
        ("generate.prompts='{pt1}'", {"generate": {"prompts": "{pt1}"}}),
        ("subject=007, caption=no: 1, mask=null", {"subject": "007", "caption": "no: 1", "mask": None}),
        ("training.scale_lr=true, device.device=cpu", {"training": {"scale_lr": True}, "device": {"device": "cpu"}}),
        ("training.seed = 3 , subject = cat", {"training": {"seed": 3}, "subject": "cat"}),
        ("device=cpu,device.dtype=bfloat16", {"device": {"device": "cpu", "dtype": "bfloat16"}}),
        ("device={device: cpu}", {"device": {"device": "cpu"}}),
        ("caption='white, mood=calm',subject=cat", {"caption": "white, mood=calm", "subject": "cat"}),
        ('generate.prompts="a, b=c", subject=cat', {"generate": {"prompts": "a, b=c"}, "subject": "cat"}),
        (
            "generate.prompts=['a cat, x=1', 'a dog'],subject=c",
            {"generate": {"prompts": ["a cat, x=1", "a dog"]}, "subject": "c"},
        ),
        ('caption="big" cat, subject=cat', {"caption": '"big" cat', "subject": "cat"}),
        ("generate.prompts={cat:1.2} a, subject=fox", {"generate": {"prompts": "{cat:1.2} a"}, "subject": "fox"}),
        ("generate.prompts=a ${foo}", {"generate": {"prompts": r"a \${foo}"}}),
        ("generate.prompts=a ${foo", {"generate": {"prompts": r"a \${foo"}}),
        # paths of Windows
        (r"image=C:\Users\me\my cat.jpg,subject=cat", {"image": r"C:\Users\me\my cat.jpg", "subject": "cat"}),
        (r'image="C:\new\t.jpg",mask=\\nas\m.png', {"image": r"C:\new\t.jpg", "mask": r"\\nas\m.png"}),
        (r"import.positive=[C:\a\b.pt, 'D:\n e\c.pt']", {"import": {"positive": [r"C:\a\b.pt", r"D:\n e\c.pt"]}}),
        (r"training.start_from=C:\new\t.safetensors", {"training": {"start_from": r"C:\new\t.safetensors"}}),
    ],
)
def test_a_comma_separates_parameters_only_before_another_key(text: str, expected: dict[str, Any]) -> None:
    assert parse_params(CONTEXT, OPTION, text) == expected


def test_a_parameter_that_is_given_twice_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="import.positive"):
        parse_params(CONTEXT, OPTION, "import.positive=a.pt, import.positive = b.pt")


def test_a_parameter_without_a_value_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="'subject'"):
        parse_params(CONTEXT, OPTION, "subject")


def test_a_list_that_yaml_cannot_read_is_refused_with_how_to_write_it() -> None:
    with pytest.raises(click.BadParameter, match="got '.a {pt1.*generate.prompts="):
        parse_params(CONTEXT, OPTION, "generate.prompts=[a {pt1}, blue background]")


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("generate.prompts=[a {pt1}, blue]", r"generate.prompts=\['a {pt1}', 'blue'\]"),
        ("caption=white, grass=green, subject=x", r"caption='white, grass=green'"),
        ("caption=white, mood=calm", r"""--params "caption='white, mood=calm'\""""),  # like `method`, but in a text
        ("generate.prompts=it's a cat, a=b, mood=c, subject=x", r"generate.prompts='it''s a cat, a=b, mood=c'"),
        ("training.words.names.pt1=[my-cat,", r"""--params "training.words.names.pt1=\['my-cat'\]\""""),
        ("generate.prompts=a,generate.prompts=b,generate.prompts=[c]", r"generate.prompts=\['a', 'b', 'c'\]"),
        ("training.num_steps=3,training.num_steps.x=1", "training.num_steps.x"),
        ("training.num_steps=3,training.num_steps=4", "leave one out"),
    ],
)
def test_a_mistake_is_answered_with_the_form_that_works(text: str, form: str) -> None:
    with pytest.raises(click.BadParameter, match=form):
        parse_params(CONTEXT, OPTION, text)


@pytest.mark.parametrize(
    "text",
    [
        "caption=it's white, mood=calm",
        "generate.prompts=it's a cat, mood=calm",
        "generate.prompts=a,generate.prompts=b",
    ],
)
def test_the_form_that_is_shown_works(text: str) -> None:
    with pytest.raises(click.BadParameter) as raised:
        parse_params(CONTEXT, OPTION, text)
    _, shown = shlex.split(raised.value.message[raised.value.message.index("--params") :].partition("; for a")[0])
    expected = text.partition("=")[2] if "mood" in text else ["a", "b"]
    assert expected in flatten(parse_params(CONTEXT, OPTION, shown)).values()


@pytest.mark.parametrize("text", ["subject=flower, mlflow_run_id=0123", "subject=cat,trainig.num_steps=3"])
def test_an_unknown_parameter_after_a_name_is_left_to_the_check_of_names(text: str) -> None:
    assert len(parse_params(CONTEXT, OPTION, text)) == 2


def test_the_forms_of_the_documentation_work() -> None:
    text = (Path(__file__).parents[1] / "docs/running.md").read_text(encoding="utf-8")
    table = text.partition("## Values of --params")[2].partition("\n\n`${")[0]
    commands = re.findall(r"`--params (.+?)`(?= \||;|,)", table)
    given = [parse_params(CONTEXT, OPTION, *shlex.split(command)) for command in commands]
    assert given == [
        {"subject": "cat", "generate": {"prompts": "a my-cat, blue background"}},
        {"caption": "white background, mood=calm", "subject": "cat"},
        {"generate": {"prompts": ["a my-cat, asleep", "a my-cat on a sofa"]}},
        {"generate": {"prompts": ["a {pt1}", "{small:1.2} {pt1}"]}},
        {"training": {"words": {"names": {"pt1": ["my-cat", "my-cat-neg"]}}}},
        {"training": {"loss": {"kind": "huber"}}},
        {"device": {"device": "cpu"}},
        {"image": "cat.jpg"},
    ]


def test_a_value_without_quotes_in_the_shell_is_answered_with_quotes() -> None:
    result = CliRunner().invoke(run, ["--params", "subject=cat,generate.prompts=a", "my-cat"])
    assert result.exit_code == 2
    assert "'my-cat'" in result.output and '--params "subject=cat,generate.prompts=a my-cat"' in result.output


@pytest.mark.parametrize(
    ("words", "options", "shown"),
    [
        (["train"], {}, "--pipeline train"),
        (["trian"], {}, "--pipeline train"),
        (["generate"], {"params": "subject=cat"}, "--pipeline generate"),
        (["train"], {"pipeline": "generate", "params": "generate.prompts=a"}, '--params "generate.prompts=a train"'),
        (["evaluated"], {"params": "caption=a picture"}, '--params "caption=a picture evaluated"'),
        (["my-neg]"], {"params": "training.words.names.pt1=[my,"}, '--params "training.words.names.pt1=[my, my-neg]"'),
        (["subject=cat"], {}, '--params "subject=cat"'),
        (["fast"], {}, "--pipeline NAME"),
    ],
)
def test_words_without_an_option_are_answered_with_the_option(
    words: list[str], options: dict[str, str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dreamartist_pipeline.cli.selection.pipelines", register_pipelines())
    with pytest.raises(click.UsageError) as raised:
        check_words(words, options)
    assert shown in raised.value.message


def test_a_list_without_quotes_in_the_shell_is_answered_with_quotes() -> None:
    result = CliRunner().invoke(run, ["--params", "training.words.names.pt1=[my-cat,", "my-cat-neg]"])
    assert '--params "training.words.names.pt1=[my-cat, my-cat-neg]"' in result.output


def test_relative_paths_are_those_of_the_working_directory_inside_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    folder = tmp_path / "photos" / "new"
    (folder / "clip").mkdir(parents=True)
    given = ",".join(
        (
            r"image=cat.jpg,mask=/m.png,base_model=hub:a/b,prompt_database=../p.parquet,init_image=C:\x.png",
            r"vae=v.safetensors,base_model_config=D:\sdxl",
            "import.positive=[a.pt, ~/b.pt],import.words.pt1=w.pt,training.start_from=../../../c.safetensors",
            "evaluation.evaluators=[clip:clip, dinov2:facebook/dinov2, efficientnet-lite0],subject=cat,"
            "training.scoring.evaluator=clip:clip",
        )
    )
    monkeypatch.chdir(tmp_path)
    assert parse_params(CONTEXT, OPTION, given)["image"] == "cat.jpg"
    monkeypatch.chdir(folder)
    assert parse_params(CONTEXT, OPTION, given) == {
        "image": "photos/new/cat.jpg",
        "mask": "/m.png",
        "base_model": "hub:a/b",
        "prompt_database": "photos/p.parquet",
        "init_image": r"C:\x.png",
        "vae": "photos/new/v.safetensors",
        "base_model_config": r"D:\sdxl",
        "import": {"positive": ["photos/new/a.pt", "~/b.pt"], "words": {"pt1": "photos/new/w.pt"}},
        "training": {
            "start_from": str(tmp_path.parent / "c.safetensors"),
            "scoring": {"evaluator": "clip:photos/new/clip"},
        },
        "evaluation": {"evaluators": ["clip:photos/new/clip", "dinov2:facebook/dinov2", "efficientnet-lite0"]},
        "subject": "cat",
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "--env", "sd15", "--params", "subject=cat"], ["--params", "subject=cat,device=cpu"]),
        (["run", "--params=image=my cat.png", "--env", "sd15"], ["--params", "image=my cat.png,device=cpu"]),
        (["run", "--env", "sd15", "--params", "device=cuda,subject=cat"], ["--params", "subject=cat,device=cpu"]),
        (["run", "--env", "sd15", "--params", "device={device: cuda}"], ["--params", "device=cpu"]),
        (
            ["run", "--params", "subject=a", "--env", "sd15", "--params", "subject=b"],
            ["--params", "subject=b,device=cpu"],
        ),
        (["run", "--env", "sd15"], ["--params", "device=cpu"]),
    ],
)
def test_a_run_is_repeated_with_further_parameters(arguments: list[str], expected: list[str]) -> None:
    words = shlex.split(command_with(["/env/bin/kedro", *arguments], "device=cpu"))
    assert Path(words[0]).name == "kedro"
    assert words[-2:] == expected
    assert run.make_context("run", words[2:]).params["env"] == "sd15"


def test_a_missing_gpu_is_answered_with_the_command_that_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kedro", "run", "--env", "sd15", "--params", "device=cuda,subject=cat"])
    with pytest.raises(click.exceptions.Exit):
        _report(lambda: check_device(DeviceParams(device="cuda")))(traceback=False)
    command = next(line for line in capsys.readouterr().err.splitlines() if "kedro run" in line)
    words = shlex.split(command.partition(": ")[2])
    given = run.make_context("run", words[2:]).params
    assert (given["env"], given["params"]) == (
        "sd15",
        {"subject": "cat", "device": {"device": "cpu", "dtype": "float32"}},
    )


# ------------------------------------------------------------------------------------------------- selection

SELECTION = {
    "runner": None,
    "pipeline": None,
    "pipelines": [],
    "tags": [],
    "node_names": [],
    "from_nodes": [],
    "to_nodes": [],
    "from_inputs": [],
    "to_outputs": [],
    "namespaces": [],
}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return the check of a selection of the project's pipelines."""
    monkeypatch.setattr("dreamartist_pipeline.cli.selection.pipelines", register_pipelines())
    return lambda **options: check_selection(SELECTION | options)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"pipeline": "trian"}, {"expected": "__default__, compare, evaluate", "got": "'trian'", "remedy": "'train'"}),
        ({"pipeline": ""}, {"expected": "train", "got": "''"}),
        ({"pipelines": ["train", "evaluat"]}, {"expected": "evaluate", "got": "'evaluat'", "remedy": "'evaluate'"}),
        ({"node_names": ["nosuch"]}, {"expected": "train_concept", "got": "'nosuch'"}),
        ({"from_nodes": ["train_concpt"]}, {"got": "'train_concpt'", "remedy": "'train_concept'"}),
        ({"pipeline": "train", "to_nodes": ["write_files"]}, {"expected": "train_concept", "got": "'write_files'"}),
        ({"tags": ["trainning"]}, {"expected": "training", "got": "'trainning'", "remedy": "'training'"}),
        ({"from_inputs": ["concpt"]}, {"expected": "concept", "got": "'concpt'", "remedy": "'concept'"}),
        ({"to_outputs": ["nosuch"]}, {"expected": "concept", "got": "'nosuch'"}),
        ({"namespaces": ["cat"]}, {"expected": "no namespace", "got": "'cat'"}),
        (
            {"pipeline": "train", "tags": ["regularization"], "node_names": ["check_training"]},
            {"expected": "train", "got": "--tags and --nodes"},
        ),
        (
            {"from_nodes": ["train_concept"], "to_nodes": ["prepare_reference"]},
            {"expected": "__default__", "got": "--from-nodes and --to-nodes"},
        ),
        ({"runner": "ParallelRunner"}, {"expected": "SequentialRunner", "got": "ParallelRunner"}),
        ({"runner": "ThreadRunner"}, {"expected": "SequentialRunner", "got": "ThreadRunner"}),
        ({"runner": "SequentialRuner"}, {"expected": "SequentialRunner", "got": "SequentialRuner"}),
        ({"runner": "my.module.Runner"}, {"expected": "SequentialRunner", "got": "my.module.Runner"}),
    ],
)
def test_a_selection_without_a_run_is_refused(
    options: dict[str, Any], parts: dict[str, str], check: Callable[..., None]
) -> None:
    with pytest.raises(InputError, check=says(**parts)):
        check(**options)


def test_a_selection_of_nodes_is_accepted(check: Callable[..., None]) -> None:
    check()
    check(pipelines=["train", "evaluate"], runner="kedro.runner.SequentialRunner")
    check(pipeline="pretrain", node_names=["render_sprites", "render_held_out_sprites"])
    check(pipeline="train", tags=["ingestion", "prompts"], to_outputs=["prepared_image"])


# ------------------------------------------------------------------------------------------------- errors


def test_a_path_in_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_params(CONTEXT, OPTION, "image=~/cat.jpg") == {"image": "/home/me/cat.jpg"}


def interrupted() -> None:
    raise KeyboardInterrupt  # by a library


def terminated() -> None:
    signal.raise_signal(signal.SIGTERM)


def interrupted_twice() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGINT)  # while what the run has begun is closed


def interrupted_in_a_library() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException as error:  # as Kedro's loader of configurations does
        raise ValueError("no such strategy") from error


def swallowed() -> None:
    with contextlib.suppress(KeyboardInterrupt):  # as in a callback of the garbage collector
        signal.raise_signal(signal.SIGTERM)
    time.sleep(60)


def stopped() -> None:
    raise StoppedEarly("stopped after step 3; the same command continues", 75)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (interrupted, "Stopped by an interruption"),
        (interrupted_twice, "Stopped by SIGINT"),
        (interrupted_in_a_library, "Stopped by SIGINT"),
        (terminated, "Stopped by SIGTERM"),
        (stopped, "stopped after step 3; the same command continues"),
    ],
)
def test_an_interrupted_run_is_recorded_as_killed_and_says_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Callable[[], None], reason: str
) -> None:
    import mlflow

    handler = signal.getsignal(signal.SIGTERM)
    with tracking_uri(f"sqlite:///{tmp_path}/mlflow.db"):
        experiment = mlflow.create_experiment("x", artifact_location=str(tmp_path / "artifacts"))
        active = mlflow.start_run(experiment_id=experiment)
        with pytest.raises(click.exceptions.Exit) as exited:
            _report(run)(traceback=False)
        ended = mlflow.get_run(active.info.run_id)
    assert exited.value.exit_code in (75, 130)
    assert ended.info.status == "KILLED" and ended.data.tags["error"].startswith(reason)
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line == ended.data.tags["error"] and "the same command" in last_line
    assert signal.getsignal(signal.SIGTERM) == handler


def test_an_interruption_that_a_library_has_caught_is_raised_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dreamartist_pipeline.cli.stopping._UNWINDING_S", 0.05)
    with pytest.raises(click.exceptions.Exit, match="130"):
        _report(swallowed)(traceback=False)
    assert "Stopped by SIGTERM" in capsys.readouterr().err


def test_an_interruption_that_python_ignores_is_raised_again_at_once_and_not_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Collected:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def interrupted_in_a_destructor() -> None:
        collected = Collected()
        del collected
        time.sleep(20)

    begun = time.monotonic()
    with pytest.raises(click.exceptions.Exit, match="130"):
        _report(interrupted_in_a_destructor)(traceback=False)
    assert time.monotonic() - begun < 4
    shown = capsys.readouterr().err
    assert "Stopped by SIGINT" in shown and "Exception ignored" not in shown


def test_nothing_is_raised_again_after_a_run_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreamartist_pipeline.cli.stopping._UNWINDING_S", 0.05)
    with pytest.raises(click.exceptions.Exit):
        _report(terminated)(traceback=False)
    time.sleep(0.2)


def test_a_training_that_was_stopped_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(click.exceptions.Exit) as ended:
        _report(stopped)(traceback=False)
    assert ended.value.exit_code == 75
    assert capsys.readouterr().err == "\nstopped after step 3; the same command continues\n"


def test_a_run_that_fails_before_its_first_node_is_recorded_as_failed(tmp_path: Path) -> None:
    import mlflow

    def refused() -> None:
        raise InputError("a caption", "a licence", "rename it")

    with tracking_uri(f"sqlite:///{tmp_path}/mlflow.db"):
        experiment = mlflow.create_experiment("x", artifact_location=str(tmp_path / "artifacts"))
        run = mlflow.start_run(experiment_id=experiment)
        with pytest.raises(click.exceptions.Exit):
            _report(refused)(traceback=False)
        ended = mlflow.get_run(run.info.run_id)
    assert ended.info.status == "FAILED"
    assert ended.data.tags["error"] == "InputError: expected a caption; got a licence; rename it"


def test_the_message_is_the_innermost_input_error() -> None:
    try:
        try:
            raise InputError("a", "b", "do c")
        except InputError as error:
            raise DatasetError("Failed while loading data from dataset X") from error
    except DatasetError as error:
        assert readable_message(error) == "expected a; got b; do c"


def test_the_message_of_another_error_is_its_own_text() -> None:
    assert readable_message(DatasetError("no such file")) == "no such file"


def test_a_run_without_enough_memory_ends_with_what_to_do() -> None:
    """In a process of its own, which may take 256 MiB more than it has."""
    program = """
import click, psutil, resource, torch
from dreamartist_pipeline.cli import _report

limit = psutil.Process().memory_info().vms + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
held = []
run = _report(lambda: [held.append(torch.ones(2**24)) for _ in range(32)])
click.Command("run", callback=lambda: run(traceback=False))()
"""
    done = subprocess.run([warm_python(), "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "expected a run that fits into the memory; got" in done.stderr
    assert "device.dtype=bfloat16" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error", [MemoryError("full"), RuntimeError("can't start new thread"), OSError(12, "Cannot allocate memory")]
)
def test_exhausted_memory_is_recognised_within_other_errors(error: Exception) -> None:
    outer = DatasetError("Failed while loading data")
    outer.__cause__ = error
    explained = with_memory_explained(outer)
    assert isinstance(explained, InputError)
    assert says(expected="the memory", got=str(error))(explained)


def test_an_error_that_explains_itself_stays() -> None:
    error = InputError("a training that fits", "more", "lower it")
    error.__cause__ = MemoryError()
    assert with_memory_explained(error) is error
    other = DatasetError("no memory is needed for this one")
    assert with_memory_explained(other) is other


def test_the_command_keeps_kedros_options() -> None:
    names = {param.name for param in run.params}
    assert {"pipeline", "pipelines", "env", "from_nodes", "only_missing_outputs", "params", "traceback"} <= names


@pytest.mark.parametrize(
    "value",
    ["[" * 5000 + "]" * 5000, "{a: " * 3000 + "1" + "}" * 3000, "'" + "${" * 5000 + "}" * 5000 + "'", "9" * 5000],
)
def test_a_value_that_is_nested_too_deeply_is_refused_before_it_is_built(value: str) -> None:
    with pytest.raises(click.BadParameter, match="deep|digits"):
        parse_params(click.Context(run), click.Option(["--params"]), f"training.lora_unet={value}")


# ------------------------------------------------------------------------------------------------- import-config

CONFIG = """
bells: whistles
lora_unet:
  - {lr: 1e-4, rank: 2, branch: p, layers: ['re:.*attn2$']}
  - {lr: 1e-4, rank: 2, branch: n, layers: ['re:.*attn2$']}
train: {cfg_scale: '2.0'}
data: {batch_size: 3, prompt_template: templates/object.txt}
"""


@pytest.fixture
def toolkit_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(PYPROJECT)
    monkeypatch.chdir(project)
    file = tmp_path / "toolkit" / "cfgs" / "DreamArtist++.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(CONFIG, encoding="utf-8")
    return file


def test_an_environment_is_written_to_the_project_from_a_sub_folder(
    toolkit_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Path.cwd()
    (project / "notebooks").mkdir()
    monkeypatch.chdir(project / "notebooks")
    result = CliRunner().invoke(cli, ["import-config", str(toolkit_file), "--env", "mine"])
    assert result.exit_code == 0, result.output
    assert (project / "conf/mine/parameters.yml").is_file()


def test_an_imported_configuration_becomes_an_environment(toolkit_file: Path) -> None:
    result = CliRunner().invoke(cli, ["import-config", str(toolkit_file)])
    assert result.exit_code == 0, result.output
    parameters = yaml.safe_load(Path("conf/DreamArtist-plus-plus/parameters.yml").read_text())
    assert parameters["training"]["guidance_scale"] == "2.0"
    assert parameters["training"]["lora_unet"][0]["lr"] == 1e-4
    assert "bells = 'whistles'" in result.output
    assert "kedro run --env DreamArtist-plus-plus --pipeline train" in result.output


def test_defaults_are_printed_and_written_above_the_values(toolkit_file: Path) -> None:
    toolkit_file.write_text(CONFIG.replace("batch_size: 3, ", "loss_weight: 0.5, "), encoding="utf-8")
    result = CliRunner().invoke(cli, ["import-config", str(toolkit_file), "--env", "mine"])
    assert "data.batch_size = not given: 4" in result.output
    text = Path("conf/mine/parameters.yml").read_text()
    assert any(line.startswith("#") and "data.batch_size = not given: 4" in line for line in text.splitlines())
    assert yaml.safe_load(text)["training"]["batch_size"] == 4


def test_invalid_values_write_no_environment(toolkit_file: Path) -> None:
    toolkit_file.write_text(CONFIG.replace("'2.0'", "'1.0'"), encoding="utf-8")
    result = CliRunner().invoke(cli, ["import-config", str(toolkit_file), "--env", "mine"])
    assert result.exit_code == 1
    assert "guidance_scale is 1" in result.output
    assert not Path("conf/mine").exists()


def test_templates_are_found_from_the_toolkits_root(toolkit_file: Path) -> None:
    templates = toolkit_file.parents[1] / "templates"
    templates.mkdir()
    (templates / "object.txt").write_text("a photo of it\n")
    CliRunner().invoke(cli, ["import-config", str(toolkit_file), "--env", "mine"])
    parameters = yaml.safe_load(Path("conf/mine/parameters.yml").read_text())
    assert parameters["training"]["templates"] == ["a photo of it"]


def test_an_environment_is_replaced_only_on_request(toolkit_file: Path) -> None:
    runner = CliRunner()
    runner.invoke(cli, ["import-config", str(toolkit_file), "--env", "mine"])
    again = runner.invoke(cli, ["import-config", str(toolkit_file), "--env", "mine"])
    assert again.exit_code == 1
    assert "conf/mine" in again.output and "--force" in again.output
    assert runner.invoke(cli, ["import-config", str(toolkit_file), "--env", "mine", "--force"]).exit_code == 0


@pytest.mark.parametrize("name", ["base", "local", "../outside"])
def test_a_reserved_or_invalid_environment_name_is_refused(toolkit_file: Path, name: str) -> None:
    result = CliRunner().invoke(cli, ["import-config", str(toolkit_file), "--env", name, "--force"])
    assert result.exit_code == 1
    assert f"'{name}'" in result.output and "--env NAME" in result.output


def test_a_base_file_whose_name_is_too_long_is_one_that_is_not_there(toolkit_file: Path) -> None:
    toolkit_file.write_text(f"_base_: {'a' * 5000}\n{toolkit_file.read_text()}")
    result = CliRunner().invoke(cli, ["import-config", str(toolkit_file), "--env", "mine"])
    assert result.exit_code == 0
    assert "the file was not found" in result.output


@pytest.mark.parametrize("path", ["/{outside}", "../../outside.yaml", "cfgs/link.yaml", "link.yaml", "outside.yaml"])
def test_a_base_file_outside_the_toolkits_configurations_is_refused(toolkit_file: Path, path: str) -> None:
    outside = toolkit_file.parents[2] / "outside.yaml"
    for place in (outside, toolkit_file.parents[1] / "outside.yaml"):
        place.write_text("password: abracadabra\n")
    (toolkit_file.parent / "link.yaml").symlink_to(outside)
    path = path.replace("/{outside}", str(outside))
    toolkit_file.write_text(f"_base_: {path}\n{CONFIG}")

    result = CliRunner().invoke(cli, ["import-config", str(toolkit_file), "--env", "mine"])

    assert result.exit_code == 1
    assert path in result.output and "base files inside" in result.output
    assert "password" not in result.output and "abracadabra" not in result.output
    assert not Path("conf/mine").exists()


@pytest.mark.parametrize("path", ["/{outside}", "../../secret.txt", "templates/link.txt"])
def test_templates_outside_the_toolkit_are_refused(toolkit_file: Path, path: str) -> None:
    outside = toolkit_file.parents[2] / "secret.txt"
    outside.write_text("abracadabra\n")
    templates = toolkit_file.parents[1] / "templates"
    templates.mkdir()
    (templates / "link.txt").symlink_to(outside)
    toolkit_file.write_text(CONFIG.replace("templates/object.txt", path.replace("/{outside}", str(outside))))

    result = CliRunner().invoke(cli, ["import-config", str(toolkit_file), "--env", "mine"])

    assert result.exit_code == 1
    assert "prompt templates inside" in result.output
    assert "abracadabra" not in result.output


@pytest.mark.parametrize(
    "line", ["it ${oc.env:SECRET}", r"it \${oc.env:SECRET}", r"it \\${oc.env:SECRET} ${env:SECRET}"]
)
def test_no_resolver_of_a_template_runs_in_the_environment(
    toolkit_file: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setenv("SECRET", "abracadabra")
    templates = toolkit_file.parents[1] / "templates"
    templates.mkdir()
    (templates / "object.txt").write_text(line)

    CliRunner().invoke(cli, ["import-config", str(toolkit_file), "--env", "mine"])

    loaded = OmegaConf.load("conf/mine/parameters.yml")
    assert OmegaConf.to_container(loaded, resolve=True)["training"]["templates"] == [line]


def test_control_characters_of_a_file_do_not_reach_the_terminal(toolkit_file: Path) -> None:
    toolkit_file.write_text(CONFIG + '"k\\e[2J\\nEOF": 1\n')

    result = CliRunner().invoke(cli, ["import-config", str(toolkit_file), "--env", "mine"])

    assert "\x1b" not in result.output and r"k\x1b[2J\nEOF" in result.output


def test_a_configuration_that_is_no_text_is_refused(toolkit_file: Path) -> None:
    toolkit_file.write_bytes(b"\x89PNG\r\n\xff")

    result = CliRunner().invoke(cli, ["import-config", str(toolkit_file), "--env", "mine"])

    assert result.exit_code == 1
    assert "UTF-8" in result.output and toolkit_file.name in result.output


@pytest.mark.parametrize("content", [b"", b"- a\n", b"a: [\n", b"\xff\xfe", b"2026-11-27\n"])
def test_a_file_of_a_sweep_that_is_no_mapping_is_one_message(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yml"
    file.write_bytes(content)
    result = CliRunner().invoke(cli, ["sweep", str(file)])
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit)
    assert str(file) in result.output or "sweep.space" in result.output


def test_parameters_of_a_sweep_belong_into_its_file(tmp_path: Path) -> None:
    (tmp_path / "sweep.yml").write_text("trials: 2\n")
    result = CliRunner().invoke(cli, ["sweep", str(tmp_path / "sweep.yml"), "--params", "sweep.halving.first=5"])
    assert result.exit_code == 2 and "sweep.yml" in result.output


def test_the_help_of_a_sweep_shows_its_example_line_by_line() -> None:
    shown = CliRunner().invoke(cli, ["sweep", "--help"]).output
    assert "\n    trials: 12\n" in shown and "\\b" not in shown
