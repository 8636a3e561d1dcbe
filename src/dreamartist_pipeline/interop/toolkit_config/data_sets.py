"""Data sets: the reference image's and the regularization set's, with their captions, weights and image size."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.toolkit_config.source import ConfigReader
from dreamartist_pipeline.interop.toolkit_config.words import words_by_slot
from dreamartist_pipeline.params import TrainingParams
from dreamartist_pipeline.references import PRODUCT

_OPTIONS = {"batch_size", "source", "bucket", "loss_weight", "text_transforms", "tag_transforms", "img_root"}
_TEMPLATE_CLASSES = {name: name for name in ("TemplateFill", "Compose", "TextImagePairDataset")}
_TAG_TRANSFORMS = {"TagShuffle": "tag_shuffle", "TagDropout": "tag_dropout", "TagErase": "tag_erase"}
_TAG_PROBABILITY = 0.1  # the toolkit's default for dropping and erasing tags
_MULTIPLE_PX = 64
_REGULARIZATION_REASONS = {  # pattern of keys of the regularization set -> why they are not carried over
    "img_root|caption_file": "the base model generates the regularization set; see prompts and regularization",
    r"prompt_template(\..+)?|\w*transforms\.\d+(\..+)?": "regularization prompts come from the prompt database",
    r"bucket\..+": "regularization images have the size of the prepared image",
}


@dataclass(frozen=True)
class DataSets:
    """Keys of the data set with the reference image, and of the regularization set, if there is one."""

    reference: str
    regularization: str | None


def find_data_sets(reader: ConfigReader) -> DataSets:
    """Find the data sets with the reference image and with regularization images.

    Older files have `data` and `data_class`, newer ones several data sets under `data`, of which the regularization set
    is the one whose trigger words are empty.

    Raises:
        InputError: there is no data set with a reference image.
    """
    candidates = _candidates(reader)
    regularization = [name for name in candidates if name == "data_class" or _has_empty_words(reader, name)]
    references = [name for name in candidates if name not in regularization]
    if not references and regularization != ["data_class"]:  # a reference image may have no trigger words
        references, regularization = regularization[:1], regularization[1:]
    if not references:
        raise InputError(
            expected="a data set with the reference image under 'data'",
            got=f"{', '.join(candidates) or 'none'}",
            remedy="import a training configuration",
        )
    others = references[1:] + regularization[1:]
    reader.leave_out([f"{name}.batch_size" for name in others], "only one data set of each kind is trained on")
    return DataSets(references[0], next(iter(regularization), None))


def _candidates(reader: ConfigReader) -> list[str]:
    """Return the keys of all data sets: keys with an option of a data set below them, or else `data` itself."""
    found: list[str] = []
    for top in reader.children(""):
        if re.fullmatch(r"data\w*", top) and (below := reader.children(top)):
            places = [top] if _OPTIONS & set(below) else [f"{top}.{name}" for name in below]
            names = [place for place in places if _OPTIONS & set(reader.children(place))]
            found += names or ([top] if top in ("data", "data_class") else [])
    return found


def _has_empty_words(reader: ConfigReader, data_set: str) -> bool:
    words = [word for slot, of in words_by_slot(reader, data_set).items() if slot != "class" for word in of.values()]
    return bool(words) and not any(words)


def read_data(reader: ConfigReader, data_sets: DataSets) -> dict[str, Any]:
    """Return batch sizes and caption transforms, as parameters of `training`."""
    data: dict[str, Any] = {
        "batch_size": _batch_size(reader, data_sets.reference, "batch_size"),
        "regularization_batch_size": 0,
    }
    if transforms := _caption_transforms(reader, data_sets.reference):
        data["caption_transforms"] = transforms
    if regularization := data_sets.regularization:
        data["regularization_batch_size"] = _batch_size(reader, regularization, "regularization_batch_size")
        for pattern, reason in _REGULARIZATION_REASONS.items():
            reader.leave_out(reader.find(regularization, pattern), reason)
    for data_set in filter(None, (data_sets.reference, regularization)):
        for key in reader.find(data_set, "_target_"):
            reader.read_choice(key, _TEMPLATE_CLASSES)
    return data


def _batch_size(reader: ConfigReader, data_set: str, name: str) -> int:
    default = TrainingParams.model_fields[name].default
    value = reader.read_or(f"{data_set}.batch_size", default, "as in this project's methods")
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(
            expected=f"an integer for {data_set}.batch_size",
            got=f"{value!r}",
            remedy="correct the file, or add its base files",
        )
    return value


def _caption_transforms(reader: ConfigReader, data_set: str) -> list[Any]:
    """Return the transforms of tags, in the file's order."""
    transforms: list[Any] = []
    for key in reader.find(data_set, "_target_"):
        if name := reader.read_choice(key, _TAG_TRANSFORMS):
            p = reader.read(f"{key.removesuffix('_target_')}p")
            transforms.append(name if name == "tag_shuffle" else {name: _TAG_PROBABILITY if p is None else p})
    return transforms


