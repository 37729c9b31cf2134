"""Records beside foreign SAEs that are damaged or made to harm: a message, or an export and a card that can be read."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import sae_train
from sae_train.cli.export import run_command
from sae_train.formats.record import FILE
from tools.exports import write_sae
from tools.foreign_files import write
from tools.random_sae import manifest_of, random_sae

pytestmark = pytest.mark.filterwarnings("ignore:.*(k=|site|model|layer)")

DAMAGED = [{"assumed": 3}, {"assumed": None}, {"assumed": "text"}, {"name": [1]}, {"name": {}}, {"format": [1]},
           {"config": []}, {"config": {}, "plan": 3}, {"config": {}, "plan": None}, {"config": {}, "run": []},
           {"config": {}, "run": 3}, {"config": {}, "run": "text"}, {"name": "\ud800"}, {"assumed": ["\ud800"]},
           {"files": 3}, {"files": None}, {"files": [[1]]}, {"sae": []}, {"site": 10**400}]  # fmt: skip


@pytest.mark.parametrize("change", DAMAGED, ids=str)
def test_a_damaged_record_is_a_message_everywhere(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write("saelens", tmp_path / "sae")
    own = manifest_of(random_sae(d_model=7, n_features=12)).as_json()
    (file.parent / FILE).write_text(json.dumps({"format": "saelens", "name": "one", "sae": own} | change))
    status = run_command([str(file.parent), "--to", "saelens", "--out", str(tmp_path / "out"), "--card"])
    assert status == 0 or (status == 2 and str(file.parent / FILE) in capsys.readouterr().err)
    assert (tmp_path / "out").exists() == (status == 0)
    write_sae(tmp_path / "ours")
    before = {each: each.read_bytes() for each in file.parent.iterdir()}
    assert run_command([str(tmp_path / "ours"), "--to", "saelens", "--out", str(file.parent)]) == 2
    assert {each: each.read_bytes() for each in file.parent.iterdir()} == before


@pytest.mark.parametrize("value", ["text", None, [], {}, math.nan, math.inf, 10**300, True, 0.5], ids=str)
def test_a_card_shows_figures_that_are_numbers(value: Any, tmp_path: Path) -> None:
    for folder in ("in/one", "in/two"):
        file = write("saelens", tmp_path / folder)
        own = manifest_of(sae_train.load(file), figures={"l0": value, "dead_fraction": 0.25}).as_json()
        (file.parent / FILE).write_text(json.dumps({"format": "saelens", "name": folder[3:], "sae": own}))
    for source in ("in", "in/one"):
        out = tmp_path / source.replace("/", "-out-")
        assert run_command([str(tmp_path / source), "--to", "saelens", "--out", f"{out}-x", "--card"]) == 0
        card = Path(f"{out}-x", "README.md").read_text()
        assert "25.00%" in card
        assert ("0.5" in card.partition("## ")[2]) == (value == 0.5)
