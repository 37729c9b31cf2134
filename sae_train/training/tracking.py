"""Where rows go: `metrics.jsonl` always, Weights & Biases when asked; the only importer of wandb."""

import inspect
import json
import math
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from sae_train.config import RunConfig, TrackingConfig, WandbConfig, as_dict
from sae_train.evaluation.density import HISTOGRAM_EDGES
from sae_train.formats.durable import explained, write_text

ANSWER_SECONDS = 20
"""How long wandb's server may take to answer at the start and at the end."""


class MetricsFile:
    """`metrics.jsonl`: one JSON object a row, appended and flushed whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_rows = 0

    def keep_first(self, n_rows: int) -> None:
        """Drop what a killed run wrote after its last checkpoint, so that no row stands twice or in half."""
        with explained(self.path, what="read"):
            text = self.path.read_bytes().decode(errors="replace") if self.path.exists() else ""
        whole = [line for line in text.splitlines(keepends=True)[:n_rows] if line.endswith("\n")]
        write_text(self.path, "".join(whole))
        self.n_rows = len(whole)

    def append(self, row: dict[str, Any]) -> None:
        """Append one row; a number that JSON cannot hold becomes null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        with explained(self.path.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        self.n_rows += 1


class Dashboard:
    """No dashboard; the twin of `Wandb` for tracking=none and for ranks after the first."""

    notice = ""

    def log(self, row: dict[str, Any]) -> None:
        """Send a row."""

    def summarise(self, figures: dict[str, Any]) -> None:
        """Send the final figures."""

    def close(self) -> None:
        """Finish."""


class Wandb(Dashboard):
    """Weights & Biases: online where credentials exist, else offline. Never asks; gives up rather than block the run.

    What cannot be sent stays in the run's directory, for `wandb sync`.
    """

    def __init__(self, tracking: WandbConfig, config: RunConfig, directory: Path) -> None:
        import wandb

        options: dict[str, Any] = {
            "project": tracking.project,
            "entity": tracking.entity,
            "name": directory.name,
            "id": self._identifier(directory),
            "resume": "allow",
            "dir": str(directory),
            "config": as_dict(config),
            "settings": wandb.Settings(
                silent=True, console="off", init_timeout=ANSWER_SECONDS, finish_timeout=ANSWER_SECONDS
            ),
        }
        self._error, self._histogram = wandb.errors.Error, wandb.Histogram
        asked = os.environ.get("WANDB_MODE", "")
        mode: Any = asked if asked in ("offline", "disabled") or has_credentials() else "offline"
        try:
            self._run = wandb.init(mode=mode or "online", **options)
        except wandb.errors.Error:  # no answer, or a refusal: the run matters more
            mode = "offline"
            self._run = wandb.init(mode=mode, **options)
        self._run.define_metric("tokens")
        for group in ("train", "perf", "density", "tokens_l0", "eval"):
            self._run.define_metric(f"{group}/*", step_metric="tokens")
        if mode == "offline":
            self.notice = f"wandb is offline; sync with: wandb sync {self._run.settings.sync_dir}"

    def log(self, row: dict[str, Any]) -> None:
        sent = {key: value for key, value in row.items() if key not in ("sae", "step")}
        if "density/histogram" in sent:
            counts = np.asarray(sent["density/histogram"])
            sent["density/histogram"] = self._histogram(np_histogram=(counts, HISTOGRAM_EDGES.numpy()))
        with suppress(self._error):
            self._run.log(sent)

    def summarise(self, figures: dict[str, Any]) -> None:
        with suppress(self._error):
            self._run.summary.update(figures)

    def close(self) -> None:
        with suppress(self._error):
            self._run.finish()

    @staticmethod
    def _identifier(directory: Path) -> str:
        """Return the run's wandb id: kept beside it, so that a resumed run continues the same curves."""
        path = directory / "wandb_id"
        if not path.exists():
            write_text(path, secrets.token_hex(4))
        return path.read_text(encoding="utf-8").strip()


def has_credentials() -> bool:
    """Return whether wandb can speak to its server without asking the user anything."""
    import wandb

    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)  # before 0.31


def build_dashboard(config: RunConfig, directory: Path) -> Dashboard:
    """Return the dashboard that `tracking` names; for the first rank, which alone speaks to one."""
    tracking: TrackingConfig = config.tracking
    if isinstance(tracking, WandbConfig):
        return Wandb(tracking, config, directory)
    return Dashboard()
