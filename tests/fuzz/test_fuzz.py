"""A short run of the fuzzer with fixed seeds; tests/fuzz/run.py is the long one."""

from __future__ import annotations

import pytest

from dreamartist_pipeline.errors import InputError
from fuzz.fuzzing import Target, all_targets, problem_of
from fuzz.mutations import mutated, mutated_tree

_NUM_INPUTS = 40  # of every target


@pytest.mark.parametrize("target", all_targets().values(), ids=lambda target: target.name)
def test_mutated_inputs_are_read_or_refused_by_a_declared_error(target: Target):
    findings = [finding for seed in range(_NUM_INPUTS) if (finding := problem_of(target, seed))]

    assert not findings, "\n".join(f"seed {finding.seed}: {finding.problem}" for finding in findings)


def test_a_seed_gives_the_same_bytes_and_others_give_others():
    data = b'{"a": [1, 2, {"b": "text"}]}' * 3

    assert [mutated(data, seed) for seed in range(50)] == [mutated(data, seed) for seed in range(50)]
    assert len({mutated(data, seed) for seed in range(50)}) > 40


def test_a_tree_is_mutated_in_a_copy():
    tree = {"a": [1, 2], "b": {"c": None}}

    assert any(mutated_tree(tree, seed) != tree for seed in range(10))
    assert tree == {"a": [1, 2], "b": {"c": None}}


@pytest.mark.parametrize(("error", "is_found"), [(InputError("a", "b", "c"), False), (KeyError("a"), True)])
def test_only_declared_errors_are_allowed(error: Exception, is_found: bool):
    def read(file: object) -> None:
        raise error

    finding = problem_of(Target("test", lambda: {"a.txt": b"text"}, read), seed=3)

    assert (finding is not None and "KeyError" in finding.problem) == is_found


def test_a_reader_that_hangs_is_found():
    def read(file: object) -> None:
        while True:
            pass

    finding = problem_of(Target("test", lambda: {"a.txt": b"text"}, read), seed=3, limit_s=0.05)

    assert finding is not None
    assert "slower" in finding.problem
