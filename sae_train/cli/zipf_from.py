"""Zipf's law of a finished run, for `budget.zipf_from`. No import of this module leads to torch."""

import math
from pathlib import Path
from typing import Any

from sae_train.config.budget import LARGEST_EXPONENT, LEAST_R2
from sae_train.errors import CheckpointError, ConfigError
from sae_train.training.run_directory import RunDirectory

BY_HAND = "Choose another run, or give budget.exponent and budget.shift."


def zipf_law(run: str) -> tuple[float, float]:
    """Return exponent and shift of the fit to the feature densities of the one SAE in a finished run's directory.

    Raises:
        ConfigError: there is no such run, it is not finished, or its densities do not follow the law.
    """
    given = f"budget.zipf_from={run}"
    try:
        name, figures = _one_sae(given, Path(run).expanduser())
    except (OSError, RuntimeError) as error:  # no such user, no permission, a name that is too long
        raise ConfigError(f"{given}: cannot be read ({error}). {BY_HAND}") from error
    density = figures.get("density")
    found = [density.get(f"zipf_{key}") for key in ("exponent", "shift", "r2")] if isinstance(density, dict) else []
    law = [float(value) for value in found if isinstance(value, int | float) and math.isfinite(value)]
    if len(law) < 3:
        raise ConfigError(
            f"{given}: its summary.json has no fit of Zipf's law to the densities of {name}: too few features fired, "
            f"or another version wrote it. {BY_HAND}"
        )
    exponent, shift, r2 = law
    if r2 < LEAST_R2:
        raise ConfigError(
            f"{given}: the densities of {name} do not follow Zipf's law: R^2 of its fit is {r2:.2g}, below "
            f"{LEAST_R2:g}. {BY_HAND}"
        )
    if not 0 <= exponent <= LARGEST_EXPONENT or shift < 0:
        raise ConfigError(
            f"{given}: its fit has exponent {exponent:g} and shift {shift:g}, and what is allowed is 0 to "
            f"{LARGEST_EXPONENT:g} and no negative shift. {BY_HAND}"
        )
    return exponent, shift


def _one_sae(given: str, path: Path) -> tuple[str, dict[str, Any]]:
    """Return name and figures of the SAE in a finished run."""
    if not path.is_dir():
        raise ConfigError(f"{given}: no such directory. Give the directory of a finished run, such as runs/NAME.")
    directory = RunDirectory(path)
    try:
        summary = directory.result() if directory.stored() else None
    except CheckpointError as error:
        raise ConfigError(f"{given}: not the directory of a run: {error}") from error
    if summary is None:
        begun = (path / "config.yaml").exists()
        state = "the run in it is not finished: summary.json and the SAE it names are not both there" if begun else ""
        raise ConfigError(f"{given}: {state or 'not the directory of a run: it has no config.yaml'}. {BY_HAND}")
    saes: dict[str, dict[str, Any]] = summary["saes"]
    if len(saes) > 1:
        raise ConfigError(f"{given}: holds {len(saes)} SAEs ({', '.join(saes)}) where one is needed. {BY_HAND}")
    return next(iter(saes.items()))
