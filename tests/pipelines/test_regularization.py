"""The regularization set: drawn once by the base model, reused, continued after an interruption."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest

from dreamartist_pipeline.backbones import base_model as base_model_module
from dreamartist_pipeline.backbones import concepts
from dreamartist_pipeline.backbones.base_model import BaseModelFiles, load_backbone
from dreamartist_pipeline.core import processes
from dreamartist_pipeline.core.image_set import describe_images
from dreamartist_pipeline.datasets.image_set import ImageSetDataset
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import (
    BucketParams,
    DeviceParams,
    IngestionParams,
    RegularizationParams,
    SamplerParams,
    StrengthParams,
)
from dreamartist_pipeline.pipelines.regularization import create_pipeline, nodes
from dreamartist_pipeline.pipelines.regularization.nodes import make_regularization_set
from image_sets import set_dataset
from refusals import says

PROMPTS = ["a red cat", "a blue dog", "a green bird"]
PARAMS = RegularizationParams(sampler=SamplerParams(num_inference_steps=2, batch_size=2), seed=5)
IN_SINGLE_BATCHES = PARAMS.model_copy(update={"sampler": SamplerParams(num_inference_steps=2, batch_size=1)})
CPU = DeviceParams(device="cpu")
INGESTION = IngestionParams(bucket=BucketParams(side_px=32, multiple_px=8))  # the size of the tiny base model


def make(
    base_model: Path,
    folder: Path,
    params: RegularizationParams = PARAMS,
    ingestion: IngestionParams = INGESTION,
    device: DeviceParams = CPU,
) -> ImageSetDataset:
    """Draw a set as the node and its dataset do."""
    made = set_dataset(folder / "fox.json", folder / "sets")
    made.save(make_regularization_set(base_model.as_posix(), PROMPTS, params, ingestion, device))
    return made


def files_in(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.*") if file.is_file()}


# --------------------------------------------------------------------------------------------- drawing


def test_the_base_model_draws_one_image_per_prompt(tiny_base_model: Path, tmp_path: Path) -> None:
    made = make(tiny_base_model, tmp_path).load()

    assert [caption for caption, _ in made] == PROMPTS
    assert [read().size for _, read in made] == [(32, 32)] * 3
    manifest = json.loads((tmp_path / "fox.json").read_text())
    assert manifest["num_images"] == 3
    assert manifest["base_model_fingerprint"] == BaseModelFiles(tiny_base_model).fingerprint()
    assert json.loads((tmp_path / "sets" / manifest["key"] / "manifest.json").read_text()) == manifest


def test_image_i_is_the_base_models_image_of_prompt_i_and_seed_i(tiny_base_model: Path, tmp_path: Path) -> None:
    made = make(tiny_base_model, tmp_path).load()
    backbone = load_backbone(BaseModelFiles(tiny_base_model), CPU)
    loaded = concepts.attach(backbone, None, StrengthParams())
    expected = concepts.generate(backbone, loaded, PROMPTS, "", [5, 6, 7], PARAMS.sampler)

    assert [read().tobytes() for _, read in made] == [image.tobytes() for image in expected]


@pytest.mark.usefixtures("warm_ranks")
def test_two_processes_draw_the_set_of_one(
    tiny_base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_WORTH_STARTING_S", 0)
    for name, device in (("one", CPU), ("two", CPU.model_copy(update={"processes": 2}))):
        make(tiny_base_model, tmp_path / name, IN_SINGLE_BATCHES, device=device)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")


def test_a_whole_set_is_used_again_without_loading_the_base_model(
    tiny_base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(tiny_base_model, tmp_path)
    before = files_in(tmp_path)
    monkeypatch.setattr(base_model_module, "open_base_model", lambda *_: pytest.fail("loaded"))

    with caplog.at_level(logging.INFO):
        make(tiny_base_model, tmp_path)

    assert files_in(tmp_path) == before
    assert "3 images" in caplog.text


def manifest_of(fingerprint: str) -> dict[str, Any]:
    """Return the manifest of images of the base model's size."""
    return describe_images(fingerprint, PROMPTS, "", PARAMS.sampler, PARAMS.seed, CPU)


