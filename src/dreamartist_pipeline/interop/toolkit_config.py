"""Training configurations of the reference toolkit (HCP-Diffusion), read into this project's parameters.

Nothing in such a file is run or imported: the class names under `_target_` are compared with those known here, and
'512*512' is a product of numbers and nothing else. What has no counterpart is named, never dropped in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from dreamartist_pipeline.core.errors import InputError

SLOT = "pt1"  # of the one pair of words, in templates and prompts of this project

_SCHEDULES = {"one_cycle": "one_cycle", "constant_with_warmup": "constant", "constant": "constant", "cosine": "cosine"}
_WEIGHTINGS = {"MSELoss": "none", "MinSNRLoss": "min_snr", "SoftMinSNRLoss": "soft_min_snr"}
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "no": "float32"}
_GROUP_KEYS = ("rank", "alpha", "dropout", "bias", "svd_init")
_TAG_TRANSFORMS = {"TagShuffle": "tag_shuffle", "TagDropout": "tag_dropout", "TagErase": "tag_erase"}
_DEFAULT_PROBABILITY = 0.1  # the toolkit's own for dropping and erasing tags
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_RESOLVER = re.compile(r"\$\{[\w.]+:([^{}]*)\}")
_PRODUCT = re.compile(r"\d+(\s*[*,]\s*\d+)*")
_ADVICE = {  # beginning of a key -> why it is not carried over
    "exp_dir": "a run's files are named by its subject",
    "ckpt_type": "everything is saved as safetensors",
    "logger": "every run is logged in MLflow",
    "vis_info": "see training.preview for pictures while training",
    "previewer": "see training.preview for pictures while training",
    "allow_tf32": "PyTorch's own setting is kept",
    "unet": "the base model stays frozen; train LoRA groups",
    "train.noise_offset": "see training.noise_offset",
    "model.ema": "see training.ema_decay",
    "text_encoder": "the base model stays frozen; train LoRA groups",
    "tokenizer_pt.emb_dir": "words start anew; set training.words.num_vectors and init_text as they were created, or "
    "import their files (kedro run --pipeline import) and set training.start_from",
    "train.save_step": "see training.preview.every for pictures while training",
    "train.workers": "latents are encoded once; nothing has to be loaded while training",
    "train.resume": "import the checkpoint (kedro run --pipeline import) and set training.start_from to the concept",
    "train.set_grads_to_none": "gradients live in one flat buffer",
    "model.enable_xformers": "PyTorch's own attention is used",
    "model.gradient_checkpointing": "not needed by adapters of this size",
    "model.tokenizer_repeats": "prompts have one context of the text encoder",
}
_ADVICE_BY_END = {
    "img_root": "name the one picture: --params image=FILE",
    "caption_file": "write the caption beside the picture, FILE.txt, or --params caption=TEXT",
    "att_mask": "name the mask: --params mask=FILE",
    "cache_latents": "latents are always cached, as mean and deviation",
    "image_transforms": "see ingestion",
    "num_bucket": "one picture has one size",
}


@dataclass(frozen=True)
class ImportedConfig:
    """What a toolkit configuration says, in this project's words.

    settings: for globals.yml: `method` (whose values fill what the file leaves open) and `base_model`.
    parameters: for parameters.yml: `training`, `ingestion`, `device`.
    left_out: dotted key of the file -> its value and why it was not carried over.
    """

    settings: dict[str, Any]
    parameters: dict[str, Any]
    left_out: dict[str, str]


def read_toolkit_config(text: str, read_text: Callable[[str], str | None]) -> ImportedConfig:
    """Translate a training configuration of the reference toolkit.

    Args:
        text: the YAML file.
        read_text: returns a file that the configuration names (its `_base_` files, prompt templates), or None.

    Raises:
        InputError: it is no YAML, or trains nothing that this project trains.
    """
    config, missing = _with_bases(text, read_text)
    try:
        source = _Source(_resolved(config))
    except OmegaConfBaseException as error:
        raise InputError(f"expected references that can be followed; got: {error}; correct the file") from error
    reference, regularization = _data_sets(source)
    data = _data(source, reference, regularization)
    training: dict[str, Any] = {
        "lora_unet": _lora_groups(source, "lora_unet"),
        "lora_text_encoder": _lora_groups(source, "lora_text_encoder"),
        **data,
        **_objective(source, reference, regularization),
        **_optimisation(source),
    }
    batch_size = data["batch_size"] + data["regularization_batch_size"]
    words = _words(source, reference, batch_size, bool(training.get("scale_lr")))
    if not (words or training["lora_unet"] or training["lora_text_encoder"]):
        raise InputError(
            "expected LoRA groups (lora_unet, lora_text_encoder) or trigger words (tokenizer_pt.train and word_names) "
            f"in the configuration; got {', '.join(map(str, config))}; import a configuration that trains adapters"
        )
    training |= {"words": words} if words else {}
    training |= _templates(source, reference, words, read_text)
    parameters = {"training": training, "ingestion": _ingestion(source, reference), "device": _device(source)}
    settings = {"method": "toolkit" if words else "lora", "base_model": _base_model(source)}
    return ImportedConfig(
        {key: value for key, value in settings.items() if value},
        {key: value for key, value in parameters.items() if value},
        {**missing, **source.left_out()},
    )


# ------------------------------------------------------------------------------------------------- reading the file


def _with_bases(
    text: str, read_text: Callable[[str], str | None], seen: tuple[str, ...] = ()
) -> tuple[DictConfig, dict[str, str]]:
    """Return the configuration over its `_base_` files, and the base files that are not at hand."""
    try:
        config = OmegaConf.create(text)
    except YAMLError as error:
        raise InputError(f"expected a YAML file; got one that cannot be read: {error}; correct it") from error
    if not isinstance(config, DictConfig):
        raise InputError("expected a YAML file of keys and values; got something else; import a training configuration")
    missing: dict[str, str] = {}
    merged = OmegaConf.create()
    bases = config.pop("_base_", None) or []
    for base in [bases] if isinstance(bases, str) else bases:
        if base in seen:
            raise InputError(f"expected base files that lead to an end; got {base!r} again; correct _base_")
        base_text = read_text(base)
        if base_text is None:
            missing[f"_base_ {base}"] = "the file is not at hand; what it sets is not carried over"
            continue
        base_config, base_missing = _with_bases(base_text, read_text, (*seen, base))
        merged, missing = cast(DictConfig, OmegaConf.merge(merged, base_config)), missing | base_missing
    return cast(DictConfig, OmegaConf.merge(merged, config)), missing


def _resolved(config: DictConfig) -> dict[str, Any]:
    """Return plain values: references are followed, `${resolver:arguments}` becomes its arguments as a text.

    A reference to what a missing base file sets becomes None.
    """
    plain = _without_resolvers(OmegaConf.to_container(config, resolve=False))
    values = OmegaConf.create(plain)
    _drop_dangling(values)
    return cast(dict[str, Any], OmegaConf.to_container(values, resolve=True))


def _without_resolvers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_resolvers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_resolvers(item) for item in value]
    return _RESOLVER.sub(lambda match: match[1], value) if isinstance(value, str) else value


def _drop_dangling(node: DictConfig | ListConfig) -> None:
    keys = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        try:
            value = node[key]
        except InterpolationResolutionError:
            node[key] = None
            continue
        if isinstance(value, DictConfig | ListConfig) and not OmegaConf.is_interpolation(node, key):
            _drop_dangling(value)


# ------------------------------------------------------------------------------------------------- the file's values


class _Source:
    """The file's values by dotted key, and which of them have been taken over."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.values = dict(_leaves(config))
        self._taken: set[str] = set()
        self._notes: dict[str, str] = {}

    def take(self, key: str) -> Any:
        """Return a value, or None, and count it as carried over."""
        self._taken.add(key)
        value = self.values.get(key)
        return _number(value) if isinstance(value, str) else value

    def note(self, key: str, reason: str) -> None:
        """Count a value as left out, for a reason."""
        self._taken.discard(key)
        self._notes[key] = reason

    def children(self, prefix: str) -> list[str]:
        """Return the names directly under a key, in the file's order."""
        start = f"{prefix}." if prefix else ""
        names = [key.removeprefix(start).split(".")[0] for key in self.values if key.startswith(start)]
        return list(dict.fromkeys(names))

    def find(self, prefix: str, suffix: str) -> list[str]:
        """Return all keys under `prefix` that end in `.suffix`."""
        return [key for key in self.values if key.startswith(f"{prefix}.") and key.endswith(f".{suffix}")]

    def left_out(self) -> dict[str, str]:
        """Return what was not taken, with the reason where one is known."""
        return {
            key: f"{value!r}: {self._reason(key)}"
            for key, value in self.values.items()
            if key not in self._taken and not key.startswith("_base_") and value not in (None, "", [], {}, False)
        }

    def _reason(self, key: str) -> str:
        if key in self._notes:
            return self._notes[key]
        begins = [reason for start, reason in _ADVICE.items() if f"{key}.".startswith(f"{start}.")]
        ends = [reason for part, reason in _ADVICE_BY_END.items() if part in key.split(".")]
        return (begins + ends + ["no counterpart here"])[0]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything that is not a mapping or list; empty ones count as values."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{prefix}.{index}")
    else:
        yield prefix, value


