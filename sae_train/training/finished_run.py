"""A finished run as Python code sees it: its SAEs, its summary and its metrics."""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.errors import CheckpointError, StoppedByNumbers, suggest
from sae_train.formats import native
from sae_train.formats.durable import explained
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.training.results import verdict
from sae_train.training.run_directory import RunDirectory

if TYPE_CHECKING:
    import pandas

MOST_LINES = 24
"""SAEs that the text of a run shows."""


class Run:
    """A finished run. `sae_train.train` returns one, and `sae_train.Run("runs/NAME")` opens one.

    Attributes:
        path: the run's directory, absolute.
        summary: the content of summary.json.
        saes: the exported SAEs by name. Each is loaded when it is first read.

    Raises:
        CheckpointError: the directory holds no finished run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        directory = RunDirectory(self.path)
        found = directory.result()
        stored = None if found is None else directory.stored()
        if found is None or stored is None:
            raise CheckpointError(
                f"{path}: holds no finished run (config.yaml, summary.json and saes/). A run writes them at its end; "
                "the call or command that began it goes on."
            )
        self.summary: dict[str, Any] = found
        self._identity: dict[str, Any] = stored["identity"]
        self.saes: Mapping[str, SparseAutoencoder] = ExportedSaes(self.path, found["saes"])

    @property
    def sae(self) -> SparseAutoencoder:
        """The SAE of a run with one.

        Raises:
            CheckpointError: the run has several. The message lists their names.
            StoppedByNumbers: the SAE was stopped.
        """
        self.check_usable()
        if len(self.summary["saes"]) > 1:
            names = "".join(f"\n  {name}" for name in self.saes)
            raise CheckpointError(f"{self.path}: has {len(self.saes)} SAEs. Choose one with run.saes[NAME].{names}")
        return next(iter(self.saes.values()))

    @cached_property
    def metrics(self) -> "pandas.DataFrame":
        """The rows of metrics.jsonl, in their order. Columns are named as in docs/metrics.md, with `sae` first.

        A figure that a row does not have is missing (NaN).
        """
        import pandas

        with explained(self.path, what="read"):
            lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return pandas.DataFrame([json.loads(line) for line in lines])

    def check_usable(self) -> None:
        """Refuse a run that exported no SAE.

        Raises:
            StoppedByNumbers: with the reason of each SAE.
        """
        if not self.saes:
            reasons = [f"{name} was stopped: {own['stopped']}" for name, own in self.summary["saes"].items()]
            raise StoppedByNumbers("\n".join([*reasons, f"{self.path}: no SAE is left."]))

    def __repr__(self) -> str:
        """Return a line on the run, and one on the quality of each SAE."""
        saes, speed = self.summary["saes"], self.summary["tokens_per_second"]
        lines = [f"{self.path}: {self.summary['tokens']:,} tokens at {speed:,.0f} tokens/s"]
        for name, figures in list(saes.items())[:MOST_LINES]:
            lines.append(f"  {name}: {verdict(figures, sparsity=self._sparsity(name))}")
        more = len(saes) - MOST_LINES
        return "\n".join(lines + ([f"  and {more} more SAEs: see run.summary"] if more > 0 else []))

    def _sparsity(self, name: str) -> str:
        """Return the target of sparsity of an SAE in words, as `SaeConfig.sparsity`."""
        own = self._identity.get("saes", {}).get(name, self._identity)
        return f"k {own['k']:g}" if own["k"] is not None else f"coefficient {own['sparsifier']['coefficient']:g}"


class ExportedSaes(Mapping[str, SparseAutoencoder]):
    """The SAEs of a run by name, without those that were stopped. `Run` creates it, and loads each SAE once."""

    def __init__(self, path: Path, figures: dict[str, Any]) -> None:
        self._path, self._figures = path, figures
        self._loaded: dict[str, SparseAutoencoder] = {}

    def __getitem__(self, name: str) -> SparseAutoencoder:
        if name not in self._figures:
            raise KeyError(f"{self._path}: holds no SAE {name!r}.{suggest(str(name), self._figures)}")
        if "stopped" in self._figures[name]:
            raise KeyError(f"{name} was stopped: {self._figures[name]['stopped']}")
        if name not in self._loaded:
            self._loaded[name] = native.load(self._path, name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, figures in self._figures.items() if "stopped" not in figures)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"ExportedSaes({', '.join(self)})"
