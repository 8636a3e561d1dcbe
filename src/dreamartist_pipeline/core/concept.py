"""The trained result of one subject: adapter pair, embedding pair, and the metadata needed to use them again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dreamartist_pipeline.core.lora_factors import LearnedUpdate, learned_updates
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import GuidanceScale, ResolvedGroup

FORMAT = "dreamartist-concept-1"
WORDS = "words"
_FIRST_ENCODER = "text_encoder"

_GROUPS = "lora_"  # followed by the network
_PLAIN = (  # texts that stand for themselves; everything else is JSON
    *("base_model", "base_model_fingerprint", "base_model_family", "prediction_type", "guidance_scale", "class_word"),
    *("config_sha256", "start_sha256"),
)
_FIRST_NAME = re.compile(r"(?P<network>\w+)\[(?P<index>\d+)\]")  # of a group in the first files, unet[0]
_SHOWN_FAULTS = 3

Whole = Annotated[int, Field(ge=0)]
VectorCount = Annotated[int, Field(ge=1)] | None


class ConceptMetadata(BaseModel):
    """What a concept's file says beside its tensors; neither times nor paths, so that equal trainings give equal bytes.

    Keys that are not known are ignored: other tools add theirs. Whatever changes how a concept acts needs another
    FORMAT. An unknown option of a LoRA group is an error for that reason.

    Defaults are what is meant by files of earlier versions, and by imported concepts, that lack a key.

    Attributes:
        base_model: its name.
        base_model_fingerprint: of its weights, "sha256:…"; in files of earlier versions 16 hex digits, of its files.
        base_model_family: what must be the same when the concept is attached.
        num_branches: 2, or 1 for a training without a negative branch.
        num_steps: how long it was trained; 0 when unknown.
        words: slot -> (positive, negative) trigger word; the latter is "" for a word by itself.
        num_vectors: of (positive, negative) words; None where they differ, so that only the tensors say it.
        lora: network of the base model -> its groups, in the order of the tensors' numbers; () without adapters.
        class_word: stands in for a slot without a word.
        clip_skip: how many of the text encoder's last layers are left out.
        zero_terminal_snr: whether the noise schedule ends without signal.
        config_sha256: of the configuration, as far as it can change the result.
        start_sha256: of the concept's file that the training started from.
        imported_from: (name, SHA-256) of the files of other tools that it was made of.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    base_model: str
    base_model_fingerprint: str
    num_branches: Literal[1, 2]
    num_steps: Whole
    words: dict[str, tuple[Annotated[str, Field(min_length=1)], str]]
    num_vectors: tuple[VectorCount, VectorCount]
    lora: dict[str, tuple[ResolvedGroup, ...]]
    class_word: str = ""
    base_model_family: str = "stable-diffusion"  # later than the first files, which knew no other
    clip_skip: Whole = 0  # later than the first files
    zero_terminal_snr: bool = False  # later than the first files
    prediction_type: str | None = None
    guidance_scale: GuidanceScale | None = None
    seed: Whole | None = None
    templates: tuple[str, ...] | None = None
    init_text: tuple[str, str] | None = None
    versions: dict[str, str] | None = None
    config_sha256: str | None = None
    start_sha256: str | None = None
    imported_from: tuple[tuple[str, str], ...] | None = None

    @classmethod
    def read(cls, fields: Mapping[str, str], origin: str) -> ConceptMetadata:
        """Return the metadata that a file of this or an earlier version holds.

        Args:
            fields: text by key, as in the file.
            origin: what to call the file in an error.

        Raises:
            InputError: not a concept of this project, or one with damaged metadata.
        """
        if fields.get("format") != FORMAT:
            raise InputError(
                expected=f"a concept of this project in {origin}",
                got="a safetensors file of another kind",
                remedy="make a concept of it first (kedro run --pipeline import), and name that one",
            )
        values = {key: text if key in _PLAIN else _parsed(text) for key, text in fields.items()}
        values["lora"] = {key.removeprefix(_GROUPS): _renamed(values[key]) for key in fields if key.startswith(_GROUPS)}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            raise InputError(
                expected=f"the metadata of a concept in {origin}",
                got=f"{'; '.join(faults[:_SHOWN_FAULTS])}",
                remedy="the file is damaged or of a later version: copy it again, or train the concept again",
            ) from error

    def write(self) -> dict[str, str]:
        """Return the metadata as a file holds them: text by key, keys sorted."""
        values = {key: value for key, value in self.model_dump(mode="json").items() if value is not None}
        values |= {f"{_GROUPS}{network}": groups for network, groups in values.pop("lora").items()}
        texts = {key: value if key in _PLAIN else to_json(value) for key, value in values.items()}
        return dict(sorted({"format": FORMAT, **texts}.items()))


