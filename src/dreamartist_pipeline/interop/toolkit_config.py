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
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.params import DeviceParams, IngestionParams, Params, TrainingParams, WordsParams

SLOT = "pt1"  # of the first pair of words, in templates and prompts of this project; the next is pt2

_SCHEDULES = {"one_cycle": "one_cycle", "constant_with_warmup": "constant", "constant": "constant", "cosine": "cosine"}
_WEIGHTINGS = {"MSELoss": "none", "MinSNRLoss": "min_snr", "SoftMinSNRLoss": "soft_min_snr"}
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "no": "float32", "False": "float32"}  # YAML 1.1: no is False
_OPTIMIZERS = {"AdamW": "adamw", "AdamW8bit": "adamw8bit"}
_ADAMW_DECAY = 0.01  # of both classes, where the file has none
_TOOLKIT_LR, _TOOLKIT_RANK = 1e-5, 1  # of a LoRA group that has none
_GROUP_KEYS = ("rank", "alpha", "dropout", "bias", "svd_init")
_TAG_TRANSFORMS = {"TagShuffle": "tag_shuffle", "TagDropout": "tag_dropout", "TagErase": "tag_erase"}
_DEFAULT_PROBABILITY = 0.1  # the toolkit's own for dropping and erasing tags
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DATA_SET_KEYS = ("batch_size", "source", "bucket", "loss_weight", "text_transforms", "tag_transforms", "img_root")
_RESOLVER = re.compile(r"\$\{[\w.]+:([^{}]*)\}")
_SLOT_NAME = re.compile(r"\{(\w+)\}")
_PRODUCT = re.compile(r"\d+(\s*[*,]\s*\d+)*")
_ADVICE = {  # beginning of a key -> why it is not carried over
    "exp_dir": "a run's files are named by its subject",
    "ckpt_type": "everything is saved as safetensors",
    "logger": "every run is logged in MLflow",
    "vis_info": "see training.preview for pictures while training",
    "previewer": "see training.preview for pictures while training",
    "allow_tf32": "PyTorch's own setting is kept",
    "unet": "the base model stays frozen; train LoRA groups",
    "train.train_epochs": "one picture has no epochs; set training.num_steps",
    "train.gradient_accumulation_steps": "gradients are not accumulated; raise training.batch_size",
    "train.optimizer._target_": "see training.optimizer for the optimizers there are",
    "train.optimizer_pt._target_": "see training.words.optimizer for the optimizers there are",
    "train.scale_lr_pt": "no words are trained",
    "model.ema": "see training.ema_decay",
    "model.ema_unet": "see training.ema_decay",
    "model.ema_text_encoder": "see training.ema_decay",
    "model.clip_final_norm": "the text encoder's final norm is always applied",
    "tokenizer_pt.replace": "every concept is a file of its own",
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
_AS_HERE = {  # key -> the value that says what is done here anyway
    "allow_tf32": False,
    "train.gradient_accumulation_steps": 1,
    "train.loss.type": "eps",  # what the base model predicts is read from the base model
    "model.tokenizer_repeats": 1,
    "model.clip_final_norm": True,
    "model.force_cast_precision": False,
    "model.ema_unet": 0,
    "model.ema_text_encoder": 0,
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

    settings: for globals.yml: `method` (whose values fill what the file leaves open), `base_model`, `class_word`.
    parameters: for parameters.yml: `training`, `ingestion`, `device`.
    left_out: dotted key of the file -> its value and why it was not carried over, or what was put where it has none.
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
        InputError: it is no YAML, trains nothing that this project trains, or has values that cannot be trained with.
    """
    try:
        config, missing = _with_bases(text, read_text)
        source = _Source(*_resolved(config))
    except OmegaConfBaseException as error:
        raise InputError(f"expected references that can be followed; got: {error}; correct the file") from error
    reference, regularization = _data_sets(source)
    groups = {network: _lora_groups(source, network) for network in ("lora_unet", "lora_text_encoder")}
    has_negative = any(group.get("branch") == "n" for group in [*groups["lora_unet"], *groups["lora_text_encoder"]])
    words = _words(source, reference, has_negative)
    if not (words.names or any(groups.values())):
        raise InputError(
            "expected LoRA groups (lora_unet, lora_text_encoder) or trigger words (tokenizer_pt.train and word_names) "
            f"in the configuration; got {', '.join(map(str, config))}; import a configuration that trains adapters"
        )
    training: dict[str, Any] = {
        **groups,
        **_data(source, reference, regularization),
        **_guidance(source, has_negative, words),
        **_objective(source, reference, regularization),
        **_optimisation(source),
        **_templates(source, reference, words, read_text),
    }
    if words.names:
        training["words"] = _words_parameters(source, words, training)
    parameters = {"training": training, "ingestion": _ingestion(source, reference), "device": _device(source)}
    settings = {
        "method": "toolkit" if words.names else "lora",
        "base_model": _base_model(source),
        "class_word": _class_word(source, reference),
    }
    _check(parameters)
    return ImportedConfig(
        {key: value for key, value in settings.items() if value},
        {key: value for key, value in parameters.items() if value},
        {**missing, **source.left_out()},
    )


def _check(parameters: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse here what every run with these parameters would refuse; what they leave open comes from the method."""
    sections: dict[str, type[Params]] = {
        "training": TrainingParams,
        "ingestion": IngestionParams,
        "device": DeviceParams,
    }
    open_values = {"training": {"num_steps": 1}}
    for name, values in parameters.items():
        if not values:
            continue
        try:
            sections[name].model_validate({**open_values.get(name, {}), **values})
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, (name, *problem['loc'])))}: {problem['msg']} (got {_short(problem['input'])})"
                for problem in error.errors()
            ]
            raise InputError(
                f"expected a configuration that can be trained with here; got {'; '.join(problems)}; correct the file"
            ) from error


