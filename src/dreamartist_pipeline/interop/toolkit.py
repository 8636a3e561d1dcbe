"""The files of the reference toolkit (HCP-Diffusion).

For every saved step, a training writes `{unet,unet-neg,text_encoder,text_encoder-neg}-{step}.safetensors` (or `.ckpt`,
pickled) to `ckpts/`, with keys `lora:<module>.___.<alpha | …>`, and every word as `<word>-{step}.pt`. alpha is already
divided by the rank, and also scales a bias. An untrained network has a file without tensors, so that with negative
adapters each network has a pair of files. Words of its `create_embedding`, and those written here, are `<word>.pt`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from dreamartist_pipeline.core.concept import TriggerWord
from dreamartist_pipeline.core.layout import FileNames
from dreamartist_pipeline.core.lora_factors import LoRAFactors
from dreamartist_pipeline.decoding.torch_files import dense_tensor
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter
from dreamartist_pipeline.interop.layer_names import layers_by_name
from dreamartist_pipeline.interop.pickled_weights import flat_names, load_weights
from dreamartist_pipeline.interop.placing import Layer, place_tensors
from dreamartist_pipeline.interop.safetensors_bytes import read_tensors, write_tensors
from dreamartist_pipeline.interop.toolkit_config import SLOT
from dreamartist_pipeline.interop.word_files import read_embedding, typable, write_embedding_pt

_NEGATIVE_SUFFIX = "-neg"
_NETWORKS = ("unet", "text_encoder")
_FILE = re.compile(rf"(?P<network>{'|'.join(_NETWORKS)})(?P<negative>-neg)?-(?P<step>\d+)\.(?i:safetensors|ckpt)")
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_WORD_FILE = re.compile(r"(?P<word>.+?)(?:-(?P<step>\d+))?(?P<suffix>\.(?i:pt))")
_KEY = re.compile(r"lora:(?P<module>.+)\.(?:___|lora_block)\.(?P<part>.+)")  # lora_block: in old files
_PARTS = {
    "alpha": "alpha",
    "scale": "alpha",  # old files
    "layer.lora_down.weight": "down",
    "layer.lora_up.weight": "up",
    "layer.W_down": "down",  # new files
    "layer.W_up": "up",
    "layer.lora_up.bias": "bias",
    "layer.bias": "bias",  # with W_down and W_up
}
_AVERAGES = ("lora_ema:", "base_ema:")  # ignored: the toolkit uses the weights themselves by default


def write_toolkit(
    adapters: Mapping[str, BranchAdapter], words: Sequence[TriggerWord], step: int, names: FileNames
) -> dict[str, bytes]:
    """Return file name -> bytes in the toolkit's layout, in float32.

    A network without adapters has no file; if only one branch has adapters, the other has an empty file.

    Args:
        adapters: branch name -> its adapter.
        words: of both branches.
        step: the number of training steps, for the file names.
        names: the names of the base model's parts in files.

    Raises:
        InputError: the base model has other networks than the toolkit's.
    """
    files = {}
    networks = sorted({network for adapter in adapters.values() for network in adapter.networks})
    check_networks(names.kohya_prefixes)
    for branch in ("positive", "negative") if "negative" in adapters else adapters:
        layers_of = adapters[branch].networks if branch in adapters else {}
        suffix = _NEGATIVE_SUFFIX if branch == "negative" else ""
        for network in networks:
            tensors: dict[str, torch.Tensor] = {}
            for layer, factors in layers_of.get(network, {}).items():
                prefix = f"lora:{names.external(network, layer)}.___"
                tensors[f"{prefix}.alpha"] = torch.tensor(factors.scale)
                tensors[f"{prefix}.layer.lora_down.weight"] = factors.down
                tensors[f"{prefix}.layer.lora_up.weight"] = factors.up
                if factors.bias is not None:
                    tensors[f"{prefix}.layer.lora_up.bias"] = factors.bias
            files[f"{network}{suffix}-{step}.safetensors"] = write_tensors(tensors, {})
    return files | {f"{word.name}.pt": write_embedding_pt(word) for word in words}


def check_networks(networks: Collection[str]) -> None:
    """Check that the toolkit's files can hold these networks of a base model.

    Raises:
        InputError: they cannot.
    """
    if unknown := sorted({*networks} - {*_NETWORKS}):
        raise InputError(
            expected=f"a base model of {' and '.join(_NETWORKS)} for the toolkit's files",
            got=f"one with {', '.join(unknown)}",
            remedy="remove toolkit from export.formats",
        )


# ------------------------------------------------------------------------------------------------- one step's files


@dataclass(frozen=True)
class ToolkitStep:
    """The files of one step in a folder.

    Attributes:
        step: None in a folder with words only.
        adapters: names of files.
        words: word -> its file.
    """

    step: int | None
    adapters: tuple[str, ...]
    words: dict[str, str]

    @property
    def names(self) -> list[str]:
        """All files of the step."""
        return sorted([*self.adapters, *self.words.values()])


def files_of_step(names: Collection[str], step: int | None = None) -> ToolkitStep:
    """Return the files of one step.

    The number at the end of a word's file is a step if there are adapters of this step, or if `step` is that number;
    otherwise it belongs to the word. A word of the step takes precedence over one without a step. Files without
    weights, such as a README, are ignored.

    Args:
        names: of all files.
        step: the step; None for the last.

    Raises:
        InputError: unexpected weight files, no adapters of that step, half of a pair of adapters, or a word of other
            steps only.
    """
    matches = {name: match for name in sorted(names) if (match := _FILE.fullmatch(name))}
    weights = [name for name in sorted(names) if name.lower().endswith(_WEIGHTS) and not name.startswith(".")]
    if unexpected := [name for name in weights if name not in matches and not name.lower().endswith(".pt")]:
        raise InputError(
            expected="files named {unet,text_encoder}[-neg]-STEP.safetensors (or .ckpt), WORD-STEP.pt or WORD.pt",
            got=", ".join(unexpected),
            remedy="remove them",
        )
    steps = sorted({int(match["step"]) for match in matches.values()})
    if step is not None and steps and step not in steps:
        raise InputError(
            expected=f"adapters of step {step}",
            got=f"those of {', '.join(map(str, steps))}",
            remedy="choose one of these steps",
        )
    chosen = step if step is not None else max(steps, default=None)
    adapters = [name for name, match in matches.items() if int(match["step"]) == chosen]
    _check_pairs([matches[name] for name in adapters], any(match["negative"] for match in matches.values()))
    known = {*steps, chosen} - {None}
    return ToolkitStep(chosen, tuple(adapters), _words_of_step(weights, known, chosen))


def _check_pairs(adapters: Sequence[re.Match[str]], has_negative: bool) -> None:
    """Check that every network of the step has both files if the folder has negative adapters of any step."""
    found = {(match["network"], match["negative"] or "") for match in adapters}
    if not (has_negative and found):
        return
    networks = sorted({network for network, _ in found})
    pairs = [(network, half) for network in networks for half in ("", _NEGATIVE_SUFFIX)]
    if missing := [f"{network}{half}-{adapters[0]['step']}" for network, half in pairs if (network, half) not in found]:
        raise InputError(
            expected="a pair of adapters for every network, as the folder has negative ones",
            got=", ".join(match[0] for match in adapters),
            remedy=f"add {', '.join(missing)}, choose another step, or copy matching files to another folder",
        )


def _words_of_step(names: Collection[str], steps: set[int | None], chosen: int | None) -> dict[str, str]:
    without_step, of_step, of_other_steps = {}, {}, {}
    for match in filter(None, map(_WORD_FILE.fullmatch, names)):
        if match["step"] is None or int(match["step"]) not in steps:
            without_step[match[0].removesuffix(match["suffix"])] = match[0]
        elif int(match["step"]) == chosen:
            of_step[match["word"]] = match[0]
        else:
            of_other_steps[match["word"]] = match[0]
    words = without_step | of_step
    if missing := [file for word, file in of_other_steps.items() if word not in words]:
        raise InputError(
            expected=f"every word at step {chosen}, the step of the adapters",
            got=f"only {', '.join(missing)}",
            remedy="choose that step, or rename the file to WORD.pt",
        )
    return words


# ------------------------------------------------------------------------------------------------- reading them


def read_toolkit(
    files: Mapping[str, bytes], modules: Mapping[str, Collection[str]], names: FileNames, step: int | None = None
) -> tuple[dict[str, BranchAdapter], dict[str, torch.Tensor]]:
    """Return branch name -> adapter, and word -> vectors `[n, D]`, of one step; averaged weights are ignored.

    Args:
        files: file name -> bytes, of adapters and words of any steps.
        modules: network -> the names of the base model's modules.
        names: their names in files.
        step: the step; None for the last.

    Raises:
        InputError: an unexpected file, no files of that step, two files for one network, or unknown keys.
    """
    of_step = files_of_step(files, step)
    seen: set[tuple[str, str]] = set()
    updates: dict[str, dict[Layer, LoRAFactors]] = {"negative": {}, "positive": {}}
    for match in filter(None, map(_FILE.fullmatch, of_step.adapters)):
        branch, network = "negative" if match["negative"] else "positive", match["network"]
        if (branch, network) in seen:
            raise InputError(
                expected="one file per network", got=f"{match[0]} and another", remedy="remove one of them"
            )
        seen.add((branch, network))
        updates[branch] |= _read_network(files[match[0]], match[0], network, modules, names)
    adapters = {branch: BranchAdapter.of_layers(found) for branch, found in updates.items() if found}
    return adapters, {word: read_embedding(files[name], name) for word, name in of_step.words.items()}


def _read_network(
    file: bytes, name: str, network: str, modules: Mapping[str, Collection[str]], names: FileNames
) -> dict[Layer, LoRAFactors]:
    known = layers_by_name({network: modules[network]}, names, kohya=False)

    def place(key: str) -> tuple[Layer, str] | None:
        match = _KEY.fullmatch(key)
        at = known.get(f"{network}.{names.external(network, match['module'])}") if match else None
        return (at, _PARTS[match["part"]]) if match and at and match["part"] in _PARTS else None

    factors = {}
    for at, part in place_tensors(_tensors(file, name), name, "the toolkit's format", place).items():
        if "alpha" not in part:
            raise InputError(
                expected=f"alpha for {'.'.join(at)} in {name}", got="none", remedy="the file is incomplete"
            )
        factors[at] = LoRAFactors(part["down"], part["up"], float(part["alpha"]), part.get("bias"))
    return factors


def _tensors(file: bytes, name: str) -> dict[str, torch.Tensor]:
    tensors = _pickled_tensors(file, name) if name.lower().endswith(".ckpt") else read_tensors(file, name)
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(_AVERAGES)}


def _pickled_tensors(file: bytes, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickled file `{"lora": {key: tensor}, …}`, with keys `lora:key` as in safetensors."""
    flat = flat_names(load_weights(file, name, "adapters"))
    return {key: dense_tensor(value, key, name) for key, value in flat.items()}


