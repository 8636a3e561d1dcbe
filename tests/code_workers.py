"""Worker processes whose requests are Python code in place of arguments of `kedro run`; otherwise like worker.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dreamartist_pipeline.starting_runs import Executor, RunCommand, run_all

WORKER = """
import json, os, signal, sys, threading, queue
requests, busy, memory_bytes = queue.Queue(), [], 100

def read():
    for line in iter(sys.stdin.buffer.raw.readline, b""):
        requests.put(json.loads(line))
    requests.put(None)
    if busy:
        os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=read, daemon=True).start()
while (request := requests.get()) is not None:
    busy.append(1)
    status = 0
    for name, value in request["environment"].items():
        os.environ.update({name: value} if value is not None else {})
    with open(request["log"], "a") as log:
        try:
            exec(request["arguments"][0], {"log": log, "worker": sys.modules["__main__"]})
        except SystemExit as error:
            status = error.code
    busy.clear()
    print(json.dumps({"status": status, "memory_bytes": memory_bytes}), flush=True)
"""
CODE_WORKER = (sys.executable, "-c", WORKER)


def code_command(folder: Path, name: str, code: str, **environment: str | None) -> RunCommand:
    return RunCommand(name, (code,), folder, environment, folder / "logs" / f"{name}.log")


def ends_of(commands: Sequence[RunCommand], executor: Executor) -> dict[str, str | None]:
    """Run commands, and return the message of each."""
    found: dict[str, str | None] = {}

    def ended(command: RunCommand, message: str | None) -> None:
        found[command.name] = message

    run_all(commands, executor, ended, lambda: False)
    return found


_WAITS = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: (Path({name!r} + '.kept').touch(), {then}))
Path({name!r}).touch()
for _ in range(6000): time.sleep(0.01)
"""


def waiting(folder: Path, name: str, then: str = "sys.exit(130)") -> RunCommand:
    return code_command(folder, name, _WAITS.format(name=name, then=then))