def _short(value: Any) -> str:
    return repr(value) if not isinstance(value, Mapping | list | tuple) else "these values together"


# ------------------------------------------------------------------------------------------------- reading the file


_Unresolved = dict[str, tuple[str, str]]
"""Dotted key -> its text, and why that was not followed."""


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


def _resolved(config: DictConfig) -> tuple[dict[str, Any], _Unresolved]:
    """Return plain values with references followed, and those that lead nowhere.

    The latter have the value None. Resolvers, `${name:arguments}`, are not run; arguments that are a product stand.
    """
    unresolved: _Unresolved = {}
    values = OmegaConf.create(_without_resolvers(OmegaConf.to_container(config, resolve=False), "", unresolved))
    _drop_dangling(values, "", unresolved)
    return cast(dict[str, Any], OmegaConf.to_container(values, resolve=True)), unresolved


def _without_resolvers(value: Any, key: str, unresolved: _Unresolved) -> Any:
    if isinstance(value, dict):
        return {name: _without_resolvers(item, _below(key, name), unresolved) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_resolvers(item, _below(key, index), unresolved) for index, item in enumerate(value)]
    if not isinstance(value, str) or not _RESOLVER.search(value):
        return value
    arguments = _RESOLVER.sub(lambda match: match[1], value)
    if _PRODUCT.fullmatch(arguments):
        return arguments
    unresolved[key] = value, "resolvers are not run"
    return None


def _drop_dangling(node: DictConfig | ListConfig, prefix: str, unresolved: _Unresolved) -> None:
    names = list(node) if isinstance(node, DictConfig) else range(len(node))
    for name in names:
        try:
            value = node[name]
        except (InterpolationResolutionError, MissingMandatoryValue):
            text = OmegaConf.to_container(node, resolve=False)[name]  # type: ignore[index]
            unresolved[_below(prefix, name)] = text, "refers to nothing in the file and the base files at hand"
            node[name] = None
            continue
        if isinstance(value, DictConfig | ListConfig) and not OmegaConf.is_interpolation(node, name):
            _drop_dangling(value, _below(prefix, name), unresolved)


