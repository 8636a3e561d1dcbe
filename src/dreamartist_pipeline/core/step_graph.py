"""The passes of a step as one CUDA graph: recorded in the first step, and then started by a single call."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import nn

from dreamartist_pipeline.core.prompt_tokens import map_tensors
from dreamartist_pipeline.errors import InputError

_Batch = TypeVar("_Batch")
_Result = TypeVar("_Result")
Passes = Callable[[_Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""batch -> loss and parts; adds to the gradients."""

_WARM_UPS = 3  # runs before recording, in which libraries choose algorithms and allocate; torch's advice
_COMPILERS = ("g++", "clang++", "cl")


def check_backend(backend: str, device: torch.device) -> None:
    """Check that steps can be run by a backend.

    Raises:
        InputError: cudagraph without a CUDA GPU, or compile without a compiler.
    """
    if backend == "cudagraph" and device.type != "cuda":
        raise InputError(
            expected="a CUDA GPU, because training.backend=cudagraph requires one",
            got=f"{device.type}",
            remedy="choose eager",
        )
    if backend == "compile" and not _has_compiler(device):
        needed = "the library triton" if device.type == "cuda" else f"a C++ compiler ({', '.join(_COMPILERS)})"
        raise InputError(
            expected=f"{needed} on {device.type}, because training.backend=compile requires it",
            got="none",
            remedy="install it, or choose eager",
        )


def _has_compiler(device: torch.device) -> bool:
    if device.type == "cuda":
        return find_spec("triton") is not None
    return any(shutil.which(name) for name in _COMPILERS)


class GraphedPasses:
    """Runs the passes of a step from a CUDA graph.

    A graph reads and writes the same memory in every step: each batch is copied into that of the first, dropout masks
    are drawn in place, and parameters and gradients stay where they are.
    """

    def __init__(self, run: Passes[_Batch], parameters: Sequence[nn.Parameter]) -> None:
        """Record nothing yet.

        Args:
            run: the passes.
            parameters: all trained ones, with gradients.
        """
        self._run, self._parameters = run, parameters
        self._replay: Callable[[], None] | None = None

    def __call__(self, batch: _Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run the passes of a batch, of the same shape in every step."""
        if self._replay is None:
            self._batch = map_tensors(torch.clone, batch)
            self._results, self._replay = record(lambda: self._run(self._batch))
            for parameter in self._parameters:  # recording ran the passes
                assert parameter.grad is not None
                parameter.grad.zero_()
        map_tensors(lambda recorded, new: recorded.copy_(new), self._batch, batch)
        self._replay()
        loss, parts = self._results
        return loss.clone(), {name: part.clone() for name, part in parts.items()}


def record(run: Callable[[], _Result]) -> tuple[_Result, Callable[[], None]]:
    """Record the kernels of a function as a CUDA graph.

    Returns:
        The results, whose tensors are overwritten in every replay, and a function that replays the graph.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return results, graph.replay
