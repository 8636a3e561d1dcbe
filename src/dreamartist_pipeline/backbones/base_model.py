"""The frozen base model: its files, loading it, and encoding and decoding images."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers.utils import logging as transformers_logging

from dreamartist_pipeline.backbones.determinism import use_deterministic_algorithms
from dreamartist_pipeline.backbones.families import FAMILIES, Backbone, ModelSource
from dreamartist_pipeline.backbones.fingerprints import fingerprint_of
from dreamartist_pipeline.backbones.holding.finding import find_parts, name_of
from dreamartist_pipeline.backbones.holding.parts import ModelParts, has_weights
from dreamartist_pipeline.backbones.known_models import few_step_hint, few_step_kind
from dreamartist_pipeline.backbones.quantization import quantize_linears
from dreamartist_pipeline.core.devices import pick_device, pick_dtype
from dreamartist_pipeline.core.images import to_images, to_tensor
from dreamartist_pipeline.core.model_location import HUB, ModelLocation
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import DeviceParams
from dreamartist_pipeline.schedulers import ZERO_TERMINAL_SNR

_PIXELS_AT_ONCE = 512 * 512  # of one call of the autoencoder, which needs about 0.6 GiB for as many
transformers_logging.disable_progress_bar()  # it would break the progress bars of a run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModelFiles:
    """A base model that is not loaded, however it is held: a folder, a single file, or an id of the hub.

    Attributes:
        path: where it is.
        half: whether a run is in half precision: of a model of the hub, smaller files are downloaded.
    """

    path: Path | str | ModelLocation
    half: bool = False

    @property
    def location(self) -> ModelLocation:
        """Where it is."""
        return ModelLocation.of(self.path)

    @property
    def name(self) -> str:
        """The name of its folder or file without a path, or the hub id; with that of another autoencoder."""
        vae = self.location.vae
        return name_of(self.location.path) + (f" + {name_of(vae)}" if vae is not None else "")

    def parts(self) -> ModelParts:
        """Return its configurations, tokenizers and weights; a model of the hub is downloaded if it is not cached.

        Raises:
            InputError: there is no model at its location, or the hub cannot be reached.
        """
        return find_parts(self.location, lambda index, place: _family_of(index, place).parts(), half=self.half)

    def index(self) -> dict[str, Any]:
        """Return its model_index.json, or that of its kind.

        Raises:
            InputError: there is none.
        """
        return self.parts().index()

    def names(self) -> tuple[str, ...]:
        """Return what the model is called: by its location, and by what its files say.

        Raises:
            InputError: see `parts`.
        """
        return name_of(self.location.path), *self.parts().names()

    def family(self) -> type[Backbone]:
        """Return its family.

        Raises:
            InputError: there is no model_index.json, or no family has that pipeline or this model of it.
        """
        parts = self.parts()
        return _family_of(parts.index(), parts.place)

    def check(self) -> None:
        """Check that the model is complete and of a supported family, without reading weights.

        Raises:
            InputError: a part or file is missing or truncated, or the family is not supported.
        """
        self.parts().check(self.family().parts())

    def fingerprint(self) -> str:
        """Return the fingerprint of the weights, see `fingerprint_of`.

        Where there are weights in full and in half precision, it is that of the former, whichever a run reads. The
        weights are read once per process unless the files change.
        """
        return _fingerprint(self, self.state())

    def old_fingerprint(self) -> str:
        """Return the fingerprint of earlier versions: the hub id, or 16 hex digits over all files."""
        if self.location.path.startswith(HUB):
            return self.location.path
        digest = hashlib.sha256()
        for name, file in self.files():
            digest.update(f"{name}\n{file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()[:16]

    def state(self) -> tuple[tuple[str, int, int], ...]:
        """Return (name, size, modification time) of all files."""
        states = ((name, file.stat()) for name, file in self.files())
        return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)

    def files(self) -> list[tuple[str, Path]]:
        """Return (name, path) of every file that the model is read from; in a folder, names are relative to it."""
        return sorted(self.parts().files(self.family().parts()))


def _family_of(index: Mapping[str, Any], place: str) -> type[Backbone]:
    for family in FAMILIES:
        if index.get("_class_name") in family.pipelines:
            family.check_index(index, place)
            return family
    raise InputError(
        expected=f"a base model of {', '.join(family.family for family in FAMILIES)}",
        got=f"{index.get('_class_name')} in {place}",
        remedy="choose another base model",
    )


@functools.cache
def _fingerprint(files: BaseModelFiles, _state: tuple[tuple[str, int, int], ...]) -> str:
    parts = files.parts()
    return fingerprint_of({part: parts.tensors(part) for part in files.family().parts() if has_weights(part)})


def open_base_model(path: Path | str | ModelLocation, device: DeviceParams) -> Backbone:
    """Return the base model from a cache that the process shares; put adapters into its `share_weights()` only.

    It is loaded again when its files change, or for another device or dtype. The cache keeps two.

    Raises:
        InputError: see `load_backbone`.
    """
    files = files_for(path, device)
    files.check()
    if device.deterministic:
        use_deterministic_algorithms()
    return _opened(files, files.state(), device.model_copy(update={"device": str(pick_device(device))}))


@functools.lru_cache(maxsize=2)  # one to train and generate with, one in float32 on the CPU to check exports
def _opened(files: BaseModelFiles, _state: tuple[tuple[str, int, int], ...], device: DeviceParams) -> Backbone:
    log.info("Loading the base model %s on %s in %s.", files.name, device.device, device.dtype)
    return load_backbone(files, device)


def files_for(path: Path | str | ModelLocation, device: DeviceParams) -> BaseModelFiles:
    """Return the files of a base model for a run on this device."""
    return BaseModelFiles(ModelLocation.of(path), half=device.dtype != "float32")


def load_backbone(files: BaseModelFiles, device: DeviceParams) -> Backbone:
    """Load every part of the base model, frozen and in eval mode.

    Raises:
        InputError: the folder is incomplete or cannot be read, the hub cannot be reached, there is no such device, or
            the model is not supported.
    """
    chosen = pick_device(device)
    model = _load(files, chosen, pick_dtype(device, chosen), quantize=device.quantize == "int8")
    return _warned_of_few_steps(files, model)


def load_outline(files: BaseModelFiles, dtype: torch.dtype = torch.float32, quantize: bool = False) -> Backbone:
    """Return the base model on the meta device, without weights, to check parameters and files against.

    The process shares it, as that of `open_base_model`: put adapters into its `share_weights()` only.

    Raises:
        InputError: see `load_backbone`.
    """
    files.check()
    return _warned_of_few_steps(files, _outline(files, files.state(), dtype, quantize))


@functools.lru_cache(maxsize=2)
def _outline(
    files: BaseModelFiles, _state: tuple[tuple[str, int, int], ...], dtype: torch.dtype, quantize: bool
) -> Backbone:
    return _load(files, torch.device("meta"), dtype, quantize)


def _load(files: BaseModelFiles, device: torch.device, dtype: torch.dtype, quantize: bool) -> Backbone:
    files.check()
    source = ModelSource(files.name, files.fingerprint(), files.parts())
    model = files.family().load(source, device, dtype)
    for network in model.networks.values() if quantize else ():
        quantize_linears(network)
    return model


def _warned_of_few_steps(files: BaseModelFiles, model: Backbone) -> Backbone:
    configs = [getattr(network, "config", None) for network in model.networks.values()]
    takes_guidance = any(getattr(config, "time_cond_proj_dim", None) is not None for config in configs)
    parts = files.parts()
    if kind := few_step_kind(parts.index(), parts.config("scheduler"), files.names(), takes_guidance):
        _warn_once(few_step_hint(kind, files.name, takes_guidance))
    return model


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
