"""What adapters and trigger words have to fit in a base model, and what files call its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""network -> layer -> the shape of its weight, of every Linear and Conv2d"""


@dataclass(frozen=True)
class FileNames:
    """What the files of other tools call the parts of a family's base models.

    Attributes:
        kohya_prefixes: network -> what its layers begin with in kohya files, such as `lora_unet_`.
        outer_modules: network -> the module around it in files that it lacks in memory, such as `text_model.`.
        embedding_keys: text encoder -> the key of its vectors in an embedding file.
        architecture: as modelspec names it.
        kohya_version: the base model's version as kohya names it.
        pipeline: the diffusers pipeline of the exported script and workflow; None: there are none for this family.
        layers_per_block: residual blocks on each level of a UNet, by which A1111 numbers them.
    """

    kohya_prefixes: Mapping[str, str]
    outer_modules: Mapping[str, str]
    embedding_keys: Mapping[str, str]
    architecture: str
    kohya_version: str
    pipeline: str | None = None
    layers_per_block: int | None = None

    def external(self, network: str, layer: str) -> str:
        """Return a layer's name in files; a layer that has the outer module in its name already keeps it."""
        outer = self.outer_modules.get(network, "")
        return outer + layer.removeprefix(outer)

    def kohya(self, network: str, layer: str) -> str:
        """Return the kohya name, such as `lora_unet_mid_block_attentions_0_proj_in`."""
        return self.kohya_prefixes[network] + self.external(network, layer).replace(".", "_")


@dataclass(frozen=True)
class BaseModelIdentity:
    """The base model that a concept belongs to: its name, the fingerprint of its weights, its family and networks."""

    name: str
    fingerprint: str
    family: str
    networks: tuple[str, ...]


@dataclass(frozen=True)
class ModelLayout:
    """Shapes that imported files must match.

    Attributes:
        shapes: of its layers.
        skipped: network -> the layers that clip_skip leaves out, where adapters act on nothing.
        word_widths: text encoder -> the width of a learned vector.
        max_vectors: how many a prompt holds.
        check_word: raises an InputError for a trigger word that the base model knows already.
        names: what files call its parts.
    """

    shapes: Shapes = field(repr=False)
    skipped: Mapping[str, frozenset[str]]
    word_widths: Mapping[str, int]
    max_vectors: int
    check_word: Callable[[str], None]
    names: FileNames