def _number(text: str) -> Any:
    """Return '1e-4', which YAML 1.1 reads as text, as the number it is meant to be."""
    try:
        return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)", text) else text
    except ValueError:
        return text


def _class_name(target: Any) -> str:
    return str(target or "").rpartition(".")[2]


# ------------------------------------------------------------------------------------------------- what trains


def _lora_groups(source: _Source, network: str) -> list[dict[str, Any]]:
    return [_lora_group(source, f"{network}.{index}") for index in source.children(network)]


def _lora_group(source: _Source, prefix: str) -> dict[str, Any]:
    """Read one LoRA group; `type: p` is an older spelling of `branch: p`."""
    group: dict[str, Any] = {"lr": source.take(f"{prefix}.lr")}
    branch = source.take(f"{prefix}.branch")
    if f"{prefix}.type" in source.values:
        kind = source.take(f"{prefix}.type")
        branch = branch or (kind if kind in ("p", "n") else None)
        if kind not in ("p", "n", "lora", "dapp"):
            source.note(f"{prefix}.type", "only plain LoRA layers are trained")
    group |= {"branch": branch} if branch else {}
    for key in _GROUP_KEYS:
        if (value := source.take(f"{prefix}.{key}")) is not None:
            group[key] = value
    layers = [source.take(f"{prefix}.layers.{index}") for index in source.children(f"{prefix}.layers")]
    group["layers"] = [str(layer).removeprefix("text_model.") for layer in layers]
    return group


