"""Bad input at the command line: one clear message, status 2, before heavy work, and nothing half-written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_train.assets import model_directory
from sae_train.cli.train import run_command
from tools.tiny_runs import tiny_run

Rows = dict[str, torch.Tensor]


def rows(n: int = 6000, width: int = 16) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(0))


def spoiled(value: float) -> torch.Tensor:
    bad = rows()
    bad[1234, 5] = value
    return bad


TENSORS: dict[str, tuple[dict[str, Rows], str]] = {
    "no files": ({}, "harvest.path="),
    "not a tensor file": ({"broken.safetensors": {}}, "broken.safetensors"),
    "no activations": ({"a.safetensors": {"x": rows()}}, "activations"),
    "integers": ({"a.safetensors": {"activations": torch.arange(6000 * 16).view(-1, 16)}}, "I64"),
    "three axes": ({"a.safetensors": {"activations": rows().view(-1, 4, 4)}}, "a.safetensors"),
    "two widths": ({"a.safetensors": {"activations": rows()}, "b.safetensors": {"activations": rows(width=8)}}, "8"),
    "no rows": ({"a.safetensors": {"activations": rows(0)}}, "harvest.path="),
    "nan": ({"a.safetensors": {"activations": spoiled(float("nan"))}}, "1234"),
    "infinite": ({"a.safetensors": {"activations": spoiled(float("inf"))}}, "1234"),
}
"""What lies in the directory of activations, and what the message must name."""

SETTINGS: dict[str, tuple[list[str], str]] = {
    "k above the width": (["k=300"], "k=300: larger than n_features=256"),
    "k above the derived width": (["n_features=null", "expansion=1", "k=300"], "k=300"),
    "lanes do not divide the batch": (["batch_tokens=500"], "batch_tokens=500 over harvest.lanes=8: not divisible"),
    "a pool that does not fit": (["harvest.pool_batches=100000000"], "harvest.pool_batches=100000000"),
    "a block the model lacks": (["layer.index=99"], "layer.index=99"),
    "a module the model lacks": (["layer=module", "layer.path=nowhere.1"], "layer.path=nowhere.1"),
    "a model that is not there": (["model=huggingface", "model.id=./no/model"], "model.id=./no/model"),
    "a revision of a directory": (
        ["model=huggingface", f"model.id={model_directory()}", "model.revision=abc"],
        "model.revision=abc: of models on the hub",
    ),
    "text that is not there": (["data=files", "data.id=no/such/text.txt"], "data.id=no/such/text.txt"),
    "an infeasible floor": (["sparsifier=feature_choice", "budget=zipf", "budget.floor=400"], "budget.floor=400"),
    "activations that are not there": (["harvest=tensors", "harvest.path=./no/tensors"], "harvest.path=./no/tensors"),
}
"""What is typed besides a tiny run, and what the message must say."""

Refusal = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Return `refusal(*arguments)`: the message with which they are refused, which is all that is said."""

    def refused(*arguments: str) -> str:
        assert run_command(list(arguments)) == 2
        stdout, stderr = capsys.readouterr()
        assert stdout == ""
        assert "Traceback" not in stderr
        assert stderr.endswith(".\n")
        return stderr

    return refused


def typed(folder: Path, *own: str) -> list[str]:
    """Return a tiny run with some settings of one's own in place of its."""
    keys = {text.partition("=")[0] for text in own}
    live = not any(text == "harvest=tensors" for text in own)
    kept = [t for t in tiny_run(folder) if t.partition("=")[0] not in keys]
    return [t for t in kept if live or not t.startswith("harvest.") or "calibration" in t] + list(own)


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_work(case: str, refusal: Refusal, tmp_path: Path) -> None:
    own, expected = SETTINGS[case]
    assert expected in refusal(*typed(tmp_path, *own))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", TENSORS)
def test_activations_that_cannot_be_used(case: str, refusal: Refusal, tmp_path: Path) -> None:
    files, expected = TENSORS[case]
    folder = tmp_path / "activations"
    folder.mkdir()
    for name, tensors in files.items():
        if tensors:
            save_file(tensors, folder / name)
        else:
            (folder / name).write_bytes(b"not a tensor file")
    assert expected in refusal(*typed(tmp_path, "harvest=tensors", f"harvest.path={folder}"))
    left = [path for path in (tmp_path / "runs").rglob("*") if path.suffix in (".jsonl", ".safetensors")]
    assert left == []


@pytest.mark.parametrize("content", ["", "a few words only\n"])
def test_text_that_is_too_short(content: str, refusal: Refusal, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(content)
    message = refusal(*typed(tmp_path, "data=files", f"data.id={text}"))
    assert ("none to train on" if content else "no text") in message
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_lanes_that_the_ranks_do_not_divide(refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert "harvest.lanes=8" in refusal(*typed(tmp_path))


def test_a_file_where_the_runs_should_go(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    assert str(tmp_path / "taken") in refusal(*typed(tmp_path, f"runs={tmp_path / 'taken'}"))