def of_an_earlier_version(folder: Path, fingerprint: str) -> str:
    """Turn the only set into one that is named after another fingerprint, and return its key."""
    old = manifest_of(fingerprint)
    (file,) = (folder / "sets").glob("*/manifest.json")
    file.write_text(json.dumps(old))
    file.parent.rename(folder / "sets" / old["key"])
    return str(old["key"])


def key_in_use(folder: Path) -> str:
    return str(json.loads((folder / "fox.json").read_text())["key"])


def test_a_set_of_an_earlier_version_is_used_again(
    tiny_base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tiny_base_model, tmp_path)
    key = of_an_earlier_version(tmp_path, BaseModelFiles(tiny_base_model).old_fingerprint())
    before = files_in(tmp_path / "sets")
    monkeypatch.setattr(base_model_module, "open_base_model", lambda *_: pytest.fail("loaded"))

    again = make(tiny_base_model, tmp_path)

    assert key_in_use(tmp_path) == key
    assert [caption for caption, _ in again.load()] == PROMPTS
    assert {name for name in files_in(tmp_path / "sets") if not name.endswith(".lock")} == {
        name for name in before if not name.endswith(".lock")
    }


def test_a_set_of_an_earlier_version_and_another_base_model_is_not(tiny_base_model: Path, tmp_path: Path) -> None:
    make(tiny_base_model, tmp_path)
    key = of_an_earlier_version(tmp_path, "0123456789abcdef")
    make(tiny_base_model, tmp_path)
    assert key_in_use(tmp_path) != key


def test_earlier_versions_fingerprint_is_only_asked_for_where_it_may_help(
    tiny_base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseModelFiles, "old_fingerprint", lambda _: pytest.fail("read all files"))
    make(tiny_base_model, tmp_path)
    make(tiny_base_model, tmp_path)
    make(tiny_base_model, tmp_path, PARAMS.model_copy(update={"seed": 6}))


def test_no_prompts_make_an_empty_set_without_loading_the_base_model(
    tiny_base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model_module, "open_base_model", lambda *_: pytest.fail("loaded"))
    made = make_regularization_set(tiny_base_model.as_posix(), [], PARAMS, INGESTION, CPU)
    dataset = set_dataset(tmp_path / "fox.json", tmp_path / "sets")

    dataset.save(made)

    assert len(dataset.load()) == 0


