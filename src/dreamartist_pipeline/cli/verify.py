"""`kedro verify`: compare the files of a concept with its manifest, and train it again to compare the result."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from kedro.framework.project import settings
from kedro.utils import find_kedro_project

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks.console import quoted
from dreamartist_pipeline.hooks.manifest import (
    BASE_MODEL,
    MANIFEST,
    Manifest,
    RunManifest,
    changes,
    digest_of,
    read_manifest,
    versions,
)
from dreamartist_pipeline.hooks.run import literal

_SAME, _CHANGED, _MISSING = "same", "changed", "missing"
_CONCEPT = "concept"
_COPIED = ("conf", "src")
_INPUTS = "data/01_raw"
_SELECTIONS = (  # options of `kedro run`, each with a value
    *("--pipeline", "--pipelines", "-p", "--nodes", "-n", "--from-nodes", "--to-nodes", "--tags", "-t"),
    *("--from-inputs", "--to-outputs", "--namespaces", "-ns"),
)


@dataclass(frozen=True)
class Finding:
    """The state of one file of a manifest.

    Attributes:
        dataset: its name.
        path: as in the manifest.
        state: same, changed or missing.
        is_input: of the run, not made by it.
    """

    dataset: str
    path: str
    state: str
    is_input: bool


@click.command("verify")
@click.argument("subject")
@click.option("--env", "-e", default=None, help="Environment of the configuration; default: local.")
@click.option("--retrain", is_flag=True, help="Train again in a temporary folder, and compare the concepts.")
def verify(subject: str, env: str | None, retrain: bool) -> None:
    """Say whether the files of SUBJECT are those that its runs have read and written, and why not.

    The exit code is 0 if all are, otherwise 1.
    """
    try:
        project, concept = _project(), None
        concept = concept_file(project, subject, env)
        manifest = read_manifest(concept.with_name(MANIFEST))
        if manifest is None:
            raise _no_manifest(concept, subject)
        holds = _report_files(manifest, project)
        _report_versions(manifest.made_by, project)
        if retrain:
            holds = _report_retraining(manifest, project, concept, env) and holds
    except InputError as error:
        click.secho(f"Error: {error}", fg="red", err=True)
        raise click.exceptions.Exit(1) from error
    raise click.exceptions.Exit(0 if holds else 1)


def _project() -> Path:
    project: Path | None = find_kedro_project(Path.cwd())
    if project is None:
        raise InputError(expected="the project folder", got=f"{Path.cwd()}", remedy="change into it")
    return project


def concept_file(project: Path, subject: str, env: str | None) -> Path:
    """Return the concept's file as the catalog names it."""
    loader = settings.CONFIG_LOADER_CLASS(
        str(project / settings.CONF_SOURCE),
        env=env,
        runtime_params={"subject": literal(subject)},
        **settings.CONFIG_LOADER_ARGS,
    )
    entry = loader["catalog"][_CONCEPT]
    return project / str(entry.get("dataset", entry)["filepath"])


def _no_manifest(concept: Path, subject: str) -> InputError:
    if concept.is_file():
        remedy = "train it again; concepts of earlier versions have none"
    else:
        remedy = f"train it: kedro run --pipeline train --params subject={subject},image=PICTURE"
    return InputError(expected=f"the manifest {concept.with_name(MANIFEST)}", got="no such file", remedy=remedy)


def findings(manifest: Manifest, project: Path) -> list[Finding]:
    """Compare the files of a manifest with those on the disk; of a file that several runs wrote, the latest counts."""
    latest: dict[tuple[str, bool], Any] = {}
    for run in sorted(manifest.runs.values(), key=lambda run: run.ended):
        latest |= {(name, True): file for name, file in run.inputs.items() if name != BASE_MODEL}
        latest |= {(name, False): file for name, file in run.outputs.items()}
    made = {name for name, is_input in latest if not is_input}
    found = []
    for (name, is_input), file in latest.items():
        if is_input and name in made:
            continue  # made by one of these runs
        path = project / file.path
        state = _MISSING if not path.exists() else _SAME if digest_of(path) == file.sha256 else _CHANGED
        found.append(Finding(name, file.path, state, is_input))
    return found


def _report_files(manifest: Manifest, project: Path) -> bool:
    """Print the state of every file; return whether all are the same."""
    run = manifest.made_by
    click.echo(f"{manifest.subject}: made {run.ended} by {quoted(['kedro', *run.arguments])}")
    found = findings(manifest, project)
    width = max((len(each.dataset) for each in found), default=0) + 2
    for each in found:
        color = None if each.state == _SAME else "yellow"
        click.secho(f"  {each.dataset:<{width}}{each.state:<9}{each.path}", fg=color)
    for reason in _reasons(found):
        click.echo(reason)
    return all(each.state == _SAME for each in found)


