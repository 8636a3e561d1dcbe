"""What a run leaves in MLflow: its parameters, its parent, its description."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Pipeline, node

from dreamartist_pipeline.core.concept import Concept, ConceptMetadata
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.datasets.image import CaptionDataset, ReferenceImageDataset
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.hooks import RunRecordHooks
from dreamartist_pipeline.hooks.opening import continued_run
from dreamartist_pipeline.hooks.parameters import recorded_parameters, repeated_parameters
from dreamartist_pipeline.hooks.record import close_run
from dreamartist_pipeline.hooks.story import run_that_made, with_sections
from dreamartist_pipeline.params import GenerateParams, Params, PretrainParams, ResolvedGroup, TrainingParams
from dreamartist_pipeline.starting_runs import PARENT_RUN
from refusals import says
from tracking_stores import tracking_uri

GROUP = {"lr": 1e-3, "rank": 4, "layers": ["re:.*attn"]}
SETTINGS = {"subject": "cat", "method": "lora", "base_model": "tiny", "recipe": "world"}
CONCEPT = ConceptMetadata(
    base_model="tiny",
    base_model_fingerprint="sha256:0123",
    num_branches=2,
    num_steps=3,
    words={},
    num_vectors=(3, 6),
    lora={"unet": (ResolvedGroup(**GROUP, name="unet.0.positive"),)},
)


def training(**changes: Any) -> TrainingParams:
    groups = [GROUP | {"branch": "p"}, GROUP | {"branch": "n", "rank": 2}]
    return TrainingParams.model_validate({"num_steps": 400, "lora_unet": groups, **changes})


# ------------------------------------------------------------------------------------------------- parameters


def test_a_training_has_a_fixed_list_of_parameters_and_what_differs_from_the_preset() -> None:
    sections = {"training": training(num_steps=10, loss={"snr_gamma": 3.0}, words={"names": {"pt1": ["a", "b"]}})}
    assert recorded_parameters(SETTINGS, sections, {"training": training(words={"names": {"pt1": ["a", "b"]}})}) == {
        "subject": "cat",
        "base_model": "tiny",
        "method": "lora",
        "steps": "10",
        "guidance_scale": "3.0",
        "seed": "0",
        "lr.words": "0.0025",
        "rank.unet.0.positive": "4",
        "lr.unet.0.positive": "0.001",
        "rank.unet.1.negative": "2",
        "lr.unet.1.negative": "0.001",
        "training.loss.snr_gamma": "3.0",
    }


def test_without_a_negative_branch_the_groups_are_shared_as_in_the_concept() -> None:
    sections = {"training": training(guidance_scale=1.0, lora_unet=[GROUP | {"branch": "p"}])}
    assert recorded_parameters(SETTINGS, sections, sections)["rank.unet.0.shared"] == "4"


def test_other_runs_have_no_method_and_only_what_differs() -> None:
    sections: dict[str, Params] = {"generate": GenerateParams(prompts=("a cat",), seed=3)}
    presets: dict[str, Params] = {"generate": GenerateParams(prompts=("a {pt1}",), seed=3)}
    assert recorded_parameters(SETTINGS, sections, presets) == {
        "subject": "cat",
        "base_model": "tiny",
        "generate.prompts": "['a cat']",
    }


def test_a_pretraining_is_named_by_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"pretrain": PretrainParams.model_construct()}
    monkeypatch.setattr(PretrainParams, "model_dump", lambda *_, **__: {})
    assert recorded_parameters(SETTINGS, sections, sections)["recipe"] == "world"


def test_a_long_value_is_cut_at_the_limit_of_mlflow() -> None:
    sections = {"generate": GenerateParams(prompts=("a " * 9000,))}
    presets = {"generate": GenerateParams(prompts=("a",))}
    assert len(recorded_parameters(SETTINGS, sections, presets)["generate.prompts"]) == 6000


def test_a_run_of_a_concept_repeats_the_parameters_of_its_training_but_not_those_of_its_own_sections() -> None:
    of_training = {"steps": "400", "method": "lora", "device.dtype": "float16", "base_model": "tiny"}
    own = {"base_model": "other", "evaluation.seed": "1"}
    assert repeated_parameters(of_training, own, {"device", "evaluation"}) == {
        "steps": "400",
        "method": "lora",
        "base_model": "other",
        "evaluation.seed": "1",
    }


# ------------------------------------------------------------------------------------------------- runs


class FixedPresets(dict[str, Any]):
    """A configuration loader that has these sections as presets."""

    def presets(self, _: Mapping[str, Any], sections: Collection[str]) -> dict[str, Any]:
        return {name: self[name] for name in sections}


@pytest.fixture(scope="module")
def _store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tracking_uri(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"):
        yield


@pytest.fixture
def experiment(_store: None, tmp_path: Path) -> str:
    import mlflow

    return mlflow.create_experiment(tmp_path.name, artifact_location=(tmp_path / "artifacts").as_uri())


@pytest.fixture
def catalog(tmp_path: Path) -> DataCatalog:
    (tmp_path / "cat.png").write_bytes(b"picture")
    return DataCatalog(
        {
            "reference_image": ReferenceImageDataset(filepath=str(tmp_path / "cat.png")),
            "reference_caption": CaptionDataset(filepath=str(tmp_path / "cat.png"), caption="white background"),
            "concept": ConceptDataset(filepath=str(tmp_path / "concept.safetensors")),
            "params:training": MemoryDataset(training()),
            "params:generate": MemoryDataset(GenerateParams(prompts=("a cat",))),
        }
    )


TRAIN = Pipeline(
    [
        node(
            lambda image, caption, params: image,
            ["reference_image", "reference_caption", "params:training"],
            "concept",
            name="train",
        )
    ]
)
GENERATE = Pipeline([node(lambda concept, params: concept, ["concept", "params:generate"], "images", name="draw")])


def hooks_with(**changes: Any) -> RunRecordHooks:
    hooks = RunRecordHooks()
    hooks._settings = SETTINGS | changes
    hooks._loader = FixedPresets(
        training=training().model_dump(mode="json"), generate={"prompts": ["a {pt1}"], "seed": 0}
    )
    return hooks


def record(experiment: str, pipeline: Pipeline, catalog: DataCatalog, **changes: Any) -> Any:
    """Run the hooks of a pipeline, as Kedro and kedro-mlflow do, and return the finished run."""
    import mlflow

    hooks = hooks_with(**changes)
    run_params = {
        "pipeline_names": ["train" if pipeline is TRAIN else "generate"],
        "runtime_params": {"training": {"num_steps": 10}} if pipeline is TRAIN else {},
        "project_path": "/",
        "runner": "<kedro.runner.sequential_runner.SequentialRunner object at 0x7f1840a59150>",
    }
    with mlflow.start_run(experiment_id=experiment) as run:
        mlflow.set_tag("runner", run_params["runner"])  # as kedro-mlflow does
        hooks.before_pipeline_run(run_params, pipeline, catalog)
        if pipeline is TRAIN:
            concept = Concept({}, CONCEPT)
            catalog["concept"].save(concept)
            hooks.after_dataset_saved("concept", concept)
        hooks.after_pipeline_run(pipeline, catalog)
    return mlflow.MlflowClient().get_run(run.info.run_id)


def test_a_run_that_uses_a_concept_is_a_child_of_the_run_that_made_it(experiment: str, catalog: DataCatalog) -> None:
    made = record(experiment, TRAIN, catalog)
    used = record(experiment, GENERATE, catalog, method="tutorial")  # the method of conf/, not of this concept
    assert used.data.tags["mlflow.parentRunId"] == made.info.run_id
    assert used.data.params == {**made.data.params, "generate.prompts": "['a cat']"}
    assert used.data.tags["method"] == used.data.params["method"] == "lora"
    assert "mlflow.parentRunId" not in made.data.tags


def test_a_run_that_another_one_has_started_is_its_child_and_leaves_its_description_alone(
    experiment: str, catalog: DataCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    starter = record(experiment, TRAIN, catalog)
    before = mlflow.MlflowClient().get_run(starter.info.run_id).data.tags
    monkeypatch.setenv(PARENT_RUN, starter.info.run_id)
    started = record(experiment, TRAIN, catalog)
    assert started.data.tags["mlflow.parentRunId"] == starter.info.run_id
    assert mlflow.MlflowClient().get_run(starter.info.run_id).data.tags == before


def test_a_failed_run_says_why(experiment: str) -> None:
    import mlflow

    with mlflow.start_run(experiment_id=experiment) as run:
        try:
            raise RuntimeError("Failed while loading data") from InputError("a picture", "none", "give one")
        except RuntimeError as error:
            RunRecordHooks().on_pipeline_error(error)
    tags = mlflow.MlflowClient().get_run(run.info.run_id).data.tags
    assert tags["error"] == "InputError: expected a picture; got none; give one"


def test_a_run_that_mlflow_does_not_track_is_left_alone(catalog: DataCatalog) -> None:
    hooks = RunRecordHooks()
    hooks.before_pipeline_run({}, GENERATE, catalog)
    hooks.after_dataset_saved("concept", Concept({}, CONCEPT))
    hooks.after_pipeline_run(GENERATE, catalog)
    hooks.on_pipeline_error(RuntimeError("nothing to tag"))
    close_run("KILLED", "interrupted")


def test_of_two_runs_that_made_the_same_concept_the_newest_is_the_parent(experiment: str, catalog: DataCatalog) -> None:
    import mlflow

    record(experiment, TRAIN, catalog)
    newest = record(experiment, TRAIN, catalog)
    file = catalog["concept"]._filepath
    found = run_that_made(mlflow.MlflowClient(), experiment, file)
    assert found is not None and found.info.run_id == newest.info.run_id
    file.write_bytes(b"another concept")
    assert run_that_made(mlflow.MlflowClient(), experiment, file) is None


def test_without_its_training_a_run_stands_alone_with_what_the_file_knows(
    experiment: str, catalog: DataCatalog, caplog: pytest.LogCaptureFixture
) -> None:
    catalog["concept"].save(Concept({}, CONCEPT))
    with caplog.at_level("INFO"):
        run = record(experiment, GENERATE, catalog)
    assert "mlflow.parentRunId" not in run.data.tags
    assert any("recorded by itself" in message for message in caplog.messages)
    expected = {"steps": "3", "rank.unet.0.positive": "4", "generate.prompts": "['a cat']"}
    assert run.data.params == {"subject": "cat", "base_model": "tiny", **expected}
    assert run.info.run_name == "cat · generate"


def test_a_training_is_tagged_with_its_concept_and_base_model_and_has_the_picture_as_input(
    experiment: str, catalog: DataCatalog
) -> None:
    run = record(experiment, TRAIN, catalog)
    sha256 = hashlib.sha256(catalog["concept"]._filepath.read_bytes()).hexdigest()
    assert run.data.tags["concept_sha256"] == sha256
    assert run.data.params["caption"] == "white background"
    assert run.data.tags["base_model_fingerprint"] == "sha256:0123"
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "reference image of cat"
    assert {tag.key: tag.value for tag in dataset.tags}["sha256"] == hashlib.sha256(b"picture").hexdigest()
    assert run.info.run_name == "cat · train · num_steps=10 · lora"


def test_the_whole_configuration_is_one_file_and_no_tag_has_an_address(experiment: str, catalog: DataCatalog) -> None:
    import mlflow

    run = record(experiment, TRAIN, catalog)
    written = yaml.safe_load(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/configuration.yaml"))
    assert (written["subject"], written["training"]["batch_size"]) == ("cat", 4)
    assert run.data.tags["runner"] == "SequentialRunner"
    assert not [tag for tag, value in run.data.tags.items() if " at 0x" in value]
    kind = mlflow.get_experiment(experiment).tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"  # MLflow opens the view of training runs


def test_a_run_with_other_parameters_is_not_continued_and_stays_as_it_is(experiment: str, catalog: DataCatalog) -> None:
    import mlflow

    run = record(experiment, TRAIN, catalog)
    hooks_with().check_continues(run, TRAIN, catalog)
    with pytest.raises(InputError, check=says(expected=run.info.run_id, got="base_model=other for tiny")):
        hooks_with(base_model="other").check_continues(run, TRAIN, catalog)
    assert mlflow.MlflowClient().get_run(run.info.run_id).to_dictionary() == run.to_dictionary()


def test_only_a_run_of_the_experiment_is_continued(experiment: str, catalog: DataCatalog) -> None:
    import mlflow

    client, run_id = mlflow.MlflowClient(), record(experiment, TRAIN, catalog).info.run_id
    assert continued_run(client, run_id, experiment).info.run_id == run_id
    with pytest.raises(InputError, check=says(expected="MLFLOW_RUN_ID=nosuch", remedy="unset MLFLOW_RUN_ID")):
        continued_run(client, "nosuch", experiment)
    with pytest.raises(InputError, check=says(expected=run_id, got=f"the experiment {experiment}")):
        continued_run(client, run_id, "0")


def test_parameters_are_not_logged_again_by_kedro_mlflow() -> None:
    inputs: dict[str, Any] = {"params:device": GenerateParams(prompts=("a",)), "parameters": {}, "image": b"x"}
    RunRecordHooks().before_node_run(inputs)
    assert inputs == {"image": b"x"}


# ------------------------------------------------------------------------------------------------- descriptions


def test_a_description_keeps_what_users_wrote_and_replaces_its_own_sections() -> None:
    note = with_sections("My notes.\n\n## Mine\n\ntext", {"Contact sheet": "![](1)"})
    assert note == "My notes.\n\n## Contact sheet\n\n![](1)\n\n## Mine\n\ntext"
    assert with_sections(note, {"Contact sheet": "![](2)"}) == note.replace("(1)", "(2)")
    assert with_sections(note, {}) == note
