"""A concept, the result of a training: adapter pair, embedding pair, and their metadata."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from dreamartist_pipeline.core.lora_factors import LearnedUpdate, learned_updates
from dreamartist_pipeline.decoding.json_text import parse_json, reasons
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import GuidanceScale, ResolvedGroup

FORMAT = "dreamartist-concept-1"
WORDS = "words"
_FIRST_ENCODER = "text_encoder"

_GROUPS = "lora_"  # followed by the network
_PLAIN = (  # stored as plain text; all other values are JSON
    *("base_model", "base_model_fingerprint", "base_model_family", "prediction_type", "guidance_scale", "class_word"),
    *("config_sha256", "start_sha256", "identity_sha256", "picture_sha256", "chosen"),
)
_OLD_NAME = re.compile(r"(?P<network>\w+)\[(?P<index>\d+)\]")  # of a group in the first files, unet[0]


class ConceptMetadata(BaseModel):
    """The metadata of a concept file. Without times and paths, so that equal trainings write equal bytes.

    Unknown keys are ignored, because other tools add theirs. Whatever changes how a concept is applied requires a new
    FORMAT; for this reason, an unknown option of a LoRA group is an error.

    The defaults apply to keys that are missing in files of earlier versions and in imported concepts.

    Attributes:
        base_model: its name.
        base_model_fingerprint: of its weights, "sha256:…"; in files of earlier versions 16 hex digits, of its files.
        num_branches: 2, or 1 for a training without a negative branch.
        num_steps: of the training; 0 if unknown.
        words: slot -> (positive, negative) trigger word; the latter is "" if there is none.
        num_vectors: of (positive, negative) words; None if the words of a branch have different numbers of vectors.
        lora: network of the base model -> its groups, in the order of their indices; () without adapters.
        class_word: fills a slot without a trigger word.
        base_model_family: the concept fits base models of this family only.
        clip_skip: number of skipped last layers of the text encoder.
        zero_terminal_snr: whether the noise schedule has zero terminal SNR.
        config_sha256: of the options that can change the result.
        start_sha256: of the concept file that the training started from.
        identity_sha256: of options, caption, base model and pictures of the training.
        picture_sha256: of the prepared picture, see `image_set.images_sha256`.
        imported_from: (name, SHA-256) of the imported files.
        step: of the training, after which the concept had these values; None: after the last, or unknown.
        chosen: why this step was chosen by its scores; None for a step that was not.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    base_model: str
    base_model_fingerprint: str
    num_branches: Literal[1, 2]
    num_steps: NonNegativeInt
    words: dict[str, tuple[Annotated[str, Field(min_length=1)], str]]
    num_vectors: tuple[PositiveInt | None, PositiveInt | None]
    lora: dict[str, tuple[ResolvedGroup, ...]]
    class_word: str = ""
    base_model_family: str = "stable-diffusion"
    clip_skip: NonNegativeInt = 0
    zero_terminal_snr: bool = False
    prediction_type: str | None = None
    guidance_scale: GuidanceScale | None = None
    seed: NonNegativeInt | None = None
    templates: tuple[str, ...] | None = None
    init_text: tuple[str, str] | None = None
    versions: dict[str, str] | None = None
    config_sha256: str | None = None
    start_sha256: str | None = None
    identity_sha256: str | None = None
    picture_sha256: str | None = None
    imported_from: tuple[tuple[str, str], ...] | None = None
    step: NonNegativeInt | None = None
    chosen: str | None = None

    @property
    def last_step(self) -> int:
        """The step after which the concept had these values."""
        return self.num_steps if self.step is None else self.step

    @classmethod
    def read(cls, fields: Mapping[str, str], origin: str) -> ConceptMetadata:
        """Parse the metadata of a file of this or an earlier version.

        Args:
            fields: key -> text, as in the file.
            origin: name of the file in error messages.

        Raises:
            InputError: the file is not a concept of this project, or its metadata is invalid.
        """
        if fields.get("format") != FORMAT:
            raise InputError(
                expected=f"a concept of this project in {origin}",
                got="another safetensors file",
                remedy="import it first (kedro run --pipeline import), and use the imported concept",
            )
        values = {key: text if key in _PLAIN else _parsed(text) for key, text in fields.items()}
        values["lora"] = {key.removeprefix(_GROUPS): _renamed(values[key]) for key in fields if key.startswith(_GROUPS)}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(
                expected=f"the metadata of a concept in {origin}",
                got=reasons(error),
                remedy="the file is damaged or of a later version: copy it again, or train the concept again",
            ) from error

    @property
    def group_branches(self) -> frozenset[str]:
        """The branches of the LoRA groups: `negative`, `positive`, or `shared` for adapters of both."""
        return frozenset(group.branch for groups in self.lora.values() for group in groups)

    def write(self) -> dict[str, str]:
        """Return key -> text as stored in a file, with sorted keys."""
        values = {key: value for key, value in self.model_dump(mode="json").items() if value is not None}
        values |= {f"{_GROUPS}{network}": groups for network, groups in values.pop("lora").items()}
        texts = {key: value if key in _PLAIN else to_json(value) for key, value in values.items()}
        return dict(sorted({"format": FORMAT, **texts}.items()))


def _parsed(text: str) -> Any:
    """Parse JSON; return other text unchanged, so that validation reports it with its key."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def _renamed(groups: Any) -> Any:
    """Return the groups with the group names of the first files updated: unet[0] becomes unet.0.positive."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return groups
    matches = [_OLD_NAME.fullmatch(str(group.get("name"))) for group in groups]
    return [
        group | {"name": f"{match['network']}.{match['index']}.{group.get('branch')}"} if match else group
        for group, match in zip(groups, matches, strict=True)
    ]


