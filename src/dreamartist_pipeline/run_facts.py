"""What a report says of runs: the hooks know it, and the report pipeline writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RUN_FACTS = "run_facts"
"""Name of the dataset in which the hooks hand a `RunFacts` to a pipeline."""


@dataclass(frozen=True)
class RunFacts:
    """The runs of a concept so far, the present one included.

    Attributes:
        subject: of the runs.
        made: when the run that made the concept ended, ISO 8601; "" if that is not recorded.
        command: of that run.
        configuration: dotted name -> value of all run settings and parameters.
        changed: dotted name -> (default, value) of parameters that differ from conf/base.
        versions: package -> version.
        machine: what can change the last bits of a result.
        files: dataset -> path of what the runs wrote, without the report.
        hashes: what -> SHA-256 or fingerprint of the concept and of what it was made from.
        next: (purpose, command) of what can be run next.
        remedies: pipeline -> the command that runs it for this subject.
        previews: the sheet of previews by step, an image file; None if MLflow has none.
    """

    subject: str
    made: str = ""
    command: str = ""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    next: tuple[tuple[str, str], ...] = ()
    remedies: Mapping[str, str] = field(default_factory=dict)
    previews: bytes | None = None
