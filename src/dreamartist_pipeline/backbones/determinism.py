"""Deterministic algorithms, for the same bits in every run on the same device."""

from __future__ import annotations

import os

import torch

from dreamartist_pipeline.errors import InputError

_CUBLAS_VARIABLE, _CUBLAS_VALUE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"  # read by cuBLAS when CUDA starts


def use_deterministic_algorithms() -> None:
    """Let torch use deterministic algorithms only, in this process; operators without one raise an error.

    Raises:
        InputError: CUDA has started without the setting that cuBLAS needs.
    """
    if _CUBLAS_VARIABLE not in os.environ:
        if torch.cuda.is_initialized():
            raise InputError(
                expected=f"{_CUBLAS_VARIABLE} in the environment, because device.deterministic is true",
                got="none, and CUDA has started",
                remedy=f"set {_CUBLAS_VARIABLE}={_CUBLAS_VALUE} before this process starts",
            )
        os.environ[_CUBLAS_VARIABLE] = _CUBLAS_VALUE
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # only needed to find bugs
