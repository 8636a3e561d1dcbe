"""The pipelines by name, and that listing them is quick."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dreamartist_pipeline.params import SECTIONS
from dreamartist_pipeline.pipeline_registry import register_pipelines

PROJECT = Path(__file__).resolve().parents[1]


def test_every_stage_and_every_chain_has_its_name() -> None:
    assert set(register_pipelines()) == {
        *("ingestion", "prompts", "regularization", "training", "train", "evaluation", "evaluate", "report"),
        *(
            "export",
            "register",
            "generate",
            "import",
            "pretrain",
            "judge",
            "compare",
            "tune",
            "personalize",
            "sweep",
            "__default__",
        ),
    }


def test_train_is_the_four_stages_and_the_default_evaluates_exports_and_registers_as_well() -> None:
    pipelines = register_pipelines()
    stages = [pipelines[name] for name in ("ingestion", "prompts", "regularization", "training")]
    assert set(pipelines["train"].nodes) == {node for stage in stages for node in stage.nodes}
    assert set(pipelines["__default__"].nodes) == {
        node for name in ("train", "evaluate", "export", "register") for node in pipelines[name].nodes
    }


@pytest.mark.parametrize("check", ["check_training", "prepare_reference", "draw_regularization_prompts"])
def test_everything_a_user_gives_is_checked_before_images_are_drawn(check: str) -> None:
    names = [node.name for node in register_pipelines()["train"].nodes]
    assert names.index(check) < names.index("make_regularization_set")


@pytest.mark.parametrize(
    "name",
    [
        *("train", "evaluate", "report", "export", "register", "generate", "import", "pretrain", "judge"),
        *("compare", "tune", "personalize", "sweep"),
    ],
)
def test_every_dataset_of_a_pipeline_is_in_the_catalog(name: str) -> None:
    in_catalog: set[str] = set()
    for file in (PROJECT / "conf" / "base").glob("catalog*.yml"):
        in_catalog |= yaml.safe_load(file.read_text()).keys()
    datasets = {name for name in register_pipelines()[name].datasets() if not name.startswith("params:")}
    assert datasets <= in_catalog


def test_every_parameter_of_a_node_is_a_section_of_the_schema() -> None:
    inputs = {name for pipeline in register_pipelines().values() for name in pipeline.inputs()}
    sections = {name.removeprefix("params:").split(".")[0] for name in inputs if name.startswith("params:")}
    assert sections == set(SECTIONS)


def test_registering_the_pipelines_imports_no_heavy_library_and_using_one_prints_no_remark() -> None:
    code = (
        "import sys; from dreamartist_pipeline import settings, cli; "
        "from dreamartist_pipeline.pipeline_registry import register_pipelines; register_pipelines(); "
        "print(sorted({'torch', 'diffusers', 'transformers', 'mlflow'} & sys.modules.keys())); "
        "import dreamartist_pipeline.backbones; from transformers import CLIPImageProcessor"  # of PIL
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