# ------------------------------------------------------------------------------------------------- loss weights


def read_regularization_weight(reader: ConfigReader, data_sets: DataSets) -> float | None:
    """Return the regularization set's loss weight relative to the reference image's, None if neither is set.

    Raises:
        InputError: a weight is not a number, or the reference image's is not above 0.
    """
    key = f"{data_sets.reference}.loss_weight"
    own = reader.read(key)
    if not data_sets.regularization:
        if own not in (None, 1):
            reader.leave_out([key], "it is relative to the regularization set's weight, and there is no such set")
        return None
    other = reader.read(f"{data_sets.regularization}.loss_weight")
    if own is None and other is None:
        return None
    own, other = (1.0 if weight is None else weight for weight in (own, other))
    if not all(isinstance(weight, int | float) for weight in (own, other)) or own <= 0:
        raise InputError(
            expected="numbers as loss_weight, above 0 for the reference image",
            got=f"{own!r} for the reference image and {other!r} for the regularization set",
            remedy="correct them",
        )
    return float(other) / float(own)


# ------------------------------------------------------------------------------------------------- image size


def read_ingestion(reader: ConfigReader, reference: str) -> dict[str, Any]:
    """Return `ingestion.bucket`, empty without a size that can be read."""
    prefix = f"{reference}.bucket"
    target = str(reader.read(f"{prefix}._target_") or "")
    found = _area_side(reader, f"{prefix}.target_area") or _size_side(reader, f"{prefix}.target_size")
    if found is None:
        reader.leave_out([f"{prefix}._target_"], "its size cannot be read; see ingestion.bucket")
        return {}
    if target and not re.search("RatioBucket|FixedBucket", target):
        reader.leave_out([f"{prefix}._target_"], "see ingestion.bucket for the supported sizes")
    key, side = found
    side_px = max(1, round(side / _MULTIPLE_PX)) * _MULTIPLE_PX
    if side_px != side:
        reader.leave_out([key], f"sides are multiples of {_MULTIPLE_PX} px; {side_px} is used")
    return {"bucket": {"side_px": side_px, "multiple_px": _MULTIPLE_PX, "keep_aspect": "RatioBucket" in target}}


def _area_side(reader: ConfigReader, key: str) -> tuple[str, float] | None:
    """Return the key and the square root of an area: '512*512', also as an argument of eval, which is not run."""
    for place in (key, f"{key}._args_.0"):
        text = str(reader.values.get(place) or "").strip()
        if PRODUCT.fullmatch(text):
            reader.use([place, f"{key}._target_"])
            return place, math.sqrt(math.prod(map(int, re.findall(r"\d+", text))))
    return None


def _size_side(reader: ConfigReader, key: str) -> tuple[str, float] | None:
    """Return the key and the value of a side; of two sides, the first is used."""
    keys = [
        place for place in (key, f"{key}.0", f"{key}.1") if re.fullmatch(r"[1-9]\d{0,5}", str(reader.values.get(place)))
    ]
    if not keys:
        return None
    sides = [int(reader.read(place)) for place in keys]
    if len(set(sides)) > 1:
        reader.leave_out([f"{key}.1"], "the first side is used for both; see ingestion.bucket.keep_aspect")
    return keys[0], sides[0]
