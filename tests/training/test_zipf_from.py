"""`budget.zipf_from=RUN`: what an earlier run found becomes numbers of this one, or the reason why not is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_train.cli.compose import compose_config
from sae_train.config import RunConfig, ZipfBudgetConfig
from sae_train.errors import ConfigError
from sae_train.training.run import name_of
from tools.small_runs import identity_of

CHOSEN = ["sparsifier=feature_choice", "budget=zipf"]
FOUND = {"gini": 0.4, "zipf_exponent": 0.71, "zipf_shift": 12.5, "zipf_r2": 0.99}


def run_that_found(path: Path, *saes: dict[str, Any], is_finished: bool = True) -> Path:
    """Leave what a run leaves whose SAEs have these `density` figures."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump({part: {} for part in ("config", "identity", "plan", "source")}))
    figures = {f"sae{number}": {"l0": 32.0, "fvu": 0.1, "density": density} for number, density in enumerate(saes)}
    for name in figures:
        (path / "saes" / name).mkdir(parents=True)
        (path / "saes" / name / "sae.json").write_text("{}")
    if is_finished:
        (path / "summary.json").write_text(json.dumps({"run": path.name, "saes": figures}))
    return path


def law(config: RunConfig) -> tuple[float | None, float | None]:
    assert isinstance(config.budget, ZipfBudgetConfig)
    return config.budget.exponent, config.budget.shift


def test_the_numbers_are_the_runs_and_where_it_lies_is_no_part_of_the_identity(tmp_path: Path) -> None:
    one, other = (run_that_found(tmp_path / place / "mc", FOUND) for place in ("one", "other"))
    typed = compose_config([*CHOSEN, "budget.exponent=0.71", "budget.shift=12.5"])
    for path in (one, other):
        taken = compose_config([*CHOSEN, f"budget.zipf_from={path}"])
        assert law(taken) == law(typed) == (0.71, 12.5)
        assert identity_of(taken) == identity_of(typed)
        names = [name_of(config, [(config.sae, "here", 2048)], model="m") for config in (taken, typed)]
        assert names[0] == names[1]
    assert identity_of(typed) != identity_of(compose_config(CHOSEN))
    assert law(compose_config(CHOSEN)) == (None, None)


def test_a_path_may_be_put_together_from_other_settings(tmp_path: Path) -> None:
    run_that_found(tmp_path / "mc", FOUND)
    config = compose_config([*CHOSEN, f"runs={tmp_path}", "budget.zipf_from=${runs}/mc"])
    assert law(config) == (0.71, 12.5)


def several(path: Path) -> Path:
    return run_that_found(path, FOUND, FOUND)


def without(*keys: str) -> Callable[[Path], Path]:
    return lambda path: run_that_found(path, {key: value for key, value in FOUND.items() if key not in keys})


def damaged(path: Path) -> Path:
    run_that_found(path, FOUND)
    (path / "summary.json").write_text('{"saes": {"sae0": ')
    return path


def without_sae(path: Path) -> Path:
    run_that_found(path, FOUND)
    (path / "saes/sae0/sae.json").unlink()
    return path


def file(path: Path) -> Path:
    path.write_text("{}")
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def foreign(path: Path) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text("model: gpt2\n")
    return path


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda path: path, "no such directory"),
    "a file": (file, "no such directory"),
    "a folder": (folder, "not the directory of a run: it has no config.yaml"),
    "another program's": (foreign, "not the directory of a run"),
    "unfinished": (lambda path: run_that_found(path, FOUND, is_finished=False), "the run in it is not finished"),
    "damaged summary": (damaged, "the run in it is not finished"),
    "an SAE is gone": (without_sae, "the run in it is not finished"),
    "no SAE": (run_that_found, "the run in it is not finished"),
    "several SAEs": (several, "holds 2 SAEs (sae0, sae1) where one is needed"),
    "no fit": (without("zipf_exponent", "zipf_shift", "zipf_r2"), "has no fit of Zipf's law to the densities of sae0"),
    "a fit of an older version": (without("zipf_shift", "zipf_r2"), "has no fit of Zipf's law"),
    "no densities": (lambda path: run_that_found(path, None), "has no fit of Zipf's law"),
    "not a number": (lambda path: run_that_found(path, FOUND | {"zipf_shift": None}), "has no fit of Zipf's law"),
    "no law": (lambda path: run_that_found(path, FOUND | {"zipf_r2": 0.31}), "R^2 of its fit is 0.31, below 0.5"),
    "a name too long": (lambda path: folder(path) / (300 * "x"), "cannot be read"),
    "nobody's home": (lambda path: Path("~nobody-at-all/mc"), "cannot be read"),
    "too steep": (lambda path: run_that_found(path, FOUND | {"zipf_exponent": 21.5}), "exponent 21.5 and shift 12.5"),
}
"""What lies where the setting points, and what the message says."""


@pytest.mark.parametrize("what", REFUSED)
def test_what_gives_no_law_is_refused_with_the_reason(what: str, tmp_path: Path) -> None:
    leave, reason = REFUSED[what]
    path = leave(tmp_path / "mc")
    with pytest.raises(ConfigError) as caught:
        compose_config([*CHOSEN, f"budget.zipf_from='{path}'"])
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"budget.zipf_from={path}: ")
    assert reason in line
    assert "Give the directory of a finished run" in line or "Choose another" in line


def test_numbers_beside_it_are_refused_and_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    path = run_that_found(tmp_path / "mc", FOUND)
    with pytest.raises(ConfigError) as caught:
        compose_config([*CHOSEN, f"budget.zipf_from={path}", "budget.exponent=1", "k=-1", "kk=3"])
    assert sorted(line.split(":")[0] for line in str(caught.value).splitlines()) == [
        "budget.exponent=1", "k=-1", "kk=3",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"no such directory(.|\n)*k=-1"):
        compose_config([*CHOSEN, "budget.zipf_from=nowhere", "k=-1"])


def test_a_budget_that_no_token_is_left_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sparsifier\.after=1: leaves no tokens to budget=zipf"):
        compose_config([*CHOSEN, "sparsifier.after=1"])


def test_other_budgets_have_no_such_setting(tmp_path: Path) -> None:
    path = run_that_found(tmp_path / "mc", FOUND)
    with pytest.raises(ConfigError, match="budget=uniform has no 'zipf_from'"):
        compose_config(["sparsifier=feature_choice", f"budget.zipf_from={path}"])
    with pytest.raises(ConfigError, match="only feature_choice splits its budget"):
        compose_config(["budget=zipf", f"budget.zipf_from={path}"])
