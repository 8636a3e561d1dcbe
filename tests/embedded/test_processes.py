"""Several processes that train as one."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dreamartist_pipeline.embedded.checkpoints import CheckpointStore
from dreamartist_pipeline.embedded.pretraining import Muon, run_stage
from dreamartist_pipeline.embedded.processes import run_on_processes
from dreamartist_pipeline.params import StageParams


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


def test_two_processes_that_share_muons_work_get_the_same_matrices_as_one(tmp_path):
    assert run_on_processes(_save_learned_matrices, 2, tmp_path) == 2
    alone = _learned_matrices()
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def _fail() -> None:
    raise ValueError("no such sprite")


def test_an_error_on_the_processes_is_raised_and_leaves_no_group():
    with pytest.raises(ValueError, match="no such sprite"):
        run_on_processes(_fail, 2)
    assert not dist.is_initialized()


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


@pytest.fixture(scope="module", params=[0, 1], ids=["first rank", "second rank"])
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """Run this file, which ends with the names of its threads, and stop one of its processes.

    In a process of its own: only an optimizer's first step makes the imports that would keep the group.
    """
    folder = tmp_path_factory.mktemp("stopped")
    command = [sys.executable, __file__, str(folder), str(request.param)]
    return Stopped(folder, subprocess.run(command, check=False, capture_output=True, text=True, timeout=300))


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
    except KeyboardInterrupt:
        stop = True
    sys.stdout.write(f"threads: {[file.read_text().strip() for file in Path('/proc/self/task').glob('*/comm')]}\n")
    sys.exit(130 if stop else 0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
