"""Dead ranks are found, slow ones are not, and the others stop: real processes and a real store."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

pytestmark = pytest.mark.multirank

EVERY, PATIENCE = 0.2, 3.0
LATEST = PATIENCE + 5 * EVERY + 3.0
"""Seconds that are promised, and seconds that a busy machine may add."""

WORKER = f"""
import os, sys, time
import torch
from torch.distributed import TCPStore
from sae_train.ranks.heartbeat import Heartbeat

EVERY, PATIENCE = {EVERY}, {PATIENCE}

class Store:
    def __init__(self, port, is_host):
        self.store = TCPStore("127.0.0.1", port, is_master=is_host, wait_for_workers=False)
        self.port = self.store.port

    def set(self, key, value):
        self.store.set(key, value)

    def get(self, key):
        return self.store.get(key).decode() if self.store.check([key]) else None

def until(work):
    end = time.monotonic() + float(sys.argv[5])
    while time.monotonic() < end:
        work()

rank, size, port, mode = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
store = Store(port, rank == 0)
if rank == 0:
    print(store.port, flush=True)
print("joined", flush=True)
sys.stdin.readline()
with Heartbeat(store, rank, size, every=EVERY, patience=PATIENCE):
    if mode == "wait":
        time.sleep(600)
    elif mode == "sleep":
        time.sleep(float(sys.argv[5]))
    elif mode == "compute":
        until(lambda: torch.linalg.svd(torch.ones(400, 400)))
    elif mode == "python":
        until(lambda: sum(range(1000)))
    elif mode == "fail":
        raise SystemExit(3)
time.sleep(5 * EVERY if rank == 0 else 0)
os._exit(0)
"""

Process = subprocess.Popen[str]
Start = Callable[..., list[Process]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return `start(*modes, busy=seconds)`: one process a mode, all beating. Rank 0 hosts the store."""
    started: list[Process] = []

    def begin(rank: int, size: int, port: str, mode: str, busy: float) -> Process:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(size), port, mode, str(busy)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    def run(*modes: str, busy: float = 2 * PATIENCE) -> list[Process]:
        first = begin(0, len(modes), "0", modes[0], busy)
        port = line_of(first)
        others = [begin(rank, len(modes), port, mode, busy) for rank, mode in enumerate(modes) if rank]
        for process in (first, *others):
            assert line_of(process) == "joined"
        for process in (first, *others):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        time.sleep(4 * EVERY)
        return [first, *others]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def line_of(process: Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ended(process: Process, *, within: float = LATEST) -> tuple[int, str]:
    """Return the status and this package's lines of stderr, without torch's remarks on broken sockets."""
    _, stderr = process.communicate(timeout=within)
    return process.returncode, "".join(line for line in stderr.splitlines(keepends=True) if line.startswith("rank"))


def test_the_others_stop_when_one_is_killed(start: Start) -> None:
    ranks = start("wait", "wait", "wait", "wait")
    began = time.monotonic()
    ranks[2].kill()
    for rank in (0, 1, 3):
        status, said = ended(ranks[rank])
        assert status == 1
        assert said.startswith(
            f"rank {rank} stops: rank 2 (host {os.uname().nodename}) has not been heard of for 3 s: "
        )
        assert said.endswith("it or its node is dead. The same command goes on from the last checkpoint.\n")
        assert said.count("\n") == 1
    assert time.monotonic() - began >= PATIENCE - 2 * EVERY


def test_the_others_stop_when_the_first_is_killed_and_the_store_with_it(start: Start) -> None:
    ranks = start("wait", "wait", "python")
    ranks[0].kill()
    for rank in (1, 2):
        status, said = ended(ranks[rank])
        assert status == 1
        assert said.startswith(f"rank {rank} stops: rank 0 (host ")
        assert "has not been heard of for 3 s: it or its node is dead" in said
        assert said.count("\n") == 1


def test_the_others_stop_when_the_store_hangs(start: Start) -> None:
    """The process exists and its sockets are open, but no call to it returns."""
    ranks = start("wait", "wait")
    ranks[0].send_signal(signal.SIGSTOP)
    status, said = ended(ranks[1])
    assert status == 1
    assert "rank 0" in said


@pytest.mark.slow
def test_neither_a_pause_nor_a_busy_main_thread_nor_a_suspended_job_is_death(start: Start) -> None:
    ranks = start("sleep", "compute", "python", busy=6 * PATIENCE)
    for stopped in (ranks[:1], ranks[1:2]):
        pause(stopped, PATIENCE / 2)
        time.sleep(3 * EVERY)
    pause(ranks, 1.5 * PATIENCE)
    assert [ended(process, within=60) for process in ranks] == [(0, "")] * 3


def pause(processes: list[Process], seconds: float) -> None:
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    for process in processes:
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("early", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_who_ended_well_is_not_missed(start: Start, early: int) -> None:
    modes = ["sleep", "sleep", "sleep"]
    modes[early] = "end"
    assert [ended(process, within=20) for process in start(*modes)] == [(0, "")] * 3


def test_who_ended_with_an_error_is_missed(start: Start) -> None:
    ranks = start("wait", "fail")
    assert ended(ranks[1])[0] == 3
    status, said = ended(ranks[0])
    assert status == 1
    assert "rank 1 (host " in said


def test_traffic_is_proportional_to_the_ranks() -> None:
    from sae_train.ranks.heartbeat import Heartbeat

    class Counting:
        """A store in this process that counts its calls."""

        def __init__(self) -> None:
            self.values: dict[str, str] = {}
            self.n_calls = 0

        def set(self, key: str, value: str) -> None:
            self.n_calls += 1
            self.values[key] = value

        def get(self, key: str) -> str | None:
            self.n_calls += 1
            return self.values.get(key)

    store, size = Counting(), 64
    beats = [Heartbeat(store, rank, size, every=60.0) for rank in range(size)]
    for beat in beats:
        beat.__enter__()
    time.sleep(1.0)
    assert store.n_calls <= 3 * size
    for beat in beats:
        beat.close()
    assert all('"done"' in value for value in store.values.values())
