"""Models of the Hugging Face hub: downloaded once, then opened from the cache without network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from dreamartist_pipeline.backbones.base_model import BaseModelFiles, files_for, load_backbone, open_base_model
from dreamartist_pipeline.core.model_location import HubId, ModelLocation
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams
from hub_server import COMMIT, hub_server
from refusals import says
from single_files import write_single_file
from tiny_models import build_sd1

CPU = DeviceParams(device="cpu")
HALF = DeviceParams(device="cpu", dtype="bfloat16")
NOWHERE = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with weights in two precisions, and with files that are not needed."""
    folder = build_sd1(tmp_path_factory.mktemp("hub") / "repository")
    for file in list(folder.rglob("*.safetensors")):
        save_file({name: t.half() for name, t in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
        torch.save(load_file(file), file.with_suffix(".bin"))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"large")
    (folder / "README.md").write_text("A model.")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    connect(monkeypatch, NOWHERE)
    return tmp_path / "cache"


def connect(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def weights_in(names: list[str]) -> set[str]:
    return {name for name in names if name.endswith((".safetensors", ".bin"))}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hub:owner/name", HubId("owner/name")),
        ("hub:owner/name@refs/pr/1", HubId("owner/name", None, "refs/pr/1")),
        ("hub:owner/name/sub/file.safetensors@fp16", HubId("owner/name", "sub/file.safetensors", "fp16")),
        ("owner/name", None),
        (r"C:\models\name", None),
    ],
)
def test_ids_name_repository_file_and_revision(path: str, expected: HubId | None) -> None:
    assert HubId.in_path(path) == expected
    assert expected is None or f"hub:{expected}" == path


@pytest.mark.parametrize(("device", "suffix"), [(CPU, "model.safetensors"), (HALF, ".fp16.safetensors")])
def test_a_model_is_downloaded_once_in_the_precision_of_the_run_and_opens_without_network(
    repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, device: DeviceParams, suffix: str
) -> None:
    with hub_server(repository) as (address, downloaded):
        connect(monkeypatch, address)
        backbone = open_base_model("hub:owner/name", device)
    weights = weights_in(downloaded)
    assert {Path(name).parent.name for name in weights} == {"unet", "vae", "text_encoder"}
    assert len(weights) == 3
    assert all(name.endswith(suffix) for name in weights)
    assert "README.md" not in downloaded
    connect(monkeypatch, NOWHERE)
    again = load_backbone(BaseModelFiles("hub:owner/name"), CPU)
    assert again.name == backbone.name == "owner/name"
    assert again.fingerprint == backbone.fingerprint
    if device is CPU:
        assert again.fingerprint == BaseModelFiles(repository).fingerprint()
    assert (cache / "models--owner--name" / "refs" / "main").read_text() == COMMIT


def test_a_revision_and_a_single_file_are_downloaded_by_name(
    repository: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served").mkdir()
    write_single_file(repository, tmp_path / "served" / "model.safetensors")
    location = ModelLocation("hub:owner/name/model.safetensors@v2", config=str(repository))
    with hub_server(tmp_path / "served") as (address, _):
        connect(monkeypatch, address)
        BaseModelFiles(location).check()
        with pytest.raises(InputError, check=says(expected="model_index.json", remedy="name/model.safetensors")):
            BaseModelFiles("hub:owner/name").check()
    connect(monkeypatch, NOWHERE)
    backbone = load_backbone(BaseModelFiles(location), CPU)
    assert backbone.name == "owner/name/model.safetensors@v2"
    assert backbone.fingerprint == BaseModelFiles(repository).fingerprint()


def test_an_autoencoder_of_the_hub_is_downloaded(
    repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = ModelLocation(str(repository), vae="hub:owner/name")
    with hub_server(repository / "vae") as (address, downloaded):
        connect(monkeypatch, address)
        assert BaseModelFiles(location).fingerprint() == BaseModelFiles(repository).fingerprint()
    assert sorted(downloaded) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_an_incomplete_download_is_continued(repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server(repository) as (address, downloaded):
        connect(monkeypatch, address)
        BaseModelFiles("hub:owner/name").check()
        file = cache / "models--owner--name" / "snapshots" / COMMIT / "unet" / "diffusion_pytorch_model.safetensors"
        file.unlink()
        downloaded.clear()
        BaseModelFiles("hub:owner/name").check()
    assert weights_in(downloaded) <= {"unet/diffusion_pytorch_model.safetensors"}
    assert file.exists()


def test_a_model_of_an_unknown_family_is_refused_before_its_weights_are_downloaded(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "flux" / "flux1-dev.safetensors").write_bytes(b"large")
    with hub_server(tmp_path / "flux") as (address, downloaded):
        connect(monkeypatch, address)
        with pytest.raises(InputError, check=says(expected="stable-diffusion", got="FluxPipeline")):
            BaseModelFiles("hub:owner/name").check()
    assert downloaded == ["model_index.json"]


@pytest.mark.parametrize("is_offline", [False, True], ids=["unreachable", "HF_HUB_OFFLINE"])
def test_without_network_and_cache_one_message_names_both(
    cache: Path, monkeypatch: pytest.MonkeyPatch, is_offline: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    parts = says(expected="owner/name", got="no connection", remedy="HF_HUB_OFFLINE")
    with pytest.raises(InputError, check=parts) as error:
        BaseModelFiles("hub:owner/name").check()
    assert str(cache) in error.value.expected
    assert "HF_TOKEN" in error.value.remedy
    assert f"{NOWHERE}/owner/name" in error.value.remedy


@pytest.mark.parametrize(
    ("code", "got"),
    [
        ("GatedRepo", "gated"),
        ("RepoNotFound", "no such repository"),
        ("RevisionNotFound", "no such revision"),
    ],
)
def test_what_the_hub_refuses_is_named(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, code: str, got: str
) -> None:
    with hub_server(tmp_path, refuse=code) as (address, _):
        connect(monkeypatch, address)
        with pytest.raises(InputError, check=says(expected="owner/name", got=got, remedy=f"{address}/owner/name")):
            files_for("hub:owner/name", CPU).check()


def test_a_copied_snapshot_keeps_its_name(repository: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--stabilityai--sd-turbo" / "snapshots" / COMMIT
    shutil.copytree(repository, snapshot)
    assert BaseModelFiles(snapshot).name == "stabilityai/sd-turbo"