def _reasons(found: Sequence[Finding]) -> Iterator[str]:
    """Yield what differences mean."""
    if differing := [each.dataset for each in found if each.is_input and each.state != _SAME]:
        yield f"What the run read has changed since ({', '.join(differing)}): a new training gives another concept."
    written = [each.dataset for each in found if not each.is_input and each.state == _CHANGED]
    if _CONCEPT in written:
        yield "The concept has been replaced or edited since: by a copy, another tool, or a run that was killed."
    if others := [name for name in written if name != _CONCEPT]:
        yield f"Written again since ({', '.join(others)}): by a run that was stopped before its end, or by hand."
    if gone := [each.dataset for each in found if not each.is_input and each.state == _MISSING]:
        yield f"Removed since: {', '.join(gone)}. The same command makes them again."


def _report_versions(run: RunManifest, project: Path) -> None:
    """Print which versions have changed; they may change the last bits of a new training."""
    if changed := changes(run.versions, versions(project)):
        click.echo("Versions have changed since, so that a new training may give other bits:")
        _print_changes(changed)


def _print_changes(changed: Mapping[str, tuple[Any, Any]]) -> None:
    for name, (before, now) in changed.items():
        click.echo(f"  {name}: {before} → {now}")


def _report_retraining(manifest: Manifest, project: Path, concept: Path, env: str | None) -> bool:
    """Train again in a copy of the project and compare; return whether the concept has the same bytes."""
    check_inside(manifest.made_by, concept, project)
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        copy = Path(folder)
        _copy(project, copy, manifest.made_by)
        command = [sys.executable, "-m", "kedro", *training_arguments(manifest.made_by.arguments)]
        click.echo(f"Training again: {quoted(['kedro', *command[3:]])}")
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        run = subprocess.run(command, cwd=copy, env=environment, stdout=subprocess.DEVNULL, check=False)
        if run.returncode:
            click.secho("The training failed; see above.", fg="red", err=True)
            return False
        again = read_manifest(copy / concept.relative_to(project).with_name(MANIFEST))
        assert again is not None  # a run that ends well has written it
    if again.concept_sha256 == manifest.concept_sha256:
        click.secho(f"The new concept has the same bytes: SHA-256 {again.concept_sha256}.", fg="green")
        return True
    click.secho("The new concept has other bytes.", fg="yellow")
    differing = _differences(manifest.made_by, again.made_by)
    if differing:
        click.echo("What may be the reason:")
        _print_changes(differing)
    else:
        click.echo(
            "Settings, inputs, versions and machine are the same. On a GPU, some kernels add in a varying order: train "
            "with device.deterministic=true. A training that was continued with training.resume=force has other bytes "
            "than one that was not interrupted."
        )
    return False


def check_inside(run: RunManifest, concept: Path, project: Path) -> None:
    """Check that a training in a copy of the project would replace nothing outside the copy.

    Raises:
        InputError: an output is not in the project.
    """
    files = [concept, *(project / file.path for file in run.outputs.values())]
    if outside := [file for file in files if not file.is_relative_to(project)]:
        raise InputError(
            expected=f"outputs inside the project {project}, of which --retrain makes a copy",
            got=f"{outside[0]}",
            remedy="leave out --retrain, and train another subject with the same settings yourself",
        )


def _differences(before: RunManifest, now: RunManifest) -> dict[str, tuple[Any, Any]]:
    """Return what differs of two runs, apart from their results."""
    parts = ("configuration", "inputs", "versions", "machine")
    old, new = (
        {part: value for part, value in run.model_dump(mode="json").items() if part in parts} for run in (before, now)
    )
    for run in (old, new):
        run["inputs"] = {name: file["sha256"] for name, file in run["inputs"].items()}
    return changes(old, new)


def training_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a `kedro run` that trains only: its options without those that select nodes.

    Raises:
        InputError: the concept was made by no such command.
    """
    if not arguments or arguments[0] != "run":
        raise InputError(
            expected="a concept that `kedro run` has made",
            got=quoted(arguments) or "a Python session",
            remedy="leave out --retrain, and train it again yourself",
        )
    kept, rest = ["run"], list(arguments[1:])
    while rest:
        option = rest.pop(0)
        if option.partition("=")[0] in _SELECTIONS:
            if "=" not in option and rest:
                rest.pop(0)
        else:
            kept.append(option)
    return [*kept, "--pipeline", "train"]


def _copy(project: Path, copy: Path, run: RunManifest) -> None:
    """Copy a project's code and configuration and the regularization set of a run; link what no training writes."""
    for path in project.iterdir():
        if path.name in _COPIED:  # Kedro takes no source folder outside the project
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.name != "data":
            (copy / path.name).symlink_to(path)
    (copy / "data" / "09_tracking").mkdir(parents=True)
    if (project / _INPUTS).exists():
        (copy / _INPUTS).symlink_to(project / _INPUTS)
    if (drawn := run.outputs.get("regularization_set")) is not None and (project / drawn.path).is_dir():
        shutil.copytree(project / drawn.path, copy / drawn.path)
