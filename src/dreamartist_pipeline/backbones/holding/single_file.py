"""A base model as a single file, as most fine-tunes are published, in the names of the original implementations."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import single_file_utils as diffusers_names
from transformers import CLIPTokenizer

from dreamartist_pipeline.backbones.holding.checkpoint_kinds import (
    EMA_PREFIX,
    SD2,
    UNET_PREFIX,
    VAE_PREFIX,
    CheckpointKind,
    kind_of,
)
from dreamartist_pipeline.backbones.holding.folder import CONFIG_SUFFIXES, FolderParts
from dreamartist_pipeline.backbones.holding.parts import (
    ModelParts,
    StoredTensor,
    StoredTensors,
    current_names,
)
from dreamartist_pipeline.backbones.holding.tensor_files import is_whole, read_metadata, read_tensors
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.schedulers import ZERO_TERMINAL_SNR

_V_KEY, _ZERO_TERMINAL_KEY = "v_pred", "ztsnr"  # in files of models that were trained so
_V_NAMES, _EPSILON_NAMES = ("v", "v_prediction"), ("epsilon", "eps")  # of modelspec.prediction_type
_V_SIGN, _V_SIGN_STD = f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
_CHANNELS = (  # part, option of its configuration, and the layer that has so many input channels
    ("unet", "in_channels", f"{UNET_PREFIX}input_blocks.0.0.weight"),
    ("vae", "latent_channels", f"{VAE_PREFIX}decoder.conv_in.weight"),
)

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SingleFileParts(ModelParts):
    """The parts of a model in a single file; configurations and tokenizers are those of its kind.

    Attributes:
        file: the file, safetensors or pickled by torch.
        given_configs: a folder in diffusers' layout whose configurations are taken instead; weights there are not read.
    """

    file: Path
    given_configs: Path | None = None

    @property
    def place(self) -> str:
        """The file."""
        return str(self.file)

    def index(self) -> dict[str, Any]:
        """Return model_index.json of its kind."""
        return self._configs().index()

    def names(self) -> tuple[str, ...]:
        """Return the title in its metadata."""
        return (self._contents().metadata.get("modelspec.title", ""),)

    def config(self, part: str) -> dict[str, Any]:
        """Return the configuration of a part; numbers of channels and what the model predicts are those of the file."""
        config = self._configs().config(part)
        contents = self._contents()
        for each, option, layer in _CHANNELS:
            if part == each and len(contents.shapes.get(layer, ())) == 4:  # [out, in, height, width]
                config[option] = contents.shapes[layer][1]
        if part == "scheduler" and self.given_configs is None:
            config |= contents.schedule()
        return config

    def tokenizer(self, part: str) -> CLIPTokenizer:
        """Return a tokenizer."""
        return self._configs().tokenizer(part)

    def tensors(self, part: str, *, half: bool = False) -> StoredTensors:
        """Return the weights of a part, whose names diffusers converts; half is not used."""
        prefix = self._contents().kind.prefixes[part]
        return converted(read_tensors(self.file), prefix, self.config(part), self.place)

    def files(self, parts: Collection[str]) -> Iterator[tuple[str, Path]]:
        """Yield the file, and the configurations that are taken in place of those of its kind."""
        yield self.file.name, self.file
        if self.given_configs is not None:
            configs = FolderParts(self.given_configs).files(parts)
            yield from ((name, file) for name, file in configs if file.suffix in CONFIG_SUFFIXES)

    def check(self, parts: Collection[str]) -> None:
        """Check that the file is complete, of a kind that can be opened, and has all parts.

        Raises:
            InputError: it is not.
        """
        check_whole(self.file)
        contents = self._contents()
        for part, prefix in contents.kind.prefixes.items():
            if part in parts and not any(name.startswith(prefix) for name in contents.shapes):
                raise _missing(part, self.file, contents.shapes)

    def _contents(self) -> Contents:
        state = self.file.stat()
        return _contents(self.file, state.st_size, state.st_mtime_ns)

    def _configs(self) -> FolderParts:
        return FolderParts(self.given_configs or self._contents().configs())


@dataclass(frozen=True)
class Contents:
    """What a single file has in it, without its weights.

    Attributes:
        file: the file.
        kind: of the model.
        shapes: name -> shape of every tensor.
        metadata: of the file.
    """

    file: Path
    kind: CheckpointKind
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def configs(self) -> Path:
        """Return the folder of configurations of its kind."""
        if self.kind is not SD2:
            return shipped_configs(self.kind.name)
        return shipped_configs("sd2-v" if self._predicts_v() else "sd2-base")

    def schedule(self) -> dict[str, Any]:
        """Return what the file says of the noise schedule and of what the model predicts."""
        predicts_v = {"prediction_type": "v_prediction"} if self._says_v() else {}
        return predicts_v | (ZERO_TERMINAL_SNR if predicts_v and _ZERO_TERMINAL_KEY in self.shapes else {})

    def _says_v(self) -> bool | None:
        """Return whether the model predicts v, None where the file does not say it."""
        stated = self.metadata.get("modelspec.prediction_type", "").lower()
        if _V_KEY in self.shapes or stated in _V_NAMES:
            return True
        return False if stated in _EPSILON_NAMES else None

    def _predicts_v(self) -> bool:
        """Return whether a Stable Diffusion 2.x predicts v: as the file says it, or by a sign in its weights.

        The models of 768 px, which predict v, have larger biases in a norm than those of 512 px (the same sign and
        limit as in ComfyUI).
        """
        says = self._says_v()
        if says is not None or _V_SIGN not in self.shapes:
            return bool(says)
        bias = read_tensors(self.file)[_V_SIGN].read().float()
        return bool(bias.std(unbiased=False) > _V_SIGN_STD)


@functools.lru_cache(maxsize=4)
def _contents(file: Path, _size: int, _modified_ns: int) -> Contents:
    """Read the names in a file, once unless it changes."""
    shapes = {name: tensor.shape for name, tensor in read_tensors(file).items()}
    contents = Contents(file, kind_of(shapes, str(file)), shapes, read_metadata(file))
    if contents.kind is SD2:
        predicted, other = ("v", "base") if contents.configs().name == "sd2-v" else ("ε", "v")
        log.info(
            "%s predicts %s, by its weights or metadata; if that is wrong, set base_model_config=%s.",
            file.name,
            predicted,
            shipped_configs(f"sd2-{other}"),
        )
    if any(name.startswith(EMA_PREFIX) for name in shapes):
        log.info("%s has averaged weights (EMA) beside its weights; they are not used.", file.name)
    return contents


def shipped_configs(name: str) -> Path:
    """Return a folder of configurations in this package: sd1, sd2-base, sd2-v or sdxl."""
    return Path(str(resources.files(__package__))) / "configs" / name


def check_whole(file: Path) -> None:
    """Check that a safetensors file is not truncated.

    Raises:
        InputError: it is.
    """
    if not is_whole(file):
        raise InputError(
            expected=f"a complete file at {file}",
            got="a truncated file or a Git LFS pointer",
            remedy="download it again",
        )


def converted(stored: Mapping[str, StoredTensor], prefix: str, config: Mapping[str, Any], place: str) -> StoredTensors:
    """Return the tensors of a part by diffusers' names; those that it splits or reshapes are read together.

    Args:
        stored: all tensors of a file.
        prefix: of the part's names.
        config: of the part.
        place: of the file, for errors.

    Raises:
        InputError: diffusers cannot convert the names, because some are missing.
    """
    own = {name: tensor for name, tensor in stored.items() if name.startswith(prefix)}
    convert = _converter(prefix)
    outline = {name: torch.empty(tensor.shape, device="meta") for name, tensor in own.items()}
    try:
        new_outline = convert(dict(outline), dict(config))
    except Exception as error:  # diffusers looks names up, splits and reshapes without checks
        raise InputError(
            expected=f"the tensors of a whole model, {prefix}…, at {place}",
            got=f"{len(own)} tensors that diffusers cannot convert ({type(error).__name__}: {error})",
            remedy="download the model again",
        ) from error
    old_names = {id(tensor): name for name, tensor in outline.items()}
    renamed = {new: old_names[id(tensor)] for new, tensor in new_outline.items() if id(tensor) in old_names}
    unread = {name: outline[name] for name in renamed.values()}

    @functools.cache
    def others() -> Tensors:
        return convert({name: unread[name] if name in unread else own[name].read() for name in own}, dict(config))

    return current_names(
        {
            name: own[renamed[name]]
            if name in renamed
            else StoredTensor(tuple(tensor.shape), functools.partial(_read, others, name))
            for name, tensor in new_outline.items()
        }
    )


def _read(read: Callable[[], Tensors], name: str) -> torch.Tensor:
    return read()[name]


def _converter(prefix: str) -> Callable[[Tensors, dict[str, Any]], Tensors]:
    if prefix == UNET_PREFIX:
        return diffusers_names.convert_ldm_unet_checkpoint  # type: ignore[no-any-return]
    if prefix == VAE_PREFIX:
        return diffusers_names.convert_ldm_vae_checkpoint  # type: ignore[no-any-return]
    if prefix.endswith(".transformer."):
        return lambda tensors, _: diffusers_names.convert_ldm_clip_checkpoint(tensors)
    return lambda tensors, config: diffusers_names.convert_open_clip_checkpoint(
        SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"])), tensors, prefix=prefix
    )


def _missing(part: str, file: Path, names: Collection[str]) -> InputError:
    """Return the error for a single file without one of its parts."""
    if part == "vae":
        got, remedy = "a file without autoencoder", "set vae to the file or folder of one"
    elif part == "unet" and any(name.startswith(EMA_PREFIX) for name in names):
        got, remedy = "a file with averaged weights (EMA) only", "download the model with its weights"
    else:
        got, remedy = f"a file without {part}", "download the whole model"
    return InputError(expected=f"a whole base model at {file}", got=got, remedy=remedy)
