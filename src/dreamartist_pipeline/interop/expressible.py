"""What files of other tools can hold of a concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import LoRAGroup

_WITHOUT_BIAS = ("kohya",)
"""The nearest thing, ComfyUI's `X.diff_b`, makes diffusers refuse the file, and ComfyUI has no place for it in layers
without a bias of their own, such as to_q."""


def check_expressible(
    groups: Mapping[str, Sequence[LoRAGroup]], formats: Sequence[str], is_trained_here: bool = False
) -> None:
    """Confirm that files of other tools can hold a concept's LoRA groups.

    Args:
        groups: network -> its groups.
        formats: those to be written.
        is_trained_here: whether the run trains them, so that they are parameters that can be changed.

    Raises:
        InputError: an option of a group that they cannot hold, and what to leave out.
    """
    for network, members in groups.items():
        for index, group in enumerate(members):
            option, refusing = _not_expressible(group, formats)
            if refusing:
                raise InputError(
                    expected="LoRA groups that other tools' files can hold, because this run exports them",
                    got=(
                        f"{'training.' if is_trained_here else ''}lora_{network}.{index} with {option}, which "
                        f"{', '.join(refusing)} cannot hold"
                    ),
                    remedy=f"{_advice(formats, refusing, is_trained_here)}",
                )


def _not_expressible(group: LoRAGroup, formats: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the option that stands in the way, and the formats that it keeps from being written."""
    if group.timestep_min_rank is not None:
        return f"timestep_min_rank={group.timestep_min_rank}", formats
    if group.bias:
        return "bias=true", [name for name in formats if name in _WITHOUT_BIAS]
    return "", ()


def _advice(formats: Sequence[str], refusing: Sequence[str], is_trained_here: bool) -> str:
    others = [name for name in formats if name not in refusing]
    leave_out = f"leave these formats out, export.formats=[{','.join(others)}], or " if others else ""
    if is_trained_here:
        return f"{leave_out}run without the export: kedro run --pipelines train,evaluate"
    return f"{leave_out}draw with it instead: kedro run --pipeline generate"
