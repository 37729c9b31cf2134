"""Whose directory it is: names, identities, what a killed run leaves, and what no run may take."""

import ctypes
import errno
import multiprocessing
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from sae_train.config import RunConfig, as_dict
from sae_train.errors import CheckpointError, ConfigError
from sae_train.training.run import name_of
from sae_train.training.run_directory import RunDirectory
from tools.small_runs import identity_of

Compose = Callable[..., RunConfig]


def claim(directory: RunDirectory, config: RunConfig) -> None:
    directory.claim(as_dict(config, [config.sae]), identity=identity_of(config), record={"plan": {}, "source": {}})


def test_a_name_changes_with_what_can_change_the_sae_and_with_nothing_else(compose: Compose) -> None:
    def name(*overrides: str) -> str:
        config = compose(*overrides)
        return name_of(config, [(config.sae, "residual2", 2048)], model="bundled")

    assert name().startswith("bundled.residual2.mutual_choice.k32.f2048.s0-")
    free = ("tracking=none", "log_every=7", "evaluate_every=9", "checkpoint.keep=5", "runs=elsewhere", "dry_run=true")
    assert {name(override) for override in free} == {name()}
    assert name("sparsifier=batch_topk") == name()
    bound = (
        "seed=1",
        "tokens=2_000_000",
        "optimizer.lr=1e-3",
        "data.seed=3",
        "aux_loss=none",
        "evaluation_tokens=9000",
    )
    assert len({name(override) for override in bound} | {name()}) == len(bound) + 1
    assert name("name=mine") == "mine"


def test_a_killed_claim_is_taken_up_again(tmp_path: Path, compose: Compose) -> None:
    (tmp_path / "run").mkdir()
    for left in (".lock", ".config.yaml.partial"):
        (tmp_path / "run" / left).write_text("half")
    directory = RunDirectory(tmp_path / "run")
    directory.check_identity(identity_of(compose()))
    claim(directory, compose())
    stored = directory.stored()
    assert stored is not None
    assert stored["config"] == as_dict(compose(), [compose().sae])


def test_another_identity_is_refused_and_its_keys_are_named(tmp_path: Path, compose: Compose) -> None:
    claim(RunDirectory(tmp_path / "run"), compose())
    RunDirectory(tmp_path / "run").check_identity(identity_of(compose("tracking=none")))
    with pytest.raises(ConfigError, match=r"holds another run: k 32.0 -> 16.0, layer.index 'middle' -> 1\."):
        RunDirectory(tmp_path / "run").check_identity(identity_of(compose("k=16", "layer.index=1")))


def test_two_processes_do_not_share_a_directory(tmp_path: Path, compose: Compose) -> None:
    first = RunDirectory(tmp_path / "run")
    claim(first, compose())
    with pytest.raises(CheckpointError, match="another process is training in it"):
        claim(RunDirectory(tmp_path / "run"), compose())
    first.release()
    claim(RunDirectory(tmp_path / "run"), compose())


HOLDER = """
import sys, time
from pathlib import Path
from sae_train.cli.compose import compose_config
from sae_train.config import as_dict, identity
from sae_train.training.run_directory import RunDirectory

config = compose_config([])
directory = RunDirectory(Path(sys.argv[1]))
own = identity(config, {"": config.sae})
directory.claim(as_dict(config, [config.sae]), identity=own, record={"plan": {}, "source": {}})
print("held", flush=True)
sys.stdin.readline()
AFTER
"""


