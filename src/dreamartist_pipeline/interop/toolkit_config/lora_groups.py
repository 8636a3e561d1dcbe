"""LoRA groups of one network (`lora_unet`, `lora_text_encoder`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreamartist_pipeline.interop.toolkit_config.source import ConfigReader

_DEFAULTS = {"lr": 1e-5, "rank": 1}  # the toolkit's
_OPTIONS = ("alpha", "dropout", "bias", "svd_init")


def read_lora_groups(reader: ConfigReader, network: str) -> list[dict[str, Any]]:
    """Return the groups of a network ("lora_unet", "lora_text_encoder") that have layers."""
    groups = (_group(reader, f"{network}.{index}") for index in reader.children(network))
    return [group for group in groups if group]


def _group(reader: ConfigReader, prefix: str) -> dict[str, Any]:
    """Read one LoRA group, empty if it has no layers; `type: p` is an older spelling of `branch: p`."""
    layers = f"{prefix}.layers"
    selectors = [layers] if isinstance(reader.values.get(layers), str) else reader.find(layers, r"\d+")
    selectors = [key for key in selectors if reader.values[key] is not None]
    if not selectors:
        reader.record_default(layers, "the group has no layers and is left out")
        return {}
    group = {
        name: reader.read_or(f"{prefix}.{name}", default, "as in the toolkit") for name, default in _DEFAULTS.items()
    }
    if (branch := _branch(reader, prefix)) not in (None, ""):
        group["branch"] = branch
    group |= reader.read_set({f"{prefix}.{name}": name for name in _OPTIONS})
    group |= _rescaled_alpha(reader, prefix, group)
    return group | {"layers": [str(reader.read(key)).removeprefix("text_model.") for key in selectors]}


def _branch(reader: ConfigReader, prefix: str) -> Any:
    branch, kind = reader.read(f"{prefix}.branch"), reader.read(f"{prefix}.type")
    if kind in ("p", "n"):
        return branch or kind
    if kind not in ("lora", "dapp", None):
        reader.leave_out([f"{prefix}.type"], "only plain LoRA layers are supported")
    return branch


def _rescaled_alpha(reader: ConfigReader, prefix: str, group: Mapping[str, Any]) -> dict[str, float]:
    """Return the alpha for `alpha_auto_scale: False`, where the toolkit scales by alpha instead of alpha / rank."""
    key = f"{prefix}.alpha_auto_scale"
    if reader.read(key) is not False:
        return {}
    if not isinstance(alpha := group.get("alpha", 1.0), int | float):
        return {}  # refused with all other invalid values
    if isinstance(group["rank"], int):
        return {"alpha": float(alpha) * group["rank"]}
    reader.leave_out(
        [key],
        "layers are always scaled by alpha / rank, and a fractional rank differs between layers; set an integer rank, "
        "and alpha to alpha · rank",
    )
    return {}