def _parsed(text: str) -> Any:
    """Return a JSON value, or a text that is none as it is, for the schema to refuse under the key's name."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _renamed(groups: Any) -> Any:
    """Return groups with the names that the first files did not have: unet[0] is unet.0.positive."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return groups
    matches = [_FIRST_NAME.fullmatch(str(group.get("name"))) for group in groups]
    return [
        group | {"name": f"{match['network']}.{match['index']}.{group.get('branch')}"} if match else group
        for group, match in zip(groups, matches, strict=True)
    ]


def to_json(value: object) -> str:
    """Return `value` as compact JSON with sorted keys: the one spelling used in metadata."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class TriggerWord:
    """A learned word. branch: "negative" or "positive". vectors: text encoder -> float32 `[n, D]`."""

    name: str
    slot: str
    branch: str
    vectors: Mapping[str, torch.Tensor] = field(repr=False)

    @property
    def num_vectors(self) -> int:
        """n, the same for every text encoder."""
        return len(next(iter(self.vectors.values())))

    @property
    def key(self) -> str:
        """The word's name in a concept, "<branch>.<slot>"."""
        return f"{self.branch}.{self.slot}"


@dataclass(frozen=True)
class Concept:
    """A concept as it is stored.

    Attributes:
        tensors: float32, contiguous, on the CPU, named `<network>.<layer>.<group>.<branch>.<down|up|bias>` for adapters
            (network such as `unet` or `text_encoder`, group its index in the configuration, branch `negative`,
            `positive` or `shared`; alpha and rank are in the metadata, not folded in) and `words.<branch>.<slot>`
            `[n, D]` for words; see `words_part` for those of further text encoders.
        metadata: what else is needed to use them.
    """

    tensors: dict[str, torch.Tensor] = field(repr=False)
    metadata: ConceptMetadata

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks of the base model that it was made for, adapted or not."""
        return tuple(self.metadata.lora)

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors under `prefix.`, named without it."""
        return {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }

    def updates(self, network: str) -> tuple[LearnedUpdate, ...]:
        """Return what the adapters of a network have learned.

        Raises:
            InputError: a tensor that belongs to no group, or an incomplete update.
        """
        return learned_updates(self.part(network), self.metadata.lora.get(network, ()))

    def trigger_words(self) -> tuple[TriggerWord, ...]:
        """Return the learned words of both branches, positive first in every slot.

        Raises:
            InputError: a word without vectors, or vectors without a word.
        """
        names, vectors = self._word_names(), self._word_vectors()
        encoders = {encoder for by_encoder in vectors.values() for encoder in by_encoder}
        wrong = names.keys() ^ vectors.keys()
        wrong |= {key for key, found in vectors.items() if found.keys() != encoders or not _are_words(found.values())}
        if wrong:
            raise InputError(
                expected=f"vectors [n, width] for every trigger word in the concept, {', '.join(names) or 'none'}",
                got=f"{', '.join(sorted(wrong))} missing, without a word or of another shape",
                remedy="train the concept again, the file is incomplete",
            )
        keys = ((*key.split(".", 1), name) for key, name in names.items())
        return tuple(TriggerWord(name, slot, branch, vectors[f"{branch}.{slot}"]) for branch, slot, name in keys)

    def _word_names(self) -> dict[str, str]:
        """Return "<branch>.<slot>" -> trigger word, of those that have vectors."""
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
        """Confirm that the tensors are whole and belong to the metadata.

        Args:
            origin: what to call the file in an error.

        Raises:
            InputError: what is missing, too much, of another dtype or shape, or not finite.
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


def words_part(encoder: str) -> str:
    """Return what the vectors for a text encoder begin with: `words`, or `words_text_encoder_2` for a second one."""
    return WORDS if encoder == _FIRST_ENCODER else f"{WORDS}_{encoder}"


def _are_words(vectors: Iterable[torch.Tensor]) -> bool:
    """Say whether these are one word's vectors `[n, D]` for several text encoders, n being the same."""
    shapes = [tuple(tensor.shape) for tensor in vectors]
    return all(len(shape) == 2 for shape in shapes) and len({shape[0] for shape in shapes} - {0}) == 1
