"""Read mutated inputs with all readers of files: `python tests/fuzz/run.py --inputs 100000`.

Each target runs in a process of its own with a limit of memory, and each input has a limit of time. Inputs that raise
another error than the declared ones, take too long or end the process are saved, and their seeds printed.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fuzz.fuzzing import Finding, all_targets, limit_memory, problem_of

_START_S = 120.0  # to import the readers and to make the samples
_STUCK_S = 60.0  # without a next input, before a process is killed: C code does not see the signal
_RENEW = 20_000  # inputs per process


def main() -> None:
    """Fuzz the targets that are named, or all."""
    arguments = _arguments()
    names = arguments.targets or sorted(all_targets())
    share = -(-arguments.inputs // len(names))
    findings: list[Finding] = []
    for name in names:
        found = list(_findings(name, arguments.first_seed, arguments.first_seed + share))
        for finding in _one_of_each_kind(found):
            print(f"\n{name}, seed {finding.seed}: {finding.problem}\n  saved as {_save(finding, arguments.save)}")
        print(f"{name}: {share:,} inputs, {len(found)} findings", flush=True)
        findings += found
    sys.exit(1 if findings else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="names of targets (default: all)")
    parser.add_argument("--inputs", type=int, default=10_000, help="number of inputs, over all targets")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first input")
    parser.add_argument("--save", type=Path, default=Path("fuzz_findings"), help="folder of inputs that are findings")
    return parser.parse_args()


def _findings(name: str, seed: int, end: int) -> Iterator[Finding]:
    """Yield the findings of the seeds from `seed` to `end`; a process that ends is replaced after its input."""
    context = multiprocessing.get_context("spawn")
    while seed < end:
        connection, other = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(name, seed, min(end, seed + _RENEW), other), daemon=True)
        process.start()
        other.close()
        limit_s, has_begun = _START_S, False
        try:
            while connection.poll(limit_s):
                message = connection.recv()
                limit_s, has_begun = _STUCK_S, True
                if isinstance(message, Finding):
                    yield message
                else:
                    seed = message  # of the next input
            process.kill()
            yield Finding(name, seed, f"not done after {limit_s:g} s")
            seed += 1
        except EOFError:
            process.join()
            if not has_begun:
                sys.exit(f"{name}: the process ended before its first input")
            if process.exitcode:
                yield Finding(name, seed, f"the process ended with exit code {process.exitcode}")
                seed += 1


def _work(name: str, seed: int, end: int, connection: Connection) -> None:
    """Read the inputs, and send the seed of each next one and the findings."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    target = all_targets()[name]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders print what is wrong with a file
    problem_of(target, 0, limit_s=_START_S)  # imports what the reader imports at its first file
    limit_memory()
    for each in range(seed, end):
        connection.send(each)
        if finding := problem_of(target, each):
            connection.send(finding)
    connection.send(end)


def _one_of_each_kind(findings: list[Finding]) -> Iterator[Finding]:
    counts = Counter(finding.kind for finding in findings)
    for finding in findings:
        if number := counts.pop(finding.kind, 0):
            yield Finding(finding.target, finding.seed, f"{finding.problem} ({number} inputs)")


def _save(finding: Finding, folder: Path) -> Path:
    name, data = all_targets()[finding.target].input(finding.seed)
    file = folder / f"{finding.target}-{finding.seed}-{name}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


if __name__ == "__main__":
    main()