def _words(source: _Source, reference: str, batch_size: int, scale_lr: bool) -> dict[str, Any]:
    """Read the trigger words, a (positive, negative) pair for each slot, and their learning rate."""
    found = _word_names(source, reference)
    names = {(slot if len(found) > 1 else SLOT): _pair(source, key, words) for slot, (key, words) in found.items()}
    trained = source.children("tokenizer_pt.train")
    rates = []
    for index in trained:
        source.take(f"tokenizer_pt.train.{index}.name")
        rates.append(source.take(f"tokenizer_pt.train.{index}.lr"))
    if not names or not trained or not rates:
        return {}
    if not all(isinstance(rate, int | float) for rate in rates):
        raise InputError(f"expected a learning rate (lr) for every word of tokenizer_pt.train; got {rates}; add them")
    for index, rate in zip(trained, rates, strict=True):
        if rate != rates[0]:
            source.note(f"tokenizer_pt.train.{index}.lr", f"all words share one learning rate, {rates[0]}")
    words: dict[str, Any] = {"names": names, "lr": _words_lr(source, float(rates[0]), batch_size, scale_lr)}
    if (decay := source.take("train.optimizer_pt.weight_decay")) is not None:
        words["weight_decay"] = decay
    return words


def _words_lr(source: _Source, lr: float, batch_size: int, scale_lr: bool) -> float:
    """Return the words' rate such that it is right after `scale_lr`, which is one switch for everything here."""
    scale_words = source.take("train.scale_lr_pt")
    scale_words = scale_lr if scale_words is None else bool(scale_words)
    if scale_words == scale_lr:
        return lr
    return lr * batch_size if scale_words else lr / batch_size


def _pair(source: _Source, key: str, words: list[str]) -> list[str]:
    if len(words) == 1:
        source.note(key, f"branches need words of their own; the negative one becomes '{words[0]}-neg'")
        return [words[0], f"{words[0]}-neg"]
    return words


# ------------------------------------------------------------------------------------------------- data


def _data_sets(source: _Source) -> tuple[str, str | None]:
    """Return the key of the data set with the picture, and of the one of regularization images.

    Older files have `data` and `data_class`, newer ones several data sets under `data`. The regularization set is the
    one whose trigger words are empty.
    """
    candidates = [
        key.rpartition(".")[0] for key in source.values if re.fullmatch(r"(data\w*)(\.\w+)?\.batch_size", key)
    ]
    regularization = [name for name in candidates if name == "data_class" or _is_empty(source, name)]
    references = [name for name in candidates if name not in regularization]
    if not references:
        raise InputError(
            "expected a data set with a batch_size for the picture under 'data'; got "
            f"{', '.join(candidates) or 'none'}; import a training configuration"
        )
    for name in references[1:] + regularization[1:]:
        source.note(f"{name}.batch_size", "there is one reference image and one regularization set")
    return references[0], regularization[0] if regularization else None


