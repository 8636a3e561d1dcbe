"""The notebooks run from top to bottom in a kernel, in a copy of the project with a tiny base model."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image

from project_copy import PROJECT, copy_project
from warm_processes import warm_children, warm_python

FIRST, SECOND, THIRD = "01_first_concept.ipynb", "02_compare_runs.ipynb", "03_inside_the_branches.ipynb"
PNG, PLOTLY, HTML, MARKDOWN = "image/png", "application/vnd.plotly.v1+json", "text/html", "text/markdown"
NUM_STEPS, SEEDS = 3, [0, 1]
SIMILARITY = "similarity/concept.efficientnet-lite0"
DRAWN = {"by_prompt": 3, "by_scale": 4, "by_negative": 3}  # variable of the first notebook -> its rows of pictures


def read(name: str) -> NotebookNode:
    """Return a notebook as it is in the project."""
    return nbformat.read(PROJECT / "notebooks" / name, as_version=4)


def prepare(project: Path, name: str, result: str = "None", **settings: Any) -> NotebookNode:
    """Return the code of a notebook, to run in a copy of the project.

    Args:
        project: a copy of the project.
        name: the notebook's file.
        result: an expression; its value as JSON is the text of the last cell.
        settings: values in place of those in the cell that is tagged `parameters`.
    """
    notebook = nbformat.read(project / "notebooks" / name, as_version=4)
    parameters, *others = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert parameters.metadata["tags"] == ["parameters"]
    given = "\n".join(f"{key} = {value!r}" for key, value in settings.items())
    own = [nbformat.v4.new_code_cell(code) for code in (given, f"import json\nprint(json.dumps({result}))")]
    notebook.cells = [parameters, own[0], *others, own[1]]
    return notebook


def run(project: Path, notebook: NotebookNode) -> None:
    """Run a notebook in a kernel of this Python; its cells get their outputs, also if one fails.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))  # no kernel of another Python
    kernel.kernel_spec.argv = [warm_python(), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    client = NotebookClient(
        notebook, km=kernel, timeout=600, resources={"metadata": {"path": str(project / "notebooks")}}
    )
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(project / "src"), "IPYTHONDIR": str(project / "ipython")}
    not_ours = ("KEDRO_ENV", "MLFLOW_TRACKING_URI")  # the copy has its own
    given = {name: value for name, value in os.environ.items() if name not in not_ours}
    client.execute(cleanup_kc=True, env=given | ours | warm_children())  # without it, a kernel that is given stays


def execute(project: Path, name: str, result: str = "None", **settings: Any) -> NotebookNode:
    """Return a notebook after running it; for the arguments see `prepare`."""
    notebook = prepare(project, name, result, **settings)
    run(project, notebook)
    return notebook


def shown(notebook: NotebookNode, kind: str) -> list[Any]:
    """Return everything of one MIME type that the cells show."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def printed(cell: NotebookNode) -> str:
    """Return what a cell prints."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def pictures(notebook: NotebookNode) -> list[Image.Image]:
    """Return every picture that the cells show, by itself or within HTML."""
    within = re.findall(r'src="data:image/png;base64,([^"]+)"', "".join(shown(notebook, HTML)))
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in [*shown(notebook, PNG), *within]]


def same(first: Image.Image, second: Image.Image) -> bool:
    """Return whether two pictures agree in every pixel."""
    return np.array_equal(first.convert("RGB"), second.convert("RGB"))


def make_project(folder: Path, base_model: Path) -> Path:
    """Return a copy of the project whose local configuration makes everything tiny."""
    copy_project(folder, base_model)
    pictures = folder / "data" / "01_raw" / "reference_images"
    pictures.mkdir(parents=True)
    for name in ("fox.png", "fox.txt"):
        shutil.copy(PROJECT / "data/01_raw/reference_images" / name, pictures)
    local = folder / "conf" / "local"
    (local / "globals.yml").write_text("prompt_database: prompts.parquet\n")
    sizes = "\ningestion: {bucket: {side_px: 32, multiple_px: 8}}\n"
    (local / "parameters.yml").write_text((folder / "conf/test/parameters.yml").read_text() + sizes)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_model: Path) -> Path:
    """Return the project in which the first notebook runs."""
    return make_project(tmp_path_factory.mktemp("project"), tiny_base_model)


