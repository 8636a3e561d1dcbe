"""The frozen base model: its files, loading it, and encoding and decoding images."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from transformers.utils import logging as transformers_logging

from dreamartist_pipeline.backbones.determinism import use_deterministic_algorithms
from dreamartist_pipeline.backbones.families import FAMILIES, Backbone, ModelSource
from dreamartist_pipeline.backbones.fingerprints import fingerprint_of
from dreamartist_pipeline.backbones.known_models import few_step_hint, few_step_kind
from dreamartist_pipeline.backbones.quantization import quantize_linears
from dreamartist_pipeline.core.devices import pick_device, pick_dtype
from dreamartist_pipeline.core.images import to_images, to_tensor
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams
from dreamartist_pipeline.schedulers import ZERO_TERMINAL_SNR

HUB = "hub:"
_INDEX = "model_index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_FINGERPRINT_SUFFIXES = (".json", ".txt", *_WEIGHT_SUFFIXES)
_MODULE_CONFIG = "config.json"  # of a part with weights
_PIXELS_AT_ONCE = 512 * 512  # of one call of the autoencoder, which needs about 0.6 GiB for as many
_VOCABULARY_FILES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})  # either set is enough
transformers_logging.disable_progress_bar()  # it would break the progress bars of a run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModelFiles:
    """A base model that is not loaded: a folder in diffusers' layout, or `hub:owner/name`."""

    path: Path | str

    @property
    def hub_id(self) -> str | None:
        """The Hugging Face id, or None for a folder."""
        return str(self.path).removeprefix(HUB) if str(self.path).startswith(HUB) else None

    @property
    def name(self) -> str:
        """The folder's name without its path, or the hub id."""
        return self.hub_id or Path(self.path).resolve().name

    @property
    def source(self) -> str:
        """The argument of diffusers' `from_pretrained`."""
        return self.hub_id or str(self.path)

    def index(self) -> dict[str, Any]:
        """Return its model_index.json.

        Raises:
            InputError: there is no such file.
            OSError: the hub cannot be reached.
        """
        if self.hub_id is not None:
            return dict(DiffusionPipeline.load_config(self.hub_id))
        _check_has(Path(self.path), [] if (Path(self.path) / _INDEX).is_file() else [_INDEX])
        index: dict[str, Any] = json.loads((Path(self.path) / _INDEX).read_text())
        return index

    def names(self) -> tuple[str, ...]:
        """Return what the model is called: by its folder or hub id, and by the one it was saved from, if it says that.

        Raises:
            InputError: it has no model_index.json.
            OSError: the hub cannot be reached.
        """
        return self.name, str(self.index().get("_name_or_path", ""))

    def family(self) -> type[Backbone]:
        """Return the family of the pipeline that model_index.json names.

        Raises:
            InputError: the file is missing, or no family has that pipeline.
            OSError: the hub cannot be reached.
        """
        class_name = self.index().get("_class_name")
        for family in FAMILIES:
            if class_name in family.pipelines:
                return family
        raise InputError(
            expected=f"a base model of {', '.join(family.family for family in FAMILIES)}",
            got=f"{class_name} in {self.source}",
            remedy="choose another base model",
        )

    def check(self) -> None:
        """Check that the folder is complete and of a supported family; a model of the hub is not checked.

        Raises:
            InputError: there is no folder, a part or file is missing or truncated, or the family is not supported.
        """
        if self.hub_id is not None:
            return
        folder = Path(self.path)
        if not folder.is_dir():
            raise InputError(
                expected=f"the base model's folder at {folder}",
                got="no such folder",
                remedy=f"set base_model to a folder in diffusers' layout, or to {HUB}owner/name",
            )
        parts = self.family().parts()
        _check_has(folder, list(_missing_files(folder, parts)))
        if damaged := [f"{f.parent.name}/{f.name}" for f in _model_files(folder, parts) if not _is_whole(f)]:
            raise InputError(
                expected=f"complete weight files in {folder}",
                got=f"truncated files or Git LFS pointers: {', '.join(damaged)}",
                remedy="download the model again",
            )

    def fingerprint(self) -> str:
        """Return the fingerprint of the weights, see `fingerprint_of`; the id of a model of the hub.

        The weights are read once per process unless the files change.
        """
        if self.hub_id is not None:
            return f"{HUB}{self.hub_id}"
        parts = [part for part, config in self.family().parts().items() if config == _MODULE_CONFIG]
        return _fingerprint(tuple(Path(self.path) / part for part in parts), self.state())

    def old_fingerprint(self) -> str:
        """Return the fingerprint of earlier versions: 16 hex digits over names and bytes of all files."""
        if self.hub_id is not None:
            return f"{HUB}{self.hub_id}"
        digest = hashlib.sha256()
        for name, size, _ in self.state():
            digest.update(f"{name}\n{size}\n".encode())
            with (Path(self.path) / name).open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()[:16]

    def state(self) -> tuple[tuple[str, int, int], ...]:
        """Return (name, size, modification time) of all files; () for a model of the hub."""
        if self.hub_id is not None:
            return ()
        folder = Path(self.path)
        files = _model_files(folder, self.family().parts())
        states = ((file.relative_to(folder).as_posix(), file.stat()) for file in files)
        return tuple(sorted((name, state.st_size, state.st_mtime_ns) for name, state in states))