def _is_empty(source: _Source, name: str) -> bool:
    found = _word_names(source, name)
    return bool(found) and not any("".join(words) for _, words in found.values())


def _word_names(source: _Source, data_set: str) -> dict[str, tuple[str, list[str]]]:
    """Return slot -> (its key, its words) of a data set; a transform's own `word_names` counts before a general one."""
    found: dict[str, tuple[str, list[str]]] = {}
    for key in sorted(source.values, key=lambda k: ".transforms." not in k):
        match = re.fullmatch(rf"{re.escape(data_set)}\.(.+\.)?word_names\.(?P<slot>\w+)(\.(?P<index>\d+))?", key)
        if match is None:
            continue
        word = source.take(key) or ""
        slot_key, words = found.setdefault(match["slot"], (key.removesuffix(f".{match['index']}"), []))
        if key.startswith(slot_key):
            words.append(str(word))
    return found


def _data(source: _Source, reference: str, regularization: str | None) -> dict[str, Any]:
    data: dict[str, Any] = {"batch_size": _count(source, f"{reference}.batch_size")}
    data["regularization_batch_size"] = _count(source, f"{regularization}.batch_size") if regularization else 0
    _take_transforms(source, reference)
    if transforms := _caption_transforms(source, reference):
        data["caption_transforms"] = transforms
    if regularization:
        _take_transforms(source, regularization)
        for key in [*source.find(regularization, "img_root"), *source.find(regularization, "caption_file")]:
            source.note(key, "the base model draws its regularization set anew; see prompts and regularization")
        for key in source.values:
            if key.startswith(f"{regularization}.bucket."):
                source.note(key, "regularization images have the size of the prepared picture")
    return data


def _count(source: _Source, key: str) -> int:
    value = source.take(key)
    if not isinstance(value, int):
        raise InputError(
            f"expected a whole number as {key}; got {value!r}; correct the file, or give its base files too"
        )
    return value


def _take_transforms(source: _Source, data_set: str) -> None:
    """Count the transforms that fill templates as carried over; the others have no counterpart."""
    for key in source.find(data_set, "_target_"):
        if _class_name(source.values[key]) in ("TemplateFill", "Compose", "TextImagePairDataset"):
            source.take(key)
            source.take(f"{key.removesuffix('_target_')}_partial_")


def _caption_transforms(source: _Source, data_set: str) -> list[Any]:
    """Return what changes the tags of captions, in the file's order."""
    transforms: list[Any] = []
    for key in source.find(data_set, "_target_"):
        if name := _TAG_TRANSFORMS.get(_class_name(source.values[key])):
            source.take(key)
            probability = source.take(f"{key.removesuffix('_target_')}p")
            transforms.append(name if name == "tag_shuffle" else {name: probability or _DEFAULT_PROBABILITY})
    return transforms


def _templates(
    source: _Source, reference: str, words: Mapping[str, Any], read_text: Callable[[str], str | None]
) -> dict[str, Any]:
    """Read the prompt templates, where their file is at hand; the only slot is renamed as the words were."""
    keys = source.find(reference, "prompt_template")
    text = read_text(str(source.values[keys[0]])) if keys and source.values[keys[0]] else None
    if text is None:
        for key in keys:
            source.note(key, "the file is not at hand; the method's own templates are used")
        return {}
    source.take(keys[0])
    slots = set(words.get("names", {}))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if slots == {SLOT}:
        lines = [re.sub(r"\{(?!caption\}|class\})\w+\}", f"{{{SLOT}}}", line) for line in lines]
    return {"templates": lines, "preview": {"prompts": lines[:2]}}


def _ingestion(source: _Source, reference: str) -> dict[str, Any]:
    target = source.take(f"{reference}.bucket._target_")
    keep_aspect = "RatioBucket" in str(target)
    if (area := _area(source, f"{reference}.bucket.target_area")) is not None:
        side = round(math.sqrt(area) / 64) * 64
    elif (size := _size(source, f"{reference}.bucket.target_size")) is not None:
        side = size
    else:
        return {}
    return {"bucket": {"side_px": side, "multiple_px": 64, "keep_aspect": keep_aspect}}


