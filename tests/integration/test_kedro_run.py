"""Whole runs of a copy of the project, with a tiny base model, as users start them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SUBJECT = "button"


COUNTED = """
import atexit, sys
from dreamartist_pipeline.backbones import base_model
from dreamartist_pipeline.backbones.families.sd import StableDiffusion
from kedro.framework.cli import main

counts = {"loads": 0, "hashes": 0}
load, fingerprint_of = StableDiffusion.load.__func__, base_model.fingerprint_of

def counted_load(cls, source, device, dtype):
    counts["loads"] += device.type != "meta"
    return load(cls, source, device, dtype)

def counted_hash(parts):
    counts["hashes"] += 1
    return fingerprint_of(parts)

StableDiffusion.load, base_model.fingerprint_of = classmethod(counted_load), counted_hash
atexit.register(lambda: print("COUNTS", counts))
sys.argv = ["kedro", *sys.argv[1:]]
main()
"""


def kedro_run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `kedro run --env test` on one thread; the last line of its output counts how a base model was read."""
    command = [sys.executable, "-c", COUNTED, "run", "--env", "test", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KEDRO_ENV": ""}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def settings(project: Path, **others: str) -> str:
    """Return the --params that every run of this test needs."""
    given = {"subject": SUBJECT, "image": "button.png", "base_model": "tiny", "prompt_database": "prompts.parquet"}
    sizes = {"ingestion.bucket.side_px": "32", "ingestion.bucket.multiple_px": "8"}
    return ",".join(f"{name}={value}" for name, value in (given | sizes | others).items())


def last_run(project: Path) -> Any:
    """Return the newest MLflow run."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project}/data/09_tracking/mlflow.db")
    experiment = client.get_experiment_by_name("dreamartist")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])[0]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_model: Path) -> Path:
    """Return a copy of the project with a picture, prompts and a tiny base model of its own."""
    import pandas as pd
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("project")
    for name in ("conf", "src"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.rmtree(folder / "conf" / "local")
    (folder / "conf" / "local").mkdir()
    for name in ("pyproject.toml", ".telemetry"):
        shutil.copy(PROJECT / name, folder)
    (folder / "data" / "09_tracking").mkdir(parents=True)
    shutil.copytree(tiny_base_model, folder / "tiny")
    picture = Image.new("RGB", (48, 40), "white")
    ImageDraw.Draw(picture).ellipse((8, 4, 40, 36), fill="red")
    picture.save(folder / "button.png")
    pd.DataFrame({"prompt": ["a red cat", "a blue dog", "a green bird"]}).to_parquet(folder / "prompts.parquet")
    return folder


@pytest.fixture(scope="module")
def trained(project: Path) -> subprocess.CompletedProcess[str]:
    """Train, evaluate and export once (the default pipeline), for all tests that look at the results."""
    result = kedro_run(project, "--params", settings(project))
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.mark.usefixtures("trained")
def test_training_evaluation_and_export_leave_every_result_in_the_subjects_folders(project: Path) -> None:
    data = project / "data"
    for file in (
        f"02_intermediate/{SUBJECT}/prepared_image.png",
        f"02_intermediate/{SUBJECT}/prepared_mask.png",
        f"06_models/{SUBJECT}/concept.safetensors",
        f"06_models/{SUBJECT}/training_plan.json",
        f"08_reporting/{SUBJECT}/training_history.csv",
        f"08_reporting/{SUBJECT}/training_curves.json",
        f"08_reporting/{SUBJECT}/contact_sheet.png",
        f"08_reporting/{SUBJECT}/evaluation_metrics.json",
        f"08_reporting/{SUBJECT}/evaluation_table.csv",
        f"07_model_output/{SUBJECT}/export/lora/{SUBJECT}-neg.safetensors",
        f"08_reporting/{SUBJECT}/export_report.json",
    ):
        assert (data / file).is_file(), file
    made = json.loads((data / "05_model_input" / SUBJECT / "regularization_set.json").read_text())
    assert len(list((data / "05_model_input" / "regularization" / made["key"]).glob("*.png"))) == 2


def test_a_default_run_loads_the_base_model_and_reads_its_weights_once(
    trained: subprocess.CompletedProcess[str],
) -> None:
    assert "COUNTS {'loads': 1, 'hashes': 1}" in trained.stdout


@pytest.mark.usefixtures("trained")
def test_the_run_is_recorded_with_its_name_parameters_curves_and_files(project: Path) -> None:
    import mlflow

    run = last_run(project)
    assert run.info.status == "FINISHED"
    assert run.info.run_name.startswith(f"{SUBJECT} · default · dreamartist-plus-plus · ingestion.bucket.side_px=32")
    assert run.data.params["training.lora_unet.1.branch"] == "n"
    assert run.data.params["training.words.names.pt1"] == f"['my-{SUBJECT}', 'my-{SUBJECT}-neg']"
    assert {"loss", "guidance_scale"} <= run.data.metrics.keys()
    assert run.data.tags["command_line"].endswith(settings(project))
    client = mlflow.MlflowClient(f"sqlite:///{project}/data/09_tracking/mlflow.db")
    assert {"concept", "evaluation", "export", "training"} <= {
        file.path for file in client.list_artifacts(run.info.run_id)
    }


def test_the_closing_summary_says_where_everything_is_and_how_to_look(
    trained: subprocess.CompletedProcess[str],
) -> None:
    assert f"data/06_models/{SUBJECT}/concept.safetensors" in trained.stdout
    assert "mlflow ui --backend-store-uri sqlite:///data/09_tracking/mlflow.db" in trained.stdout
    assert "kedro viz run" in trained.stdout
    assert "kedro run --pipeline generate" in trained.stdout


@pytest.mark.usefixtures("trained")
def test_every_generate_run_has_a_folder_of_its_own(project: Path) -> None:
    prompt = f"a my-{SUBJECT}, blue background"
    result = kedro_run(project, "--pipeline", "generate", "--params", settings(project, **{"generate.prompts": prompt}))
    assert result.returncode == 0, result.stderr[-3000:]
    output = project / "data" / "07_model_output" / SUBJECT
    (folder,) = [path for path in output.iterdir() if path.is_dir() and path.name != "export"]
    assert len(list(folder.rglob("*.png"))) == 2
    assert last_run(project).data.params["generate.prompts"] == f"['{prompt}']"


@pytest.mark.usefixtures("trained")
def test_a_part_of_a_picture_is_drawn_anew_from_the_command_line(project: Path) -> None:
    from PIL import Image

    mask = Image.new("L", (48, 40))
    mask.paste(255, (24, 0, 48, 40))
    mask.save(project / "mask.png")
    values = {
        "init_image": "button.png",
        "init_mask": "mask.png",
        "generate.denoise": "0.5",
        "generate.strength": "reference",
        "generate.sampler.scheduler": "HeunDiscreteScheduler",
        "generate.sampler.scheduler_options.use_karras_sigmas": "true",
    }
    result = kedro_run(project, "--pipeline", "generate", "--params", settings(project, **values))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Adapter strengths: 0.8 positive, 0.65 negative." in result.stdout + result.stderr
    newest = max((project / "data" / "07_model_output" / SUBJECT).rglob("000_0.png"), key=lambda f: f.stat().st_mtime)
    said = json.loads(Image.open(newest).info["dreamartist"])
    assert (said["init_image"]["size_px"], said["init_mask"]["size_px"], said["denoise"]) == ([48, 40], [48, 40], 0.5)
    assert said["strength"] == {"positive": 0.8, "negative": 0.65}
    assert said["sampler"]["scheduler_options"] == {"use_karras_sigmas": True}


@pytest.mark.usefixtures("trained")
def test_exported_files_become_a_concept_again_which_draws_and_is_a_trainings_start(project: Path) -> None:
    export = f"data/07_model_output/{SUBJECT}/export"
    files = {
        "import.positive": f"{export}/lora/{SUBJECT}.safetensors",
        "import.negative": f"{export}/lora/{SUBJECT}-neg.safetensors",
        "import.words.pt1": f"[{export}/toolkit/my-{SUBJECT}.pt, {export}/toolkit/my-{SUBJECT}-neg.pt]",
    }
    params = f"subject=again,base_model=tiny,{','.join(f'{name}={value}' for name, value in files.items())}"
    result = kedro_run(project, "--pipeline", "import", "--params", params)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((project / "data/08_reporting/again/import_report.json").read_text())
    assert [word["name"] for word in report["words"]] == [f"my-{SUBJECT}", f"my-{SUBJECT}-neg"]
    assert last_run(project).info.run_name.startswith("again · import")

    result = kedro_run(project, "--pipeline", "generate", "--params", "subject=again,base_model=tiny")
    assert result.returncode == 0, result.stderr[-3000:]
    others = {
        "subject": "trained-on",
        "training.start_from": "data/06_models/again/concept.safetensors",
        "training.words.names.pt1": f"[my-{SUBJECT}, my-{SUBJECT}-neg]",
    }
    check = ("--pipeline", "train", "--nodes", "check_training")
    result = kedro_run(project, *check, "--params", settings(project, **others))
    assert result.returncode == 0, result.stderr[-3000:]
    plan = json.loads((project / "data/06_models/trained-on/training_plan.json").read_text())
    assert plan["start"]["taken_over"]["words.positive.pt1"] == 3


@pytest.mark.usefixtures("trained")
def test_a_failed_run_is_marked_with_its_reason_and_leaves_earlier_results_alone(project: Path) -> None:
    concept = project / "data" / "06_models" / SUBJECT / "concept.safetensors"
    before = concept.read_bytes()
    layers = "[{lr: 1e-3, rank: 4, branch: p, layers: ['re:.*nowhere']}]"
    result = kedro_run(project, "--params", settings(project, **{"training.lora_unet": layers}))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    message, hint = result.stderr.splitlines()[-2:]
    assert message.startswith("Error: expected a selector that matches")
    assert hint == "(--traceback shows where it was raised)"
    run = last_run(project)
    assert (run.info.status, run.data.tags["error"].split(":")[0]) == ("FAILED", "InputError")
    assert concept.read_bytes() == before


def test_the_sample_recipe_pretrains_a_whole_base_model_and_says_what_it_is(project: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel

    shutil.copytree(PROJECT / "data/01_raw/sprite_samples", project / "data/01_raw/sprite_samples")
    result = kedro_run(project, "--pipeline", "pretrain")
    assert result.returncode == 0, result.stderr[-3000:]
    made = project / "data/06_models/pretrain"
    pipeline = StableDiffusionPipeline.from_pretrained(made / "base_model", local_files_only=True)
    towers = CLIPModel.from_pretrained(made / "towers", local_files_only=True)
    assert pipeline.text_encoder.config.hidden_size == towers.config.text_config.hidden_size
    assert (project / "data/08_reporting/pretrain/samples.png").is_file()
    metrics = last_run(project).data.metrics
    assert {"autoencoder/psnr_db", "towers/captions_found", "denoiser/loss"} <= metrics.keys()


def test_an_unknown_recipe_is_refused_with_the_known_ones(project: Path) -> None:
    result = kedro_run(project, "--pipeline", "pretrain", "--params", "recipe=ful")
    assert result.returncode == 1
    assert "expected a recipe out of cpu, full, sample; got 'ful'; did you mean 'full'?" in result.stderr


def test_an_unknown_key_ends_before_anything_is_opened(project: Path) -> None:
    result = kedro_run(project, "--pipeline", "train", "--params", "trainign.num_steps=1")
    assert result.returncode == 1
    assert "got 'trainign' from --params; did you mean 'training'?" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_cannot_be_exported_ends_before_anything_is_trained(project: Path) -> None:
    group = "{lr: 1e-3, rank: 4, timestep_min_rank: 1, layers: ['re:.*attn']}"
    result = kedro_run(project, "--params", f"training.lora_unet=[{group}]")
    assert result.returncode == 1
    assert "got training.lora_unet.0 with timestep_min_rank=1, which kohya, peft, toolkit" in result.stderr
    assert "kedro run --pipelines train,evaluate" in result.stderr
    assert "Traceback" not in result.stderr
    assert "check_training" not in result.stdout + result.stderr