# ------------------------------------------------------------------------------------------------- words


def toolkit_words(
    vectors: Mapping[str, torch.Tensor], names: Mapping[str, Sequence[str]], option: str
) -> list[TriggerWord]:
    """Assign words to slots and branches.

    Args:
        vectors: word -> its vectors.
        names: slot -> positive and optional negative word; empty: one pair, the negative word ending in "-neg".
        option: the option that names the pairs, for an error.

    Raises:
        InputError: words that are not a pair, an invalid word, or words other than those named.
    """
    for word in vectors:
        if word != typable(word):
            raise InputError(
                expected="trigger words without spaces and braces as names of files",
                got=f"{word}.pt",
                remedy=f"rename it, such as {typable(word)}.pt",
            )
    pairs = names or {SLOT: _pair(sorted(vectors), option)}
    words = [
        TriggerWord(word, slot, branch, {_NETWORKS[1]: vectors[word]})
        for slot, pair in pairs.items()
        for word, branch in zip(pair, ("positive", "negative"), strict=False)
        if word in vectors
    ]
    named = [word for pair in pairs.values() for word in pair if word]
    if sorted(named) != sorted(vectors):
        raise InputError(
            expected=f"the words {named}",
            got=f"{sorted(vectors)}, the names of the files",
            remedy=f"name these in {option}, or rename the files",
        )
    return words


def _pair(words: Sequence[str], option: str) -> tuple[str, str]:
    negative = [word for word in words if word.endswith(_NEGATIVE_SUFFIX)]
    positive = [word for word in words if word not in negative]
    if len(positive) > 1 or len(negative) > 1:
        raise InputError(
            expected="one word and its '-neg' partner",
            got=", ".join(words),
            remedy=f"name the pair in {option}; if the numbers are steps, choose one, or keep the files of one step",
        )
    return (positive or [""])[0], (negative or [""])[0]