@contextmanager
def held_elsewhere(path: Path, *, after: str = "", **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """Hold a run's directory in a process of its own; `after` is what that does once it reads a line."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER.replace("AFTER", after), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_who_is_refused_hears_who_holds_it_and_a_dead_holder_holds_nothing(tmp_path: Path, compose: Compose) -> None:
    with held_elsewhere(tmp_path / "run", SLURM_JOB_ID="4711") as holder:
        held = f"another process is training in it: process {holder.pid} on {platform.node()}, SLURM job 4711, since 2"
        for _ in range(2):  # asking does not wipe out the answer
            with pytest.raises(CheckpointError, match=held):
                claim(RunDirectory(tmp_path / "run"), compose())
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        claim(RunDirectory(tmp_path / "run"), compose())


def test_a_lock_without_a_name_is_still_a_lock(tmp_path: Path, compose: Compose) -> None:
    first = RunDirectory(tmp_path / "run")
    claim(first, compose())
    for text in ("", "[]", "{", "{}"):
        (tmp_path / "run" / ".lock").write_text(text)
        with pytest.raises(CheckpointError, match=r"training in it\. Wait for it"):
            claim(RunDirectory(tmp_path / "run"), compose())


def test_a_requeued_job_waits_for_the_one_that_is_dying(
    tmp_path: Path, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_elsewhere(tmp_path / "run", after="time.sleep(1.5)") as holder:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
        with pytest.raises(CheckpointError, match="another process"):
            claim(RunDirectory(tmp_path / "run"), compose())
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert holder.stdin is not None
        holder.stdin.write("\n")
        holder.stdin.flush()
        began = time.monotonic()
        claim(RunDirectory(tmp_path / "run"), compose())
        assert 0.5 < time.monotonic() - began < 25


def test_who_waited_for_an_abandoned_directory_holds_the_new_one(tmp_path: Path, compose: Compose) -> None:
    """The refused run removes the lock file while another has it open: that one's lock would be on nothing."""
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    claim(first, compose())
    gone = (tmp_path / "run" / ".lock").stat().st_ino
    with (tmp_path / "run" / ".lock").open() as kept_open:
        assert os.fstat(kept_open.fileno()).st_ino == gone
        first.abandon()
        first.release()
        assert not (tmp_path / "run").exists()
        claim(second, compose())
        assert (tmp_path / "run" / ".lock").stat().st_ino != gone
    with pytest.raises(CheckpointError, match="another process"):
        claim(RunDirectory(tmp_path / "run"), compose())


def without_locks(number: int, path: Path, results: "multiprocessing.Queue[str]") -> None:
    """Claim `path` where the kernel answers every flock(2) with `number`."""
    from sae_train.cli.compose import compose_config

    system_call = {"x86_64": 73, "aarch64": 32}[platform.machine()]
    load, jump_equal, give = 0x20, 0x15, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000
    program = b"".join(
        struct.pack("HBBI", *step)
        for step in [
            (load, 0, 0, 0),
            (jump_equal, 0, 1, system_call),
            (give, 0, 0, refuse | number),
            (give, 0, 0, allow),
        ]
    )
    text = ctypes.create_string_buffer(program)
    filter_of = struct.pack("HxxxxxxQ", 4, ctypes.addressof(text))
    libc = ctypes.CDLL(None, use_errno=True)
    set_no_new_privileges, set_seccomp, by_filter = 38, 22, 2
    if libc.prctl(set_no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, by_filter, filter_of, 0, 0):
        results.put(f"skip: {os.strerror(ctypes.get_errno())}")
        return
    try:
        claim(RunDirectory(path), compose_config([]))
        results.put("claimed")
    except CheckpointError as error:
        results.put(str(error))


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="system call numbers are of x86_64, aarch64"
)
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused_with_what_to_do(tmp_path: Path, number: int) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=without_locks, args=(number, tmp_path / "run", results))
    process.start()
    said = results.get(timeout=60)
    process.join(timeout=60)
    if said.startswith("skip: "):
        pytest.skip(f"seccomp: {said}")
    assert f"its file system has no file locks ({os.strerror(number)})" in said
    assert "runs=DIR" in said


@pytest.mark.parametrize("content", ["", "just text", "a: [", "config: {}", "\xff"])
def test_a_config_file_that_is_not_ours_is_refused(tmp_path: Path, compose: Compose, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        RunDirectory(tmp_path / "run").check_identity(identity_of(compose()))


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, compose: Compose) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("dear to someone")
    with pytest.raises(ConfigError, match="not a run's directory"):
        RunDirectory(tmp_path / "run").check_identity(identity_of(compose()))
    (tmp_path / "file").write_text("")
    with pytest.raises((ConfigError, CheckpointError)):
        RunDirectory(tmp_path / "file").check_identity(identity_of(compose()))


def test_config_yaml_is_plain_yaml(tmp_path: Path, compose: Compose) -> None:
    claim(RunDirectory(tmp_path / "run"), compose("k=7"))
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert values["config"]["k"] == 7
    assert values["identity"]["k"] == 7
