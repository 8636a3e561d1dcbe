"""The shapes of a base model that adapters and trigger words must match, and the names of its parts in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""network -> Linear or Conv2d layer -> shape of its weight"""


@dataclass(frozen=True)
class FileNames:
    """The names of a base model's parts in files of other tools.

    Attributes:
        title: what users call such base models.
        kohya_prefixes: network -> prefix of its layers in kohya files, such as `lora_unet_`.
        outer_modules: network -> prefix of its layers that exists only in files, such as `text_model.`.
        embedding_keys: text encoder -> key of its vectors in an embedding file.
        architecture: modelspec architecture.
        kohya_version: base model version in kohya metadata.
        pipeline: diffusers pipeline of the exported script and workflow; None if the family has none.
        layers_per_block: residual blocks per level of the UNet, for A1111's layer numbers.
        kohya_aliases: network -> further prefixes that are read, such as `lora_te1_` for the only text encoder.
        comfyui_text_layer: the layer that ComfyUI's CLIPSetLastLayer calls the one that is read without clip_skip.
        a1111_has_clip_skip: whether A1111's setting Clip skip is the clip_skip of this base model.
        original_unet_names: layer of the UNet -> its name in the original code of Stable Diffusion.
        kohya_uses_original_names: whether kohya's trainer names the layers of the UNet so; both names are read.
    """

    title: str
    kohya_prefixes: Mapping[str, str]
    outer_modules: Mapping[str, str]
    embedding_keys: Mapping[str, str]
    architecture: str
    kohya_version: str
    pipeline: str | None = None
    layers_per_block: int | None = None
    kohya_aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    comfyui_text_layer: int = -1
    a1111_has_clip_skip: bool = True
    original_unet_names: Mapping[str, str] = field(default_factory=dict, repr=False)
    kohya_uses_original_names: bool = False

    def external(self, network: str, layer: str) -> str:
        """Return the name of a layer in files, with the prefix of the outer module."""
        outer = self.outer_modules.get(network, "")
        return outer + layer.removeprefix(outer)

    def kohya(self, network: str, layer: str) -> str:
        """Return the kohya name, such as `lora_unet_mid_block_attentions_0_proj_in`."""
        name = self.external(network, layer)
        if network == "unet" and self.kohya_uses_original_names:
            name = self.original_unet_names.get(layer, name)
        return self.kohya_prefixes[network] + name.replace(".", "_")


@dataclass(frozen=True)
class BaseModelIdentity:
    """The name, weight fingerprint, family and networks of the base model of a concept."""

    name: str
    fingerprint: str
    family: str
    networks: tuple[str, ...]


@dataclass(frozen=True)
class ModelLayout:
    """Shapes that imported files must match.

    Attributes:
        shapes: of the layers.
        skipped: network -> layers of text encoders that are not read, so that adapters there have no effect.
        word_widths: text encoder -> width of a learned vector.
        max_vectors: maximum number of vectors in a prompt.
        check_word: raises an InputError for a trigger word that is already a token.
        names: of the parts in files.
    """

    shapes: Shapes = field(repr=False)
    skipped: Mapping[str, frozenset[str]]
    word_widths: Mapping[str, int]
    max_vectors: int
    check_word: Callable[[str], None]
    names: FileNames
