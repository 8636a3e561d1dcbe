"""Trigger words, a (positive, negative) pair for each slot, and the prompt templates with these slots."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.toolkit_config.optimization import read_optimizer
from dreamartist_pipeline.interop.toolkit_config.source import ConfigReader, ReadText
from dreamartist_pipeline.params import WordsParams

SLOT = "pt1"  # the first pair's slot in this project's templates and prompts; the next is pt2
_SLOT_NAME = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class TriggerWords:
    """The trigger words of the reference image's data set.

    Attributes:
        names: slot of this project -> [positive, negative] word that is trained.
        slots: slot of the file -> slot of this project, for trained words.
        texts: slot of the file -> key -> word, for words without a trained embedding.
        lr: learning rate of the trained words in the file, or 0.
        has_trained_pair: whether words are trained and some slot has a word for each branch.
    """

    names: dict[str, list[str]]
    slots: dict[str, str]
    texts: dict[str, dict[str, str]]
    lr: float
    has_trained_pair: bool


def words_by_slot(reader: ConfigReader, data_set: str) -> dict[str, dict[str, str]]:
    """Return slot -> key -> word of a data set; a transform's own `word_names` override those of the data set."""
    found: dict[str, dict[str, str]] = {}
    parents: dict[str, str] = {}
    for key in sorted(reader.find(data_set, r"word_names\.\w+(\.\d+)?"), key=lambda key: ".transforms." not in key):
        parent, _, rest = key.rpartition("word_names.")
        slot = rest.partition(".")[0]
        if parents.setdefault(slot, parent) == parent:
            word = reader.values[key]
            found.setdefault(slot, {})[key] = "" if word in (None, []) else str(word)
    return found


def read_class_word(reader: ConfigReader, data_set: str) -> str:
    """Return the word for '{class}', or ''."""
    words = words_by_slot(reader, data_set).get("class", {})
    first = next(iter(words.values()), "")
    reader.use(words)
    others = [key for key, word in words.items() if word != first]
    reader.leave_out(others, f"both branches use the same class word, {first!r}")
    return first


def read_trigger_words(reader: ConfigReader, reference: str, has_negative: bool) -> TriggerWords:
    """Read the trigger words of the reference image's data set, and which of them are trained.

    Args:
        reader: the configuration.
        reference: key of the data set.
        has_negative: whether a LoRA group acts on the negative branch. That is DreamArtist++, which trains its words
            with or without `tokenizer_pt`.

    Raises:
        InputError: `tokenizer_pt.train` has none of the data set's words, or no learning rate for one of them.
    """
    found = {s: words for s, words in words_by_slot(reader, reference).items() if s != "class" and any(words.values())}
    pairs = {slot: _pair(list(words.values())) for slot, words in found.items()}
    rates = _learning_rates(reader, [word for pair in pairs.values() for word in pair])
    trained, lr = [slot for slot, pair in pairs.items() if rates.keys() & set(pair)], next(iter(rates.values()), 0.0)
    if has_negative and pairs and not rates:
        trained, lr = list(pairs), float(WordsParams.model_fields["lr"].default)
        reader.record_default("tokenizer_pt.train", f"LoRA groups of both branches imply trained words; lr is {lr:g}")
    for slot in trained:
        _use_pair(reader, found[slot], pairs[slot], rates)
    slots = {slot: f"pt{number}" for number, slot in enumerate(trained, start=1)}
    return TriggerWords(
        names={slots[slot]: pairs[slot] for slot in trained},
        slots=slots,
        texts={slot: words for slot, words in found.items() if slot not in slots},
        lr=lr,
        has_trained_pair=bool(trained) and any(_is_pair(list(words.values())) for words in found.values()),
    )


def _is_pair(words: list[str]) -> bool:
    return len(words) == 2 and words[1] not in ("", words[0])


def _pair(words: list[str]) -> list[str]:
    """Return a word for each branch; the negative one is derived if it is missing or the same."""
    return words if _is_pair(words) or len(words) > 2 else [words[0], f"{words[0]}-neg"]


def _use_pair(reader: ConfigReader, words: Mapping[str, str], pair: list[str], rates: Mapping[str, float]) -> None:
    reader.use(words)
    if list(words.values()) != pair:
        reader.leave_out(list(words)[:1], f"each branch needs its own word; the negative one becomes {pair[1]!r}")
    elif rates:
        untrained = [key for key, word in words.items() if word not in rates]
        reader.leave_out(untrained, "not in tokenizer_pt.train; both words of a pair are trained")


