"""The errors that end a run in one readable message, in three parts: what was expected, what was given, what to do."""

from __future__ import annotations


class _ExplainedError(Exception):
    """An error in three parts.

    Attributes:
        expected: what would have been right.
        got: what was given or found instead; it may have several lines.
        remedy: what to do.
        where: what the error is about, said before everything else, such as a section of the parameters; or "".
    """

    def __init__(self, expected: str, got: str, remedy: str, where: str = "") -> None:
        super().__init__(expected, got, remedy, where)  # as arguments, so that it can cross processes
        self.expected, self.got, self.remedy, self.where = expected, got, remedy, where

    def __str__(self) -> str:
        about = f"{self.where}: " if self.where else ""
        end = "\n" if "\n" in self.got else "; "
        return f"{about}expected {self.expected}; got {self.got}{end}{self.remedy}"


class InputError(_ExplainedError, ValueError):
    """Input that cannot be used."""


class TrainingError(_ExplainedError, RuntimeError):
    """A training that cannot go on, because nothing is learned or numbers are no longer finite."""
