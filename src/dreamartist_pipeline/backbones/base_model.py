"""The frozen base model: finding it, loading it, and its way between pixels and latents."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from dreamartist_pipeline.core.adapters import set_noise_levels
from dreamartist_pipeline.core.diffusion import NoiseSchedule
from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.params import DeviceParams
from dreamartist_pipeline.schedulers import ZERO_TERMINAL_SNR

HUB = "hub:"
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_FINGERPRINT_SUFFIXES = (".json", ".txt", *_WEIGHT_SUFFIXES)
_PARTS = {  # part -> the file that describes it
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
transformers_logging.disable_progress_bar()  # of weights from the disk, within the bars of a run

_PARTS_WITH_WEIGHTS = ("unet", "vae", "text_encoder")
_VOCABULARY_FILES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})  # either spelling of a tokenizer


@dataclass(frozen=True)
class BaseModelFiles:
    """Where the base model is: a folder in diffusers' layout, or `hub:owner/name`. Cheap to make, loads nothing."""

    path: Path | str

    @property
    def hub_id(self) -> str | None:
        """The Hugging Face id, or None for a folder."""
        return str(self.path).removeprefix(HUB) if str(self.path).startswith(HUB) else None

    @property
    def name(self) -> str:
        """A name without a path: the folder's own name, or the hub id."""
        return self.hub_id or Path(self.path).resolve().name

    @property
    def source(self) -> str:
        """What diffusers' `from_pretrained` takes."""
        return self.hub_id or str(self.path)

    def check(self) -> None:
        """Confirm that the folder is complete and of a kind that can be trained.

        Raises:
            InputError: there is no folder, a part or file is missing or truncated, or the model is an SDXL one.
        """
        if self.hub_id is not None:
            return
        folder = Path(self.path)
        if not folder.is_dir():
            raise InputError(
                f"expected the base model's folder at {folder}; there is none; "
                f"set base_model to a folder in diffusers' layout, or to {HUB}owner/name"
            )
        if _is_sdxl(folder):
            raise InputError(
                f"expected a Stable Diffusion 1.x / 2.x model; {folder} is an SDXL model with a second text encoder, "
                "which is not supported yet; choose another base model"
            )
        if missing := list(_missing_files(folder)):
            raise InputError(
                f"expected a complete base model in {folder}; it lacks {', '.join(missing)}; "
                "copy what is missing, or download the model again"
            )
        if damaged := [f"{f.parent.name}/{f.name}" for f in _model_files(folder) if not _is_whole(f)]:
            raise InputError(
                f"expected whole weight files in {folder}; got a truncated one, or a Git LFS pointer, as "
                f"{', '.join(damaged)}; download the model again"
            )

    def fingerprint(self) -> str:
        """Return 16 hex digits of a SHA-256 over names and bytes of all configuration and weight files."""
        if self.hub_id is not None:
            return f"{HUB}{self.hub_id}"
        folder = Path(self.path)
        digest = hashlib.sha256()
        for file in sorted(_model_files(folder), key=lambda f: f.relative_to(folder).as_posix()):
            digest.update(f"{file.relative_to(folder).as_posix()}\n{file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()[:16]


@dataclass
class Backbone:
    """The base model in memory, frozen; adapters and words are put into `unet` and `text_encoder` in place.

    image_px: the side the model was made for. latent_scale: pixels per latent along a side.
    """

    unet: UNet2DConditionModel
    autoencoder: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    fingerprint: str
    name: str
    image_px: int
    latent_scale: int

    def autocast(self) -> torch.autocast:
        """Return the context in which the frozen half-precision layers and float32 adapters meet."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the UNet's prediction `[N, C, h, w]` for `latents`, timesteps `[N]` and text states `[N, L, D]`."""
        set_noise_levels(self.unet, timesteps / (self.schedule.num_train_timesteps - 1))
        with self.autocast():
            prediction: torch.Tensor = self.unet(latents.to(self.dtype), timesteps, hidden, return_dict=False)[0]
        return prediction


def load_backbone(files: BaseModelFiles, device: DeviceParams) -> Backbone:
    """Load every part of the base model, frozen and in eval mode; the autoencoder stays in float32.

    Raises:
        InputError: the folder is incomplete or cannot be read, the hub cannot be reached, the device is not there, the
            prediction type is unknown, or the UNet takes more than latents.
    """
    files.check()
    target, dtype = pick_device(device), getattr(torch, device.dtype)
    options: dict[str, Any] = {"local_files_only": files.hub_id is None}
    with _readable(files):
        _check_channels(files, options)
        scheduler = DDPMScheduler.from_pretrained(files.source, subfolder="scheduler", **options)
        unet = UNet2DConditionModel.from_pretrained(files.source, subfolder="unet", torch_dtype=dtype, **options)
        autoencoder = AutoencoderKL.from_pretrained(files.source, subfolder="vae", torch_dtype=torch.float32, **options)
        text_encoder = CLIPTextModel.from_pretrained(files.source, subfolder="text_encoder", dtype=dtype, **options)
        tokenizer = CLIPTokenizer.from_pretrained(files.source, subfolder="tokenizer", **options)
    latent_scale = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    return Backbone(
        unet=_freeze(unet, target),
        autoencoder=_freeze(autoencoder, target),
        text_encoder=_freeze(text_encoder, target),
        tokenizer=tokenizer,
        schedule=NoiseSchedule(scheduler.alphas_cumprod.float().to(target), scheduler.config.prediction_type),
        scheduler_config=dict(scheduler.config),
        device=target,
        dtype=dtype,
        fingerprint=files.fingerprint(),
        name=files.name,
        image_px=int(unet.config.sample_size) * latent_scale,
        latent_scale=latent_scale,
    )


@dataclass(frozen=True)
class Outline:
    """The base model without weights, on the meta device: enough to check a plan against."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    prediction_type: str
    num_train_timesteps: int


def load_outline(files: BaseModelFiles) -> Outline:
    """Read the base model's configuration and tokenizer; no weight is loaded.

    Raises:
        InputError: the folder is incomplete or cannot be read, the hub cannot be reached, or the UNet takes more than
            latents.
    """
    files.check()
    options: dict[str, Any] = {"local_files_only": files.hub_id is None}
    with _readable(files):
        _check_channels(files, options)
        unet_config = UNet2DConditionModel.load_config(files.source, subfolder="unet", **options)
        text_config = CLIPTextConfig.from_pretrained(files.source, subfolder="text_encoder", **options)
        tokenizer = CLIPTokenizer.from_pretrained(files.source, subfolder="tokenizer", **options)
        scheduler = DDPMScheduler.from_pretrained(files.source, subfolder="scheduler", **options).config
    with torch.device("meta"):
        unet, text_encoder = UNet2DConditionModel.from_config(unet_config), CLIPTextModel(text_config)
    return Outline(unet, text_encoder, tokenizer, scheduler.prediction_type, scheduler.num_train_timesteps)


def pick_device(params: DeviceParams) -> torch.device:
    """Return the device to run on; `auto` is the GPU where there is one.

    Raises:
        InputError: a GPU was asked for by name and there is none.
    """
    if params.device == "cuda" and not torch.cuda.is_available():
        raise InputError("expected a CUDA GPU (device: cuda); torch sees none; set device to cpu or auto")
    if params.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(params.device)


@torch.no_grad()
def encode_images(backbone: Backbone, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation `[B, C, h, w]` of the latents of `images` `[B, 3, H, W]` in [-1, 1].

    Both are float32 and already times the model's scaling factor: latents are `mean + std · noise`.
    """
    posterior = backbone.autoencoder.encode(images.to(backbone.device, torch.float32)).latent_dist
    scale = float(backbone.autoencoder.config.scaling_factor)
    return posterior.mean * scale, posterior.std * scale


@torch.no_grad()
def decode_latents(backbone: Backbone, latents: torch.Tensor) -> torch.Tensor:
    """Return the images `[B, 3, H, W]`, float32 in [-1, 1], of latents `[B, C, h, w]`."""
    return decode_with_gradients(backbone, latents).clamp(-1, 1)


def decode_with_gradients(backbone: Backbone, latents: torch.Tensor) -> torch.Tensor:
    """Return what `decode_latents` does, through which gradients reach the latents, and not clamped."""
    scale = float(backbone.autoencoder.config.scaling_factor)
    decoded: torch.Tensor = backbone.autoencoder.decode(latents.float() / scale, return_dict=False)[0]
    return decoded


def with_zero_terminal_snr(backbone: Backbone) -> Backbone:
    """Return the base model with a noise schedule that ends without signal (Lin et al. 2023), weights shared.

    Drawing then starts at the last timestep (`trailing`), as that schedule needs.

    Raises:
        InputError: the model predicts ε.
    """
    defaults = backbone.scheduler_config.get("_use_default_values", ())  # diffusers ignores what is named there
    kept_defaults = {"_use_default_values": [name for name in defaults if name not in ZERO_TERMINAL_SNR]}
    return dataclasses.replace(
        backbone,
        schedule=backbone.schedule.with_zero_terminal_snr(),
        scheduler_config={**backbone.scheduler_config, **ZERO_TERMINAL_SNR, **kept_defaults},
    )


@contextmanager
def _readable(files: BaseModelFiles) -> Iterator[None]:
    """Turn what diffusers and transformers raise for files that they cannot get or read into an InputError."""
    try:
        yield
    except OSError as error:
        where = f"the Hugging Face hub as {files.hub_id}" if files.hub_id else str(files.path)
        raise InputError(
            f"expected to read a base model from {where}; got: {error}; "
            "correct base_model, or download the model again (a hub id needs the network, or its files in the cache)"
        ) from error


def _check_channels(files: BaseModelFiles, options: dict[str, Any]) -> None:
    """Confirm, by the configurations alone, that the UNet takes noisy latents and nothing beside them.

    Raises:
        InputError: it has other input channels than latents have.
    """
    unet = UNet2DConditionModel.load_config(files.source, subfolder="unet", **options)
    autoencoder = AutoencoderKL.load_config(files.source, subfolder="vae", **options)
    in_channels, latent_channels = unet.get("in_channels", 4), autoencoder.get("latent_channels", 4)  # their defaults
    if in_channels != latent_channels:
        raise InputError(
            f"expected a text-to-image model, whose UNet takes the {latent_channels} channels of its latents; got "
            f"{in_channels} input channels in {files.source}, as inpainting models have for a mask and a picture; "
            "set base_model to the model that it was made from (generate redraws a part of a picture with init_mask)"
        )


def _freeze(module: Any, device: torch.device) -> Any:
    return module.to(device).eval().requires_grad_(False)


def _is_sdxl(folder: Path) -> bool:
    index = folder / "model_index.json"
    named = index.is_file() and "XL" in json.loads(index.read_text()).get("_class_name", "")
    return named or (folder / "text_encoder_2").exists()


def _missing_files(folder: Path) -> Iterator[str]:
    if not (folder / "model_index.json").is_file():
        yield "model_index.json"
    for part, config in _PARTS.items():
        if not (folder / part).is_dir():
            yield f"{part}/"
            continue
        names = {file.name for file in (folder / part).iterdir()}
        if config not in names:
            yield f"{part}/{config}"
        if part in _PARTS_WITH_WEIGHTS and not any(Path(name).suffix in _WEIGHT_SUFFIXES for name in names):
            yield f"{part}'s weights (a .safetensors file)"
        if part == "tokenizer" and not any(files <= names for files in _VOCABULARY_FILES):
            yield "tokenizer/tokenizer.json (or vocab.json and merges.txt)"


def _is_whole(file: Path) -> bool:
    """Say whether a safetensors file is as long as its header says; other files are taken as they are."""
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


def _model_files(folder: Path) -> Iterator[Path]:
    yield folder / "model_index.json"
    for part in _PARTS:
        yield from (f for f in (folder / part).rglob("*") if f.is_file() and f.suffix in _FINGERPRINT_SUFFIXES)
