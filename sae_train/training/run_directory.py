"""A run's directory: its name, whose it is, and whether the run in it is new, unfinished or finished.

The same identity (config.identity) finds its directory again; that is what makes a resubmitted sweep resume.
"""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import yaml

from sae_train.config import RunConfig, as_dict, identity
from sae_train.config.naming import LONGEST_NAME
from sae_train.errors import CheckpointError, ConfigError, DirectoryInUse
from sae_train.formats.durable import explained, write_text

LONGEST_BELOW = {
    "an exported SAE": len("saes/") + LONGEST_NAME + len("/.sae.safetensors.partial"),
    "a checkpoint": len("checkpoints/tmp-step_/saes//features__.safetensors") + LONGEST_NAME + 3 * 15,
    "wandb's files": 200,
}
"""Bytes of the longest path that a run writes below its directory, with room."""

PARTS = ("config", "identity", "plan", "source")
"""What every config.yaml holds, each a mapping."""


NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
"""What `flock` says where a file system has none: NFS without its lock service, Lustre mounted without `flock`."""
NAME_MAX = 255
"""Bytes of a name that file systems take."""
SHOWN = 120
"""Characters of a path that a message about its length shows."""
SEEN_WITHIN = 60.0
"""Seconds in which a network file system shows one machine what another wrote."""
REQUEUED_WAITS = 30.0
"""Seconds that a requeued job gives the job before it to end: SLURM may start the one while the other is dying."""


