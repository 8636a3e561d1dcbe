"""Whole runs of a copy of the project, with a tiny base model, as users start them."""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from project_copy import PROJECT, copy_project
from warm_processes import run_warm

SUBJECT = "button"
_TIMEOUT_S = 600  # a run takes seconds; the machine may be shared


_WATCHED_RUN = """
import json, os, sys, threading
from pathlib import Path
from kedro.framework.cli.utils import find_run_command
from kedro.framework.startup import bootstrap_project

calls, root = set(), str(Path("src/dreamartist_pipeline").resolve()) + "/"

def note(frame, event, _):
    if not frame.f_code.co_filename.startswith(root):  # as most calls
        return
    if frame.f_code.co_name != "<module>" and frame.f_back is not None:
        ends = frame.f_code.co_filename, frame.f_back.f_code.co_filename
        if ends[0] != ends[1] and ends[1].startswith(root):
            called, calling = (end.removeprefix(root).removesuffix(".py").replace("/", ".") for end in ends)
            calls.add((calling, called + ":" + frame.f_code.co_qualname))

bootstrap_project(Path.cwd())
run = find_run_command("dreamartist_pipeline")
from dreamartist_pipeline.backbones import base_model
from dreamartist_pipeline.backbones.families.sd import StableDiffusion

counts = {"loads": 0, "hashes": 0}
load, fingerprint_of = StableDiffusion.load.__func__, base_model.fingerprint_of

def counted_load(cls, source, device, dtype):
    counts["loads"] += device.type != "meta"
    return load(cls, source, device, dtype)

def counted_hash(parts):
    counts["hashes"] += 1
    return fingerprint_of(parts)

StableDiffusion.load, base_model.fingerprint_of = classmethod(counted_load), counted_hash
if os.environ.get("NOTE_CALLS"):
    threading.settrace(note)  # of calls alone, because it returns nothing
    sys.settrace(note)
run(sys.argv[1:], standalone_mode=False)
sys.settrace(None)
Path("calls.json").write_text(json.dumps(sorted(calls)))
Path("counts.json").write_text(json.dumps(counts))
"""
"""Runs `kedro run` and writes counts.json: how often the base model's weights were loaded, and how often they were
hashed; and with NOTE_CALLS, calls.json: [calling module, called module:function] between the project's files."""


def run_python(project: Path, *arguments: str, warm: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in the project, on one thread; `warm`, without importing the large libraries anew."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KEDRO_ENV": ""} | variables
    environment.pop("MLFLOW_TRACKING_URI", None)
    if warm:
        return run_warm(arguments, project, environment, timeout_s=_TIMEOUT_S)
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )


def kedro_run(project: Path, *arguments: str, warm: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `kedro run --env test` in the project."""
    return run_python(project, "-m", "kedro", "run", "--env", "test", *arguments, warm=warm)


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
    folder = copy_project(tmp_path_factory.mktemp("project"), tiny_base_model)
    (folder / "data" / "09_tracking" / "mlflow.db").unlink()  # the first run makes one
    return folder


@pytest.fixture(scope="module")
def trained(project: Path) -> subprocess.CompletedProcess[str]:
    """Train, evaluate and export once (the default pipeline), for all tests that look at the results."""
    return watched_run(project)


def watched_run(project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the default pipeline, see `_WATCHED_RUN`."""
    (project / "watched_run.py").write_text(_WATCHED_RUN)
    arguments = ("--env", "test", "--params", settings(project, **{"training.scoring.every": "1"}))
    result = run_python(project, "watched_run.py", *arguments, **variables)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.mark.usefixtures("trained")
def test_training_evaluation_and_export_leave_every_result_in_the_subjects_folders(project: Path) -> None:
    data = project / "data"
    for file in (
        f"02_intermediate/{SUBJECT}/prepared_image.png",
        f"02_intermediate/{SUBJECT}/prepared_mask.png",
        f"06_models/{SUBJECT}/concept.safetensors",
        f"06_models/{SUBJECT}/steps/1.safetensors",
        f"06_models/{SUBJECT}/steps/2.safetensors",
        f"06_models/{SUBJECT}/training_plan.json",
        f"08_reporting/{SUBJECT}/training_history.csv",
        f"08_reporting/{SUBJECT}/training_curves.json",
        f"08_reporting/{SUBJECT}/training_scores.csv",
        f"08_reporting/{SUBJECT}/reconstruction.png",
        f"08_reporting/{SUBJECT}/contact_sheet.png",
        f"08_reporting/{SUBJECT}/evaluation_metrics.json",
        f"08_reporting/{SUBJECT}/evaluation_table.csv",
        f"08_reporting/{SUBJECT}/report.html",
        f"08_reporting/{SUBJECT}/evaluation_measures.csv",
        f"07_model_output/{SUBJECT}/export/lora/{SUBJECT}-neg.safetensors",
        f"08_reporting/{SUBJECT}/export_report.json",
        f"07_model_output/{SUBJECT}/mlflow/last/MLmodel",
    ):
        assert (data / file).is_file(), file
    made = json.loads((data / "05_model_input" / SUBJECT / "regularization_set.json").read_text())
    assert len(list((data / "05_model_input" / "regularization" / made["key"]).glob("*.png"))) == 2


@pytest.mark.usefixtures("trained")
def test_a_default_run_loads_the_base_model_and_reads_its_weights_once(project: Path) -> None:
    assert json.loads((project / "counts.json").read_text()) == {"loads": 1, "hashes": 1}


@pytest.mark.usefixtures("trained")
def test_the_run_is_recorded_with_its_name_parameters_curves_and_files(project: Path) -> None:
    import mlflow

    run = last_run(project)
    assert run.info.status == "FINISHED"
    assert run.info.run_name.startswith(f"{SUBJECT} · default · ingestion.bucket.side_px=32")
    assert run.info.run_name.endswith("dreamartist-plus-plus")
    assert (run.data.params["steps"], run.data.params["rank.unet.1.negative"]) == ("2", "8")
    assert run.data.params["evaluation.images_per_prompt"] == "2"
    assert "training.words.names.pt1" not in run.data.params  # as in the preset
    measured = json.loads((project / "data/08_reporting" / SUBJECT / "evaluation_metrics.json").read_text())
    assert {"loss/total", "training/guidance_scale", "training/steps_per_second"} <= run.data.metrics.keys()
    assert measured.items() <= run.data.metrics.items()
    assert settings(project) in run.data.tags["command_line"]
    assert run.data.tags["reference_image"] == "48 × 40 → middle 40 × 40 (83 %) → 32 × 32"
    assert "reconstruction/similarity" in run.data.metrics
    client = mlflow.MlflowClient(f"sqlite:///{project}/data/09_tracking/mlflow.db")
    assert {"concept", "configuration.yaml", "evaluation", "export", "report", "training"} <= {
        file.path for file in client.list_artifacts(run.info.run_id)
    }
    assert {"training/previews.png", "training/training_curves.html"} <= {
        file.path for file in client.list_artifacts(run.info.run_id, "training")
    }
    note = run.data.tags["mlflow.note.content"]
    assert f"evaluation/contact_sheet.png&run_uuid={run.info.run_id}" in note
    assert not [tag for tag, value in run.data.tags.items() if " at 0x" in value]


@pytest.mark.usefixtures("trained")
def test_mlflow_models_predict_draws_with_the_registered_concept(project: Path) -> None:
    import mlflow
    from PIL import Image

    store = f"sqlite:///{project}/data/09_tracking/mlflow.db"
    version = mlflow.MlflowClient(store).get_model_version_by_alias(SUBJECT, "last")
    assert version.run_id == last_run(project).info.run_id
    example = f"data/07_model_output/{SUBJECT}/mlflow/last/serving_input_example.json"
    command = ("-m", "mlflow", "models", "predict", "--env-manager", "local")
    variables = {"OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(project / "src")}
    files = ("-m", f"models:/{SUBJECT}@last", "-i", example, "-o", "images.json")
    result = run_warm((*command, *files), project, os.environ | variables, timeout_s=_TIMEOUT_S)
    assert result.returncode == 0, result.stderr[-3000:]
    (row,) = json.loads((project / "images.json").read_text())["predictions"]
    assert row["prompt"] == f"a my-{SUBJECT}, blue background"
    image = Image.open(io.BytesIO(base64.b64decode(row["image"])))
    assert (image.format, image.size) == ("PNG", (32, 32))


@pytest.mark.parametrize(("overlay", "name"), [("sdxl", "sdxl"), pytest.param("sd21", "sd2-v", marks=pytest.mark.slow)])
def test_an_overlay_trains_on_a_folder_of_its_family(
    project: Path, tiny_model: Callable[[str], Path], overlay: str, name: str
) -> None:
    small = {
        "subject": overlay,
        "image": "button.png",
        "base_model": str(tiny_model(name)),
        "prompt_database": "prompts.parquet",
        "device": "cpu",
        "device.dtype": "float32",
        "ingestion.bucket.side_px": "64",
        "prompts.num_prompts": "2",
        "regularization.sampler.num_inference_steps": "2",
        "training.num_steps": "2",
        "training.preview.every": "0",
    }
    given = ",".join(f"{key}={value}" for key, value in small.items())
    result = run_python(project, "-m", "kedro", "run", "--env", overlay, "--pipelines", "train", "--params", given)
    assert result.returncode == 0, result.stderr[-3000:]
    framing = json.loads((project / f"data/02_intermediate/{overlay}/prepared_framing.json").read_text())
    assert framing == {"original_px": [48, 40], "crop_px": [6, 0], "size_px": [64, 64]}  # of 77 × 64
    plan = json.loads((project / f"data/06_models/{overlay}/training_plan.json").read_text())
    networks = {group["name"].split(".")[0] for group in plan["groups"] if group["kind"] == "adapters"}
    assert networks == {"unet", "text_encoder", *(["text_encoder_2"] if overlay == "sdxl" else [])}


def test_the_closing_summary_lists_files_and_commands(
    trained: subprocess.CompletedProcess[str],
) -> None:
    assert f"data/06_models/{SUBJECT}/concept.safetensors" in trained.stdout
    assert "mlflow ui --backend-store-uri sqlite:///data/09_tracking/mlflow.db" in trained.stdout
    assert "kedro viz run" in trained.stdout
    assert "kedro run --pipeline generate" in trained.stdout


def run_folders(project: Path) -> set[Path]:
    output = project / "data" / "07_model_output" / SUBJECT
    return {path for path in output.iterdir() if path.is_dir() and path.name not in ("export", "mlflow")}


@pytest.mark.usefixtures("trained")
def test_every_generate_run_has_a_folder_of_its_own_also_from_a_sub_folder(project: Path) -> None:
    before, prompt = run_folders(project), f"a my-{SUBJECT}, blue background"
    files = {"image": "../button.png", "base_model": "../tiny", "prompt_database": "../prompts.parquet"}
    values = settings(project, **files, **{"generate.prompts": prompt})
    result = kedro_run(project / "data", "--pipeline", "generate", "--params", values)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder,) = run_folders(project) - before
    assert len(list(folder.rglob("*.png"))) == 2
    run = last_run(project)
    assert run.data.params["generate.prompts"] == f"['{prompt}']"
    assert run.data.params["rank.unet.1.negative"] == "8"  # repeated from the training
    assert "mlflow.parentRunId" in run.data.tags
    assert "09_tracking/mlflow.db" in result.stdout and "data/09_tracking" not in result.stdout
    assert f"base_model={project.as_posix()}/tiny" in result.stdout


def test_the_printed_command_draws_new_images(trained: subprocess.CompletedProcess[str], project: Path) -> None:
    before = run_folders(project)
    (line,) = [line for line in trained.stdout.splitlines() if "--pipeline generate" in line]
    program, *arguments = shlex.split(line.strip().removeprefix("new images"))
    assert Path(program).name == "kedro" and shutil.which(program)
    result = run_python(project, "-m", "kedro", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder,) = run_folders(project) - before
    assert len(list(folder.rglob("*.png"))) == 2
    assert last_run(project).data.params["generate.prompts"] == "['a {pt1}, blue background']"


@pytest.mark.slow
@pytest.mark.usefixtures("trained")
def test_a_kept_step_is_drawn_and_another_one_is_refused_with_those_that_are_kept(project: Path) -> None:
    result = kedro_run(project, "--pipeline", "generate", "--params", settings(project, **{"generate.step": "1"}))
    assert result.returncode == 0, result.stderr[-3000:]
    result = kedro_run(project, "--pipeline", "generate", "--params", settings(project, **{"generate.step": "7"}))
    assert result.returncode == 1
    assert "1, 2" in result.stderr and "step" in result.stderr


@pytest.mark.slow
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
    info = json.loads(Image.open(newest).info["dreamartist"])
    assert (info["init_image"]["size_px"], info["init_mask"]["size_px"], info["denoise"]) == ([48, 40], [48, 40], 0.5)
    assert info["strength"] == {"positive": 0.8, "negative": 0.65}
    assert info["sampler"]["scheduler_options"] == {"use_karras_sigmas": True}


@pytest.mark.slow
@pytest.mark.usefixtures("trained")
def test_exported_files_are_imported_drawn_and_trained_from(project: Path) -> None:
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
    assert message.startswith("Error: expected ") and "'re:.*nowhere'" in message
    assert "--traceback" in hint
    run = last_run(project)
    assert (run.info.status, run.data.tags["error"].split(":")[0]) == ("FAILED", "InputError")
    assert concept.read_bytes() == before


# --------------------------------------------------------------------------------------------- layers

LAYERS = (  # from the lowest; each calls those below it
    ("errors", "redaction", "whole_files", "checkpoint_files", "locks", "disk_space", "starting_runs", "decoding"),
    ("object_stores",),
    ("prompt_weights", "schedulers", "layer_selectors", "references", "yaml_texts", "run_facts"),
    ("params",),
    ("early_checks",),
    ("core",),
    ("backbones", "interop", "datasets"),
    ("embedded",),
    ("pipelines",),
    ("hooks", "catalog", "settings", "tracking", "serving", "pipeline_registry", "cli", "__main__"),
)
CALLED_BACK = {  # what is handed down to be called
    "backbones.concepts:_draw_batch.<locals>.<lambda>": "core.sampling",
    "backbones.families.backbone:Backbone.denoise": "core.memory, core.training_step",
    "backbones.prompts:PromptEncoder.encode": "core.training_step",
    "backbones.schedulers:check_sampler.<locals>.<lambda>": "core.sampling",
    "pipelines.evaluation.nodes:evaluate_concept": "core.tracking",
    "pipelines.evaluation.base_images:_draw": "datasets.image_set",
    "pipelines.evaluation.drawing:_draw": "core.processes",
    "pipelines.regularization.nodes:_draw": "datasets.image_set",
    "pipelines.regularization.nodes:_draw_batches": "core.processes",
    "pipelines.ingestion.nodes:prepare_reference": "core.tracking",
    "pipelines.training.rank_training:train_on_rank": "core.processes",
    "pipelines.training.nodes:compare_reconstruction": "core.tracking",
    "pipelines.training.reporting:StepReport.__call__": "core.course",
    "pipelines.training.reporting:Previews.__call__": "core.training",
    "pipelines.training.scoring:Scorer.__call__": "core.training",
    "pipelines.training.scoring:Scorer.kept_in.<locals>.save": "core.course",
    "pipelines.training.nodes:train_concept": "core.tracking",
    "tracking.tracker:MLflowTracker.log_image": "pipelines.evaluation.nodes, pipelines.training.reporting",
    "tracking.tracker:MLflowTracker.log_image_file": "pipelines.training.reporting",
    "tracking.tracker:MLflowTracker.log_metrics": (
        "pipelines.training.reconstruction, pipelines.training.reporting, pipelines.training.scoring"
    ),
    "tracking.tracker:MLflowTracker.run_id": "pipelines.training.resuming",
    "tracking.tracker:MLflowTracker.set_tag": (
        "pipelines.evaluation.nodes, pipelines.ingestion.nodes, pipelines.training.scoring"
    ),
}


def layer_of(module: str) -> int:
    package = module.partition(".")[0]
    return next(height for height, names in enumerate(LAYERS) if package in names)


@pytest.mark.slow  # every call of a function is noted
def test_calls_go_down_the_layers_but_for_named_callbacks(tmp_path: Path, tiny_base_model: Path) -> None:
    project = copy_project(tmp_path / "project", tiny_base_model)
    watched_run(project, NOTE_CALLS="1")
    upward: dict[str, list[str]] = {}
    calls = json.loads((project / "calls.json").read_text())
    for calling, called in calls:
        if layer_of(calling) < layer_of(called.partition(":")[0]):
            upward.setdefault(called, []).append(calling)
    assert len(calls) > 200
    assert {called: ", ".join(callers) for called, callers in upward.items()} == CALLED_BACK


# --------------------------------------------------------------------------------------------- kedro-viz

PICTURES = (
    *("reference_image", "prepared_image", "prepared_mask", "regularization_set", "base_images"),
    *("reconstruction", "contact_sheet", "generated_images", "generated_grid"),
    *("strengths_sheet", "guidance_sheet", "attention_sheet"),
)
DATA = {  # kinds of datasets that load to data, never to something that reads or writes elsewhere
    *("BaseModelDataset", "CaptionDataset", "ConceptDataset", "ConceptStepsDataset", "CSVDataset", "FileFolderDataset"),
    *("HTMLDataset", "ImageDataset"),
    *("ImageRunsDataset", "JSONDataset", "MemoryDataset", "OptionalImageDataset", "PromptDatabaseDataset"),
    *("PageDataset", "ReferenceImageDataset", "ImageSetDataset", "UserFilesDataset", "UserFolderDataset"),
    "UserPicturesDataset",
    *("MetricsHistoryDataset", "SpritePackagesDataset", "SpriteSetDataset", "StartDataset", "PretrainedFolderDataset"),
    *("JudgeDataset", "RegisteredModelDataset"),
}
_SAVE_JSON = """
import json, sys, fsspec
from pathlib import Path
from kedro_viz.api.rest.responses.save_responses import save_api_responses_to_fs
from kedro_viz.server import load_and_populate_data
load_and_populate_data(Path.cwd(), env="test", extra_params=json.loads(sys.argv[1]))
save_api_responses_to_fs("viz", fsspec.filesystem("file"), True)
"""


@pytest.fixture(scope="module")
def viz_nodes(project: Path, trained: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """Return what kedro-viz shows after a run, without hooks as it is started by default: dataset -> its JSON."""
    given = dict(item.split("=") for item in settings(project).split(",") if "ingestion" not in item)
    if not list((project / "data/07_model_output" / SUBJECT).rglob("000_0.png")):
        result = kedro_run(project, "--pipeline", "generate", "--params", settings(project))
        assert result.returncode == 0, result.stderr[-3000:]
    (project / "save_json.py").write_text(_SAVE_JSON)
    result = run_python(project, "save_json.py", json.dumps(given))
    assert result.returncode == 0, result.stderr[-3000:]
    nodes: dict[str, dict[str, Any]] = {}
    for pipeline in ("__default__", "generate", "import", "pretrain", "judge"):
        shown = json.loads((project / "viz/api/pipelines" / pipeline).read_text())
        for node in shown["nodes"]:
            if node["type"] == "data":
                nodes[node["name"]] = node | json.loads((project / "viz/api/nodes" / node["id"]).read_text())
    return nodes


def test_kedro_viz_shows_nothing_but_data(viz_nodes: dict[str, dict[str, Any]]) -> None:
    kinds = {name: node["dataset_type"].rpartition(".")[2].removeprefix("Mlflow") for name, node in viz_nodes.items()}
    assert len(kinds) > 20
    assert {name: kind for name, kind in kinds.items() if kind not in DATA} == {}


@pytest.mark.usefixtures("viz_nodes")
def test_kedro_viz_shows_the_layers_of_every_pipeline(project: Path) -> None:
    """It leaves out those of a pipeline in which data goes back to an earlier one."""
    files = [*(project / "viz/api/pipelines").iterdir()]
    layers = {file.name: json.loads(file.read_text())["layers"] for file in files}
    assert all(layers.values()) and len(layers) > 15
    assert layers["__default__"] == [
        *("raw", "intermediate", "primary", "model_input", "models", "model_output", "reporting")
    ]


@pytest.mark.parametrize("name", PICTURES)
def test_kedro_viz_shows_pictures(viz_nodes: dict[str, dict[str, Any]], name: str) -> None:
    from PIL import Image

    assert viz_nodes[name]["preview_type"] == "ImagePreview"
    shown = Image.open(io.BytesIO(base64.b64decode(viz_nodes[name]["preview"])))
    assert min(shown.size) >= 32


@pytest.mark.slow
def test_the_sample_recipe_pretrains_a_whole_base_model(project: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel

    shutil.copytree(PROJECT / "data/01_raw/sprite_samples", project / "data/01_raw/sprite_samples")
    result = kedro_run(project, "--pipeline", "pretrain", "--params", "base_model=tiny")
    assert result.returncode == 0, result.stderr[-3000:]
    made = project / "data/06_models/pretrain"
    pipeline = StableDiffusionPipeline.from_pretrained(made / "base_model", local_files_only=True)
    towers = CLIPModel.from_pretrained(made / "towers", local_files_only=True)
    assert pipeline.text_encoder.config.hidden_size == towers.config.text_config.hidden_size
    assert (project / "data/08_reporting/pretrain/samples.png").is_file()
    metrics = last_run(project).data.metrics
    assert {"autoencoder/psnr_db", "towers/captions_found", "denoiser/loss"} <= metrics.keys()


def test_an_unknown_recipe_is_refused_with_the_known_ones(project: Path) -> None:
    result = kedro_run(project, "--pipeline", "pretrain", "--params", "recipe=wrld")
    assert result.returncode == 1
    assert "recipe" in result.stderr and "'wrld'" in result.stderr and "'world'" in result.stderr


def test_an_unknown_key_fails_before_the_run(project: Path) -> None:
    result = kedro_run(project, "--pipeline", "train", "--params", "trainign.num_steps=1", warm=False)
    assert result.returncode == 1
    assert "'trainign'" in result.stderr and "'training'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_training_that_cannot_be_exported_fails_before_the_run(project: Path) -> None:
    group = "{lr: 1e-3, rank: 4, timestep_min_rank: 1, layers: ['re:.*attn']}"
    result = kedro_run(project, "--params", settings(project, **{"training.lora_unet": f"[{group}]"}))
    assert result.returncode == 1
    assert "training.lora_unet.0 with timestep_min_rank=1" in result.stderr
    assert "kedro run --pipelines train,evaluate" in result.stderr
    assert "Traceback" not in result.stderr
    assert "check_training" not in result.stdout + result.stderr