def _area(source: _Source, key: str) -> int | None:
    """Read '512*512', as a text, a resolver's argument or the argument of an eval that is not run."""
    for place in (key, f"{key}._args_.0"):
        text = str(source.values.get(place) or "")
        if match := _PRODUCT.search(text):
            source.take(place)
            source.take(f"{key}._target_")
            return math.prod(int(factor) for factor in re.findall(r"\d+", match[0]))
    return None


def _size(source: _Source, key: str) -> int | None:
    sides = [source.take(place) for place in (key, f"{key}.0", f"{key}.1") if source.values.get(place)]
    if len(set(sides)) > 1:
        source.note(f"{key}.1", "one side for both; see ingestion.bucket.keep_aspect")
    return int(sides[0]) if sides else None


# ------------------------------------------------------------------------------------------------- how it trains


def _objective(source: _Source, reference: str, regularization: str | None) -> dict[str, Any]:
    objective: dict[str, Any] = {}
    if (scale := source.take("train.cfg_scale")) is not None:
        objective["guidance_scale"] = str(scale)
    loss: dict[str, Any] = {}
    name = _class_name(source.take("train.loss.criterion._target_"))
    if name in _WEIGHTINGS:
        loss["weighting"] = _WEIGHTINGS[name]
        if (gamma := source.take("train.loss.criterion.gamma")) is not None:
            loss["snr_gamma"] = gamma
        source.take("train.loss.criterion._partial_")
        source.take("train.loss.criterion.reduction")
    elif name:
        source.note("train.loss.criterion._target_", "see training.loss for the losses there are")
    if source.values.get("train.loss.type") == "eps":
        source.take("train.loss.type")  # what the base model predicts is read from the base model
    if regularization:
        own = source.take(f"{reference}.loss_weight")
        other = source.take(f"{regularization}.loss_weight")
        if other is not None:
            loss["regularization_weight"] = float(other) / float(own or 1)
    return objective | ({"loss": loss} if loss else {})


def _optimisation(source: _Source) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, name in (
        ("train.train_steps", "num_steps"),
        ("train.max_grad_norm", "max_grad_norm"),
        ("train.scale_lr", "scale_lr"),
        ("seed", "seed"),
        ("model.clip_skip", "clip_skip"),
        ("train.optimizer.weight_decay", "weight_decay"),
    ):
        if (value := source.take(key)) is not None:
            values[name] = value
    if source.values.get("train.gradient_accumulation_steps") == 1:
        source.take("train.gradient_accumulation_steps")
    for part in ("optimizer", "optimizer_pt"):
        if _class_name(source.values.get(f"train.{part}._target_")) == "AdamW":
            source.take(f"train.{part}._target_")
            source.take(f"train.{part}._partial_")
    for part, name in (("scheduler", "schedule"), ("scheduler_pt", "words_schedule")):
        if schedule := _schedule(source, f"train.{part}", values.get("num_steps")):
            values[name] = schedule
    return values


def _schedule(source: _Source, prefix: str, num_steps: int | None) -> dict[str, Any]:
    name = source.values.get(f"{prefix}.name")
    if name is None:
        return {}
    if name not in _SCHEDULES:
        source.note(f"{prefix}.name", f"schedules here are {', '.join(sorted(set(_SCHEDULES.values())))}")
        return {}
    source.take(f"{prefix}.name")
    if source.take(f"{prefix}.num_training_steps") not in (None, num_steps):
        source.note(f"{prefix}.num_training_steps", "a schedule is as long as the training")
    warmup = source.take(f"{prefix}.num_warmup_steps") if name != "constant" else 0
    return {"kind": _SCHEDULES[name], "warmup_steps": int(warmup or 0)}


def _device(source: _Source) -> dict[str, Any]:
    precision = source.take("mixed_precision")
    if precision is None:
        return {}
    if precision not in _DTYPES:
        source.note("mixed_precision", f"known are {', '.join(_DTYPES)}")
        return {}
    return {"dtype": _DTYPES[precision]}


def _base_model(source: _Source) -> str | None:
    """Return the base model; 'owner/name' is a hub id, anything else a folder."""
    name = source.take("model.pretrained_model_name_or_path")
    if name is None:
        return None
    return f"hub:{name}" if _HUB_ID.fullmatch(str(name)) else str(name)
