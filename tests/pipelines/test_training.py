"""The training nodes: a plan checked first, a concept that is the same every time, live curves and previews."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dreamartist_pipeline.api import step_values
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone, reconstruct
from dreamartist_pipeline.backbones.concepts import attach, generate, start_concept
from dreamartist_pipeline.backbones.evaluators import load_evaluator
from dreamartist_pipeline.core.concept import Concept
from dreamartist_pipeline.core.images import Framing
from dreamartist_pipeline.datasets.concept import ConceptDataset
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams, SamplerParams, StrengthParams, TrainingParams
from dreamartist_pipeline.pipeline_registry import register_pipelines
from dreamartist_pipeline.pipelines.training import create_pipeline, reconstruction
from dreamartist_pipeline.pipelines.training.data import fill_prompt, training_data
from dreamartist_pipeline.pipelines.training.figures import plot_history
from dreamartist_pipeline.pipelines.training.nodes import check_training, compare_reconstruction, train_concept
from dreamartist_pipeline.pipelines.training.ranks import num_training_processes
from dreamartist_pipeline.pipelines.training.reporting import curve_name, filmstrip, history_table
from refusals import says

MakeParams = Callable[..., TrainingParams]
CPU = DeviceParams(device="cpu")
CAPTION = "white background"
MASK = Image.new("L", (32, 32), 127)
CONSTANT = {"kind": "constant"}
LAYERS = [r"re:.*\.attn.?$"]
DATA = Path(__file__).parents[2] / "data/01_raw"
EMBEDDED, REFERENCES = DATA / "base_model", DATA / "reference_images"


class RecordingTracker:
    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}
        self.images: dict[int, Image.Image] = {}
        self.files: dict[str, Image.Image] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics[step] = self.metrics.get(step, {}) | metrics

    def log_image(self, image: Image.Image, key: str, step: int) -> None:
        assert key == "previews/by step"
        self.images[step] = image

    def log_image_file(self, image: Image.Image, file: str) -> None:
        self.files[file] = image


TWO_IMAGES = [  # of another size than the reference
    (caption, functools.partial(Image.new, "RGB", (48, 40), color))
    for caption, color in (("a red cat", "red"), ("a blue dog", "blue"))
]


def picture() -> Image.Image:
    """Vertical stripes."""
    image = Image.new("RGB", (32, 32), "orange")
    image.paste("purple", (8, 0, 16, 32))
    return image


def train(
    base_model: Path, params: TrainingParams, tracker: RecordingTracker | None = None, **changes: Any
) -> tuple[Concept, Any]:
    plan = changes.pop("plan", None) or check_training(str(base_model), params, CAPTION)
    return train_concept(
        base_model=str(base_model),
        prepared_image=picture(),
        prepared_mask=changes.pop("mask", MASK),
        regularization_set=changes.pop("regularization_set", TWO_IMAGES),
        training_plan=plan,
        params=params,
        caption=CAPTION,
        device=changes.pop("device", CPU),
        tracker=tracker or RecordingTracker(),
        **changes,
    )[:2]


# --------------------------------------------------------------------------------------------- processes


@pytest.mark.usefixtures("warm_ranks")
def test_two_processes_train_the_concept_of_one_and_only_the_first_reports(
    tiny_base_model: Path, make_training_params: MakeParams, capfd: pytest.CaptureFixture[str]
) -> None:
    preview = {"every": 2, "prompts": ["a {pt1}"], "sampler": {"num_inference_steps": 1}}
    params = make_training_params(num_steps=3, preview=preview, schedule=CONSTANT, words_schedule=CONSTANT)
    trackers = [RecordingTracker(), RecordingTracker()]
    (one, alone), (two, shared) = (
        train(tiny_base_model, params, tracker, device=CPU.model_copy(update={"processes": count}))
        for count, tracker in zip((1, 2), trackers, strict=True)
    )
    assert one.metadata == two.metadata
    length = 3 * 4e-4  # of the shortest way, in three steps with the lowest rate
    for name, tensor in one.tensors.items():  # Adam amplifies small gradients of single values
        assert (two.tensors[name] - tensor).square().mean().sqrt() < 1e-2 * length, name
    for column in alone.columns.drop("seconds"):
        assert shared[column].tolist() == pytest.approx(alone[column].tolist(), rel=1e-3)
    assert trackers[0].images.keys() == trackers[1].images.keys() == {0, 2, 3}
    assert "Traceback" not in capfd.readouterr().err


def test_more_processes_than_rows_are_refused(tiny_base_model: Path, make_training_params: MakeParams) -> None:
    device = CPU.model_copy(update={"processes": 4})  # of 2 reference rows and 1 regularization row
    with pytest.raises(InputError, check=says(expected="training.batch_size=2", got="device.processes=4")):
        check_training(str(tiny_base_model), make_training_params(), CAPTION, device)


def test_processes_are_one_per_gpu_and_row_and_one_with_cuda_graphs(
    make_training_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    params = make_training_params()
    graphed = params.model_copy(update={"backend": "cudagraph"})
    assert num_training_processes(params, DeviceParams(device="cuda")) == 3
    assert num_training_processes(params, DeviceParams(device="cuda:1")) == 1
    assert num_training_processes(params, DeviceParams(device="cuda", processes=2)) == 2
    assert num_training_processes(graphed, DeviceParams(device="cuda")) == 1
    with pytest.raises(InputError, check=says(expected="training.backend=cudagraph", got="device.processes=2")):
        num_training_processes(graphed, DeviceParams(device="cuda", processes=2))


# --------------------------------------------------------------------------------------------- the plan


def test_the_plan_counts_what_each_branch_trains(tiny_base_model: Path, make_training_params: MakeParams) -> None:
    plan = check_training(str(tiny_base_model), make_training_params(scale_lr=True), CAPTION)
    assert json.loads(json.dumps(plan)) == plan
    groups = {group["name"]: group for group in plan["groups"]}
    assert list(groups) == [
        "unet.0.positive",
        "unet.1.negative",
        "text_encoder.0.positive",
        "text_encoder.1.negative",
        "words.negative.pt1",
        "words.positive.pt1",
    ]
    assert plan["lr_factor"] == 3  # 2 reference rows + 1 regularization row
    assert groups["unet.0.positive"]["lr"] == pytest.approx(3e-3)
    assert groups["words.positive.pt1"]["lr"] == pytest.approx(7.5e-3)
    assert groups["words.positive.pt1"]["num_vectors"] == 2
    # two layers, each q, k, v, out (32 -> 32) and fc1, fc2 (32 -> 96 -> 32), rank 1
    assert groups["text_encoder.0.positive"]["num_layers"] == 12
    assert groups["text_encoder.0.positive"]["num_parameters"] == 2 * (4 * 64 + 2 * 128)


def test_the_plan_counts_biases_and_not_what_a_start_by_svd_keeps_frozen(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    text = {"lr": 1e-3, "rank": 1, "layers": [r"re:.*self_attn$"]}
    groups = [text | {"branch": "p", "bias": True}, text | {"branch": "n", "svd_init": True}]
    plan = check_training(str(tiny_base_model), make_training_params(lora_text_encoder=groups), CAPTION)
    counts = {g["name"]: (g["num_layers"], g["num_parameters"]) for g in plan["groups"] if "text" in g["name"]}
    factors = 2 * 4 * (32 + 32)  # two layers, each q, k, v, out (32 -> 32), rank 1
    assert counts == {"text_encoder.0.positive": (8, factors + 8 * 32), "text_encoder.1.negative": (8, factors)}


def test_the_caption_is_shown_and_part_of_the_plan(
    tiny_base_model: Path, make_training_params: MakeParams, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        plan = check_training(str(tiny_base_model), make_training_params(), CAPTION)
    assert plan["caption"] == CAPTION
    assert "cut_off" not in plan
    assert repr(CAPTION) in caplog.text


def test_a_missing_caption_is_said_too(
    tiny_base_model: Path, make_training_params: MakeParams, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert check_training(str(tiny_base_model), make_training_params(), "")["caption"] == ""
    assert "--params caption=" in caplog.text


def test_what_the_text_encoder_does_not_read_of_a_caption_is_quoted_for_each_branch(
    tiny_base_model: Path, make_training_params: MakeParams, caplog: pytest.LogCaptureFixture
) -> None:
    params = make_training_params(templates=("a {pt1}", "a {pt1}, {caption}"))
    caption = "cat " * 18 + "blue dog"  # of 22 tokens, "a", the comma and 2 or 3 vectors are taken
    plan = check_training(str(tiny_base_model), params, caption)
    assert plan["cut_off"] == {"negative": "cat blue dog", "positive": "blue dog"}
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [("negative" in text, "'cat blue dog'" in text) for text in warnings] == [(True, True), (False, False)]


def test_a_warm_up_that_is_not_shorter_than_the_training_is_named(
    tiny_base_model: Path, make_training_params: MakeParams, caplog: pytest.LogCaptureFixture
) -> None:
    warmup = {"kind": "constant", "warmup_steps": 3}
    check_training(str(tiny_base_model), make_training_params(num_steps=3, words_schedule=warmup), CAPTION)
    assert "training.words_schedule.warmup_steps=3" in caplog.text
    caplog.clear()
    check_training(str(tiny_base_model), make_training_params(num_steps=4, words_schedule=warmup), CAPTION)
    assert "warmup_steps" not in caplog.text


def test_a_long_caption_is_shortened_in_the_log_and_whole_in_the_plan(
    tiny_base_model: Path, make_training_params: MakeParams, caplog: pytest.LogCaptureFixture
) -> None:
    caption = "cat " * 120 + "dog"
    params = make_training_params(templates=("a {pt1}, {caption}",))
    with caplog.at_level(logging.INFO):
        plan = check_training(str(tiny_base_model), params, caption)
    assert plan["caption"] == caption and plan["cut_off"]["positive"].endswith("dog")
    quoting = [message for message in caplog.messages if "cat cat" in message]
    assert len(quoting) == 3 and max(map(len, quoting)) < 200


def test_a_caption_is_cut_off_without_trigger_words_too(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    params = make_training_params(
        words={},
        guidance_scale="1.0",
        templates=("a cat, {caption}",),
        lora_unet=[{"lr": 1e-3, "rank": 1, "layers": LAYERS}],
        lora_text_encoder=[],
    )
    assert check_training(str(tiny_base_model), params, "cat " * 19 + "dog")["cut_off"] == {"positive": "dog"}


def test_the_plan_is_shown_per_branch(
    tiny_base_model: Path, make_training_params: MakeParams, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        check_training(str(tiny_base_model), make_training_params(), CAPTION)
    assert "negative  unet.1.negative" in caplog.text
    assert "positive  words.positive.pt1" in caplog.text


def test_the_usual_clip_skip_of_an_anime_model_is_suggested(
    tiny_base_model: Path, tmp_path: Path, make_training_params: MakeParams, caplog: pytest.LogCaptureFixture
) -> None:
    base_model = shutil.copytree(tiny_base_model, tmp_path / "anything-v5")
    check_training(str(base_model), make_training_params(), CAPTION)
    assert "training.clip_skip=1" in caplog.text
    caplog.clear()
    check_training(str(base_model), make_training_params(clip_skip=1), CAPTION)
    assert "clip skip 2" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"templates": ("two {pt1}s",)}, {"expected": "a trigger word", "got": "'two my-fox-negs'"}),
        ({"templates": ("a photo",)}, {"expected": "{pt1}", "got": "'a photo'"}),
        ({"templates": ("a {pt1} {pt2}",)}, {"expected": "{pt1}", "got": "{pt2} in 'a {pt1} {pt2}'"}),
        (
            {"words": {"names": {"pt1": ("my-fox", "my-neg"), "pt2": ("my-hat", "my-hat-neg")}}},
            {"expected": "words.names", "got": "{pt2}"},
        ),
        ({"words": {"names": {"pt1": ("cat", "my-cat-neg")}}}, {"expected": "a trigger word", "got": "'cat'"}),
        ({"words": {"names": {"pt1": ("my-cat", "My-Cat")}}}, {"got": "'my-cat' twice"}),
        (
            {"words": {"names": {"pt1": ("my-fox", "my-neg")}, "num_vectors": (30, 2)}},
            {"got": "my-fox", "remedy": "vectors"},
        ),
        (
            {"words": {"names": {"pt1": ("my-fox", "my-neg")}, "init_text": ("*[0.1, 9]", "*[0.1]")}},
            {"expected": "init_text"},
        ),
        (
            {"lora_unet": [{"lr": 1e-3, "rank": 1, "layers": ["re:.*atn1$"]}]},
            {"got": "'re:.*atn1$'", "remedy": "attn1"},
        ),
        (
            {"preview": {"every": 1, "sampler": {"scheduler_options": {"nonsense": 1}}}},
            {"expected": "scheduler_options", "got": "'nonsense'"},
        ),
        (
            {"preview": {"every": 1, "sampler": {"scheduler": "LMSDiscreteScheduler"}}, "zero_terminal_snr": True},
            {"got": "LMSDiscreteScheduler"},
        ),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_any_weight_is_loaded(
    tiny_base_model: Path,
    make_training_params: MakeParams,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    parts: dict[str, str],
) -> None:
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", None)
    with pytest.raises(InputError, check=says(**parts)):
        check_training(str(tiny_base_model), make_training_params(**changes), CAPTION)


def test_a_branch_may_have_words_alone(tiny_base_model: Path, make_training_params: MakeParams) -> None:
    groups = [{"lr": 1e-3, "rank": 1, "branch": "p", "layers": [r"re:.*\.attn.?$"]}]
    params = make_training_params(lora_unet=groups, lora_text_encoder=())
    plan = check_training(str(tiny_base_model), params, CAPTION)
    assert [group["name"] for group in plan["groups"] if group["branch"] == "negative"] == ["words.negative.pt1"]


def test_an_incomplete_base_model_is_refused(tmp_path: Path, make_training_params: MakeParams) -> None:
    with pytest.raises(InputError, check=says(expected="/none", remedy="base_model")):
        check_training(str(tmp_path / "none"), make_training_params(), CAPTION)


def test_the_effective_rates_are_shown(
    tiny_base_model: Path, make_training_params: MakeParams, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        check_training(str(tiny_base_model), make_training_params(scale_lr=True), CAPTION)
    rates = {line.split()[1]: line.split()[-1] for line in caplog.text.splitlines() if line.startswith(("neg", "pos"))}
    assert rates["unet.0.positive"] == "3.00e-03"  # 1e-3 times 2 reference rows + 1 regularization row
    assert rates["unet.1.negative"] == "1.20e-03"
    assert rates["words.negative.pt1"] == "7.50e-03"


def test_an_optimizer_that_cannot_run_is_refused_before_any_model_is_read(make_training_params: MakeParams) -> None:
    words = {"names": {"pt1": ("my-fox", "my-fox-neg")}, "optimizer": "adamw8bit"}
    for changes in ({"optimizer": "adamw8bit"}, {"words": words}):
        with pytest.raises(InputError, check=says(expected="adamw8bit", got="cpu")):
            check_training("no/such/folder", make_training_params(**changes), CAPTION, CPU)


def test_a_zero_terminal_schedule_of_an_epsilon_model_is_refused_in_the_plan(
    tiny_base_model: Path, make_training_params: MakeParams, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_base_model, tmp_path / "model")
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("v_prediction", "epsilon"))
    check_training(str(model), make_training_params(), CAPTION)
    with pytest.raises(InputError, check=says(expected="training.zero_terminal_snr", got="'epsilon'")):
        check_training(str(model), make_training_params(zero_terminal_snr=True), CAPTION)


def test_limits_that_hold_no_timestep_are_refused_in_the_plan(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    with pytest.raises(InputError, check=says(expected="training.timesteps", got="[0.0001, 0.0002]")):
        check_training(str(tiny_base_model), make_training_params(timesteps=(0.0001, 0.0002)), CAPTION)


# --------------------------------------------------------------------------------------------- the concept


def test_a_concept_draws_with_the_noise_schedule_it_was_trained_with(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    params = {"num_steps": 1, "words_schedule": CONSTANT}
    concept, _ = train(tiny_base_model, make_training_params(zero_terminal_snr=True, **params))
    plain, _ = train(tiny_base_model, make_training_params(**params))
    assert (concept.metadata.zero_terminal_snr, plain.metadata.zero_terminal_snr) == (True, False)
    assert not torch.equal(concept.tensors["words.positive.pt1"], plain.tensors["words.positive.pt1"])
    backbone = load_backbone(BaseModelFiles(tiny_base_model), CPU)
    pictures = {}
    for name, tensors, metadata in (
        ("rescaled", plain.tensors, plain.metadata.model_copy(update={"zero_terminal_snr": True})),
        ("plain", plain.tensors, plain.metadata),
    ):
        loaded = attach(backbone, Concept(tensors, metadata), StrengthParams())
        sampler = SamplerParams(num_inference_steps=2)
        pictures[name] = generate(backbone, loaded, ["a my-fox"], "", [0], sampler)[0].tobytes()
    assert pictures["plain"] != pictures["rescaled"]


@pytest.fixture(scope="module")
def plain(tiny_base_model: Path, make_training_params: MakeParams) -> Concept:
    """Return a concept of two steps without further options."""
    return train(tiny_base_model, make_training_params(num_steps=2))[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": {"reconstruction_weight": 0.5}},
        {"loss": {"reconstruction_weight": 0.5, "reconstruction_norm": "l2"}},
        {"loss": {"kind": "huber"}},
        {"noise_offset": 0.1},
        {"timesteps": (0.2, 0.8)},
        {"ema_decay": 0.9},
        {"optimizer": "schedule_free", "schedule": {"kind": "constant"}},
        {
            "words": {
                "names": {"pt1": ("my-fox", "my-fox-neg")},
                "num_vectors": (2, 3),
                "optimizer": "prodigy",
                "lr": 1.0,
            }
        },
    ],
    ids=["reconstruction", "reconstruction l2", "huber", "offset", "timesteps", "ema", "schedule-free", "prodigy"],
)
def test_every_option_of_the_objective_changes_what_is_learned_and_repeats(
    tiny_base_model: Path, make_training_params: MakeParams, plain: Concept, changes: dict[str, Any]
) -> None:
    mask = Image.new("L", (32, 32), 127)
    mask.paste(255, (0, 0, 16, 32))
    first, again = (train(tiny_base_model, make_training_params(num_steps=2, **changes))[0] for _ in range(2))
    assert all(torch.equal(first.tensors[name], tensor) for name, tensor in again.tensors.items())
    assert any(not torch.equal(first.tensors[name], tensor) for name, tensor in plain.tensors.items())
    train(tiny_base_model, make_training_params(num_steps=1, **changes), mask=mask)


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(
    tiny_base_model: Path, make_training_params: MakeParams, tmp_path: Path
) -> None:
    unet, text = ([{"lr": 1e-3, "rank": 4, "layers": [layers], "dropout": 0.3}] for layers in (r"re:.*", r"re:.*mlp$"))
    files = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(files))  # whatever the process did before
        concept, _ = train(tiny_base_model, make_training_params(seed=seed, lora_unet=unet, lora_text_encoder=text))
        dataset = ConceptDataset(filepath=str(tmp_path / f"{len(files)}.safetensors"))
        dataset.save(concept)
        files.append((tmp_path / f"{len(files)}.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_previews_do_not_change_what_is_learned(tiny_base_model: Path, make_training_params: MakeParams) -> None:
    sampler = SamplerParams(scheduler="euler_a", num_inference_steps=2)
    preview = {"every": 1, "prompts": ("a {pt1}", "a my-fox, blue"), "sampler": sampler}
    tracker = RecordingTracker()
    dropout = [
        {"lr": 1e-3, "rank": 4, "dropout": 0.5, "branch": branch, "layers": (r"re:.*\.attn.?$",)} for branch in "pn"
    ]
    with_previews, _ = train(tiny_base_model, make_training_params(preview=preview, lora_unet=dropout), tracker)
    without, _ = train(tiny_base_model, make_training_params(lora_unet=dropout))
    assert all(torch.equal(with_previews.tensors[name], tensor) for name, tensor in without.tensors.items())
    assert with_previews.metadata == without.metadata
    assert list(tracker.images) == [0, 1, 2, 3]
    assert tracker.images[1].height > tracker.images[1].width > 32  # MLflow shows the top of a card
    assert tracker.files["training/previews.png"].width > 4 * 144  # a column per step
    assert tracker.images[1].tobytes() != tracker.images[3].tobytes()


def test_the_history_has_one_row_per_step_and_the_tracker_live_curves(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    tracker = RecordingTracker()
    _, history = train(tiny_base_model, make_training_params(), tracker)
    assert history["step"].tolist() == [1, 2, 3]
    curves = {
        "loss": "loss/total",
        "loss_reference": "loss/reference",
        "loss_regularization": "loss/regularization",
        "guidance_scale": "training/guidance_scale",
        "lr/unet.0.positive": "training/lr.unet.0.positive",
        "lr/words.negative.pt1": "training/lr.words.negative.pt1",
        "grad_norm/negative/adapters": "training/grad.negative.adapters",
        "grad_norm/positive/words": "training/grad.positive.words",
    }
    assert set(curves) <= set(history.columns)
    assert {*curves.values()} <= tracker.metrics[1].keys()
    assert tracker.metrics[3]["training/steps_per_second"] == pytest.approx(3 / history["seconds"].sum())
    assert tracker.metrics[3]["training/peak_memory_gib"] > 0.1  # torch alone is larger
    assert tracker.metrics[3]["loss/total"] == pytest.approx(history["loss"].iloc[-1])
    assert len(plot_history(history).data) > 0


def test_zero_steps_give_a_concept_and_an_empty_history(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    concept, history = train(tiny_base_model, make_training_params(num_steps=0))
    assert len(history) == 0
    assert "loss" in history.columns
    assert not any(t.any() for name, t in concept.tensors.items() if name.endswith(".up"))
    plot_history(history)


def test_charts_sorted_by_group_and_name_begin_with_the_losses_and_end_with_the_schedules() -> None:
    columns = ("grad_norm/positive/words", "guidance_scale", "loss", "loss_reference", "lr/unet.0.positive")
    names = sorted((name.rpartition("/")[0], name) for name in map(curve_name, columns))
    assert [name for _, name in names] == [
        "loss/reference",
        "loss/total",
        "training/grad.positive.words",
        "training/guidance_scale",
        "training/lr.unet.0.positive",
    ]


def test_a_filmstrip_of_many_steps_has_the_first_and_the_last() -> None:
    colors = {step: Image.new("RGB", (32, 32), (step, 0, 0)) for step in range(0, 250, 5)}
    strip = filmstrip(["a fox"], {step: [image] for step, image in colors.items()})
    shown = [strip.getpixel((36 + 250 + column * 152 + 72, 36 + 24 + 72))[0] for column in range(12)]  # type: ignore[index]
    assert (shown[0], shown[-1], shown) == (0, 245, sorted(shown))
    assert strip.width == 36 + 250 + 12 * 152 - 8 + 36


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": "1.0", "lora_unet": (), "lora_text_encoder": (), "regularization_batch_size": 0},
        {
            "guidance_scale": "1.0",
            "words": {},
            "templates": ("a {class}",),
            "class_word": "fox",
            "lora_unet": [{"lr": 1e-3, "rank": 2, "layers": ["re:.*attn.?$"]}],
            "lora_text_encoder": (),
        },
        {"lora_unet": (), "lora_text_encoder": ()},
        {"guidance_scale": "1.5-4.0:cos"},
    ],
    ids=["textual inversion", "plain LoRA", "pairs of words", "dynamic guidance"],
)
def test_other_methods_are_configurations(
    tiny_base_model: Path, make_training_params: MakeParams, changes: dict[str, Any]
) -> None:
    before, _ = train(tiny_base_model, make_training_params(**changes, num_steps=0))
    after, history = train(tiny_base_model, make_training_params(**changes))
    assert len(history) == 3
    moved = {name for name, tensor in after.tensors.items() if not torch.equal(tensor, before.tensors[name])}
    assert moved >= {name for name in after.tensors if name.startswith("words") or name.endswith(".up")}


def test_a_plan_of_other_parameters_is_refused(tiny_base_model: Path, make_training_params: MakeParams) -> None:
    plan = check_training(str(tiny_base_model), make_training_params(scale_lr=True), CAPTION)
    with pytest.raises(InputError, check=says(expected="training_plan", remedy="check_training")):
        train(tiny_base_model, make_training_params(), plan=plan)


def test_rows_from_an_empty_regularization_set_are_refused(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    with pytest.raises(InputError, check=says(expected="regularization_batch_size=1", remedy="prompts.num_prompts")):
        train(tiny_base_model, make_training_params(), regularization_set=[])
    train(tiny_base_model, make_training_params(regularization_batch_size=0, num_steps=0), regularization_set=[])


# --------------------------------------------------------------------------------------------- the data


def test_the_mask_weighs_the_reference_at_latent_size(tiny_base_model: Path, make_training_params: MakeParams) -> None:
    mask = Image.new("L", (32, 32), 127)
    mask.paste(255, (0, 0, 16, 32))  # the left half counts five times
    params = make_training_params()
    backbone = load_backbone(BaseModelFiles(tiny_base_model), CPU)
    prompts = start_concept(backbone, params, 1, 0).prompts
    data = training_data(backbone, prompts, picture(), mask, [], params, CAPTION)
    assert data.mask is not None
    assert data.mask.shape == (1, 1, 8, 8)
    assert data.mask[0, 0, 3].tolist() == [5.0] * 4 + [1.0] * 4
    assert training_data(backbone, prompts, picture(), MASK, [], params, CAPTION).mask is None


def test_the_framing_of_every_image_is_that_of_its_picture(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    params = make_training_params()
    backbone = load_backbone(BaseModelFiles(tiny_base_model), CPU)
    prompts = start_concept(backbone, params, 1, 0).prompts
    images = [(caption, read()) for caption, read in TWO_IMAGES] + [("a cat", picture())]
    cropped = Framing(original_px=(300, 200), crop_px=(8, 0), size_px=(32, 32))
    data = training_data(backbone, prompts, picture(), MASK, images, params, "", cropped)
    assert data.regularization is not None
    assert data.regularization.framing is not None and data.reference.framing is not None
    assert data.reference.framing.tolist() == [[200, 300, 0, 8, 32, 32]]
    assert data.regularization.framing.tolist() == [[40, 48, 0, 3, 32, 32]] * 2 + [[32, 32, 0, 0, 32, 32]]
    alone = training_data(backbone, prompts, picture(), MASK, [], params, "").reference.framing
    assert alone is not None and alone.tolist() == [[32, 32, 0, 0, 32, 32]]


def test_templates_become_prompts_of_both_branches_and_captions_stay_alike(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    params = make_training_params(templates=("a {class} {pt1}, {caption}",), class_word="red")
    backbone = load_backbone(BaseModelFiles(tiny_base_model), CPU)
    prompts = start_concept(backbone, params, 1, 0).prompts
    images = [("a red cat", picture())]
    data = training_data(backbone, prompts, picture(), MASK, images, params, "blue background")
    expected = prompts.tokenize(["a red my-fox-neg, blue background", "a red my-fox, blue background"]).ids
    assert torch.equal(data.reference.tokens.ids, expected[None])
    assert data.regularization is not None
    assert torch.equal(data.regularization.tokens.ids, prompts.tokenize(["a red cat", "a red cat"]).ids[None])
    assert data.regularization.mean.shape == data.reference.mean.shape == (1, 4, 8, 8)


def test_caption_transforms_change_the_caption_alike_in_both_branches(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    params = make_training_params(templates=("{pt1}, {caption}",), caption_transforms=[{"tag_erase": 0.5}])
    backbone = load_backbone(BaseModelFiles(tiny_base_model), CPU)
    prompts = start_concept(backbone, params, 1, 0).prompts
    data = training_data(backbone, prompts, picture(), MASK, [], params, "a cat")
    pairs = {tuple(map(tuple, pair)) for pair in data.reference.tokens.ids.tolist()}
    with_caption = prompts.tokenize(["my-fox-neg, a cat", "my-fox, a cat"]).ids.tolist()
    without = prompts.tokenize(["my-fox-neg", "my-fox"]).ids.tolist()
    assert pairs == {tuple(map(tuple, with_caption)), tuple(map(tuple, without))}


def test_preview_prompts_are_filled_with_the_positive_word(make_training_params: MakeParams) -> None:
    assert fill_prompt("a {pt1}, blue background", make_training_params()) == "a my-fox, blue background"
    assert fill_prompt("one {class}", make_training_params(class_word="fox")) == "one fox"


def test_weights_of_templates_and_captions_reach_the_training(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    params = make_training_params(templates=("a {{pt1}:1.5}, {caption}", "{pt1:0.5}"))
    backbone = load_backbone(BaseModelFiles(tiny_base_model), CPU)
    prompts = start_concept(backbone, params, 1, 0).prompts
    data = training_data(backbone, prompts, picture(), MASK, [("a {red:2} cat", picture())], params, "a {cat:2}")
    assert data.reference.tokens.weights is not None and data.regularization is not None
    negative, positive = data.reference.tokens.weights[0].tolist()
    assert negative[:10] == [1, 1, 1.5, 1.5, 1.5, 1, 1, 2, 1, 1]  # start, a, three vectors, comma, a, cat, end
    assert positive[:10] == [1, 1, 1.5, 1.5, 1, 1, 2, 1, 1, 1]
    assert data.reference.tokens.weights[1, :, 1:3].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert data.regularization.tokens.weights is not None
    assert data.regularization.tokens.weights[0, :, :4].tolist() == [[1, 1, 2, 1]] * 2


def test_a_weight_in_a_template_changes_what_is_learned(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    plain, weighted, weightless = (
        train(tiny_base_model, make_training_params(templates=(template,)))[0].tensors
        for template in ("a {pt1}", "a {{pt1}:1.5}", "a {{pt1}:1}")
    )
    assert all(torch.equal(plain[name], weightless[name]) for name in plain)
    assert not any(torch.equal(plain[name], weighted[name]) for name in plain)


def test_without_trigger_words_a_preset_uses_the_class_word(
    tiny_base_model: Path, make_training_params: MakeParams
) -> None:
    params = make_training_params(words={}, templates="caption", class_word="fox")
    backbone = load_backbone(BaseModelFiles(tiny_base_model), CPU)
    prompts = start_concept(backbone, params, 1, 0).prompts
    data = training_data(backbone, prompts, picture(), MASK, [], params, "blue background")
    expected = prompts.tokenize(["fox, blue background"] * 2).ids
    assert torch.equal(data.reference.tokens.ids, expected[None])
    assert fill_prompt("a {pt1}", params) == "a fox"


def test_a_trigger_word_in_the_caption_is_refused(tiny_base_model: Path, make_training_params: MakeParams) -> None:
    with pytest.raises(InputError, check=says(expected="a caption", got="'a red My-Fox, sitting' with my-fox")):
        check_training(str(tiny_base_model), make_training_params(), "a red My-Fox, sitting")


@pytest.mark.parametrize(
    ("template", "caption", "warned"),
    [
        ("a {pt1}", "sitting", ["sitting", "caption_transforms"]),
        ("a {pt1}, {caption}", "", ["caption_transforms"]),
        ("a {pt1}, {caption:0.9}", "sitting", []),
    ],
)
def test_an_unused_caption_is_logged(
    tiny_base_model: Path,
    make_training_params: MakeParams,
    caplog: pytest.LogCaptureFixture,
    template: str,
    caption: str,
    warned: list[str],
) -> None:
    params = make_training_params(templates=(template,), caption_transforms=("tag_shuffle",))
    check_training(str(tiny_base_model), params, caption)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert all(text in warning for warning, text in zip(warnings, warned, strict=True))


def test_previews_without_a_trigger_word_are_named_in_one_line(
    tiny_base_model: Path, make_training_params: MakeParams, caplog: pytest.LogCaptureFixture
) -> None:
    preview = {"every": 1, "prompts": ["a {pt1}", "two my-foxes", "a my_fox"]}
    check_training(str(tiny_base_model), make_training_params(preview=preview), "")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "2 of 3" in warning
    assert "'two my-foxes'" in warning


def test_a_caption_whose_braces_cannot_be_read_is_refused_before_a_model_is_read(
    make_training_params: MakeParams,
) -> None:
    params = make_training_params(templates=("{pt1}, {caption}",))
    with pytest.raises(InputError, check=says(got="'my-fox-neg, a {cat'", remedy="caption")):
        check_training("nowhere", params, "a {cat")


def test_layers_that_clip_skip_skips_are_not_planned_and_logged(
    tiny_base_model: Path, make_training_params: MakeParams, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        plan = check_training(str(tiny_base_model), make_training_params(clip_skip=1), CAPTION)
    by_name = {group["name"]: group for group in plan["groups"]}
    assert by_name["text_encoder.0.positive"]["num_layers"] == 6  # of 12
    assert any("clip_skip=1" in message and "layers.1.mlp.fc1" in message for message in caplog.messages)


def test_an_empty_history_keeps_its_columns() -> None:
    assert list(history_table([]).columns) == ["step", "loss", "loss_reference", "guidance_scale", "seconds"]


def test_the_plan_depends_on_raw_inputs_only() -> None:
    first = create_pipeline(RecordingTracker()).grouped_nodes[0]
    assert first[0].name == "check_training"  # before the base model is loaded
    raw = {"base_model", "params:training", "params:device", "params:ingestion", "reference_caption", "start_files"}
    assert set(first[0].inputs) == raw


# --------------------------------------------------------------------------------------------- the autoencoder's limit


@pytest.mark.parametrize(("name", "level"), [("fox", "INFO"), ("photograph", "WARNING")])
def test_what_to_expect_of_a_picture_is_said_in_one_line_before_the_training(
    name: str, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = photograph() if name == "photograph" else Image.open(REFERENCES / f"{name}.png").convert("RGB")
    tracker = RecordingTracker()
    with caplog.at_level(logging.INFO, logger=reconstruction.__name__):
        beside = compare_reconstruction(str(EMBEDDED), image.resize((64, 64)), CPU, tracker)
    measured = tracker.metrics[0]["reconstruction/similarity"]
    (said,) = [record for record in caplog.records if record.name == reconstruction.__name__]
    assert said.levelname == level
    assert (measured < reconstruction.LEAST_SIMILARITY) == (level == "WARNING")
    assert f"{measured:.2f}" in said.message
    assert ("--env sd15" in said.message) == ("prompt_database=FILE" in said.message) == (level == "WARNING")
    assert beside.width > 2 * 64


def test_a_similarity_is_not_called_fine_for_a_picture_of_one_colour(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=reconstruction.__name__):
        compare_reconstruction(str(EMBEDDED), Image.new("RGB", (64, 64), "white"), CPU, RecordingTracker())
    (said,) = [record for record in caplog.records if record.name == reconstruction.__name__]
    assert f"{reconstruction.LEAST_SIMILARITY}" not in said.message


def test_the_bundled_pictures_are_all_above_the_threshold() -> None:
    files = sorted(REFERENCES.glob("*.png"))
    assert len(files) > 10
    backbone, evaluator = load_backbone(BaseModelFiles(EMBEDDED), CPU), load_evaluator("efficientnet-lite0")
    for file in files:
        image = Image.open(file).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
        first, second = evaluator.embed([image, reconstruct(backbone, image)])
        assert float(first @ second) > reconstruction.LEAST_SIMILARITY, file.name


def photograph() -> Image.Image:
    """Fine detail everywhere, as in grass, fur or gravel."""
    noise = Image.effect_noise((96, 96), 90)
    detail = Image.merge("RGB", [noise, noise.rotate(90), noise.rotate(180)])
    return Image.blend(Image.linear_gradient("L").resize((96, 96)).convert("RGB"), detail, 0.6)


def test_the_autoencoder_is_looked_at_before_images_are_drawn() -> None:
    names = [node.name for node in register_pipelines()["train"].nodes]
    order = ["check_training", "compare_reconstruction", "make_regularization_set"]
    assert sorted(order, key=names.index) == order


# --------------------------------------------------------------------------------------------- from a concept


@pytest.fixture(scope="module")
def start(tiny_base_model: Path, make_training_params: MakeParams) -> Concept:
    """A concept far from fresh values, with rank 2 and 1 in the UNet."""
    concept, _ = train(tiny_base_model, make_training_params(num_steps=0))
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in concept.tensors.items()}
    return Concept(tensors, concept.metadata)


@pytest.fixture(scope="module")
def start_file(start: Concept, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("start") / "concept.safetensors"
    ConceptDataset(filepath=str(file)).save(start)
    return file


def train_from_start(base_model: Path, params: TrainingParams, plan: dict[str, Any] | None = None) -> Concept:
    plan = plan or check_training(str(base_model), params, CAPTION, CPU, files_of(params))
    return train(base_model, params, plan=plan, start_files=files_of(params))[0]


def files_of(params: TrainingParams) -> dict[str, Callable[[], bytes]]:
    assert params.start_from is not None
    return {params.start_from: Path(params.start_from).read_bytes}


WIDER = {
    "lora_unet": [
        {"lr": 1e-3, "rank": 5, "alpha": 2.0, "branch": "p", "layers": (r"re:.*\.attn.?$", r"re:.*\.ff$")},
        {"lr": 1e-3, "rank": 0.25, "branch": "n", "layers": (r"re:.*\.attn.?$",)},
    ]
}


@pytest.mark.parametrize("changes", [{}, WIDER])
def test_before_the_first_step_a_concept_predicts_as_the_one_it_starts_from(
    tiny_base_model: Path,
    make_training_params: MakeParams,
    start: Concept,
    start_file: Path,
    changes: dict[str, Any],
) -> None:
    params = make_training_params(num_steps=0, start_from=str(start_file), **changes)
    trained = train_from_start(tiny_base_model, params)
    backbone = load_backbone(BaseModelFiles(tiny_base_model), CPU)
    given = {
        "latents": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)),
        "noise": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)),
        "timesteps": torch.tensor([100, 900]),
    }
    predictions = [
        step_values(backbone, concept, "a my-fox", "a my-fox-neg", **given).prediction for concept in (trained, start)
    ]
    fresh, _ = train(tiny_base_model, make_training_params(num_steps=0))
    other = step_values(backbone, fresh, "a my-fox", "a my-fox-neg", **given).prediction
    torch.testing.assert_close(predictions[0], predictions[1], rtol=1e-5, atol=1e-5)
    assert (other - predictions[1]).abs().max() > 0.1


def test_a_concept_trains_on_from_its_start_and_remembers_its_hash(
    tiny_base_model: Path, make_training_params: MakeParams, start: Concept, start_file: Path
) -> None:
    params = {"schedule": CONSTANT, "words_schedule": CONSTANT}
    trained = train_from_start(tiny_base_model, make_training_params(num_steps=1, start_from=str(start_file), **params))
    assert trained.metadata.start_sha256 == hashlib.sha256(start_file.read_bytes()).hexdigest()
    for name, tensor in start.tensors.items():
        assert 0 < (trained.tensors[name] - tensor).abs().max() < 0.02, name  # one step of AdamW


def test_the_plan_shows_what_is_taken_over(
    tiny_base_model: Path, make_training_params: MakeParams, start_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = make_training_params(start_from=str(start_file))
    with caplog.at_level(logging.INFO):
        plan = check_training(str(tiny_base_model), params, CAPTION, CPU, files_of(params))
    assert plan["start"]["sha256"] == hashlib.sha256(start_file.read_bytes()).hexdigest()
    assert plan["start"]["taken_over"]["text_encoder.0.positive"] == 12
    assert plan["start"]["taken_over"]["words.negative.pt1"] == 3
    (line,) = [line for line in caplog.text.splitlines() if line.startswith("positive  text_encoder.0.positive")]
    assert line.split()[-1] == "12"
    assert "start" not in check_training(str(tiny_base_model), make_training_params(), CAPTION)


def test_a_plan_made_for_another_start_is_refused(
    tiny_base_model: Path, make_training_params: MakeParams, start_file: Path
) -> None:
    params = make_training_params(num_steps=0, start_from=str(start_file))
    plan = check_training(str(tiny_base_model), params, CAPTION, CPU, files_of(params))
    changed = plan | {"start": plan["start"] | {"sha256": "another"}}
    for other in (changed, check_training(str(tiny_base_model), make_training_params(), CAPTION)):
        with pytest.raises(InputError, check=says(expected="training_plan", remedy="check_training")):
            train_from_start(tiny_base_model, params, other)


def test_the_path_of_the_start_is_not_part_of_the_concept(
    tiny_base_model: Path, make_training_params: MakeParams, start_file: Path, tmp_path: Path
) -> None:
    elsewhere = shutil.copy(start_file, tmp_path / "other.safetensors")
    one, other = (
        train_from_start(tiny_base_model, make_training_params(num_steps=0, start_from=str(file)))
        for file in (start_file, elsewhere)
    )
    assert one.metadata == other.metadata


def test_a_start_that_cannot_be_taken_over_is_refused_in_the_plan(
    tiny_base_model: Path,
    other_layout: Path,
    make_training_params: MakeParams,
    start_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", None)
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    narrow = [{"lr": 1e-3, "rank": 1, "layers": (r"re:.*\.attn.?$",), "branch": branch} for branch in "pn"]
    refused = [
        (tiny_base_model, {"start_from": str(tmp_path / "lora.safetensors")}, {"remedy": "--pipeline import"}),
        (other_layout, {}, {"got": "prediction_type (epsilon, not v_prediction)"}),
        (tiny_base_model, {"clip_skip": 1}, {"expected": "training.clip_skip 0", "got": "1"}),
        (tiny_base_model, {"zero_terminal_snr": True}, {"expected": "training.zero_terminal_snr false", "got": "true"}),
        (tiny_base_model, {"lora_unet": narrow}, {"remedy": "training.lora_unet.0.rank to 2"}),
        (tiny_base_model, {"lora_text_encoder": ()}, {"expected": "training.start_from", "got": "text_encoder"}),
    ]
    for model, changes, parts in refused:
        params = make_training_params(**{"start_from": str(start_file), **changes})
        with pytest.raises(InputError, check=says(**parts)):
            check_training(str(model), params, CAPTION, CPU, files_of(params))
