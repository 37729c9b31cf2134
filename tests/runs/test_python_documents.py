"""The examples of docs/python.md and the cells of docs/notebook.ipynb run, and print what is written there."""

import ast
import doctest
import json
import re
from pathlib import Path
from typing import Any

import pytest

import sae_train

DOCS = Path(__file__).resolve().parents[2] / "docs"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the examples write to runs/


def test_the_examples_of_the_page_hold() -> None:
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    session = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "python.md", None, 0)
    assert len(session.examples) > 20
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(session, out=said.append)
    assert result.failed == 0, "".join(said)
    assert result.attempted == len(session.examples)


def test_the_page_shows_every_form_of_an_example() -> None:
    """A block that is not written as a session would not be run."""
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    assert [block for block in re.findall(r"^```(.*)\n(?!>>>)(?=\S)", text, flags=re.MULTILINE) if block] == []


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    return found


def shown(cell: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does; return the value of its last expression, None where it ends otherwise."""
    tree = ast.parse(cell)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    values = [shown("".join(cell["source"]), names) for cell in cells() if cell["cell_type"] == "code"]
    assert isinstance(values[0], sae_train.Run)
    assert len(values[1]) == 8
    assert values[1]["train/fvu"].iloc[-1] < values[1]["train/fvu"].iloc[0] < 1.5
    assert values[3] is values[0].sae
    assert all(value > 0 for _, value in values[5])
    assert names["spliced"] > names["clean"]
    assert names["plain"] != names["steered"]
    said = capsys.readouterr().out
    assert f"loss {names['clean']:.2f}, with reconstructions {names['spliced']:.2f}" in said
    assert "steered: " in said


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