@functools.cache
def _fingerprint(parts: tuple[Path, ...], _state: tuple[tuple[str, int, int], ...]) -> str:
    return fingerprint_of(parts)


def open_base_model(path: Path | str, device: DeviceParams) -> Backbone:
    """Return the base model from a cache that the process shares; put adapters into its `share_weights()` only.

    It is loaded again when its files change, or for another device or dtype. The cache keeps two.

    Raises:
        InputError: see `load_backbone`.
    """
    files = BaseModelFiles(str(path))
    files.check()
    if device.deterministic:
        use_deterministic_algorithms()
    return _opened(files, files.state(), device.model_copy(update={"device": str(pick_device(device))}))


@functools.lru_cache(maxsize=2)  # one to train and generate with, one in float32 on the CPU to check exports
def _opened(files: BaseModelFiles, _state: tuple[tuple[str, int, int], ...], device: DeviceParams) -> Backbone:
    log.info("Loading the base model %s on %s in %s.", files.name, device.device, device.dtype)
    return load_backbone(files, device)


def load_backbone(files: BaseModelFiles, device: DeviceParams) -> Backbone:
    """Load every part of the base model, frozen and in eval mode.

    Raises:
        InputError: the folder is incomplete or cannot be read, the hub cannot be reached, there is no such device, or
            the model is not supported.
    """
    chosen = pick_device(device)
    return _load(files, chosen, pick_dtype(device, chosen), quantize=device.quantize == "int8")


def load_outline(files: BaseModelFiles, dtype: torch.dtype = torch.float32, quantize: bool = False) -> Backbone:
    """Return the base model on the meta device, without weights, to check parameters and files against.

    Raises:
        InputError: see `load_backbone`.
    """
    return _load(files, torch.device("meta"), dtype, quantize)


def _load(files: BaseModelFiles, device: torch.device, dtype: torch.dtype, quantize: bool) -> Backbone:
    files.check()
    with _readable(files):
        source = ModelSource(files.name, files.fingerprint(), files.source, local_files_only=files.hub_id is None)
        model = files.family().load(source, device, dtype)
        for network in model.networks.values() if quantize else ():
            quantize_linears(network)
        _warn_of_few_steps(files, model)
        return model


def _warn_of_few_steps(files: BaseModelFiles, model: Backbone) -> None:
    configs = [getattr(network, "config", None) for network in model.networks.values()]
    takes_guidance = any(getattr(config, "time_cond_proj_dim", None) is not None for config in configs)
    if kind := few_step_kind(files.index(), files.names(), takes_guidance):
        _warn_once(few_step_hint(kind, files.name, takes_guidance))


@functools.cache
def _warn_once(text: str) -> None:
    """Log a warning the first time in a process: a run opens its base model several times."""
    log.warning("%s", text)


