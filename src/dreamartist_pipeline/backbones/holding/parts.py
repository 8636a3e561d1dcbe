"""The parts of a base model that is not loaded: configurations, tokenizers and weights, however they are held."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import nn
from transformers import CLIPTokenizer
from transformers.initialization import no_init_weights

from dreamartist_pipeline.backbones.holding.configurations import num_blocks
from dreamartist_pipeline.errors import InputError, is_out_of_memory

_SHOWN = 3  # tensors named in an error
_NOT_LEARNED = re.compile(r"(^|\.)position_ids$")  # a buffer that newer versions do not save
_OUTER = re.compile(r"^text_model\.")  # newer versions leave it out
_RENAMED = {  # layers of the autoencoder's attention in older versions of diffusers
    re.compile(rf"(?<=\.){old}(?=\.(weight|bias)$)"): new
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        shape: of it.
        read: reads it, on the CPU, in the dtype of the file.
    """

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


StoredTensors = Mapping[str, StoredTensor]
"""Name in current versions of diffusers and transformers -> tensor."""


class ModelParts(ABC):
    """The parts of a base model, by their names in diffusers' layout, such as `unet`, `vae` and `tokenizer`."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Where they are, for errors."""

    @abstractmethod
    def index(self) -> dict[str, Any]:
        """Return model_index.json."""

    @abstractmethod
    def config(self, part: str) -> dict[str, Any]:
        """Return the configuration of a part.

        Raises:
            InputError: there is none, or it cannot be read.
        """

    @abstractmethod
    def tokenizer(self, part: str) -> CLIPTokenizer:
        """Return a tokenizer."""

    @abstractmethod
    def tensors(self, part: str, *, half: bool = False) -> StoredTensors:
        """Return the weights of a part.

        Args:
            part: one with weights.
            half: take those in half precision where there are both.
        """

    @abstractmethod
    def files(self, parts: Collection[str]) -> Iterator[tuple[str, Path]]:
        """Yield (name, path) of every file that these parts are read from."""

    @abstractmethod
    def check(self, parts: Collection[str]) -> None:
        """Check that the files of these parts are there and complete, without reading weights.

        Raises:
            InputError: they are not.
        """

    def names(self) -> tuple[str, ...]:
        """Return what the files say that the model is called."""
        return (str(self.index().get("_name_or_path", "")),)

    def module(self, kind: Any, part: str, device: torch.device, dtype: torch.dtype) -> Any:
        """Return a module of diffusers or transformers, frozen and in eval mode; on the meta device without weights.

        On a CUDA GPU, convolutions get the memory format channels_last.

        Raises:
            InputError: tensors are missing, not finite, or have other shapes than the configuration.
        """
        config, tensors, what = (
            self.config(part),
            self.tensors(part, half=dtype != torch.float32),
            f"{part} of {self.place}",
        )
        module = make_outline(kind, part, config, what, len(tensors))
        _check_fits(module, tensors, what)
        if device.type == "meta":
            nn.Module.to(module, dtype=dtype)  # diffusers warns of half precision on a device that does not compute
        else:
            _fill(module, tensors, device, dtype, what)
        module = module.to(device).eval().requires_grad_(False)
        # tensor cores read convolutions' inputs by position; on a CPU both formats take the same time
        return module.to(memory_format=torch.channels_last) if device.type == "cuda" else module


def config_name(part: str) -> str:
    """Return the name of the file that describes a part in diffusers' layout."""
    if part == "scheduler":
        return "scheduler_config.json"
    return "tokenizer_config.json" if part.startswith("tokenizer") else "config.json"


def has_weights(part: str) -> bool:
    """Return whether a part has weights."""
    return config_name(part) == "config.json"


def current_names(tensors: StoredTensors) -> dict[str, StoredTensor]:
    """Return the learned tensors by their names in current versions of diffusers and transformers."""
    return {_current_name(name): tensor for name, tensor in tensors.items() if not _NOT_LEARNED.search(name)}


def _current_name(name: str) -> str:
    for old, new in _RENAMED.items():
        name = old.sub(new, name)
    return _OUTER.sub("", name)


def make_module(kind: Any, config: dict[str, Any]) -> Any:
    """Return a module of diffusers or transformers with this configuration."""
    if issubclass(kind, ModelMixin):
        return kind.from_config(config)
    return kind(kind.config_class.from_dict(config.get(kind.config_class.base_config_key, config)))


def make_part(make: Callable[[dict[str, Any]], Any], config: dict[str, Any], what: str) -> Any:
    """Return a part of a model from its configuration, which is checked: see `configurations.check_config`.

    Args:
        make: of diffusers or transformers.
        config: the configuration.
        what: the part, for an error.

    Raises:
        InputError: the library rejects it.
    """
    try:
        return make(config)
    except Exception as error:  # an invalid option fails where it is first used, with any error
        if is_out_of_memory(error):
            raise
        raise InputError(
            expected=f"a valid configuration for {what}",
            got=f"one that its library rejects ({type(error).__name__}: {error})",
            remedy="download the model again",
        ) from error


def make_outline(kind: Any, part: str, config: dict[str, Any], what: str, num_tensors: int) -> Any:
    """Return a module of diffusers or transformers on the meta device, without weights.

    Args:
        kind: its class.
        part: such as `unet`.
        config: its configuration, which is checked: see `configurations.check_config`.
        what: the part, for an error.
        num_tensors: of the weights, so that not more modules are made than there can be.

    Raises:
        InputError: the library rejects the configuration, or it asks for more blocks than there are tensors.
    """
    if (needed := num_blocks(part, config)) > num_tensors:
        raise misfit(what, f"{num_tensors} tensors for at least {needed} blocks")
    with no_init_weights(), init_empty_weights():  # buffers such as positions are computed
        return make_part(partial(make_module, kind), config, what)


def misfit(what: str, got: str) -> InputError:
    """Return the error for weights that do not fit their configuration."""
    return InputError(
        expected=f"the weights that its configuration describes in {what}",
        got=got,
        remedy="for a single file of unusual size, set base_model_config to a folder with its configurations; "
        "otherwise download the model again",
    )


def _check_fits(module: nn.Module, tensors: StoredTensors, what: str) -> None:
    """Check names and shapes of all tensors of a module.

    Raises:
        InputError: they differ.
    """
    shapes = {_current_name(name): tuple(value.shape) for name, value in module.state_dict().items()}
    missing = [name for name in shapes if name not in tensors]
    wrong = [
        f"{name} of shape {tensors[name].shape} in place of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if found := [*wrong, *(f"no {name}" for name in missing)]:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise misfit(what, f"{', '.join(found[:_SHOWN])}{more}")


def _fill(module: nn.Module, tensors: StoredTensors, device: torch.device, dtype: torch.dtype, what: str) -> None:
    """Give a module its weights, read one at a time and copied: the files may change afterwards.

    Raises:
        InputError: some are not finite.
    """
    weights = {name: tensors[_current_name(name)].read().to(device, dtype, copy=True) for name in module.state_dict()}
    if infinite := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        precision = str(dtype).removeprefix("torch.")
        raise InputError(
            expected=f"finite weights in {what}",
            got=f"{len(infinite)} tensors that are not, in {precision}: {', '.join(infinite[:_SHOWN])}",
            remedy="download the model again, or set device.dtype to float32",
        )
    module.load_state_dict(weights, assign=True)
