"""Ignore the options one by one, and check that the test which proves the option fails.

    python tests/ignore_options.py [OPTION ...]      for example training.loss; by default all (some minutes)

An ignored option always has its default. For required options, OTHER_VALUES has a value that differs from the proof.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dreamartist_pipeline.params import SamplerParams, ScheduleParams

TESTS = Path(__file__).resolve().parent
USED_TWICE = (SamplerParams, ScheduleParams)  # the option is ignored in one place only
OTHER_VALUES: dict[str, Any] = {
    "LoRAGroup.layers": ("re:.*(attn2|mlp)$",),
    "LoRAGroup.lr": 1e-4,
    "LoRAGroup.rank": 1,
    "evaluation.prior_prompts": ("a cat", "a dog", "a bird"),
    "evaluation.prompts": ("a {pt1}",),
    "export.title": "other",
    "generate.prompts": ("a cat",),
    "ingestion.bucket.side_px": 64,
    "prompts.num_prompts": 3,
    "regularization.sampler": SamplerParams(),
    "training.caption_transforms.kind": "tag_shuffle",
    "training.guidance_scale.high": 9.0,
    "training.guidance_scale.low": 9.0,
    "training.num_steps": 1,
}


class Outcomes:
    """A pytest plugin that counts the tests, and stores the message of the first failure."""

    def __init__(self) -> None:
        self.num_tests, self.failure = 0, ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.num_tests += report.when == "call"
        if report.failed and not self.failure:
            self.failure = next((x for x in str(report.longrepr).splitlines() if x.startswith("E ")), "E failed")[1:]


def main(chosen: list[str]) -> int:
    proofs = load_proofs()
    unnoticed = 0
    for option, proof in sorted(proofs.proofs().items()):
        if chosen and not option.startswith(tuple(chosen)):
            continue
        with ignored(option, proofs.roots(), proofs.model_in):
            outcomes = run(proof)
        unnoticed += not outcomes.failure
        result = f"noticed:{outcomes.failure:.100}" if outcomes.failure else f"NOT NOTICED by {proof}"
        sys.stdout.write(f"{option:<40} {result}{'' if outcomes.num_tests else ' (no test finished)'}\n")
        sys.stdout.flush()
    return 1 if unnoticed else 0


def load_proofs() -> Any:
    spec = importlib.util.spec_from_file_location("every_option", TESTS / "test_every_option.py")
    assert spec is not None and spec.loader is not None
    sys.modules["every_option"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def ignored(
    option: str, roots: dict[str, type[BaseModel]], model_in: Callable[[Any], type[BaseModel] | None]
) -> Iterator[None]:
    """Replace the value of the option for all readers; validation and serialization are unchanged."""
    root, *names = option.split(".")
    owners: list[Any] = [roots[root]]
    for name in names[:-1]:
        owners.append(model_in(owners[-1].model_fields[name].annotation))
    owner, name = owners[-1], names[-1]
    field = owner.model_fields[name]
    value = OTHER_VALUES.get(option, field.get_default(call_default_factory=True))
    if field.is_required() and option not in OTHER_VALUES:
        raise SystemExit(f"{option} has no default: add a value that differs from its proof to OTHER_VALUES")
    reader = always(value)
    if owner in USED_TWICE and len(owners) > 1:
        owner, name, reader = owners[-2], names[-2], changed(names[-2], {name: value})
    type.__setattr__(owner, name, reader)
    try:
        yield
    finally:
        type.__delattr__(owner, name)


def always(value: Any) -> property:
    """Return a property that hides the value of an instance."""
    return property(lambda self: value)


def changed(name: str, changes: dict[str, Any]) -> property:
    """Return a property that hides the model of an instance by a changed copy."""
    return property(lambda self: self.__dict__[name].model_copy(update=changes))


def run(proof: str) -> Outcomes:
    """Run a test until its first failure, without output."""
    outcomes = Outcomes()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main(["-q", "-x", "-p", "no:cacheprovider", str(TESTS / proof)], plugins=[outcomes])
    return outcomes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