@torch.no_grad()
def encode_images(backbone: Backbone, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation `[B, C, h, w]` of the latents of `images` `[B, 3, H, W]` in [-1, 1].

    Both are float32 and multiplied by the model's scaling factor: latents are `mean + std · noise`.
    """
    scale = float(backbone.autoencoder.config.scaling_factor)
    at_once = max(1, _PIXELS_AT_ONCE // images[0, 0].numel())
    parts = [
        backbone.autoencoder.encode(part.to(backbone.device, torch.float32)).latent_dist
        for part in images.split(at_once)
    ]
    return torch.cat([part.mean for part in parts]) * scale, torch.cat([part.std for part in parts]) * scale


@torch.no_grad()
def decode_latents(backbone: Backbone, latents: torch.Tensor) -> torch.Tensor:
    """Return the images `[B, 3, H, W]`, float32 in [-1, 1], of latents `[B, C, h, w]`."""
    at_once = max(1, _PIXELS_AT_ONCE // (latents[0, 0].numel() * backbone.latent_scale**2))
    return torch.cat([decode_with_gradients(backbone, part) for part in latents.split(at_once)]).clamp(-1, 1)


def decode_with_gradients(backbone: Backbone, latents: torch.Tensor) -> torch.Tensor:
    """Return the images of `decode_latents`, not clamped and differentiable with respect to the latents."""
    scale = float(backbone.autoencoder.config.scaling_factor)
    decoded: torch.Tensor = backbone.autoencoder.decode(latents.float() / scale, return_dict=False)[0]
    return decoded


def reconstruct(backbone: Backbone, image: Image) -> Image:
    """Return an image after encoding and decoding: the best that a concept can reach."""
    mean, _ = encode_images(backbone, to_tensor([image]))
    return to_images(decode_latents(backbone, mean))[0]


def with_zero_terminal_snr(backbone: Backbone) -> Backbone:
    """Return the base model with a noise schedule of zero terminal SNR (Lin et al. 2023), weights shared.

    Sampling then starts at the last timestep (`timestep_spacing: trailing`), as this schedule requires.

    Raises:
        InputError: the model predicts ε.
    """
    defaults = backbone.scheduler_config.get("_use_default_values", ())  # diffusers ignores values named there
    kept_defaults = {"_use_default_values": [name for name in defaults if name not in ZERO_TERMINAL_SNR]}
    return dataclasses.replace(
        backbone,
        objective=backbone.objective.with_zero_terminal_snr(),
        scheduler_config={**backbone.scheduler_config, **ZERO_TERMINAL_SNR, **kept_defaults},
    )


@contextmanager
def _readable(files: BaseModelFiles) -> Iterator[None]:
    """Convert errors of diffusers and transformers on files that cannot be downloaded or read into an InputError."""
    try:
        yield
    except OSError as error:
        place = f"the Hugging Face hub as {files.hub_id}" if files.hub_id else str(files.path)
        raise InputError(
            expected=f"a readable base model in {place}",
            got=f"{error}",
            remedy="correct base_model, or download the model again; a hub id needs the network or a cached model",
        ) from error


def _check_has(folder: Path, missing: list[str]) -> None:
    """Raise an InputError if anything is missing."""
    if missing:
        raise InputError(
            expected=f"a complete base model in {folder}",
            got=f"one without {', '.join(missing)}",
            remedy="copy the missing files, or download the model again",
        )


def _missing_files(folder: Path, parts: Mapping[str, str]) -> Iterator[str]:
    for part, config in parts.items():
        if not (folder / part).is_dir():
            yield f"{part}/"
            continue
        names = {file.name for file in (folder / part).iterdir()}
        if config not in names:
            yield f"{part}/{config}"
        if config == _MODULE_CONFIG and not any(Path(name).suffix in _WEIGHT_SUFFIXES for name in names):
            yield f"{part}/*.safetensors"
        if part.startswith("tokenizer") and not any(files <= names for files in _VOCABULARY_FILES):
            yield f"{part}/tokenizer.json (or vocab.json and merges.txt)"


def _is_whole(file: Path) -> bool:
    """Return whether a safetensors file has the length given in its header; True for other files."""
    if file.suffix != ".safetensors":
        return True
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length < size - 8:
            return False
        header = json.loads(stream.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def _model_files(folder: Path, parts: Mapping[str, str]) -> Iterator[Path]:
    yield folder / _INDEX
    for part in parts:
        yield from (f for f in (folder / part).rglob("*") if f.is_file() and f.suffix in _FINGERPRINT_SUFFIXES)
