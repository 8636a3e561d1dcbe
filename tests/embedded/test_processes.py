"""Several processes that train as one."""

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


@pytest.mark.parametrize("stopped_rank", [0, 1])
def test_a_stop_of_one_process_stops_all_after_the_same_step_and_without_a_traceback(tmp_path, stopped_rank):
    command = [sys.executable, __file__, "stop", str(tmp_path), str(stopped_rank)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 130
    assert "Traceback" not in ended.stderr
    assert ended.stdout.count("toy: stopped after step 3") == 1
    assert CheckpointStore(tmp_path).load("toy")["step"] == 3


def _names_of_threads() -> list[str]:
    return [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the names of threads as Linux gives them")
def test_no_thread_of_the_group_outlives_it():
    """In a process of its own: only an optimizer's first step makes the imports that would keep the group."""
    subprocess.run([sys.executable, __file__], check=True, timeout=300)


def _main(arguments: list[str]) -> None:
    if arguments[:1] == ["stop"]:
        try:
            run_on_processes(_train_until_stopped, 2, Path(arguments[1]), int(arguments[2]))
        except KeyboardInterrupt:
            sys.exit(130)
    run_on_processes(_learned_matrices, 2)
    assert not [name for name in _names_of_threads() if "gloo" in name], _names_of_threads()


if __name__ == "__main__":
    _main(sys.argv[1:])
