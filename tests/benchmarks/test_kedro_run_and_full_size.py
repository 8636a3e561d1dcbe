"""The benchmarks of whole commands: their arithmetic by hand, and both once with tiny models."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import full_size
import kedro_run
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.params import DeviceParams
from kedro_run import Point, Timeline, make_timeline
from project_copy import PROJECT, copy_project
from speed import commands
from speed.commands import Finished
from speed.random_models import AUTOENCODER, CLIP_L, OPENCLIP_G, SD15_UNET, SDXL_UNET, TINY_PX, write_model
from warm_processes import run_warm

EVERY_4 = [Point(2, 112.0), Point(4, 114.0), Point(6, 121.0), Point(8, 123.0)]  # a step is a second, a preview five


def test_a_timeline_leaves_previews_out_of_the_rate() -> None:
    timeline = make_timeline(EVERY_4, 4, run_began=103.0, command=Finished(100.0, 30.0, 1.0))

    assert timeline == Timeline(steps_per_second=1.0, start_up=3.0, first_step=10.0, preview=5.0, after=7.0, whole=30.0)


def test_a_timeline_without_previews_has_no_preview() -> None:
    timeline = make_timeline(EVERY_4[:2], 0, run_began=103.0, command=Finished(100.0, 30.0, 1.0))

    assert timeline.preview is None
    assert "a preview, s" not in timeline.columns()


def test_a_preview_at_the_last_step_of_an_interval_comes_after_it() -> None:
    timeline = make_timeline([Point(3, 3.0), Point(6, 6.0), Point(9, 14.0)], 6, 0.0, Finished(0.0, 20.0, 1.0))

    assert (timeline.steps_per_second, timeline.preview) == (1.0, 5.0)


def test_points_that_are_logged_together_count_as_the_last_of_them() -> None:
    read_together = [Point(2, 2.0), Point(3, 5.0), Point(4, 5.001), Point(5, 5.002), Point(7, 7.001), Point(8, 7.002)]

    timeline = make_timeline(read_together, 0, 0.0, Finished(0.0, 10.0, 1.0))

    assert timeline.steps_per_second == pytest.approx(6 / 5.002)
    assert make_timeline(read_together, 5, 0.0, Finished(0.0, 10.0, 1.0)).steps_per_second == pytest.approx(3 / 3.002)


def test_too_few_steps_for_a_rate_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kedro_run.main(("--steps", "2"))

    assert "at least 12" in capsys.readouterr().err


def test_rates_are_relative_to_the_bare_loop() -> None:
    runs = [Timeline(rate, 1.0, 2.0, None, 3.0, 4.0) for rate in (1.0, 1.9, 1.9)]

    bare, first, later = kedro_run.make_rows([2.0, 2.0], runs)

    assert [row.values["% of the bare loop"] for row in (bare, first, later)] == [100.0, 50.0, 95.0]


def test_a_command_that_fails_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exit status 3"):
        commands.finish(["sh", "-c", "exit 3"], {}, tmp_path)


def test_a_command_is_measured(tmp_path: Path) -> None:
    finished = commands.finish(["sh", "-c", "sleep 0.05"], {"PATH": "/usr/bin:/bin"}, tmp_path)

    assert finished.seconds >= 0.05
    own_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    assert 0 < finished.peak_gib < max(1, 1.1 * own_gib)  # a process begins as a copy of the one that starts it


@pytest.fixture
def warm_project(tmp_path: Path, tiny_base_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the project in which the benchmarks' commands run, in processes that are warm."""
    project = copy_project(tmp_path / "project", tiny_base_model)
    shutil.copytree(PROJECT / "data/01_raw/prompts", project / "data/01_raw/prompts")

    def finish(command: Sequence[str], environment: Mapping[str, str], _: Path) -> Finished:
        started = time.time()
        outcome = run_warm(tuple(command[1:]), project, environment, timeout_s=300)
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        return Finished(started, time.time() - started, 0.5)

    monkeypatch.setattr(commands, "finish", finish)
    return project


@pytest.mark.slow
def test_kedro_run_is_timed_by_its_curve_in_mlflow(warm_project: Path, tmp_path: Path) -> None:
    arguments = ("--env", "test", "--base-model", str(warm_project / "tiny"))

    kedro_run.main((*arguments, "--steps", "12", "--rounds", "1", "--threads", "1", "--output", str(tmp_path)))

    bare, first = json.loads((tmp_path / "kedro_run.json").read_text())["rows"]
    assert first["steps per second"] > 0
    assert 0 < first["start-up, s"] < first["start to first step, s"] < first["whole command, s"]
    assert "a preview, s" in first  # its value, a difference, drowns in noise at this size
    assert bare["% of the bare loop"] == 100


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_the_parts_of_full_size_run_on_a_tiny_model(warm_project: Path, tmp_path: Path, model: str) -> None:
    arguments = ("--models", model, "--tiny", "--dtype", "float32")

    full_size.main((*arguments, "--threads", "1", "--output", str(tmp_path)))

    content = json.loads((tmp_path / "full_size.json").read_text())
    assert [row["peak memory, GiB"] for row in content["rows"]] == [0.5, 0.5, 0.5]
    assert (warm_project / f"data/06_models/full-size-{model}/concept.safetensors").is_file()
    assert list((warm_project / f"data/07_model_output/full-size-{model}").rglob("*.png"))


def test_models_can_be_written_alone(tmp_path: Path) -> None:
    full_size.main(("--models", "sd15", "--tiny", "--write", str(tmp_path)))

    model = load_backbone(BaseModelFiles(tmp_path / "sd15"), DeviceParams(device="cpu"))
    assert model.file_names.architecture == "stable-diffusion-v1"
    assert all(tensor.isfinite().all() for part in model.networks.values() for tensor in part.state_dict().values())


def test_models_of_real_size_have_the_published_layers() -> None:
    with torch.device("meta"):
        unets = [UNet2DConditionModel(**config) for config in (SD15_UNET, SDXL_UNET)]
        texts = [CLIPTextModel(CLIPTextConfig(**CLIP_L)), CLIPTextModelWithProjection(CLIPTextConfig(**OPENCLIP_G))]
        autoencoder = AutoencoderKL(**AUTOENCODER)

    sizes = [sum(p.numel() for p in part.parameters()) for part in (*unets, *texts, autoencoder)]
    assert sizes == [859_520_964, 2_567_463_684, 123_060_480, 694_659_840, 83_653_863]


def test_the_written_sdxl_is_one_for_diffusers(tmp_path: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(write_model("sdxl", tmp_path, torch.float32, tiny=True))

    image = pipeline("a red cat", num_inference_steps=1, output_type="np", height=TINY_PX, width=TINY_PX).images[0]

    assert np.isfinite(image).all()
