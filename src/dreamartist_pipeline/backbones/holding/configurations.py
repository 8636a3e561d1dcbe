"""The JSON files of a base model: typed, within bounds, and without code of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dreamartist_pipeline.decoding.json_text import reasons
from dreamartist_pipeline.errors import InputError

_MAX_LEVELS = 8
MAX_TOKENS = 2**21
"""How many tokens a vocabulary may have; that of CLIP has 49,408."""

_Width = Annotated[int, Field(ge=1, le=2**17)]
_Layers = Annotated[int, Field(ge=1, le=64)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Levels = Annotated[list[_Width], Field(min_length=1, max_length=_MAX_LEVELS)]
_LayersOfLevels = (
    _Layers | Annotated[list[_Layers | Annotated[list[_Layers], Field(max_length=8)]], Field(max_length=_MAX_LEVELS)]
)
_Names = Annotated[list[str], Field(min_length=1, max_length=_MAX_LEVELS)]


class _Config(BaseModel):
    """A configuration; defaults are those of diffusers and transformers, and other options are theirs to check."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _UNetConfig(_Config):
    """What decides how large a UNet is."""

    sample_size: Annotated[int, Field(ge=1, le=4096)]
    in_channels: _Width = 4
    out_channels: _Width = 4
    block_out_channels: _Levels = [320, 640, 1280, 1280]
    layers_per_block: _LayersOfLevels = 2
    transformer_layers_per_block: _LayersOfLevels = 1
    cross_attention_dim: _Width | list[_Width] = 1280
    down_block_types: _Names | None = None
    up_block_types: _Names | None = None

    @property
    def num_blocks(self) -> int:
        """About how many blocks with weights it has."""
        layers, transformers = _most(self.layers_per_block), _most(self.transformer_layers_per_block)
        return len(self.block_out_channels) * layers * transformers


class _AutoencoderConfig(_Config):
    """What decides how large an autoencoder is, and the scale of its latents."""

    latent_channels: _Width = 4
    block_out_channels: _Levels = [64]
    layers_per_block: _Layers = 1
    scaling_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.18215

    @property
    def num_blocks(self) -> int:
        """About how many blocks with weights it has."""
        return len(self.block_out_channels) * self.layers_per_block


class _TowerConfig(_Config):
    """What decides how large a text or image tower is."""

    hidden_size: _Width = 512
    intermediate_size: _Width = 2048
    projection_dim: _Width = 512
    num_hidden_layers: Annotated[int, Field(ge=1, le=256)] = 12
    num_attention_heads: Annotated[int, Field(ge=1, le=1024)] = 8
    max_position_embeddings: Annotated[int, Field(ge=3, le=2**16)] = 77
    vocab_size: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 49408
    image_size: Annotated[int, Field(ge=1, le=4096)] = 224
    patch_size: Annotated[int, Field(ge=1, le=4096)] = 32

    @property
    def num_blocks(self) -> int:
        """How many layers it has."""
        return self.num_hidden_layers


class _TowersConfig(_Config):
    """What decides how large the two towers of CLIP or SigLIP are."""

    text_config: _TowerConfig = _TowerConfig()
    vision_config: _TowerConfig = _TowerConfig()
    projection_dim: _Width = 512

    @property
    def num_blocks(self) -> int:
        """How many layers both have."""
        return self.text_config.num_blocks + self.vision_config.num_blocks


class _SchedulerConfig(_Config):
    """What a noise schedule is computed from."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    beta_start: _Number = 0.0001
    beta_end: _Number = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool | None = False


class _TokenizerConfig(_Config):
    """What decides how long token sequences are."""

    model_max_length: Annotated[float, Field(ge=3)] = 77


_TYPES: Mapping[str, type[_Config]] = {
    "unet": _UNetConfig,
    "vae": _AutoencoderConfig,
    "text_encoder": _TowerConfig,
    "dinov2": _TowerConfig,
    "clip": _TowersConfig,
    "siglip": _TowersConfig,
    "scheduler": _SchedulerConfig,
    "tokenizer": _TokenizerConfig,
}
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")  # which transformers and diffusers would download
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_QUANTIZATION = "quantization_config"
_INDEX_ENTRY = TypeAdapter(tuple[str | None, str | None])
_INDEX, _LIBRARIES = "model_index.json", ("diffusers", "transformers")
_REMEDY = "download the model again, or choose another one"


def check_config(part: str, config: Mapping[str, Any], place: str) -> None:
    """Check the configuration of a part before anything is built from it.

    Args:
        part: such as `unet` or `text_encoder_2`.
        config: its configuration.
        place: of its file, for errors.

    Raises:
        InputError: a value of another type or out of bounds, code to download, or quantized weights.
    """
    kind = _TYPES.get(part.removesuffix("_2"))
    if code := [key for key in _CODE if config.get(key)]:
        raise _error(place, f"{code[0]}, which names code to run", "choose a model without custom code")
    kernels = [key for key in _ATTENTION if "/" in str(config.get(key, ""))]
    if kernels:
        raise _error(place, f"{kernels[0]}, which names code to download", f"remove {kernels[0]} there")
    if config.get(_QUANTIZATION):
        raise _error(place, "quantized weights", "download the model in full or half precision")
    if kind is not None:
        try:
            kind.model_validate(config)
        except ValidationError as error:
            raise _error(place, reasons(error), _REMEDY) from error


def check_index(index: Mapping[str, Any], parts: Mapping[str, tuple[str, ...]], place: str) -> None:
    """Check that model_index.json names known classes for the parts that are read.

    Args:
        index: its content.
        parts: part -> names of classes whose files it may have; () for any class of diffusers.
        place: of the model, for errors.

    Raises:
        InputError: a part is null, has another class, or one that is not in diffusers or transformers.
    """
    entries = {part: _entry(index[part], part, place) for part in parts if part in index}
    if missing := [part for part, (_, kind) in entries.items() if kind is None]:
        raise InputError(
            expected=f"a base model with {', '.join(parts)}",
            got=f"{place}, whose {_INDEX} has none as {', '.join(missing)}",
            remedy="choose a complete base model",
        )
    for part, (library, kind) in entries.items():
        if library not in _LIBRARIES or (parts[part] and kind not in parts[part]):
            raise InputError(
                expected=f"{' or '.join(parts[part]) or 'a class of diffusers'} as {part} in {_INDEX} of {place}",
                got=f"{kind} of {library}",
                remedy="choose a model of the classes that its family has; code of a model is never run",
            )


def _entry(value: Any, part: str, place: str) -> tuple[str | None, str | None]:
    try:
        return _INDEX_ENTRY.validate_python(value)
    except ValidationError as error:
        got = f"{part}: {reasons(error, 1)}"
        raise _error(f"{_INDEX} of {place}", got, _REMEDY) from error


def num_blocks(part: str, config: Mapping[str, Any]) -> int:
    """Return about how many blocks with weights a configuration asks for, 0 for other parts; see `check_config`."""
    kind = _TYPES.get(part.removesuffix("_2"))
    return int(getattr(kind.model_validate(config), "num_blocks", 0)) if kind is not None else 0


def _most(layers: Any) -> int:
    return max(map(_most, layers), default=0) if isinstance(layers, list) else int(layers)


def _error(place: str, got: str, remedy: str) -> InputError:
    return InputError(expected=f"a readable configuration in {place}", got=got, remedy=remedy)
