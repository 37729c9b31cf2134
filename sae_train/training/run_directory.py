"""A run's directory: its identity, and whether the run in it is new, unfinished or finished.

A run of the same identity (`config.identity`) finds its directory again. So a resubmitted sweep resumes.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import yaml

from sae_train.config.naming import LONGEST_NAME
from sae_train.errors import CheckpointError, ConfigError
from sae_train.formats.durable import explained, write_text
from sae_train.training.directory_lock import lock
from sae_train.training.path_length import check_length

LONGEST_BELOW = {
    "an exported SAE": len("saes/") + LONGEST_NAME + len("/.sae.safetensors.partial"),
    "a checkpoint": len("checkpoints/tmp-step_/saes//features__.safetensors") + LONGEST_NAME + 3 * 15,
    "wandb's files": 200,
}
"""Bytes of the longest path that a run writes below its directory, with room."""
PARTS = ("config", "identity", "plan", "source")
"""Mappings that every config.yaml holds."""
SEEN_WITHIN = 60.0
"""Seconds after which a network file system shows one machine the files that another wrote."""


class RunDirectory:
    """`runs/<name>/`, held by one run while it trains. `run.run` makes it; its session writes there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self._claimed_now = False

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def suite(self) -> Path:
        return self.path / "suite.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def result(self) -> dict[str, Any] | None:
        """Return summary.json of a finished run. None unless it and every SAE that it names are there and whole.

        An SAE that was stopped has no files, and its entry is {"stopped": reason}.
        """
        with explained(self.path, what="read"):
            if not self.summary.is_file():
                return None
            text = self.summary.read_bytes()
        try:
            summary: dict[str, Any] = json.loads(text)
            saes = summary["saes"]
            there = [
                "stopped" in figures
                or ({"l0", "fvu"} <= figures.keys() and (self.path / "saes" / name / "sae.json").is_file())
                for name, figures in saes.items()
            ]
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        return summary if there and all(there) else None

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

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Refuse a directory that holds a run of another identity, listing the keys that differ.

        Args:
            identity: `config.identity` of the settings as composed.

        Raises:
            ConfigError: the directory is another run's, or is not a run's and not empty.
        """
        stored = self.stored()
        if stored is None:
            if self._is_anothers():
                raise ConfigError(f"{self.path}: exists and is not a run's directory. Choose another name=.")
            return
        differ = differences(_plain(identity), stored["identity"])
        if differ:
            raise ConfigError(f"{self.path} holds another run: {', '.join(differ)}. Choose another name=.")

    def check_length(self) -> None:
        """Refuse a directory in which the run could not write its files, because their paths would be too long.

        Raises:
            ConfigError: before anything is written.
        """
        check_length(self.path, below=max(LONGEST_BELOW.values()))

    def is_seen(self, *, within: float = SEEN_WITHIN) -> bool:
        """Return whether this process sees config.yaml, waiting for a network file system to show it."""
        deadline = time.monotonic() + within
        while True:
            with suppress(OSError):
                if "config.yaml" in os.listdir(self.path):
                    return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.5)

    def _is_anothers(self) -> bool:
        """Return whether the path holds foreign files. Names with a dot are a killed run's lock and partial files."""
        with explained(self.path, what="read"):
            if not self.path.exists():
                return False
            return not self.path.is_dir() or any(not found.name.startswith(".") for found in self.path.iterdir())

    def claim(self, config: dict[str, Any], *, identity: dict[str, Any], record: dict[str, Any]) -> None:
        """Make the directory, take its lock and write config.yaml if it is new.

        Args:
            config: the run's settings, with every 'auto' decided.
            identity: see `check_identity`.
            record: the other entries of config.yaml: the plan's numbers, the source, what was typed, versions.

        Raises:
            CheckpointError: it cannot be written or locked.
            DirectoryInUse: another process is training in it.
        """
        self._lock = lock(self.path)
        self.check_identity(identity)  # another run may have come between the first look and the lock
        if self.stored() is None:
            values = {"config": _plain(config), "identity": _plain(identity)} | _plain(record)
            self._claimed_now = True
            write_text(self.path / "config.yaml", yaml.safe_dump(values, sort_keys=False))

    def abandon(self) -> None:
        """Remove the files of a run that was refused before its first step, if this process made them."""
        if self._claimed_now and not any(self.path.glob("checkpoints/step_*")):
            for name in ("config.yaml", "metrics.jsonl", ".lock"):
                (self.path / name).unlink(missing_ok=True)
            with suppress(OSError):  # something else is in there
                self.path.rmdir()

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as JSON reads them back. Identities are compared in this form."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return a phrase for each difference of two identities: 'key old -> new', or the name of an SAE of only one."""
    own, other = (values.get("saes", {}) for values in (ours, theirs))
    if bool(own) != bool(other):
        return [f"it has {len(other) or 1} SAE{'s' if other else ''}, and this one {len(own) or 1}"]
    gone, new = [name for name in other if name not in own], [name for name in own if name not in other]
    flat, before = (_flat(_without(values, {*gone, *new})) for values in (ours, theirs))
    return [
        *(f"its SAE {name} is not asked for" for name in gone),
        *(f"{name} is none of its SAEs" for name in new),
        *(
            f"{key} {before.get(key)!r} -> {flat.get(key)!r}"
            for key in sorted(flat.keys() | before.keys())
            if flat.get(key) != before.get(key)
        ),
    ]


def _without(identity: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return an identity without some of its SAEs."""
    if "saes" not in identity:
        return identity
    return identity | {"saes": {name: own for name, own in identity["saes"].items() if name not in names}}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
