"""Errors for users, with a message in three parts: what was expected, what was given, and the remedy."""

from __future__ import annotations


class _ExplainedError(Exception):
    """An error with a message in three parts.

    Attributes:
        expected: a valid value.
        got: the actual value; it may have several lines.
        remedy: what to do.
        where: prefix of the message, such as a section of the parameters; or "".
    """

    def __init__(self, expected: str, got: str, remedy: str, where: str = "") -> None:
        super().__init__(expected, got, remedy, where)  # `args` must match the signature for pickling
        self.expected, self.got, self.remedy, self.where = expected, got, remedy, where

    def __str__(self) -> str:
        prefix = f"{self.where}: " if self.where else ""
        separator = "\n" if "\n" in self.got else "; "
        return f"{prefix}expected {self.expected}; got {self.got}{separator}{self.remedy}"


class InputError(_ExplainedError, ValueError):
    """Invalid input."""


class TrainingError(_ExplainedError, RuntimeError):
    """A training that cannot continue: a branch receives no gradient, or values are not finite."""


class StoppedEarly(KeyboardInterrupt):
    """A training that was stopped between two steps, by a signal or at the end of its minutes; its state is kept.

    Attributes:
        exit_code: of the command.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


STOPPED_BY_SIGNAL = 130  # as shells report a program that SIGINT ended
STOPPED_BY_BUDGET = 75  # EX_TEMPFAIL of sysexits.h: to be run again


def input_error_in(error: BaseException) -> InputError | None:
    """Return the InputError in the chain of causes, if any; Kedro and OmegaConf wrap errors."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__ or cause.__context__
    return cause


_NO_MEMORY = (  # of torch on the CPU, the operating system, C++, and a thread whose stack has no room
    *("can't allocate memory", "Cannot allocate memory", "bad allocation", "bad_alloc"),
    *("can't start new thread", "failed to map segment"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the machine or of the device is exhausted."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True  # torch's class, by its name: importing torch takes memory
    return isinstance(error, RuntimeError | OSError | ImportError) and any(text in str(error) for text in _NO_MEMORY)


def out_of_memory_in(error: BaseException) -> BaseException | None:
    """Return the error that says that memory is exhausted in the chain of causes, if any."""
    cause: BaseException | None = error
    while cause is not None and not is_out_of_memory(cause):
        cause = cause.__cause__ or cause.__context__
    return cause
