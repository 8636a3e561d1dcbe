"""The files of the reference toolkit (HCP-Diffusion), in and out.

`{unet,unet-neg,text_encoder,text_encoder-neg}-{step}.safetensors` with keys `lora:<module>.___.<alpha | …>`; alpha is
stored already divided by the rank, and scales a bias too. Words are `<word>.pt` in the old form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from dreamartist_pipeline.core.errors import InputError
from dreamartist_pipeline.interop.branch_adapters import BranchAdapter, LoRAFactors, TriggerWord
from dreamartist_pipeline.interop.layer_names import external_name, layers_by_name
from dreamartist_pipeline.interop.placing import Layer, build_adapter, read_parts
from dreamartist_pipeline.interop.safetensors_bytes import write_tensors
from dreamartist_pipeline.interop.word_files import read_embedding, write_embedding_pt

_FILE = re.compile(r"(?P<network>unet|text_encoder)(?P<negative>-neg)?-(?P<step>\d+)\.safetensors")
_KEY = re.compile(r"lora:(?P<module>.+)\.___\.(?P<part>.+)")
_PARTS = {
    "alpha": "alpha",
    "layer.lora_down.weight": "down",
    "layer.lora_up.weight": "up",
    "layer.W_down": "down",  # its newer files
    "layer.W_up": "up",
    "layer.lora_up.bias": "bias",
    "layer.bias": "bias",  # beside W_down and W_up
}


def write_toolkit(adapters: Mapping[str, BranchAdapter], words: Sequence[TriggerWord], step: int) -> dict[str, bytes]:
    """Return file name -> bytes of the toolkit's layout, in float32; a network without adapters has no file.

    Args:
        adapters: branch name -> its adapter.
        words: of both branches.
        step: the number of training steps, part of the names.
    """
    files = {}
    for branch, adapter in adapters.items():
        suffix = "-neg" if branch == "negative" else ""
        for network, layers in adapter.networks.items():
            tensors: dict[str, torch.Tensor] = {}
            for layer, factors in layers.items():
                prefix = f"lora:{external_name(network, layer)}.___"
                tensors[f"{prefix}.alpha"] = torch.tensor(factors.scale)
                tensors[f"{prefix}.layer.lora_down.weight"] = factors.down
                tensors[f"{prefix}.layer.lora_up.weight"] = factors.up
                if factors.bias is not None:
                    tensors[f"{prefix}.layer.lora_up.bias"] = factors.bias
            files[f"{network}{suffix}-{step}.safetensors"] = write_tensors(tensors, {})
    return files | {f"{word.name}.pt": write_embedding_pt(word) for word in words}


def read_toolkit(
    files: Mapping[str, bytes], modules: Mapping[str, Sequence[str]]
) -> tuple[dict[str, BranchAdapter], dict[str, torch.Tensor]]:
    """Return branch name -> adapter, and word -> vectors `[n, D]`, of the files of one step.

    Args:
        files: file name -> bytes; adapters and words.
        modules: network -> the names of the base model's modules.

    Raises:
        InputError: a file that does not belong here, files of several steps, or keys that no module explains.
    """
    adapter_files = {name: match for name in files if (match := _FILE.fullmatch(name))}
    if strangers := [name for name in files if name not in adapter_files and not name.endswith(".pt")]:
        raise InputError(
            "expected files named {unet,text_encoder}[-neg]-STEP.safetensors or WORD.pt; got "
            f"{', '.join(sorted(strangers))}; leave them out"
        )
    if len(steps := {match["step"] for match in adapter_files.values()}) > 1:
        raise InputError(f"expected files of one step; got those of {', '.join(sorted(steps))}; give one set")
    networks: dict[str, dict[str, dict[str, LoRAFactors]]] = {}
    for name, match in adapter_files.items():
        branch = "negative" if match["negative"] else "positive"
        networks.setdefault(branch, {})[match["network"]] = _read_network(files[name], name, match["network"], modules)
    words = {name.removesuffix(".pt"): read_embedding(files[name], name) for name in files if name.endswith(".pt")}
    return {branch: BranchAdapter(found) for branch, found in sorted(networks.items())}, words


def _read_network(file: bytes, name: str, network: str, modules: Mapping[str, Sequence[str]]) -> dict[str, LoRAFactors]:
    known = layers_by_name({network: modules[network]}, kohya=False)

    def place(key: str) -> tuple[Layer, str] | None:
        match = _KEY.fullmatch(key)
        at = known.get(f"{network}.{external_name(network, match['module'])}") if match else None
        return (at, _PARTS[match["part"]]) if match and at and match["part"] in _PARTS else None

    factors = {}
    for at, part in read_parts(file, name, "the toolkit's format", place).items():
        if "alpha" not in part:
            raise InputError(f"expected alpha for {'.'.join(at)} in {name}; got none; the file is incomplete")
        factors[at] = LoRAFactors(part["down"], part["up"], float(part["alpha"]), part.get("bias"))
    return build_adapter(factors, name).networks[network]
