"""An MLflow model of a concept: what is in it, what it draws, and where it finds its base model."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import yaml
from mlflow.exceptions import MlflowException
from PIL import Image

from dreamartist_pipeline.api import save_mlflow_model
from dreamartist_pipeline.backbones.served import ServedConcept
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, GenerateParams, SamplerParams
from dreamartist_pipeline.pipelines.generate.nodes import generate_images
from dreamartist_pipeline.serving.model import VARIABLE
from dreamartist_pipeline.serving.packaging import save_model
from refusals import says

CPU = DeviceParams(device="cpu")


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    return mlflow.pyfunc.load_model(str(model_folder))


def prompts(*texts: str) -> pd.DataFrame:
    return pd.DataFrame({"prompt": texts})


def test_the_images_are_those_of_the_generate_pipeline(model: Any, concept: Concept, tiny_base_model: Path) -> None:
    drawn = model.predict(prompts("a {pt1}", "a red cat"), params={"images_per_prompt": 2, "guidance_scale": 3.0})
    sampler = SamplerParams(num_inference_steps=2, batch_size=3, guidance_scale=3.0)
    params = GenerateParams(prompts=("a {pt1}", "a red cat"), images_per_prompt=2, seed=7, sampler=sampler)
    images, _ = generate_images(str(tiny_base_model), concept, params, CPU)
    assert list(drawn["prompt"]) == ["a my-fox", "a my-fox", "a red cat", "a red cat"]
    assert list(drawn["seed"]) == [7, 8, 7, 8]
    for data, image in zip(drawn["image"], images.values(), strict=True):
        read = Image.open(io.BytesIO(data))
        assert read.format == "PNG" and read.tobytes() == image.tobytes()
        assert read.info["parameters"] == image.info["parameters"]


def test_without_params_the_defaults_of_the_model_are_drawn(model: Any) -> None:
    (drawn,) = model.predict(prompts("a my-fox")).to_dict("records")
    settings = json.loads(Image.open(io.BytesIO(drawn["image"])).info["dreamartist"])
    assert (settings["seed"], settings["sampler"]["num_inference_steps"]) == (7, 2)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("a {pt1}", {"guidance_scale": 0.5}, "guidance_scale"),
        ("a {nosuch}", {}, "nosuch"),
        ("a {pt1}", {"scheduler_options": '{"nosuch": 1}'}, "nosuch"),
        ("a {pt1}", {"num_inference_steps": "many"}, "num_inference_steps"),
    ],
)
def test_a_wrong_option_is_refused_as_a_parameter(
    model: Any, prompt: str, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(MlflowException, match=message) as raised:
        model.predict(prompts(prompt), params=params)
    assert raised.value.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def test_the_model_holds_code_concept_and_base_model_and_no_pickle(model_folder: Path, tiny_base_model: Path) -> None:
    files = {file.relative_to(model_folder).as_posix() for file in model_folder.rglob("*") if file.is_file()}
    assert {"model_code.py", "artifacts/concept.safetensors", "artifacts/tiny/model_index.json"} <= files
    assert not [name for name in files if name.endswith(".pkl")]
    described = yaml.safe_load((model_folder / "MLmodel").read_text())
    assert described["flavors"]["python_function"]["model_code_path"].endswith("model_code.py")
    assert "python_model" not in described["flavors"]["python_function"]
    assert described["flavors"]["python_function"]["config"]["base_model"] == str(tiny_base_model)


def test_signature_example_and_requirements_are_in_the_model(model_folder: Path) -> None:
    model = mlflow.models.Model.load(str(model_folder))
    assert [column.name for column in model.signature.inputs] == ["prompt"]
    assert [column.name for column in model.signature.outputs] == ["prompt", "seed", "image"]
    assert {param.name: param.default for param in model.signature.params.params}["seed"] == 7
    example = json.loads((model_folder / "serving_input_example.json").read_text())
    assert example["dataframe_split"]["data"] == [["a my-fox, blue background"]]
    assert example["params"]["num_inference_steps"] == 2
    lines = (model_folder / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in lines} >= {"dreamartist-pipeline", "mlflow", "torch", "diffusers"}
    assert not [line for line in lines if "+" in line]


def test_a_script_writes_a_model_into_a_new_folder_only(
    concept: Concept, tiny_base_model: Path, tmp_path: Path
) -> None:
    sampler = SamplerParams(scheduler="ddim", num_inference_steps=2)
    save_mlflow_model(tmp_path / "model", concept, tiny_base_model, sampler=sampler, strength="reference")
    (drawn,) = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(prompts("a my-fox")).to_dict("records")
    settings = json.loads(Image.open(io.BytesIO(drawn["image"])).info["dreamartist"])
    assert (settings["sampler"]["scheduler"], settings["strength"]) == ("ddim", {"positive": 0.8, "negative": 0.65})
    with pytest.raises(InputError, check=says(expected="model", got="files")):
        save_mlflow_model(tmp_path / "model", concept, tiny_base_model)


def test_a_copied_base_model_is_not_needed_any_more(
    serve: Callable[..., ServedConcept], tiny_base_model: Path, tmp_path: Path
) -> None:
    elsewhere = Path(shutil.copytree(tiny_base_model, tmp_path / "elsewhere"))
    save_model(serve(elsewhere), tmp_path / "model")
    shutil.rmtree(elsewhere)
    assert len(mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(prompts("a my-fox"))) == 1


def test_a_large_base_model_is_found_by_its_path_or_by_the_variable(
    serve: Callable[..., ServedConcept], tiny_base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Path(shutil.copytree(tiny_base_model, tmp_path / "there"))
    save_model(serve(there, max_copied_mb=0), tmp_path / "model")
    assert not (tmp_path / "model/artifacts/there").exists()
    assert len(mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(prompts("a my-fox"))) == 1
    there.rename(tmp_path / "moved")
    with pytest.raises(InputError, check=says(expected=str(there), got="no such", remedy=VARIABLE)):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "moved"))
    assert len(mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(prompts("a my-fox"))) == 1


def test_a_base_model_with_other_weights_is_refused(
    serve: Callable[..., ServedConcept],
    tiny_base_model: Path,
    other_tiny_base_model: Path,
    tmp_path: Path,
) -> None:
    there = Path(shutil.copytree(tiny_base_model, tmp_path / "there"))
    served = serve(there, max_copied_mb=0)
    save_model(served, tmp_path / "model")
    shutil.rmtree(there)
    shutil.copytree(other_tiny_base_model, there)
    with pytest.raises(InputError, check=says(expected=served.fingerprint, got="other weights", remedy=VARIABLE)):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))


def test_a_path_with_a_secret_is_not_in_the_model(
    serve: Callable[..., ServedConcept], tiny_base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Path(shutil.copytree(tiny_base_model, tmp_path / "abra-cadabra"))
    monkeypatch.setenv("HF_TOKEN", "abra-cadabra")
    save_model(serve(there, max_copied_mb=0), tmp_path / "model")
    texts = [file.read_text(errors="replace") for file in (tmp_path / "model").rglob("*") if file.is_file()]
    assert not [text for text in texts if "abra-cadabra" in text]
