"""Whole configurations of the reference toolkit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.toolkit_config import ImportedConfig
from dreamartist_pipeline.params import DeviceParams, IngestionParams, TrainingParams
from refusals import says

Import = Callable[..., ImportedConfig]
AsRun = Callable[[ImportedConfig], TrainingParams]
TUTORIAL = Path(__file__).with_name("tutorial.yaml").read_text(encoding="utf-8")
FULL = Path(__file__).with_name("full.yaml").read_text(encoding="utf-8")


def test_the_result_is_valid(imported: ImportedConfig) -> None:
    TrainingParams.model_validate({**imported.parameters["training"]})
    IngestionParams.model_validate(imported.parameters["ingestion"])
    DeviceParams.model_validate(imported.parameters["device"])


def test_objective_and_data_sets_are_carried_over(imported: ImportedConfig) -> None:
    training = imported.parameters["training"]
    assert training["guidance_scale"] == "1.0-3.0:cos"
    assert training["loss"] == {"weighting": "min_snr", "snr_gamma": 2.0, "regularization_weight": 0.5}
    assert (training["batch_size"], training["regularization_batch_size"]) == (4, 1)
    assert imported.parameters["ingestion"]["bucket"] == {"side_px": 512, "multiple_px": 64, "keep_aspect": True}
    assert imported.parameters["device"] == {"dtype": "float16"}
    assert imported.settings == {"method": "toolkit", "base_model": "hub:owner/model"}


@pytest.mark.parametrize(
    ("text", "expected", "got"),
    [
        ("a: [", "YAML file", "syntax error"),
        ("- 1", "YAML mapping", ""),
        ("data: {batch_size: 4}\nunet: [{lr: 1e-6}]", "lora_unet", "data, unet"),
        ("lora_unet: []", "'data'", "none"),
        ("lora_unet: [{layers: [a]}]\ndata: {batch_size: many}", "data.batch_size", "'many'"),
        ("data: {batch_size: 4}\ntokenizer_pt: {train: [{name: a}]}\nword_names: {}", "lora_unet", "tokenizer_pt"),
        (FULL.replace("lr: 0.003", "name2: x"), "lr", "pt-dog"),
        ("_base_: me.yaml", "cycle", "'me.yaml'"),
    ],
)
def test_other_files_are_refused(imported_from: Import, text: str, expected: str, got: str) -> None:
    with pytest.raises(InputError, check=says(expected=expected, got=got)):
        imported_from(text, me_yaml="_base_: me.yaml")


def test_the_tutorial_trains_both_branches_and_names_its_defaults(imported_from: Import, as_run: AsRun) -> None:
    imported = imported_from(TUTORIAL)
    params = as_run(imported)
    assert params.words.names == {"pt1": ("my-cat", "my-cat-neg")}
    assert (params.num_branches, str(params.guidance_scale)) == (2, "3.0")
    assert (params.batch_size, params.regularization_batch_size) == (4, 1)
    assert {
        "data.batch_size",
        "data_class.batch_size",
        "tokenizer_pt.train",
        "train.cfg_scale",
        "train.scale_lr",
    } <= set(imported.left_out)
    assert imported.left_out["data.batch_size"].startswith("not given: 4")


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("seed: soon\n", "training.seed:", "'soon'"),
        ("train: {max_grad_norm: 0}\n", "training.max_grad_norm:", "0"),
        ("train: {cfg_scale: fast}\n", "training.guidance_scale:", "'fast'"),
    ],
)
def test_invalid_values_are_refused(imported_from: Import, text: str, option: str, value: str) -> None:
    with pytest.raises(InputError, check=says(got=option)) as error:
        imported_from(TUTORIAL + text)
    assert f"(got {value})" in error.value.got


def test_a_relative_folder_is_not_a_hub_id(imported_from: Import) -> None:
    text = TUTORIAL + "model: {pretrained_model_name_or_path: ./models}\n"
    assert imported_from(text).settings["base_model"] == "./models"
