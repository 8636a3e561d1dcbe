"""Options of LoRA groups that the files of other tools can represent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import LoRAGroup

_WITHOUT_BIAS = ("kohya",)
"""ComfyUI's `X.diff_b` is no substitute: diffusers rejects the file, and ComfyUI ignores it in layers without a bias,
such as to_q."""


def check_expressible(
    groups: Mapping[str, Sequence[LoRAGroup]], formats: Sequence[str], is_trained_here: bool = False
) -> None:
    """Check that the export formats can represent a concept's LoRA groups.

    Args:
        groups: network -> its groups.
        formats: the formats to export.
        is_trained_here: whether this run trains the groups, which are parameters then.

    Raises:
        InputError: a group has an option that a format cannot represent.
    """
    for network, members in groups.items():
        for index, group in enumerate(members):
            option, refusing = _not_expressible(group, formats)
            if refusing:
                prefix = "training." if is_trained_here else ""
                raise InputError(
                    expected="LoRA groups that the export formats support, because this run exports them",
                    got=f"{prefix}lora_{network}.{index} with {option}, which {', '.join(refusing)} cannot hold",
                    remedy=_advice(formats, refusing, is_trained_here),
                )


def _not_expressible(group: LoRAGroup, formats: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return an option that cannot be represented, and the formats that do not support it."""
    if group.timestep_min_rank is not None:
        return f"timestep_min_rank={group.timestep_min_rank}", formats
    if group.bias:
        return "bias=true", [name for name in formats if name in _WITHOUT_BIAS]
    return "", ()


def _advice(formats: Sequence[str], refusing: Sequence[str], is_trained_here: bool) -> str:
    others = [name for name in formats if name not in refusing]
    reduce = f"set export.formats=[{','.join(others)}], or " if others else ""
    if is_trained_here:
        return f"{reduce}run without the export: kedro run --pipelines train,evaluate"
    return f"{reduce}generate images with it instead: kedro run --pipeline generate"