def _learning_rates(reader: ConfigReader, known: list[str]) -> dict[str, float]:
    """Return word -> learning rate of the `known` words in `tokenizer_pt.train`."""
    rates: dict[str, Any] = {}
    unknown = []
    for index in reader.children("tokenizer_pt.train"):
        name_key, lr_key = f"tokenizer_pt.train.{index}.name", f"tokenizer_pt.train.{index}.lr"
        name = str(reader.values.get(name_key))
        if name not in known:
            unknown.append(name)
            reader.leave_out([name_key, lr_key], f"word_names of the reference image's data set has no {name!r}")
            continue
        reader.use([name_key])
        rates[name] = reader.read(lr_key)
        first = next(iter(rates.values()))
        if rates[name] != first:
            reader.leave_out([lr_key], f"all words have the same learning rate, {first}")
    if unknown and known and not rates:
        raise InputError(
            expected=f"words of word_names ({', '.join(known)}) in tokenizer_pt.train",
            got=f"{', '.join(unknown)}",
            remedy="correct the names",
        )
    if not all(isinstance(rate, int | float) for rate in rates.values()):
        raise InputError(
            expected="a learning rate (lr) for every word of tokenizer_pt.train", got=f"{rates}", remedy="add it"
        )
    return rates


def read_words_parameters(reader: ConfigReader, words: TriggerWords, total_batch_size: int) -> dict[str, Any]:
    """Return `training.words` and `training.scale_lr`.

    `scale_lr` applies to adapters and words, while the toolkit has an option for each: the words' learning rate is
    converted if they differ.

    Args:
        reader: the configuration.
        words: at least one trained.
        total_batch_size: rows of both data sets; `scale_lr` multiplies every learning rate by it.
    """
    lr = float(words.lr)
    scale_lr = reader.read_or(
        "train.scale_lr", True, "as in the method 'toolkit': every lr is multiplied by the total batch size"
    )
    scale_words = reader.read("train.scale_lr_pt")
    if scale_words is None and scale_lr:
        reader.record_default(
            "train.scale_lr_pt", "True, as scale_lr: the words' lr is multiplied by the total batch size, too"
        )
    if scale_words is not None and bool(scale_words) != bool(scale_lr):
        lr = lr * total_batch_size if scale_words else lr / total_batch_size
    parameters = {"names": words.names, "lr": lr, **read_optimizer(reader, "train.optimizer_pt")}
    return {"scale_lr": scale_lr, "words": parameters}


# ------------------------------------------------------------------------------------------------- templates


def read_templates(reader: ConfigReader, reference: str, words: TriggerWords, read_text: ReadText) -> dict[str, Any]:
    """Return `training.templates` and `training.preview`, empty if the template file is not found.

    Templates without a trained word are left out. If a slot is in none of the others, a template of all slots is added.
    """
    keys = [key for key in reader.find(reference, "prompt_template") if reader.values[key]]
    text = read_text(str(reader.values[keys[0]])) if keys else None
    if text is None:
        reader.leave_out(keys, "the file was not found; the method's own templates are used")
    else:
        reader.use(keys[:1])
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    _use_texts(reader, words, _slots(lines))
    renamed = [_renamed(line, words) for line in lines]
    kept = [line for line in renamed if not words.names or _slots([line]) & words.names.keys()]
    if len(kept) < len(renamed):
        reader.leave_out(keys[:1], f"{len(renamed) - len(kept)} templates without a trigger word are left out")
    if len(words.names) > 1 and not words.names.keys() <= _slots(kept):
        kept.append(f"{' and '.join(f'a {{{slot}}}' for slot in words.names)}, {{caption}}")
        key = keys[0] if keys else f"{reference}.prompt_template"
        if lines:
            reader.leave_out([key], "some slot is in none of the remaining templates")
        reader.record_default(key, f"{kept[-1]!r} is added, so that every slot is in a template")
    return {"templates": kept, "preview": {"prompts": kept[:2]}} if kept else {}


def _slots(templates: Iterable[str]) -> set[str]:
    return {slot for template in templates for slot in _SLOT_NAME.findall(template)}


def _use_texts(reader: ConfigReader, words: TriggerWords, slots: set[str]) -> None:
    """Mark words without an embedding as used if a template contains their slot."""
    for slot, texts in words.texts.items():
        reader.use(texts)
        first = next(iter(texts.values()))
        if slot not in slots:
            reader.leave_out(texts, "no embedding is trained for it; write it into training.templates as text")
        elif others := [key for key, text in texts.items() if text != first]:
            reader.leave_out(others, f"no embedding is trained for it; templates use {first!r} in both branches")


def _renamed(template: str, words: TriggerWords) -> str:
    """Rename the slots of trained words, and fill in the words of other slots.

    An unknown slot becomes that of the only pair; with several pairs it is removed, without any it is kept.
    """
    known = {name: f"{{{name}}}" for name in ("caption", "class")}
    known |= {slot: next(iter(texts.values())) for slot, texts in words.texts.items()}
    known |= {slot: f"{{{name}}}" for slot, name in words.slots.items()}
    only = f"{{{SLOT}}}" if len(words.slots) == 1 else ""
    return _SLOT_NAME.sub(lambda match: known.get(match[1], only if words.slots else match[0]), template)