@pytest.fixture(scope="module")
def first(project: Path) -> NotebookNode:
    """Return the first notebook, executed."""
    drawn = ", ".join(f"'{name}': {name}" for name in DRAWN)
    distinct = f"{{name: len({{i.tobytes() for row in rows for i in row}}) for name, rows in {{{drawn}}}.items()}}"
    return execute(project, FIRST, result=distinct, BASE_MODEL="tiny", NUM_STEPS=NUM_STEPS, SEEDS=SEEDS)


@pytest.mark.parametrize("name", sorted(path.name for path in (PROJECT / "notebooks").glob("*.ipynb")))
def test_a_notebook_is_kept_without_outputs(name: str) -> None:
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)


# ------------------------------------------------------------------------------------------- the first concept


def test_the_first_notebook_trains_and_evaluates_a_concept(project: Path, first: NotebookNode) -> None:
    assert (project / "data/06_models/fox/concept.safetensors").is_file()
    client, experiment = open_store(project)
    (run,) = client.search_runs([experiment])
    assert len(client.get_metric_history(run.info.run_id, "loss/total")) == NUM_STEPS
    assert SIMILARITY in run.data.metrics


def test_the_first_notebook_shows_the_picture_the_curves_and_the_contact_sheet(
    project: Path, first: NotebookNode
) -> None:
    picture, sheet, *_ = pictures(first)
    assert same(picture, Image.open(project / "data/01_raw/reference_images/fox.png"))
    assert same(sheet, Image.open(project / "data/08_reporting/fox/contact_sheet.png"))
    (curves,) = shown(first, PLOTLY)
    assert {len(trace["x"]) for trace in curves["data"]} == {NUM_STEPS}


def test_the_first_notebook_draws_by_prompt_by_guidance_and_by_the_negative_branch(
    first: NotebookNode,
) -> None:
    assert len(pictures(first)) == 5
    assert json.loads(printed(first.cells[-1])) == {name: rows * len(SEEDS) for name, rows in DRAWN.items()}


def test_the_first_notebook_keeps_a_picture_with_its_settings(project: Path, first: NotebookNode) -> None:
    kept = Image.open(project / "data/07_model_output/fox/my_picture.png")
    assert "my-fox" in kept.info["parameters"]


# ------------------------------------------------------------------------------------------- comparing runs


