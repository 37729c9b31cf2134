"""Full disks, read-only ones, damaged files, slow and lost ranks, clocks that jump: the right end, or a message.

One run of 16 steps is made whole once; what was hurt must end with its weights and metrics, bit for bit.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_train.ranks.interface import Solo
from sae_train.sweeps import outcome
from sae_train.training import restore
from tools.processes import checkpoints, finish, launch, rows, run_directory, wait_until, weights, workers

KEEP = ["checkpoint.keep=0"]
FEATURES = 256
A_MINUTE = 60.0
ROOT = Path(__file__).resolve().parents[2]
Whole = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return `whole(n_ranks=1)`: the folder of a run that nothing happened to, with all its checkpoints."""
    made: dict[int, Path] = {}

    def get(n_ranks: int = 1) -> Path:
        if n_ranks not in made:
            folder = tmp_path_factory.mktemp(f"whole{n_ranks}")
            done = finish(launch(folder, n_ranks, KEEP))
            assert done.status == 0, done.stdout
            made[n_ranks] = folder
        return made[n_ranks]

    return get


def check_alike(folder: Path, whole: Path) -> None:
    assert weights(folder) == weights(whole)
    assert rows(folder) == rows(whole)


def readable(folder: Path) -> None:
    """Every checkpoint that was published is whole."""
    for path in folder.glob("runs/*/checkpoints/step_*"):
        found = everything(path.parent, path.name, warn=pytest.fail)
        assert found is not None


def everything(directory: Path, name: str, *, warn: Callable[[str], None]) -> tuple[Any, ...] | None:
    """Return all that is in one checkpoint, read the way a run reads it; None where it is passed over."""
    alone = directory.parent / f"alone-{name}"
    shutil.rmtree(alone, ignore_errors=True)
    shutil.copytree(directory / name, alone / name)
    found = restore.newest(alone, ranks=Solo(), warn=warn)
    if found is None:
        return None
    lanes = [found.lane_state(lane) for lane in range(8)]
    (name,) = found.sae_names()
    return found.notes, found.stream, found.sae_state(name, 0, FEATURES), lanes


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def damage(path: Path, chance: random.Random) -> str:
    """Cut a file short at a random byte, or flip one of its bits; return what was done."""
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    if chance.random() < 0.5:
        path.write_bytes(content[:place])
        return f"{path.name} cut at byte {place} of {len(content)}"
    content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return f"{path.name}: a bit of byte {place} of {len(content)} flipped"


def files_of(checkpoint: Path) -> list[Path]:
    """Return the paths of a checkpoint's files, relative to it, in their order."""
    return sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())


def test_a_damaged_checkpoint_is_never_taken(tmp_path: Path, whole: Whole) -> None:
    name = checkpoints(whole())[-1]
    original = run_directory(whole()) / "checkpoints" / name
    (tmp_path / "c").mkdir()
    shutil.copytree(original, tmp_path / "c" / name)
    intact = everything(tmp_path / "c", name, warn=pytest.fail)
    chance, taken = random.Random(11), []
    files = files_of(original)
    for number in range(120):
        file = files[number % len(files)]
        done = damage(tmp_path / "c" / name / file, chance)
        warnings: list[str] = []
        found = everything(tmp_path / "c", name, warn=warnings.append)
        if found is not None and not same(found, intact):
            taken.append(done)
        assert (found is None) == bool(warnings), done
        shutil.copyfile(original / file, tmp_path / "c" / name / file)
    assert taken == []


def test_after_damage_the_run_goes_on_from_before_it(tmp_path: Path, whole: Whole) -> None:
    shutil.copytree(whole() / "runs", tmp_path / "runs")
    run, chance = run_directory(tmp_path), random.Random(3)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "saes")
    for name in checkpoints(tmp_path)[-3:]:
        step = run / "checkpoints" / name
        damage(step / chance.choice(files_of(step)), chance)
    done = finish(launch(tmp_path, 1, KEEP))
    assert done.status == 0, done.stdout
    assert done.stdout.count("Using the checkpoint before it") == 3
    check_alike(tmp_path, whole())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return `small_disk(options)`: mount, or mount again with other options, a file system in memory at one place."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        again = "remount," if os.path.ismount(place) else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
        return place

    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    yield mount
    subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


