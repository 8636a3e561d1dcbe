"""Several processes that do one work."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dreamartist_pipeline.checkpoint_files import CheckpointStore
from dreamartist_pipeline.core import processes
from dreamartist_pipeline.core.processes import rows_of_rank, run_on_processes, spread, sum_over_ranks
from dreamartist_pipeline.embedded.pretraining import Muon, run_stage
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.params import StageParams
from refusals import says
from warm_processes import warm_python


def _learned_matrices() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(16, side, generator=generator)) for side in (16, 24, 48)]
    optimizer = Muon(matrices, lr=0.1)
    for matrix in matrices:
        matrix.grad = matrix.detach() + 1
    optimizer.step()
    return [matrix.detach() for matrix in matrices]


def _save_learned_matrices(folder: Path) -> int:
    torch.save(_learned_matrices(), folder / f"{dist.get_rank()}.pt")
    return dist.get_world_size()


@pytest.mark.usefixtures("warm_ranks")
def test_two_processes_that_share_muons_work_get_the_same_matrices_as_one(tmp_path):
    assert run_on_processes(_save_learned_matrices, 2, tmp_path) == 2
    alone = _learned_matrices()
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def _fail() -> None:
    raise ValueError("no such sprite")


@pytest.mark.usefixtures("warm_ranks")
def test_an_error_on_the_processes_is_raised_and_leaves_no_group():
    with pytest.raises(ValueError, match="no such sprite"):
        run_on_processes(_fail, 2)
    assert not dist.is_initialized()


def fail_on_one_rank(failing: int, how: str, device: str = "cpu") -> None:
    """Fail on one rank while the others are in a collective call."""
    sum_over_ranks([torch.zeros(1, device=device)])
    if dist.get_rank() == failing:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise InputError(expected="enough memory", got="too little", remedy="lower the batch size")
    values = torch.zeros(1, device=device)
    sum_over_ranks([values])
    values.tolist()  # waits for the sum


@pytest.mark.parametrize(("how", "expected", "got"), [("error", "memory", "too little"), ("killed", "rank 1", "-9")])
def test_an_error_of_another_rank_ends_all_and_is_the_only_one(
    how: str, expected: str, got: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, check=says(expected=expected, got=got)):
        run_on_processes(fail_on_one_rank, 2, 1, how)
    assert not dist.is_initialized()
    assert not multiprocessing.active_children()
    assert "Traceback" not in capfd.readouterr().err


def _name_parts(rank: int, parts: Sequence[int], failing: int | None) -> Iterator[str]:
    for part in parts:
        if part == failing:
            raise InputError(expected="another part", got=str(part), remedy="none")
        yield f"{part} on {rank} of {rows_of_rank(4)}"  # without a group


@pytest.mark.usefixtures("warm_ranks")
def test_parts_are_spread_and_results_arrive_in_order_until_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "_WORTH_STARTING_S", 0)
    whole = "of slice(0, 4, None)"
    results = spread(_name_parts, [6, 7, 8, 9, 10], 2, 10)
    expected = [f"{part} on {rank} {whole}" for part, rank in ((6, 0), (7, 0), (8, 1), (9, 0))]
    assert [next(results) for _ in range(4)] == expected
    with pytest.raises(InputError, check=says(got="10")):
        next(results)
    assert not multiprocessing.active_children()


def test_no_process_is_started_for_short_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_started", lambda *_: pytest.fail("started"))
    assert [result[:6] for result in spread(_name_parts, [7, 8, 9], 2, None)] == ["7 on 0", "8 on 0", "9 on 0"]
    assert list(spread(_name_parts, [], 2, None)) == []


@pytest.mark.parametrize(("num_rows", "count"), [(5, 2), (5, 5), (8, 3), (7, 1)])
def test_every_row_belongs_to_one_rank(num_rows: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreamartist_pipeline.core.processes.num_ranks", lambda: count)
    shares = []
    for rank in range(count):
        monkeypatch.setattr("dreamartist_pipeline.core.processes.rank", lambda rank=rank: rank)
        shares.append(range(num_rows)[rows_of_rank(num_rows)])
    assert [row for share in shares for row in share] == list(range(num_rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_that_cannot_start_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.process._current_process, "_config", {"daemon": True})
    with pytest.raises(InputError, check=says(expected="device.processes", remedy="device.processes=1")):
        run_on_processes(_fail, 2)


def test_a_script_without_a_guarded_main_part_is_told_how_to_start_processes(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from dreamartist_pipeline.core.processes import run_on_processes\n"
        "print('starts')\n"
        "run_on_processes(print, 2, 'done')\n"
    )
    program = subprocess.run([warm_python(), script], check=False, capture_output=True, text=True, timeout=300)
    assert program.returncode == 1
    assert "__name__ == '__main__'" in program.stderr.splitlines()[-1]


class _NoTracker:
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        pass


def _train_until_stopped(folder: Path, stopped_rank: int) -> None:
    """Train until one rank receives SIGTERM in its third step."""
    network = nn.Linear(2, 2)
    num_calls = 0

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3 and dist.get_rank() == stopped_rank:
            signal.raise_signal(signal.SIGTERM)
        return network(torch.randn(4, 2, generator=generator)).square().mean()

    stage = StageParams(num_steps=1000, batch_size=4, lr=0.1)
    run_stage("toy", [network], loss_of, stage, 0, CheckpointStore(folder), _NoTracker())


@dataclasses.dataclass(frozen=True)
class Stopped:
    """A program that trained on two processes until it was stopped."""

    folder: Path
    program: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow)], ids=["first rank", "second rank"])
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """Run this file, which ends with the names of its threads, and stop one of its processes.

    In a process of its own: only an optimizer's first step makes the imports that would keep the group.
    """
    folder = tmp_path_factory.mktemp("stopped")
    command = [sys.executable, __file__, str(folder), str(request.param)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    return Stopped(folder, program)


def test_a_stop_of_one_process_stops_all_after_the_same_step_and_without_a_traceback(stopped: Stopped):
    assert stopped.program.returncode == 130
    assert "Traceback" not in stopped.program.stderr
    assert stopped.program.stdout.count("toy: stopped after step 3") == 1
    assert CheckpointStore(stopped.folder).load("toy")["step"] == 3


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the names of threads as Linux gives them")
def test_no_thread_of_the_group_outlives_it(stopped: Stopped):
    *_, names = stopped.program.stdout.splitlines()
    assert names.startswith("threads: ") and "gloo" not in names


def _main(folder: str, stopped_rank: str) -> None:
    stop = False
    try:
        run_on_processes(_train_until_stopped, 2, Path(folder), int(stopped_rank))
    except KeyboardInterrupt as error:
        stop = True
        sys.stdout.write(f"{error}\n")
    sys.stdout.write(f"threads: {[file.read_text().strip() for file in Path('/proc/self/task').glob('*/comm')]}\n")
    sys.exit(130 if stop else 0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
