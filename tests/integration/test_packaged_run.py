"""`kedro package`, and runs of the packaged project in an empty folder."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from project_copy import add_inputs
from warm_processes import run_warm

_PACKAGE = """
import sys
from kedro.framework.cli import project
from kedro.framework.cli.cli import main

call = project.call
project.call = lambda command, **options: call([*command, *["--no-isolation"] * ("build" in command)], **options)
sys.argv = ["kedro", "package"]
main()
"""
"""Runs `kedro package` without downloading setuptools."""


@pytest.fixture(scope="module")
def package(bare_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the contents of the wheel in `installed`, and the archive of the configuration."""
    packaged = run_warm(("-c", _PACKAGE), bare_project, os.environ, timeout_s=240)
    assert packaged.returncode == 0, packaged.stderr
    folder = tmp_path_factory.mktemp("package")
    (wheel,) = (bare_project / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    shutil.copy(bare_project / "dist/conf-dreamartist_pipeline.tar.gz", folder / "conf.tar.gz")
    return folder


def packaged_run(package: Path, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(package / "installed"), **variables}
    environment |= {"KEDRO_DISABLE_TELEMETRY": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return run_warm(("-m", "dreamartist_pipeline", *arguments), folder, environment, timeout_s=240)


def test_a_packaged_project_trains_and_prints_commands_that_work(
    package: Path, tmp_path: Path, tiny_base_model: Path
) -> None:
    add_inputs(tmp_path, tiny_base_model)
    shutil.copy(package / "conf.tar.gz", tmp_path)
    given = (
        "subject=button,image=button.png,base_model=tiny,prompt_database=prompts.parquet,ingestion.bucket.side_px=32"
    )
    options = ("--conf-source", "conf.tar.gz", "--params", given)

    trained = packaged_run(package, tmp_path, "--pipeline", "train", *options, KEDRO_ENV="test")

    assert trained.returncode == 0, trained.stderr[-3000:]
    assert (tmp_path / "data/06_models/button/concept.safetensors").is_file()
    assert re.search(r" INFO    \[1/\d+\] check_training", trained.stderr)  # in the format of conf/logging.yml
    (printed,) = [line for line in trained.stdout.splitlines() if "--pipeline generate" in line]
    words = shlex.split(printed)
    start = words.index("--pipeline")
    assert Path(words[start - 1]).name == "dreamartist-pipeline"
    generated = packaged_run(package, tmp_path, *words[start:], KEDRO_ENV="")
    assert generated.returncode == 0, generated.stderr[-3000:]
    assert len(list((tmp_path / "data/07_model_output/button").rglob("0*_*.png"))) == 2


def test_an_unknown_environment_of_a_packaged_project_is_one_message(package: Path, tmp_path: Path) -> None:
    result = packaged_run(package, tmp_path, "--conf-source", str(package / "conf.tar.gz"), KEDRO_ENV="tset")
    assert result.returncode == 1
    assert "'tset'" in result.stderr and "base, local, sd15, sd21, sdxl, test" in result.stderr
    assert "Traceback" not in result.stderr
