"""Workers of a Ray cluster, of which all machines are processes here: lost ones, lost machines, and the end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from code_workers import CODE_WORKER, code_command, ends_of, waiting
from dreamartist_pipeline.errors import InputError
from dreamartist_pipeline.executors import executor_for
from dreamartist_pipeline.executors.ray_cluster import WAITING, RayWorkers
from dreamartist_pipeline.starting_runs import Workers, run_all
from refusals import says

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster with a head, which has place for one worker."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_health_check_period_ms", "1000")  # a lost machine is noticed soon
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield started
        started.shutdown()


def workers(cluster: Any, count: int = 1) -> RayWorkers:
    return RayWorkers(cluster.address, count, threads=1, program=CODE_WORKER)


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_commands_are_executed_and_a_failed_one_is_reported_by_its_message(cluster: Any, tmp_path: Path) -> None:
    commands = [
        code_command(tmp_path, "wrong", "print('Error: expected a picture', file=log); raise SystemExit(1)"),
        code_command(tmp_path / "elsewhere", "gone", ""),
        code_command(tmp_path, "right", "import os; open('made', 'w').write(os.environ['ADDED'])", ADDED="yes"),
    ]
    found = ends_of(commands, workers(cluster))
    assert (found["right"], (tmp_path / "made").read_text()) == (None, "yes")
    assert str(found["wrong"]).startswith("expected a picture (")
    assert "has no folder" in str(found["gone"])


_BEGINS = """
import os, signal, time
with open("begun", "a") as file:
    file.write(f"{os.getpid()}\\n")
def times_begun():
    return len(open("begun").readlines())
"""


def test_a_command_whose_actor_is_killed_is_executed_again(cluster: Any, tmp_path: Path) -> None:
    code = f"{_BEGINS}if times_begun() == 1: os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)"
    assert ends_of([code_command(tmp_path, "a", code)], workers(cluster)) == {"a": None}
    assert len({*(tmp_path / "begun").read_text().split()}) == 2


@pytest.mark.slow
def test_a_command_whose_machine_is_lost_is_executed_by_another(cluster: Any, tmp_path: Path) -> None:
    executor = workers(cluster, 2)  # before there is a second machine, so that this process belongs to the first
    second = cluster.add_node(num_cpus=1)
    code = f"{_BEGINS}while not os.path.exists('lost'): time.sleep(0.02)"
    lost = threading.Thread(target=_lose_when_both_run, args=(cluster, second, tmp_path))
    lost.start()
    found = ends_of([code_command(tmp_path, name, code) for name in "ab"], executor)
    lost.join()
    assert found == {"a": None, "b": None}
    assert len((tmp_path / "begun").read_text().split()) == 3


def _lose_when_both_run(cluster: Any, node: Any, folder: Path) -> None:
    begun = folder / "begun"
    wait_until(lambda: begun.exists() and len(begun.read_text().splitlines()) == 2)
    pids = [*map(int, begun.read_text().split())]
    cluster.remove_node(node, allow_graceful=False)
    wait_until(lambda: not all(map(psutil.pid_exists, pids)))
    (folder / "lost").touch()


def test_what_runs_is_stopped_and_keeps_its_work(cluster: Any, tmp_path: Path) -> None:
    ended: list[str] = []
    commands = [waiting(tmp_path, "a"), waiting(tmp_path, "b")]
    run_all(commands, workers(cluster), lambda one, message: ended.append(one.name), (tmp_path / "a").exists)
    assert ended == []
    wait_until((tmp_path / "a.kept").exists)
    assert not (tmp_path / "b").exists()


def test_ray_is_shut_down_after_all_threads_have_left_it(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill, shutdown, inside = ray.kill, ray.shutdown, []

    def noted_shutdown() -> None:
        inside.append([thread for thread in threading.enumerate() if thread.name == WAITING])
        if not inside[-1]:
            shutdown()

    executor = workers(cluster, 2)  # the second one waits for a place
    with monkeypatch.context() as patch:
        patch.setattr(ray, "kill", lambda actor: threading.Timer(0.5, kill, [actor]).start())  # a slow one
        patch.setattr(ray, "shutdown", noted_shutdown)
        assert ends_of([code_command(tmp_path, "a", "")], executor) == {"a": None}  # closes the executor
    assert inside == [[]]


def test_a_cluster_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, check=says(expected="127.0.0.1:1", remedy="HEAD:6379")):
        executor_for(Workers(ray="127.0.0.1:1"))


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, check=says(remedy="[ray]")):
        executor_for(Workers(ray="local"))