def _below(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


# ------------------------------------------------------------------------------------------------- the file's values


class _Source:
    """The file's values by dotted key, and which of them have been taken over."""

    def __init__(self, config: Mapping[str, Any], unresolved: _Unresolved) -> None:
        self.values = dict(_leaves(config))
        self._unresolved = unresolved
        self._taken = {key for key, value in _AS_HERE.items() if self.values.get(key) == value}
        self._taken |= {key for key in self.values if key.endswith("._partial_")}  # how a class is made, no setting
        self._notes: dict[str, str] = {}
        self._assumed: dict[str, str] = {}

    def take(self, key: str) -> Any:
        """Return a value, or None, and count it as carried over."""
        self._taken.add(key)
        value = self.values.get(key)
        return _number(value) if isinstance(value, str) else value

    def note(self, key: str, reason: str) -> None:
        """Count a value as left out, for a reason."""
        self._taken.discard(key)
        self._notes[key] = reason

    def assume(self, key: str, reason: str) -> None:
        """Say what was put where the file has no value."""
        self._assumed[key] = reason

    def is_null(self, key: str) -> bool:
        """Whether the file says null, and neither nothing nor a reference that leads nowhere."""
        return key in self.values and self.values[key] is None and key not in self._unresolved

    def children(self, prefix: str) -> list[str]:
        """Return the names directly under a key, in the file's order."""
        start = f"{prefix}." if prefix else ""
        names = [key.removeprefix(start).split(".")[0] for key in self.values if key.startswith(start)]
        return list(dict.fromkeys(names))

    def find(self, prefix: str, suffix: str) -> list[str]:
        """Return all keys under `prefix` that end in `.suffix`."""
        return [key for key in self.values if key.startswith(f"{prefix}.") and key.endswith(f".{suffix}")]

    def left_out(self) -> dict[str, str]:
        """Return what was not taken, with the reason where one is known, and what was assumed."""
        unused = {
            key: f"{value!r}: {self._reason(key)}"
            for key, value in self.values.items()
            if key not in self._taken and value not in (None, "", [], {})
        }
        lost = {key: f"{text!r}: {self._reason(key, why)}" for key, (text, why) in self._unresolved.items()}
        named = unused | lost
        assumed = {
            key: f"{named[key]}; {reason}" if key in named else f"not given: {reason}"
            for key, reason in self._assumed.items()
        }
        return named | assumed

    def _reason(self, key: str, default: str = "no counterpart here") -> str:
        if key in self._notes:
            return self._notes[key]
        begins = [_ADVICE[start] for start in sorted(_ADVICE, key=len, reverse=True) if _is_under(key, start)]
        ends = [reason for part, reason in _ADVICE_BY_END.items() if part in key.split(".")]
        return (begins + ends + [default])[0]


def _is_under(key: str, start: str) -> bool:
    return f"{key}.".startswith(f"{start}.")


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
    groups = [_lora_group(source, f"{network}.{index}") for index in source.children(network)]
    return [group for group in groups if group]


def _lora_group(source: _Source, prefix: str) -> dict[str, Any] | None:
    """Read one LoRA group, None if it has no layers; `type: p` is an older spelling of `branch: p`."""
    places = [f"{prefix}.layers.{index}" for index in source.children(f"{prefix}.layers")]
    if isinstance(source.values.get(f"{prefix}.layers"), str):
        places = [f"{prefix}.layers"]
    places = [place for place in places if source.values[place] is not None]
    if not places:
        source.assume(f"{prefix}.layers", "a group without layers trains nothing; it is left out")
        return None
    group: dict[str, Any] = {}
    for key, default in (("lr", _TOOLKIT_LR), ("rank", _TOOLKIT_RANK)):
        group[key] = source.take(f"{prefix}.{key}")
        if group[key] is None:
            group[key] = default
            source.assume(f"{prefix}.{key}", f"{default:g}, as in the toolkit")
    branch = source.take(f"{prefix}.branch")
    if f"{prefix}.type" in source.values:
        kind = source.take(f"{prefix}.type")
        branch = branch or (kind if kind in ("p", "n") else None)
        if kind not in ("p", "n", "lora", "dapp", None):
            source.note(f"{prefix}.type", "only plain LoRA layers are trained")
    group |= {"branch": branch} if branch not in (None, "") else {}
    for key in _GROUP_KEYS:
        if (value := source.take(f"{prefix}.{key}")) is not None:
            group[key] = value
    _scale_alpha(source, prefix, group)
    group["layers"] = [str(source.take(place)).removeprefix("text_model.") for place in places]
    return group


def _scale_alpha(source: _Source, prefix: str, group: dict[str, Any]) -> None:
    """Read `alpha_auto_scale`; False: the toolkit scales a layer by alpha, where it is alpha / rank here."""
    key = f"{prefix}.alpha_auto_scale"
    if source.take(key) is not False:
        return
    if isinstance(group["rank"], int):
        group["alpha"] = float(group.get("alpha", 1.0)) * group["rank"]
    else:
        source.note(
            key,
            "layers are always scaled by alpha / rank, and a relative rank differs between layers; give a whole rank "
            "and set alpha to alpha · rank",
        )


@dataclass(frozen=True)
class _Words:
    """The trigger words of the picture's data set.

    names: slot of this project -> (positive, negative) word that is trained.
    slots: slot of the file -> slot of this project, of trained words.
    texts: slot of the file -> (its keys, its text), of words without a trained embedding.
    lr: of the trained words, as the file has it; None without any.
    has_pair: whether the file gives some slot a word per branch.
    """

    names: dict[str, list[str]]
    slots: dict[str, str]
    texts: dict[str, tuple[list[str], str]]
    lr: float | None
    has_pair: bool


def _words(source: _Source, reference: str, has_negative: bool) -> _Words:
    """Read the trigger words, a (positive, negative) pair for each slot, and which of them are trained.

    LoRA groups of a negative branch are of DreamArtist++, whose words are trained with or without `tokenizer_pt`.
    """
    found = {
        slot: (keys, words)
        for slot, (keys, words) in _word_names(source, reference).items()
        if any(words) and slot != "class"
    }
    pairs = {slot: _pair(words) for slot, (_, words) in found.items()}
    rates = _word_rates(source, pairs)
    lr = next(iter(rates.values()), None)
    trained = [slot for slot, pair in pairs.items() if rates.keys() & set(pair)]
    if has_negative and pairs and not rates:
        trained, lr = list(pairs), float(WordsParams.model_fields["lr"].default)
        source.assume("tokenizer_pt.train", f"LoRA groups of two branches belong to trained words; their lr is {lr:g}")
    slots = {slot: f"pt{number}" for number, slot in enumerate(trained, start=1)}
    for slot in trained:
        _take_pair(source, found[slot], pairs[slot], rates)
    return _Words(
        names={slots[slot]: pairs[slot] for slot in trained},
        slots=slots,
        texts={slot: (keys, words[0]) for slot, (keys, words) in found.items() if slot not in slots},
        lr=lr,
        has_pair=any(_is_pair(words) for _, words in found.values()),
    )


def _is_pair(words: list[str]) -> bool:
    return len(words) == 2 and bool(words[1]) and words[0] != words[1]


def _pair(words: list[str]) -> list[str]:
    """Return a word per branch; the toolkit may have one for both, or none for the negative one."""
    return words if _is_pair(words) or len(words) > 2 else [words[0], f"{words[0]}-neg"]


def _take_pair(
    source: _Source, found: tuple[list[str], list[str]], pair: list[str], rates: Mapping[str, float]
) -> None:
    keys, words = found
    for key in keys:
        source.take(key)
    if pair != words:
        source.note(keys[0], f"branches need words of their own; the negative one becomes '{pair[1]}'")
        return
    for key, word in zip(keys, words, strict=True):
        if rates and word not in rates:
            source.note(key, "not in tokenizer_pt.train; here both words of a pair are trained")


def _word_rates(source: _Source, pairs: Mapping[str, list[str]]) -> dict[str, float]:
    """Return trigger word -> learning rate of what `tokenizer_pt.train` trains.

    Raises:
        InputError: none of its words is in `word_names`, though that has some, or a word has no rate.
    """
    known = [word for pair in pairs.values() for word in pair]
    rates: dict[str, Any] = {}
    strangers: list[str] = []
    for index in source.children("tokenizer_pt.train"):
        prefix = f"tokenizer_pt.train.{index}"
        name = str(source.values.get(f"{prefix}.name"))
        if name in known:
            source.take(f"{prefix}.name")
            rates[name] = source.take(f"{prefix}.lr")
            if rates[name] != next(iter(rates.values())):
                source.note(f"{prefix}.lr", f"all words share one learning rate, {next(iter(rates.values()))}")
        else:
            strangers.append(name)
            for part in ("name", "lr"):
                source.note(f"{prefix}.{part}", f"word_names of the picture's data set has no {name!r}")
    if strangers and known and not rates:
        raise InputError(
            f"expected words of word_names ({', '.join(known)}) in tokenizer_pt.train; got {', '.join(strangers)}; "
            "correct the names"
        )
    if not all(isinstance(rate, int | float) for rate in rates.values()):
        raise InputError(f"expected a learning rate (lr) for every word of tokenizer_pt.train; got {rates}; add them")
    return rates


def _words_parameters(source: _Source, words: _Words, training: dict[str, Any]) -> dict[str, Any]:
    """Return `training.words`; where the file has no `scale_lr`, which holds for everything here, it is written too."""
    if "scale_lr" not in training:
        training["scale_lr"] = True
        source.assume(
            "train.scale_lr", "true, as in the method 'toolkit': every lr is multiplied by the total batch size"
        )
    batch_size = training["batch_size"] + training["regularization_batch_size"]
    assert words.lr is not None
    parameters: dict[str, Any] = {
        "names": words.names,
        "lr": _words_lr(source, float(words.lr), batch_size, bool(training["scale_lr"])),
    }
    return parameters | _optimizer(source, "train.optimizer_pt")


def _words_lr(source: _Source, lr: float, batch_size: int, scale_lr: bool) -> float:
    """Return the words' rate such that it is right after `scale_lr`, which is one switch for everything here."""
    scale_words = source.take("train.scale_lr_pt")
    if scale_words is None and scale_lr:
        source.assume(
            "train.scale_lr_pt", "true, as scale_lr: the words' lr is multiplied by the total batch size, too"
        )
    if scale_words is None or bool(scale_words) == scale_lr:
        return lr
    return lr * batch_size if scale_words else lr / batch_size


# ------------------------------------------------------------------------------------------------- data


def _data_sets(source: _Source) -> tuple[str, str | None]:
    """Return the key of the data set with the picture, and of the one of regularization images.

    Older files have `data` and `data_class`, newer ones several data sets under `data`. The regularization set is the
    one whose trigger words are empty.
    """
    candidates = _data_set_names(source)
    regularization = [name for name in candidates if name == "data_class" or _is_empty(source, name)]
    references = [name for name in candidates if name not in regularization]
    if not references and regularization != ["data_class"]:  # a picture may have no trigger words
        references, regularization = regularization[:1], regularization[1:]
    if not references:
        raise InputError(
            "expected a data set for the picture under 'data'; got "
            f"{', '.join(candidates) or 'none'}; import a training configuration"
        )
    for name in references[1:] + regularization[1:]:
        source.note(f"{name}.batch_size", "there is one reference image and one regularization set")
    return references[0], regularization[0] if regularization else None


def _data_set_names(source: _Source) -> list[str]:
    """Return the keys of all data sets: those with a key of data sets below them, or what `data` itself says."""
    names: list[str] = []
    for top in source.children(""):
        below = source.children(top)
        if not re.fullmatch(r"data\w*", top) or not below:
            continue
        if set(below) & set(_DATA_SET_KEYS):
            names.append(top)
            continue
        nested = [f"{top}.{name}" for name in below if set(source.children(f"{top}.{name}")) & set(_DATA_SET_KEYS)]
        names += nested or ([top] if top in ("data", "data_class") else [])
    return names


def _is_empty(source: _Source, name: str) -> bool:
    found = {slot: words for slot, (_, words) in _word_names(source, name).items() if slot != "class"}
    return bool(found) and not any("".join(words) for words in found.values())


def _word_names(source: _Source, data_set: str) -> dict[str, tuple[list[str], list[str]]]:
    """Return slot -> (keys, words) of a data set; a transform's own `word_names` counts before a general one."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    parents: dict[str, str] = {}
    for key in sorted(source.values, key=lambda k: ".transforms." not in k):
        match = re.fullmatch(rf"({re.escape(data_set)}\.(?:.+\.)?word_names)\.(?P<slot>\w+)(\.\d+)?", key)
        if match is None or parents.setdefault(match["slot"], match[1]) != match[1]:
            continue
        word = source.values[key]
        keys, words = found.setdefault(match["slot"], ([], []))
        keys.append(key)
        words.append("" if word is None or word == [] else str(word))
    return found


def _class_word(source: _Source, data_set: str) -> str | None:
    """Return what fills '{class}'."""
    keys, words = _word_names(source, data_set).get("class", ([], []))
    for key, word in zip(keys, words, strict=True):
        source.take(key)
        if word != words[0]:
            source.note(key, f"both branches share one class word, {words[0]!r}")
    return words[0] if words else None


def _data(source: _Source, reference: str, regularization: str | None) -> dict[str, Any]:
    data: dict[str, Any] = {"batch_size": _count(source, f"{reference}.batch_size", "batch_size")}
    data["regularization_batch_size"] = (
        _count(source, f"{regularization}.batch_size", "regularization_batch_size") if regularization else 0
    )
    _take_transforms(source, reference)
    if transforms := _caption_transforms(source, reference):
        data["caption_transforms"] = transforms
    if regularization:
        for key in [*source.find(regularization, "img_root"), *source.find(regularization, "caption_file")]:
            source.note(key, "the base model draws its regularization set anew; see prompts and regularization")
        prompt_keys = re.compile(rf"{re.escape(regularization)}\..*(prompt_template|transforms\.\d+)(\..+)?")
        for key in filter(prompt_keys.fullmatch, source.values):
            source.note(key, "regularization prompts come from the prompt database as they are")
        _take_transforms(source, regularization)
        for key in source.values:
            if key.startswith(f"{regularization}.bucket."):
                source.note(key, "regularization images have the size of the prepared picture")
    return data


def _count(source: _Source, key: str, name: str) -> int:
    """Return a number of rows; where the file has none, the default of `training.<name>`."""
    value = source.take(key)
    if value is None:
        value = TrainingParams.model_fields[name].default
        source.assume(key, f"{value}, as in this project's methods")
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(
            f"expected a whole number as {key}; got {value!r}; correct the file, or give its base files too"
        )
    return value


def _take_transforms(source: _Source, data_set: str) -> None:
    """Count the transforms that fill templates as carried over; the others have no counterpart."""
    for key in source.find(data_set, "_target_"):
        if _class_name(source.values[key]) in ("TemplateFill", "Compose", "TextImagePairDataset"):
            source.take(key)


def _caption_transforms(source: _Source, data_set: str) -> list[Any]:
    """Return what changes the tags of captions, in the file's order."""
    transforms: list[Any] = []
    for key in source.find(data_set, "_target_"):
        if name := _TAG_TRANSFORMS.get(_class_name(source.values[key])):
            source.take(key)
            probability = source.take(f"{key.removesuffix('_target_')}p")
            if probability is None:
                probability = _DEFAULT_PROBABILITY
            transforms.append(name if name == "tag_shuffle" else {name: probability})
    return transforms


def _templates(
    source: _Source, reference: str, words: _Words, read_text: Callable[[str], str | None]
) -> dict[str, Any]:
    """Read the prompt templates, where their file is at hand; slots are renamed as the words were."""
    keys = [key for key in source.find(reference, "prompt_template") if source.values[key]]
    text = read_text(str(source.values[keys[0]])) if keys else None
    if text is None:
        for key in keys:
            source.note(key, "the file is not at hand; the method's own templates are used")
        lines = []
    else:
        source.take(keys[0])
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    _take_texts(source, words, lines)
    renamed = [_renamed(line, words) for line in lines]
    fitting = [line for line in renamed if not words.names or set(_SLOT_NAME.findall(line)) & set(words.names)]
    if len(fitting) < len(renamed):
        source.note(keys[0], f"{len(renamed) - len(fitting)} templates have no trigger word's slot and are left out")
    used = {slot for line in fitting for slot in _SLOT_NAME.findall(line)}
    if len(words.names) > 1 and not set(words.names) <= used:
        fitting.append(f"{' and '.join(f'a {{{slot}}}' for slot in words.names)}, {{caption}}")
        place = keys[0] if keys else f"{reference}.prompt_template"
        if lines:
            source.note(place, "some slot is in none of the templates that are kept")
        source.assume(place, f"{fitting[-1]!r} is added, so that every slot is in a template")
    return {"templates": fitting, "preview": {"prompts": fitting[:2]}} if fitting else {}


def _take_texts(source: _Source, words: _Words, lines: list[str]) -> None:
    """Count words without an embedding as carried over where a template takes them as a text."""
    for slot, (keys, text) in words.texts.items():
        is_used = any(slot in _SLOT_NAME.findall(line) for line in lines)
        for key in keys:
            source.take(key)
            if not is_used:
                source.note(key, "no embedding is trained for it; write it into training.templates as a text")
            elif str(source.values[key]) != text:
                source.note(key, f"no embedding is trained for it; the templates say {text!r} in both branches")


def _renamed(template: str, words: _Words) -> str:
    def fill(match: re.Match[str]) -> str:
        slot = match[1]
        if slot in ("caption", "class"):
            return match[0]
        if slot in words.slots:
            return f"{{{words.slots[slot]}}}"
        if slot in words.texts:
            return words.texts[slot][1]
        return f"{{{SLOT}}}" if len(words.slots) == 1 else match[0] if not words.slots else ""

    return _SLOT_NAME.sub(fill, template)


def _ingestion(source: _Source, reference: str) -> dict[str, Any]:
    bucket = f"{reference}.bucket"
    target = str(source.take(f"{bucket}._target_") or "")
    if (area := _area(source, f"{bucket}.target_area")) is not None:
        place, side = area[0], math.sqrt(area[1])
    elif (size := _size(source, f"{bucket}.target_size")) is not None:
        place, side = size
    else:
        if target:
            source.note(f"{bucket}._target_", "it has no size that can be read; see ingestion.bucket")
        return {}
    if target and not re.search("RatioBucket|FixedBucket", target):
        source.note(f"{bucket}._target_", "see ingestion.bucket for the sizes there are")
    side_px = max(1, round(side / 64)) * 64
    if side_px != side:
        source.note(place, f"sides are multiples of 64 px; {side_px} is used")
    return {"bucket": {"side_px": side_px, "multiple_px": 64, "keep_aspect": "RatioBucket" in target}}


def _area(source: _Source, key: str) -> tuple[str, int] | None:
    """Read '512*512', as a text, a resolver's argument or the argument of an eval that is not run; with its key."""
    for place in (key, f"{key}._args_.0"):
        text = str(source.values.get(place) or "").strip()
        if _PRODUCT.fullmatch(text):
            source.take(place)
            source.take(f"{key}._target_")
            return place, math.prod(int(factor) for factor in re.findall(r"\d+", text))
    return None


def _size(source: _Source, key: str) -> tuple[str, int] | None:
    """Read one side, or two of which the first counts; with its key."""
    places = [
        place for place in (key, f"{key}.0", f"{key}.1") if re.fullmatch(r"[1-9]\d*", str(source.values.get(place)))
    ]
    sides = [int(source.take(place)) for place in places]
    if len(set(sides)) > 1:
        source.note(f"{key}.1", "one side for both; see ingestion.bucket.keep_aspect")
    return (places[0], sides[0]) if sides else None


# ------------------------------------------------------------------------------------------------- how it trains


def _guidance(source: _Source, has_negative: bool, words: _Words) -> dict[str, Any]:
    """Read the guidance scale; where the file has none, two branches get this project's, and one gets 1."""
    scale = source.take("train.cfg_scale")
    if scale is None:
        has_two = has_negative or (bool(words.names) and words.has_pair)
        scale = TrainingParams.model_fields["guidance_scale"].default if has_two else "1.0"
        source.assume(
            "train.cfg_scale", f"{scale}, because {'both branches are' if has_two else 'one branch is'} trained"
        )
    return {"guidance_scale": str(scale)}


def _objective(source: _Source, reference: str, regularization: str | None) -> dict[str, Any]:
    loss: dict[str, Any] = {}
    name = _class_name(source.take("train.loss.criterion._target_"))
    if name in _WEIGHTINGS:
        loss["weighting"] = _WEIGHTINGS[name]
        if (gamma := source.take("train.loss.criterion.gamma")) is not None:
            loss["snr_gamma"] = gamma
        source.take("train.loss.criterion.reduction")
    elif name:
        source.note("train.loss.criterion._target_", "see training.loss for the losses there are")
    own = source.take(f"{reference}.loss_weight")
    if not regularization:
        if own not in (None, 1):
            source.note(f"{reference}.loss_weight", "a weight is relative to the regularization set's; there is none")
        return {"loss": loss} if loss else {}
    other = source.take(f"{regularization}.loss_weight")
    if own is not None or other is not None:
        loss["regularization_weight"] = _relative_weight(1.0 if own is None else own, 1.0 if other is None else other)
    return {"loss": loss} if loss else {}


def _relative_weight(own: Any, other: Any) -> float:
    if not all(isinstance(weight, int | float) for weight in (own, other)) or own <= 0:
        raise InputError(
            f"expected numbers as loss_weight, above 0 for the picture; got {own!r} for the picture and {other!r} for "
            "the regularization set; correct them"
        )
    return float(other) / float(own)


def _optimisation(source: _Source) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, name in (
        ("train.train_steps", "num_steps"),
        ("train.max_grad_norm", "max_grad_norm"),
        ("train.scale_lr", "scale_lr"),
        ("seed", "seed"),
        ("model.clip_skip", "clip_skip"),
        ("train.noise_offset", "noise_offset"),
    ):
        if (value := source.take(key)) is not None:
            values[name] = value
    values |= _optimizer(source, "train.optimizer")
    for part, name in (("scheduler", "schedule"), ("scheduler_pt", "words_schedule")):
        if schedule := _schedule(source, f"train.{part}", values.get("num_steps")):
            values[name] = schedule
    return values


def _optimizer(source: _Source, prefix: str) -> dict[str, Any]:
    """Read the optimizer and its weight decay; AdamW is what there is anyway."""
    values: dict[str, Any] = {}
    name = _OPTIMIZERS.get(_class_name(source.values.get(f"{prefix}._target_")))
    if name is not None:
        source.take(f"{prefix}._target_")
        values["weight_decay"] = _ADAMW_DECAY
        if name != "adamw":
            values["optimizer"] = name
    if (decay := source.take(f"{prefix}.weight_decay")) is not None:
        values["weight_decay"] = decay
    return values


def _schedule(source: _Source, prefix: str, num_steps: int | None) -> dict[str, Any]:
    if source.is_null(prefix):
        return {"kind": "constant", "warmup_steps": 0}
    name = source.values.get(f"{prefix}.name")
    if name is None:
        return {}
    if str(name) not in _SCHEDULES:
        source.note(f"{prefix}.name", f"schedules here are {', '.join(sorted(set(_SCHEDULES.values())))}")
        return {}
    source.take(f"{prefix}.name")
    if source.take(f"{prefix}.num_training_steps") not in (None, num_steps):
        source.note(f"{prefix}.num_training_steps", "a schedule is as long as the training")
    warmup = source.take(f"{prefix}.num_warmup_steps")
    if warmup and name == "constant":
        source.note(f"{prefix}.num_warmup_steps", "a constant rate has none; constant_with_warmup has")
        warmup = 0
    return {"kind": _SCHEDULES[name], "warmup_steps": warmup or 0}


def _device(source: _Source) -> dict[str, Any]:
    precision = source.take("mixed_precision")
    if precision is None:
        return {}
    if str(precision) not in _DTYPES:
        source.note("mixed_precision", "known are fp16, bf16 and no")
        return {}
    return {"dtype": _DTYPES[str(precision)]}


def _base_model(source: _Source) -> str | None:
    """Return the base model; 'owner/name' is a hub id, anything else a folder."""
    name = source.take("model.pretrained_model_name_or_path")
    if name is None:
        return None
    return f"hub:{name}" if _HUB_ID.fullmatch(str(name)) and not str(name).startswith(".") else str(name)
