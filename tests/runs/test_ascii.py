"""Where stdout and stderr have ASCII alone, other characters are escaped, and nothing ends with a traceback."""

from pathlib import Path

import pytest

from tools.command_line import Command, changed
from tools.tiny_runs import rows_run

ASCII = {
    "streams": {"PYTHONIOENCODING": "ascii"},
    "locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
"""How an environment says so."""
SHOWN = {"streams": r"caf\xe9", "locale": r"caf\udcc3\udca9"}
E_ACUTE = "\u00e9"


@pytest.mark.parametrize("case", ["streams", pytest.param("locale", marks=pytest.mark.slow)])
def test_a_plan_names_a_directory_that_cannot_be_shown(command: Command, tmp_path: Path, case: str) -> None:
    typed = changed(rows_run(tmp_path), f"runs='{tmp_path}/caf{E_ACUTE}'")
    outcome = command(*typed, "dry_run=true", **ASCII[case])
    assert (outcome.status, outcome.stderr) == (0, "")
    assert SHOWN[case] in outcome.stdout


@pytest.mark.slow
@pytest.mark.parametrize("case", ASCII)
def test_a_run_in_a_directory_that_cannot_be_shown_finishes(command: Command, tmp_path: Path, case: str) -> None:
    typed = changed(rows_run(tmp_path), f"runs='{tmp_path}/caf{E_ACUTE}'")
    for expected in ("L0 ", "already finished: "):
        outcome = command(*typed, **ASCII[case])
        assert outcome.status == 0, outcome.stderr
        assert "Traceback" not in outcome.stderr
        assert expected in outcome.stdout
        assert SHOWN[case] in outcome.stdout
    assert len(list((tmp_path / f"caf{E_ACUTE}").glob("*/summary.json"))) == 1
    sweep = ["-m", *typed, "hydra/launcher=slurm", "hydra.launcher.submit=false", "seed=1,2"]
    outcome = command(*sweep, **ASCII[case])
    assert outcome.status == 0, outcome.stderr
    assert SHOWN[case] in outcome.stdout
