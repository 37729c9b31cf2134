"""The commit of a dataset on the Hub is recorded with an SAE, and changes nothing else of a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae_train.harvest.corpus import Corpus
from tools.command_line import QUIET, changed
from tools.hub_routes import Repo
from tools.hub_server import Hub
from tools.small_runs import run_config
from tools.tiny_runs import tiny_run

OPEN = """
from dataclasses import replace
from sae_train.harvest.corpus import Corpus
from tools.small_runs import run_config
print(Corpus(replace(run_config().data, id="org/text")).revision)
"""
TESTS = Path(__file__).resolve().parents[1]


def some_text(n: int, *, more: str = "") -> bytes:
    lines = (json.dumps({"text": f"Document {number} has a few words of its own{more}."}) for number in range(n))
    return "\n".join(lines).encode()


def run(hub: Hub, home: Path, *command: str, **variables: str) -> str:
    environment = os.environ | QUIET | hub.environment(home) | {"PYTHONPATH": str(TESTS)} | variables
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_commit_of_a_dataset_on_the_hub_is_known(tmp_path: Path) -> None:
    with Hub().serving() as hub:
        repo = hub.repos["dataset", "org/text"] = Repo(commits=[{"train.jsonl": some_text(50)}])
        assert run(hub, tmp_path, "-c", OPEN) == repo.sha()
    assert Corpus(run_config().data).revision is None  # the bundled text is on no Hub


@pytest.mark.slow
def test_a_run_records_the_commit_and_goes_on_where_it_moves(tmp_path: Path) -> None:
    settings = ["-m", "sae_train", "data=huggingface", "data.id=org/text", "name=run"]
    settings += changed(tiny_run(tmp_path), "tokens=2048", "checkpoint.every_tokens=512")
    with Hub().serving() as hub:
        repo = hub.repos["dataset", "org/text"] = Repo(commits=[{"train.jsonl": some_text(1500)}])
        run(hub, tmp_path, *settings)
        (notes,) = (tmp_path / "runs" / "run" / "saes").glob("*/sae.json")
        source = json.loads(notes.read_text())["source"]
        assert (source["data"], source["data_revision"]) == ("org/text", repo.sha())
        repo.commits.append(repo.files | {"README.md": b"---\nlicense: mit\n---\n"})
        assert "already finished" in run(hub, tmp_path, *settings)
        (tmp_path / "runs" / "run" / "summary.json").unlink()  # as if the run had ended before its last line
        run(hub, tmp_path, *settings)
        assert json.loads(notes.read_text())["source"]["data_revision"] == repo.sha()
    assert run(hub, tmp_path, "-c", OPEN, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1") == repo.sha()