def to_json(value: object) -> str:
    """Return `value` as compact JSON with sorted keys, the form used in metadata."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class TriggerWord:
    """A trigger word with its learned vectors.

    Attributes:
        name: the trigger word.
        slot: in templates.
        branch: "negative" or "positive".
        vectors: text encoder -> float32 `[n, D]`.
    """

    name: str
    slot: str
    branch: str
    vectors: Mapping[str, torch.Tensor] = field(repr=False)

    @property
    def num_vectors(self) -> int:
        """The number of vectors n, the same for every text encoder."""
        return len(next(iter(self.vectors.values())))

    @property
    def key(self) -> str:
        """The name of the word in a concept, "<branch>.<slot>"."""
        return f"{self.branch}.{self.slot}"


@dataclass(frozen=True)
class Concept:
    """A concept as stored in a file.

    Attributes:
        tensors: float32, contiguous, on the CPU. Adapters are named `<network>.<layer>.<group>.<branch>.<down|up|bias>`
            (network: such as `unet`; group: its index in the configuration; branch: `negative`, `positive` or
            `shared`); alpha is in the metadata, not multiplied in. Words `[n, D]` are named `words.<branch>.<slot>`;
            see `words_part` for further text encoders.
        metadata: of the concept.
        doubts: what makes the result of a training doubtful; not stored. Such a concept does not replace another one.
    """

    tensors: dict[str, torch.Tensor] = field(repr=False)
    metadata: ConceptMetadata
    doubts: tuple[str, ...] = ()

    def is_stored_like(self, other: Concept) -> bool:
        """Return whether both have the same file."""
        return (
            self.metadata.write() == other.metadata.write()
            and self.tensors.keys() == other.tensors.keys()
            and all(tensor.equal(other.tensors[name]) for name, tensor in self.tensors.items())
        )

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks of the base model, adapted or not."""
        return tuple(self.metadata.lora)

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors whose name starts with `prefix.`, by the rest of the name."""
        return {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }

    def updates(self, network: str) -> tuple[LearnedUpdate, ...]:
        """Return the LoRA updates of a network.

        Raises:
            InputError: a tensor belongs to no group, or an update is incomplete.
        """
        return learned_updates(self.part(network), self.metadata.lora.get(network, ()))

    def trigger_words(self) -> tuple[TriggerWord, ...]:
        """Return the trigger words of both branches, positive first in every slot.

        Raises:
            InputError: a word has no vectors, or vectors have no word.
        """
        names, vectors = self._word_names(), self._word_vectors()
        encoders = {encoder for by_encoder in vectors.values() for encoder in by_encoder}
        wrong = names.keys() ^ vectors.keys()
        wrong |= {key for key, found in vectors.items() if found.keys() != encoders or not _are_words(found.values())}
        if wrong:
            raise InputError(
                expected=f"vectors [n, width] for every trigger word in the concept, {', '.join(names) or 'none'}",
                got=f"{', '.join(sorted(wrong))} missing, without a word, or of another shape",
                remedy="the file is incomplete: train the concept again",
            )
        keys = ((*key.split(".", 1), name) for key, name in names.items())
        return tuple(TriggerWord(name, slot, branch, vectors[f"{branch}.{slot}"]) for branch, slot, name in keys)

    def _word_names(self) -> dict[str, str]:
        """Return "<branch>.<slot>" -> trigger word, for all words with vectors."""
        branches = ("positive", "negative")[: self.metadata.num_branches]
        return {
            f"{branch}.{slot}": name
            for slot, names in self.metadata.words.items()
            for branch, name in zip(branches, names, strict=False)
            if branch == "positive" or name
        }

    def _word_vectors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return "<branch>.<slot>" -> text encoder -> vectors."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for encoder in self.networks:
            for key, vectors in self.part(words_part(encoder)).items():
                found.setdefault(key, {})[encoder] = vectors
        return found

    def check(self, origin: str) -> None:
        """Check the tensors against the metadata.

        Args:
            origin: name of the file in error messages.

        Raises:
            InputError: a tensor is missing, unknown, of another dtype or shape, or not finite.
        """
        known = {*self.networks, *map(words_part, self.networks)}
        for name, tensor in self.tensors.items():
            if name.split(".", 1)[0] not in known or tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise InputError(
                    expected=f"finite float32 tensors of {', '.join((*self.networks, WORDS))} in {origin}",
                    got=f"{name}, {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}",
                    remedy="the file is damaged: copy it again, or train the concept again",
                )
        for network in self.networks:
            self.updates(network)
        self.trigger_words()

    def sha256(self) -> str:
        """Return the SHA-256 of names, shapes and values of all tensors; equal adapters and words give equal digits."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}\0{list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def words_part(encoder: str) -> str:
    """Return the name prefix of a text encoder's vectors: `words`, or `words_<encoder>` for all but the first one."""
    return WORDS if encoder == _FIRST_ENCODER else f"{WORDS}_{encoder}"


def _are_words(vectors: Iterable[torch.Tensor]) -> bool:
    """Return whether these are vectors `[n, D]` of one word for several text encoders, with the same n > 0."""
    shapes = [tuple(tensor.shape) for tensor in vectors]
    return all(len(shape) == 2 for shape in shapes) and len({shape[0] for shape in shapes} - {0}) == 1