@pytest.mark.slow
def test_a_full_disk_and_a_read_only_one(small_disk: Callable[[str], Path], whole: Whole) -> None:
    checkpoint_bytes = sum(path.stat().st_size for path in next(whole().glob("runs/*/checkpoints/step_*")).rglob("*"))
    folder = small_disk(f"size={int(3.5 * checkpoint_bytes)}")
    full = finish(launch(folder, 1, KEEP))
    assert full.status == 2, full.stdout
    assert "No space left on device" in full.stdout
    assert "Free space there" in full.stdout
    assert "Traceback" not in full.stdout
    before = checkpoints(folder)
    assert before
    assert not list(folder.glob("runs/*/checkpoints/tmp-*"))
    for path in folder.glob("runs/*/checkpoints/step_*"):
        assert restore.load(path).notes["files"]
    small_disk("ro")
    refused = finish(launch(folder, 1, KEEP))
    assert refused.status == 2, refused.stdout
    assert "Read-only file system" in refused.stdout
    assert "runs=DIR" in refused.stdout
    assert "Traceback" not in refused.stdout
    assert checkpoints(folder) == before
    small_disk(f"rw,size={100 * checkpoint_bytes}")
    done = finish(launch(folder, 1, KEEP))
    assert done.status == 0, done.stdout
    assert f"resuming at step {int(before[-1].removeprefix('step_'))} " in done.stdout
    check_alike(folder, whole())


FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed (Debian: faketime)")
@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [1, pytest.param(2, marks=pytest.mark.multirank)])
def test_a_clock_that_jumps(tmp_path: Path, whole: Whole, n_ranks: int) -> None:
    """The ranks' wall clock is set forth and back by days, many times a second; the monotonic clock is what it is.

    torchrun keeps its own: under libfaketime 0.9.10 `time.sleep` fails (EINVAL).
    """
    whole(n_ranks)
    offset, chance, over = tmp_path / "offset", random.Random(2), threading.Event()
    offset.write_text("+1d")
    variables = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(offset)}
    variables |= {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    variables |= {outcome.VARIABLE: str(tmp_path / "outcome.json")}

    def jump() -> None:
        while not over.wait(0.02):
            fresh = offset.with_suffix(".new")
            fresh.write_text(f"{chance.choice('+-')}{chance.randrange(1, 100)}d")
            fresh.replace(offset)

    clock = threading.Thread(target=jump)
    process = launch(tmp_path, n_ranks, KEEP, variables)
    clock.start()
    done = finish(process)
    over.set()
    clock.join()
    assert done.status == 0, done.stdout
    said = outcome.read_outcome(tmp_path / "outcome.json")
    assert said is not None
    assert abs(datetime.now(UTC) - datetime.fromisoformat(said.time)) > timedelta(hours=20)
    check_alike(tmp_path, whole(n_ranks))


@pytest.mark.slow
@pytest.mark.multirank
def test_a_slow_rank_is_waited_for(tmp_path: Path, whole: Whole) -> None:
    process = launch(tmp_path, 2, KEEP)
    wait_until(lambda: bool(checkpoints(tmp_path)), process)
    for rank in (1, 0):
        if process.poll() is None:
            slow = workers(process)[rank]
            os.kill(slow, signal.SIGSTOP)
            time.sleep(2)
            os.kill(slow, signal.SIGCONT)
            time.sleep(0.1)
    done = finish(process)
    assert done.status == 0, done.stdout
    check_alike(tmp_path, whole(2))


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_ends_in_the_middle(tmp_path: Path, whole: Whole, rank: int, number: signal.Signals) -> None:
    """SIGINT makes Python raise wherever it is: an error that one rank has alone."""
    process = launch(tmp_path, 2, KEEP)
    wait_until(lambda: bool(checkpoints(tmp_path)), process)
    os.kill(workers(process)[rank], number)
    began = time.monotonic()
    torn = finish(process)
    assert time.monotonic() - began < A_MINUTE
    assert torn.status != 0, torn.stdout
    if number != signal.SIGINT:
        assert "lost touch with another rank" in torn.stdout or number.name in torn.stdout
    readable(tmp_path)
    done = finish(launch(tmp_path, 2, KEEP))
    assert done.status == 0, done.stdout
    assert "resuming at step" in done.stdout
    check_alike(tmp_path, whole(2))


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [1, pytest.param(2, marks=pytest.mark.multirank)])
def test_random_kill_points(n_ranks: int) -> None:
    """Twelve of them; scripts/soak.py by hand makes more."""
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--kills", "6", "--ranks", str(n_ranks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
