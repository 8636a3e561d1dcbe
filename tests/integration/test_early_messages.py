"""What users read soon after a command: mistakes that need no model, from any folder of the project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from warm_processes import run_warm

_RUN = """
import sys
from kedro.framework.cli.cli import main

sys.argv = ["kedro", "run", *sys.argv[1:]]
try:
    main()
finally:
    print("tracking store opened:", "mlflow.store.tracking.sqlalchemy_store" in sys.modules)
    print("torch imported:", "torch" in sys.modules)
"""


def kedro_run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `kedro run` in a folder; the output ends with whether the tracking store was opened, and torch imported."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KEDRO_ENV": "", **variables}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-c", _RUN, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.parametrize(
    ("folder", "arguments", "named"),
    [
        ("notebooks", ("--pipeline", "train", "--params", "subject=cat,image=a.png"), "{project}/notebooks/a.png"),
        pytest.param(
            *(
                "notebooks",
                ("--pipeline", "generate", "--params", "subject=nosuch"),
                "{project}/data/06_models/nosuch/",
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("notebooks", ("--pipeline", "train", "--params", "vae=v.ckpt"), "{project}/notebooks/v.ckpt for vae"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_missing_picture_concept_or_autoencoder_is_reported_before_torch_is_imported(
    folder: str, arguments: tuple[str, ...], named: str, bare_project: Path
) -> None:
    result = kedro_run(bare_project / folder, *arguments)
    assert result.returncode == 1
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert named.format(project=bare_project) in message
    assert result.stdout.splitlines()[-2:] == ["tracking store opened: False", "torch imported: False"]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [("--pipeline", "trian"), ("--runner", "ParallelRunner")])
def test_a_mistaken_selection_is_one_message(arguments: tuple[str, ...], bare_project: Path) -> None:
    result = kedro_run(bare_project, *arguments)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line]
    assert [line.split()[0] for line in lines] == ["Error:", "(--traceback"]
    assert arguments[1] in lines[0]


_SESSION = """
import sys
from pathlib import Path
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

bootstrap_project(Path(sys.argv[1]))
with KedroSession.create(sys.argv[1]) as session:
    catalog = session.load_context().catalog
    for name in ("pretrain", "judge"):
        print(name, catalog.load(f"params:{name}").checkpoints)
"""


def test_checkpoints_are_the_projects_in_a_session_from_outside(bare_project: Path, tmp_path: Path) -> None:
    (tmp_path / "session.py").write_text(_SESSION)
    environment = os.environ | {"PYTHONPATH": str(bare_project / "src"), "KEDRO_ENV": ""}
    result = run_warm(("session.py", str(bare_project)), tmp_path, environment, timeout_s=240)
    assert result.returncode == 0, result.stderr[-3000:]
    models = bare_project / "data/06_models"
    lines = result.stdout.splitlines()
    assert {f"{name} {models / name / 'checkpoints'}" for name in ("pretrain", "judge")} <= set(lines)


def log_lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the log without times."""
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in result.stderr.splitlines()]


def test_a_run_logs_alike_in_a_sub_folder(bare_project: Path) -> None:
    picture = bare_project / "cat.png"
    Image.effect_noise((64, 64), 50).save(picture)
    picture.write_bytes(picture.read_bytes()[:-999])  # damaged, which is found when it is decoded
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KEDRO_ENV": ""}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = ("-m", "kedro", "run", "--pipeline", "ingestion", "--params")
    at_root, below = (
        run_warm((*command, f"subject=cat,image={image}"), folder, environment, timeout_s=240)
        for folder, image in ((bare_project, "cat.png"), (bare_project / "notebooks", "../cat.png"))
    )
    assert at_root.returncode == below.returncode == 1
    assert any("[1/1] prepare_reference" in line for line in log_lines(below))
    assert log_lines(below)[-4:] == log_lines(at_root)[-4:]
    assert "UserWarning" not in below.stderr