def open_store(project: Path) -> tuple[Any, str]:
    """Return a client of the project's MLflow store, and the id of its experiment."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project}/data/09_tracking/mlflow.db")
    return client, client.get_experiment_by_name("dreamartist").experiment_id


def add_training(project: Path, method: str, subject: str = "fox") -> str:
    """Record a training of seven steps and return its id."""
    client, experiment = open_store(project)
    run = client.create_run(experiment, tags={"subject": subject, "method": method}).info.run_id
    client.log_param(run, "steps", "7")
    client.log_metric(run, "loss/total", 0.5)
    client.set_terminated(run)
    return run


def add_evaluation(project: Path, training: str, similarity: float, sheet: Image.Image) -> None:
    """Record an evaluation as the child run of a training."""
    client, experiment = open_store(project)
    run = client.create_run(experiment, tags={"mlflow.parentRunId": training}).info.run_id
    client.log_metric(run, SIMILARITY, similarity)
    client.log_metric(run, "prior_drift/pixels", 0.25)
    client.log_image(run, sheet, "evaluation/contact_sheet.png")
    client.set_terminated(run)


def test_the_second_notebook_says_what_to_do_without_a_training(tmp_path: Path, tiny_base_model: Path) -> None:
    notebook = execute(make_project(tmp_path, tiny_base_model), SECOND)
    assert any("kedro run --pipelines train,evaluate" in text for text in shown(notebook, MARKDOWN))
    assert not shown(notebook, PLOTLY) + pictures(notebook)


@pytest.mark.usefixtures("first")
def test_the_second_notebook_shows_a_single_training_and_how_to_make_another(project: Path) -> None:
    notebook = execute(project, SECOND)
    assert any("method=lora" in text for text in shown(notebook, MARKDOWN))
    tables = shown(notebook, HTML)
    assert any("<th>steps</th>" in table for table in tables)
    assert any(SIMILARITY in table for table in tables)
    loss, results = shown(notebook, PLOTLY)
    assert [len(loss["data"]), len(results["data"])] == [1, 1]
    (sheet,) = pictures(notebook)
    assert same(sheet, Image.open(project / "data/08_reporting/fox/contact_sheet.png"))


@pytest.mark.usefixtures("first")
def test_the_second_notebook_compares_trainings_with_evaluations_in_the_same_and_in_a_child_run(
    project: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    sheet = Image.new("RGB", (40, 30), "red")
    add_evaluation(copy, add_training(copy, "lora"), 0.125, sheet)
    add_training(copy, "tutorial", subject="owl")
    add_training(copy, "toolkit")
    compared = f"[parameters['steps'].to_dict(), results['{SIMILARITY}'].to_dict()]"
    notebook = execute(copy, SECOND, result=compared, SUBJECT="fox")
    names = ["1 · fox · dreamartist-plus-plus", "2 · fox · lora", "3 · fox · toolkit"]
    steps, similarity = json.loads(printed(notebook.cells[-1]))
    assert steps == dict(zip(names, [str(NUM_STEPS), "7", "7"], strict=True))
    assert list(similarity) == names[:2]
    assert similarity[names[1]] == 0.125
    assert [text for text in shown(notebook, MARKDOWN) if "not evaluated" in text and names[2] in text]
    loss, results = shown(notebook, PLOTLY)
    assert [trace["name"] for trace in loss["data"]] == names
    assert [trace["name"] for trace in results["data"]] == names[:2]
    _, child = pictures(notebook)
    assert same(child, sheet)


# ------------------------------------------------------------------------------------------- inside the branches


@pytest.mark.usefixtures("first")
def test_the_third_notebook_says_what_to_do_without_a_concept(project: Path) -> None:
    notebook = prepare(project, THIRD, SUBJECT="owl")
    with pytest.raises(CellExecutionError, match="the message above"):
        run(project, notebook)
    (hint,) = shown(notebook, MARKDOWN)
    assert "kedro run --pipelines train,evaluate --params subject=owl" in hint
    assert "There are: fox" in hint


@pytest.mark.usefixtures("first")
def test_the_third_notebook_shows_adapters_strengths_attention_layers_and_words(project: Path) -> None:
    found = (
        "{'pictures': [len({i.tobytes() for row in rows for i in row}) for rows in (by_adapter, by_strength)], "
        "'columns': [name.partition(':')[0] for name in columns], 'changes': sorted(adapters['change'])[:1], "
        "'known': list(known)[0], 'distances': distances.tolist(), 'learned': list(learned)}"
    )
    few = {"SEEDS": [0, 1], "STRENGTHS": [0.0, 1.0], "NUM_STEPS": 2}
    notebook = execute(project, THIRD, result=found, BASE_MODEL="tiny", **few)
    assert len(pictures(notebook)) == 3
    result = json.loads(printed(notebook.cells[-1]))
    assert result["pictures"] == [5 * 2, 2 * 2]
    assert result["columns"] == ["picture", "positive", "negative"]
    assert result["changes"][0] > 0
    assert result["known"] == "fox"
    assert result["distances"][0][0] == pytest.approx(0, abs=1e-6)
    assert [len(row) for row in result["distances"]] == [1 + len(result["learned"])] * len(result["distances"])
    assert result["learned"] == [*(f"my-fox {n}" for n in (1, 2, 3)), *(f"my-fox-neg {n}" for n in range(1, 7))]
    *maps, distances = shown(notebook, PLOTLY)
    titles = {figure["layout"]["title"]["text"] for figure in maps}
    assert titles == {
        f"{network}, {b} adapter" for network in ("unet", "text_encoder") for b in ("positive", "negative")
    }
    assert "fox" in distances["layout"]["title"]["text"]
