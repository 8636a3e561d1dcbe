"""Fixtures for all tests: one tiny, random, but complete base model in diffusers' layout."""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing.spawn
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamartist_pipeline.core.memory import StepCount
from dreamartist_pipeline.params import EmbeddedModelSize, TrainingParams
from warm_processes import warm_python

TINY_SIZE = EmbeddedModelSize(
    image_px=32,
    latent_channels=4,
    autoencoder_channels=(8, 8, 8),  # two halvings: latents are 8 × 8
    autoencoder_norm_groups=8,
    unet_channels=(16, 24),
    unet_attention=(False, True),
    unet_norm_groups=8,
    text_width=32,
    text_layers=2,
    max_tokens=24,
)
_CORPUS = ("a red cat", "a blue dog", "a photo of a green bird", "background", "style", "fox", "the yellow house")


_MEMORY, _ROOM_BYTES = Path("/dev/shm"), 4 * 2**30

if (
    _MEMORY.is_dir()
    and shutil.disk_usage(_MEMORY).free > _ROOM_BYTES
    and not os.statvfs(_MEMORY).f_flag & os.ST_NOEXEC  # tests make programs
):  # databases wait for disks most of their time
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

_SLOW_FOLDERS = ("integration", "notebooks", "benchmarks", "tracking", "pipelines", "backbones")


def pytest_xdist_auto_num_workers() -> int:
    """Start one process more than there are cores: long tests wait for servers and for commands in other processes."""
    return (os.cpu_count() or 1) + 1


def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Let the processes of pytest start without importing the large libraries; with a GPU, they are no forks."""
    python = warm_python()  # the same for all of them
    for spec in specs:
        if spec.popen and not torch.cuda.is_available():
            spec.python = python


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the folders with long tests first, so that no process of several is left with one of them at the end."""
    items.sort(key=lambda item: item.path.parent.name not in _SLOW_FOLDERS)  # stable


def pytest_collection_finish() -> None:
    """Leave the half a million objects of the libraries out of garbage collections, which take a tenth of the time."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Run tests in one thread: the models are tiny and the machine may be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def steps_are_counted() -> Iterator[bool]:
    """Let trainings be planned without counting the memory of a step, which takes longer than tiny steps do.

    A module that tests the plans replaces this fixture.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dreamartist_pipeline.pipelines.training.memory.count_step", lambda *_: StepCount(1, 1, 1))
        yield False


@pytest.fixture
def warm_ranks() -> Iterator[None]:
    """Let the ranks of a process group start without importing the large libraries."""
    before = multiprocessing.spawn.get_executable()
    multiprocessing.set_executable(warm_python())
    yield
    multiprocessing.set_executable(before)


@pytest.fixture(scope="session")
def tiny_base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a complete base model with random weights, v-prediction, 32 px images.

    Do not write into it; copy it first.
    """
    return build_tiny_base_model(tmp_path_factory.mktemp("base_model") / "tiny", seed=0)


def build_tiny_base_model(folder: Path, seed: int, size: EmbeddedModelSize = TINY_SIZE) -> Path:
    """Write a tiny base model to `folder` and return it; another seed gives other weights."""
    from diffusers import DDIMScheduler

    from dreamartist_pipeline.embedded import model as embedded

    tokenizer = embedded.build_tokenizer(_CORPUS * 2, folder / "tokenizer", size.max_tokens)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet, autoencoder = embedded.build_unet(size), embedded.build_autoencoder(size)
        text_encoder = embedded.build_text_encoder(size, tokenizer)
        torch.nn.init.normal_(unet.conv_out.weight, std=0.1)  # an untrained UNet predicts zero: nothing to learn from
        for module in (*autoencoder.modules(), *text_encoder.modules()):
            if type(module).__name__ == "ResnetBlock2D":
                torch.nn.init.normal_(module.conv2.weight, std=0.1)
            if isinstance(module, torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=0.5)  # the default 0.02 drowns words in their positions
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = {"unet": unet, "vae": autoencoder, "text_encoder": text_encoder, "scheduler": scheduler}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what builds a model of `tiny_models.BUILDERS` once, by its name. Do not write into its folder."""
    folders = tmp_path_factory.mktemp("tiny_models")

    @functools.cache
    def build(name: str) -> Path:
        from tiny_models import BUILDERS

        return BUILDERS[name](folders / name)

    return build


@pytest.fixture(scope="session")
def other_tiny_base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a base model of the same shape with other weights."""
    return build_tiny_base_model(tmp_path_factory.mktemp("base_model") / "other", seed=1)


@pytest.fixture(scope="session")
def base_model_of_earlier_concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a base model of the shape that the files in tests/core/concepts are for."""
    size = TINY_SIZE.model_copy(update={"unet_channels": (16, 32), "unet_attention": (True, True)})
    return build_tiny_base_model(tmp_path_factory.mktemp("base_model") / "tiny", seed=0, size=size)


@pytest.fixture(scope="session")
def other_layout(tmp_path_factory: pytest.TempPathFactory, tiny_base_model: Path) -> Path:
    """Return the folder of a base model with the same weights, of which the scheduler says that it predicts ε."""
    folder = Path(shutil.copytree(tiny_base_model, tmp_path_factory.mktemp("base_model") / "epsilon"))
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "epsilon"}))
    return folder


@pytest.fixture(scope="session")
def make_training_params() -> Callable[..., TrainingParams]:
    """Return what makes parameters of a short DreamArtist++ training; keywords replace single values."""

    def make(**changes: Any) -> TrainingParams:
        attention, text = (r"re:.*\.attn.?$",), (r"re:.*self_attn$", r"re:.*mlp$")
        values: dict[str, Any] = {
            "num_steps": 3,
            "batch_size": 2,
            "regularization_batch_size": 1,
            "templates": ("a photo of a {pt1}", "the {pt1}"),
            "words": {"names": {"pt1": ("my-fox", "my-fox-neg")}, "num_vectors": (2, 3)},
            "lora_unet": [
                {"lr": 1e-3, "rank": 2, "branch": "p", "layers": attention},
                {"lr": 4e-4, "rank": 1, "branch": "n", "layers": attention},
            ],
            "lora_text_encoder": [
                {"lr": 1e-3, "rank": 1, "branch": "p", "layers": text},
                {"lr": 1e-3, "rank": 1, "branch": "n", "layers": text},
            ],
        }
        return TrainingParams(**{**values, **changes})

    return make