class RunDirectory:
    """`runs/<name>/`, held by this run alone while it trains."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self._claimed_now = False

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def result(self) -> dict[str, Any] | None:
        """Return summary.json of a finished run; None unless it and every SAE it names are there and whole."""
        with explained(self.path, what="read"):
            if not self.summary.is_file():
                return None
            text = self.summary.read_bytes()
        try:
            summary: dict[str, Any] = json.loads(text)
            whole = all({"l0", "fvu"} <= figures.keys() for figures in summary["saes"].values())
            there = [(self.path / "saes" / name / "sae.json").is_file() for name in summary["saes"]]
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        return summary if whole and there and all(there) else None

    def stored(self) -> dict[str, Any] | None:
        """Return config.yaml, or None where there is none yet.

        Raises:
            CheckpointError: it is not readable.
        """
        path = self.path / "config.yaml"
        with explained(self.path, what="read"):
            if not path.exists():
                return None
            text = path.read_bytes()
        try:
            values = yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise CheckpointError(f"{path}: not readable as YAML: {error}. Choose another name=.") from error
        parts: list[Any] = [values.get(name) for name in PARTS] if isinstance(values, dict) else []
        if not parts or not all(isinstance(part, dict) for part in parts):
            raise CheckpointError(f"{path}: not a sae-train run's config. Choose another name= or runs=.")
        checked: dict[str, Any] = values
        return checked

    def check_identity(self, config: RunConfig) -> None:
        """Refuse a directory that holds a run of another identity, listing the keys that differ.

        Raises:
            ConfigError: the directory is another run's, or is not a run's and not empty.
        """
        stored = self.stored()
        if stored is None:
            if self._is_anothers():
                raise ConfigError(f"{self.path}: exists and is not a run's directory. Choose another name=.")
            return
        ours, theirs = _flat(_plain(identity(config))), _flat(stored["identity"])
        differ = [
            f"{key} {theirs.get(key)!r} -> {ours.get(key)!r}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]
        if differ:
            raise ConfigError(f"{self.path} holds another run: {', '.join(differ)}. Choose another name=.")

    def check_length(self) -> None:
        """Refuse a directory in which the run could not write its files, because their paths would be too long.

        Raises:
            ConfigError: before anything is written.
        """
        check_length(self.path, below=max(LONGEST_BELOW.values()))

    def is_seen(self, *, within: float = SEEN_WITHIN) -> bool:
        """Return whether this process sees config.yaml, which another one wrote; gives a network time to show it."""
        deadline = time.monotonic() + within
        while True:
            with suppress(OSError):
                if "config.yaml" in os.listdir(self.path):
                    return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.5)

    def _is_anothers(self) -> bool:
        """Return whether something that no run left is there; names with a dot are a killed run's lock and partials."""
        with explained(self.path, what="read"):
            if not self.path.exists():
                return False
            return not self.path.is_dir() or any(not found.name.startswith(".") for found in self.path.iterdir())

    def claim(self, resolved: RunConfig, *, identified_as: RunConfig, record: dict[str, Any]) -> None:
        """Make the directory, take its lock and write config.yaml if it is new.

        Args:
            resolved: what config.yaml holds, every 'auto' decided.
            identified_as: the configuration as composed, whose identity the directory carries.
            record: what else config.yaml holds: the plan's numbers, the source, what was typed, versions.

        Raises:
            CheckpointError: it cannot be written or locked.
            DirectoryInUse: another process is training in it.
        """
        self._lock = self._locked()
        self.check_identity(identified_as)  # another run may have come between the first look and the lock
        if self.stored() is None:
            values = {
                "config": _plain(as_dict(resolved)),
                "identity": _plain(identity(identified_as)),
            }
            self._claimed_now = True
            write_text(self.path / "config.yaml", yaml.safe_dump(values | _plain(record), sort_keys=False))

    def _locked(self) -> IO[str]:
        """Return the lock file, held by this process until it is closed; the kernel closes a dead holder's."""
        patience = REQUEUED_WAITS if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0.0
        deadline = time.monotonic() + patience
        while True:
            with explained(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                lock = os.fdopen(os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(lock):
                    with explained(self.path):
                        _sign(lock)
                    return lock
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise DirectoryInUse(
                        f"{self.path}: another process is training in it{_holder(lock)}. Wait for it, or choose "
                        "another name=."
                    ) from None
                time.sleep(0.5)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise CheckpointError(f"{self.path}: cannot be locked: {error.strerror}.") from error
                raise CheckpointError(
                    f"{self.path}: its file system has no file locks ({error.strerror}), so nothing would keep two "
                    "jobs from writing there at once. Choose another one with runs=DIR, or have it mounted with locks "
                    "(Lustre: -o flock; NFS: with its lock service)."
                ) from error
            lock.close()

    def _is_current(self, lock: IO[str]) -> bool:
        """Return whether `lock` is still the file of that name: who abandons a directory removes it."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(lock.fileno()), (self.path / ".lock").stat())
        return False

    def abandon(self) -> None:
        """Leave nothing behind of a run that was refused before its first step."""
        if self._claimed_now and not any(self.path.glob("checkpoints/step_*")):
            for name in ("config.yaml", "metrics.jsonl", ".lock"):
                (self.path / name).unlink(missing_ok=True)
            with suppress(OSError):  # something else is in there
                self.path.rmdir()

    def release(self) -> None:
        """Let another process have the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def check_length(path: Path, *, below: int) -> None:
    """Refuse `path` if the system takes no paths that are `below` bytes longer, or no names as long as its own.

    Raises:
        ConfigError: saying how long they are and may be.
    """
    with explained(path, what="read"):
        whole = os.fsencode(os.path.abspath(path))
    most = os.pathconf("/", "PC_PATH_MAX") - 1  # the byte that ends it counts
    length = len(whole) + 1 + below
    if length > most:
        raise ConfigError(
            f"{_start(path)}: a path of {len(whole)} bytes. Files in it have up to {below} more, and this system takes "
            f"{most} in all. Choose a shorter directory with runs=DIR."
        )
    longest = max(len(part) for part in whole.split(b"/"))
    if longest > NAME_MAX:
        raise ConfigError(
            f"{_start(path)}: one of its names has {longest} bytes, and file systems take {NAME_MAX}. Choose another "
            "directory with runs=DIR."
        )


def _start(path: Path) -> str:
    """Return a path for a message, cut where nobody would read on."""
    text = str(path)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _sign(lock: IO[str]) -> None:
    """Write who holds a lock into it, for whoever is refused."""
    facts = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    lock.seek(0)
    lock.truncate()
    lock.write(json.dumps(facts) + "\n")
    lock.flush()
    os.fsync(lock.fileno())


def _holder(lock: IO[str]) -> str:
    """Return who holds a lock, as it wrote; nothing where it has not written yet."""
    try:
        facts = json.loads(lock.read())
        job = f", SLURM job {facts['job']}" if facts["job"] else ""
        return f": process {facts['pid']} on {facts['host']}{job}, since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return what JSON would read back: the form in which identities are compared."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