def test_an_interrupted_set_is_continued_to_the_same_bytes(
    tiny_base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = concepts.generate

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if args[2] == PROMPTS[2:]:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(concepts, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tiny_base_model, tmp_path / "continued")
    asked: list[list[str]] = []
    monkeypatch.setattr(
        concepts, "generate", lambda *args, **options: asked.append(args[2]) or generate(*args, **options)
    )

    make(tiny_base_model, tmp_path / "continued")

    assert asked == [PROMPTS[2:]]
    monkeypatch.undo()
    make(tiny_base_model, tmp_path / "at_once")
    assert files_in(tmp_path / "continued") == files_in(tmp_path / "at_once")


def test_other_parameters_make_another_set_and_leave_the_first(tiny_base_model: Path, tmp_path: Path) -> None:
    make(tiny_base_model, tmp_path)
    first = files_in(tmp_path / "sets")

    make(tiny_base_model, tmp_path, PARAMS.model_copy(update={"seed": 6}))

    both = files_in(tmp_path / "sets")
    assert first.items() < both.items()
    assert len({name.split("/")[0] for name in both if name.endswith(".png")}) == 2


def test_an_incomplete_base_model_is_refused_before_anything_is_written(tiny_base_model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_base_model, tmp_path / "broken")
    shutil.rmtree(broken / "vae")

    with pytest.raises(InputError, check=says(expected="/broken", got="vae")):
        make(broken, tmp_path)

    assert not (tmp_path / "sets").exists()


SMALL = IngestionParams(bucket=BucketParams(side_px=16, multiple_px=8, keep_aspect=True))


@pytest.mark.parametrize(
    ("side_px", "ingestion", "expected"), [(None, INGESTION, 32), (None, SMALL, 16), (24, SMALL, 24), (32, SMALL, 32)]
)
def test_images_are_squares_of_the_configured_side_or_of_the_references(
    side_px: int | None, ingestion: IngestionParams, expected: int, tiny_base_model: Path, tmp_path: Path
) -> None:
    made = make(tiny_base_model, tmp_path, PARAMS.model_copy(update={"side_px": side_px}), ingestion).load()
    assert {read().size for _, read in made} == {(expected, expected)}


def test_only_images_of_another_size_than_the_base_models_get_another_name(
    tiny_base_model: Path, tmp_path: Path
) -> None:
    earlier = manifest_of(BaseModelFiles(tiny_base_model).fingerprint())
    assert "side_px" not in earlier  # as in sets of earlier versions
    make(tiny_base_model, tmp_path, ingestion=INGESTION)
    assert key_in_use(tmp_path) == earlier["key"]
    make(tiny_base_model, tmp_path, PARAMS.model_copy(update={"side_px": 32}), SMALL)
    assert key_in_use(tmp_path) == earlier["key"]
    make(tiny_base_model, tmp_path, ingestion=SMALL)
    assert json.loads((tmp_path / "fox.json").read_text())["side_px"] == 16
    assert key_in_use(tmp_path) != earlier["key"]


def test_the_cost_of_the_set_is_logged_after_the_first_batch(
    tiny_base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter((0.0, 60.0, 60.0, 90.0))  # 2 images of the first batch take 60 s
    monkeypatch.setattr(nodes, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level(logging.INFO):
        make(tiny_base_model, tmp_path)
    (message,) = [record.getMessage() for record in caplog.records if record.name == nodes.__name__]
    assert "1 images of 32 px" in message and "0:00:30" in message and "30 s each" in message


# --------------------------------------------------------------------------------------------- the key


def key_of(
    fingerprint: str = "f00d",
    prompts: tuple[str, ...] = ("a cat", "a dog"),
    params: RegularizationParams = PARAMS,
    device: DeviceParams = CPU,
) -> str:
    manifest = describe_images(fingerprint, prompts, params.negative_prompt, params.sampler, params.seed, device)
    return str(manifest["key"])


def with_sampler(**changes: Any) -> RegularizationParams:
    return PARAMS.model_copy(update={"sampler": PARAMS.sampler.model_copy(update=changes)})


def test_equal_ingredients_give_equal_keys() -> None:
    assert key_of() == key_of(params=RegularizationParams.model_validate(PARAMS.model_dump()))


def test_a_set_of_a_scheduler_without_options_keeps_the_name_of_earlier_versions() -> None:
    sampler = manifest_of("beef")["sampler"]
    assert set(sampler) == {"scheduler", "num_inference_steps", "guidance_scale", "batch_size"}


@pytest.mark.parametrize(
    "other",
    [
        {"fingerprint": "beef"},
        {"prompts": ("a cat", "a bee")},
        {"prompts": ("a dog", "a cat")},
        {"prompts": ("a cat",)},
        {"params": PARAMS.model_copy(update={"seed": 6})},
        {"params": PARAMS.model_copy(update={"negative_prompt": "blurry"})},
        {"params": with_sampler(num_inference_steps=3)},
        {"params": with_sampler(guidance_scale=5.0)},
        {"params": with_sampler(scheduler="ddim")},
        {"params": with_sampler(scheduler_options={"use_karras_sigmas": False})},
        {"params": with_sampler(batch_size=4)},
        {"device": DeviceParams(device="cpu", dtype="bfloat16")},
    ],
)
def test_every_ingredient_changes_the_key(other: dict[str, Any]) -> None:
    assert key_of(**other) != key_of()


def test_kedro_can_resolve_the_hints_of_the_node_and_validate_its_parameters() -> None:
    assert get_type_hints(make_regularization_set)["params"] is RegularizationParams


def test_the_stage_goes_from_base_model_and_prompts_to_the_set() -> None:
    stage = create_pipeline()

    assert stage.inputs() == {
        "base_model",
        "regularization_prompts",
        "params:regularization",
        "params:ingestion",
        "params:device",
    }
    assert stage.outputs() == {"regularization_set"}
