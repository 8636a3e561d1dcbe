"""Live curves in the active MLflow run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from PIL import Image

from dreamartist_pipeline.tracking import MLflowTracker, metric_name
from tracking_stores import tracking_uri


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return an experiment in a store for this module: MLflow takes seconds to create one."""
    import mlflow

    folder = tmp_path_factory.mktemp("tracking")
    with tracking_uri(f"sqlite:///{folder}/mlflow.db"):
        yield mlflow.create_experiment("test", artifact_location=(folder / "artifacts").as_uri())


@pytest.fixture
def run_id(experiment: str) -> Iterator[str]:
    import mlflow

    with mlflow.start_run(experiment_id=experiment) as run:
        yield run.info.run_id


def test_metrics_of_every_step_reach_the_active_run(run_id: str) -> None:
    import mlflow

    tracker = MLflowTracker()
    for step in range(3):
        tracker.log_metrics({"loss": 1.0 / (step + 1), "lr/unet[0]": 0.5}, step=step)
    mlflow.flush_async_logging()
    client = mlflow.MlflowClient()
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert len(client.get_metric_history(run_id, "lr/unet.0")) == 3


def test_images_reach_the_active_run(run_id: str) -> None:
    import mlflow

    MLflowTracker().log_image(Image.new("RGB", (4, 4)), key="preview", step=2)
    mlflow.flush_artifact_async_logging()
    files = [file.path for file in mlflow.MlflowClient().list_artifacts(run_id, "images")]
    assert any("preview" in file and file.endswith(".png") for file in files)


def test_a_tag_reaches_the_active_run_however_long_its_text(run_id: str) -> None:
    import mlflow

    MLflowTracker().set_tag("caption", "white background")
    MLflowTracker().set_tag("long", "word " * 5000)
    tags = mlflow.MlflowClient().get_run(run_id).data.tags
    assert tags["caption"] == "white background"
    assert tags["long"].startswith("word word")


def test_an_image_file_is_replaced_by_the_next_of_that_name(run_id: str) -> None:
    import mlflow

    for color in ("red", "blue"):
        MLflowTracker().log_image_file(Image.new("RGB", (4, 4), color), "training/previews.png")
    (file,) = mlflow.MlflowClient().list_artifacts(run_id, "training")
    image = mlflow.artifacts.load_image(f"runs:/{run_id}/{file.path}")
    assert image.getpixel((0, 0)) == (0, 0, 255)


def test_without_an_active_run_nothing_is_written() -> None:
    import mlflow

    assert mlflow.active_run() is None
    tracker = MLflowTracker()
    tracker.log_metrics({"loss": 1.0}, step=0)
    tracker.log_image(Image.new("RGB", (4, 4)), key="preview", step=0)
    tracker.set_tag("caption", "white background")
    tracker.log_image_file(Image.new("RGB", (4, 4)), "previews.png")
    assert mlflow.active_run() is None


@pytest.mark.parametrize(
    ("name", "accepted"),
    [("loss", "loss"), ("lr/unet[0]", "lr/unet.0"), ("lr/unet[0].positive", "lr/unet.0.positive"), ("a(b)", "a_b_")],
)
def test_names_that_mlflow_refuses_are_spelt_otherwise(name: str, accepted: str) -> None:
    assert metric_name(name) == accepted
