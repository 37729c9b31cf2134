"""Whose directory it is: names, identities, what a killed run leaves, and what no run may take."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sae_train.config import RunConfig, as_dict
from sae_train.errors import CheckpointError, ConfigError
from sae_train.training.directory import RunDirectory, run_name

Compose = Callable[..., RunConfig]


def claim(directory: RunDirectory, config: RunConfig) -> None:
    directory.claim(config, identified_as=config, record={"plan": {}, "source": {}})


def test_a_name_changes_with_what_can_change_the_sae_and_with_nothing_else(compose: Compose) -> None:
    def name(*overrides: str) -> str:
        return run_name(compose(*overrides), label="bundled.residual2", n_features=2048)

    assert name().startswith("bundled.residual2.mutual_choice.k32.f2048.s0-")
    free = ("tracking=none", "log_every=7", "evaluate_every=9", "checkpoint.keep=5", "runs=elsewhere", "dry_run=true")
    assert {name(override) for override in free} == {name()}
    assert name("sparsifier=batch_topk") == name()
    bound = (
        "seed=1",
        "tokens=2_000_000",
        "optimizer.lr=1e-3",
        "data.seed=3",
        "aux_loss=none",
        "evaluation_tokens=9000",
    )
    assert len({name(override) for override in bound} | {name()}) == len(bound) + 1
    assert name("name=mine") == "mine"


def test_a_killed_claim_is_taken_up_again(tmp_path: Path, compose: Compose) -> None:
    (tmp_path / "run").mkdir()
    for left in (".lock", ".config.yaml.partial"):
        (tmp_path / "run" / left).write_text("half")
    directory = RunDirectory(tmp_path / "run")
    directory.check_identity(compose())
    claim(directory, compose())
    stored = directory.stored()
    assert stored is not None
    assert stored["config"] == as_dict(compose())


def test_another_identity_is_refused_and_its_keys_are_named(tmp_path: Path, compose: Compose) -> None:
    claim(RunDirectory(tmp_path / "run"), compose())
    RunDirectory(tmp_path / "run").check_identity(compose("tracking=none"))
    with pytest.raises(ConfigError, match=r"holds another run: k 32.0 -> 16.0, layer.index 'middle' -> 1\."):
        RunDirectory(tmp_path / "run").check_identity(compose("k=16", "layer.index=1"))


def test_two_processes_do_not_share_a_directory(tmp_path: Path, compose: Compose) -> None:
    first = RunDirectory(tmp_path / "run")
    claim(first, compose())
    with pytest.raises(CheckpointError, match="another process is training in it"):
        claim(RunDirectory(tmp_path / "run"), compose())
    first.release()
    claim(RunDirectory(tmp_path / "run"), compose())


@pytest.mark.parametrize("content", ["", "just text", "a: [", "config: {}", "\xff"])
def test_a_config_file_that_is_not_ours_is_refused(tmp_path: Path, compose: Compose, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        RunDirectory(tmp_path / "run").check_identity(compose())


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, compose: Compose) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("dear to someone")
    with pytest.raises(ConfigError, match="not a run's directory"):
        RunDirectory(tmp_path / "run").check_identity(compose())
    (tmp_path / "file").write_text("")
    with pytest.raises((ConfigError, CheckpointError)):
        RunDirectory(tmp_path / "file").check_identity(compose())


def test_config_yaml_is_plain_yaml(tmp_path: Path, compose: Compose) -> None:
    claim(RunDirectory(tmp_path / "run"), compose("k=7"))
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert values["config"]["k"] == 7
    assert values["identity"]["k"] == 7
