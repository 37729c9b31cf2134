"""Exports that fail or are killed: what was there stays, and nothing half-written is taken for whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sae_train
from sae_train.cli.export import run_command
from sae_train.errors import CheckpointError
from sae_train.formats.export import Source, export
from sae_train.formats.foreign import Opened
from sae_train.formats.registry import FORMATS
from sae_train.sae.autoencoder import SparseAutoencoder
from tools.exports import write_sae
from tools.random_sae import manifest_of, random_sae

pytestmark = pytest.mark.filterwarnings("ignore:.*(model|layer|site)")
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
EXPORT = "import sys; from sae_train.cli.export import run_command; sys.exit(run_command(sys.argv[1:]))"
LIMITED = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
          "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); " + EXPORT  # fmt: skip


def sources(*names: str, d_model: int = 6) -> tuple[list[Source], list[SparseAutoencoder]]:
    saes = [random_sae(d_model=d_model, n_features=10, seed=number) for number in range(len(names))]
    made = [
        Source(
            name=name,
            open=lambda sae=sae: Opened(sae=sae, manifest=manifest_of(sae, site="mlp3"), format_name="ours"),  # type: ignore[misc]
            run=None,
        )
        for name, sae in zip(names, saes, strict=True)
    ]
    return made, saes


def are_equal(one: SparseAutoencoder, other: SparseAutoencoder) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)


def test_equal_folders_of_gemma_scope_are_told_apart_by_the_saes_names(tmp_path: Path) -> None:
    made, saes = sources("first", "second", "third")
    written = export(made, FORMATS["gemma_scope"], tmp_path / "out")
    folders = [each.directory.relative_to(tmp_path / "out").as_posix() for each in written]
    place = "mlp/layer_3/width_10/average_l0_3"
    assert folders == [place, f"{place}-second", f"{place}-third"]
    entries = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert [(entry["name"], entry["path"]) for entry in entries] == list(
        zip(("first", "second", "third"), folders, strict=True)
    )
    for name, folder, sae in zip(("first", "second", "third"), folders, saes, strict=True):
        assert are_equal(sae, sae_train.load(tmp_path / "out", name))
        assert are_equal(sae, sae_train.load(tmp_path / "out" / folder))


@pytest.mark.parametrize("name", ["saelens", "dictionary_learning"])
def test_a_full_disk_is_a_message_and_the_earlier_export_stays(name: str, tmp_path: Path) -> None:
    write_sae(tmp_path / "sae")
    arguments = [str(tmp_path / "sae"), "--to", name, "--out", str(tmp_path / "out")]
    assert run_command(arguments) == 0
    before = contents(tmp_path)
    full = subprocess.run([sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert "out: cannot be written: " in full.stderr
    assert "Traceback" not in full.stderr
    assert contents(tmp_path) == before


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    made, _ = sources("one")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot be (written|read): "):
        export(made, FORMATS["saelens"], tmp_path / "file" / "out")
    with pytest.raises(CheckpointError, match=r"cannot be (written|read): "):
        export(made, FORMATS["saelens"], tmp_path / ("x" * 300))
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_failure_among_several_leaves_nothing(tmp_path: Path) -> None:
    made, _ = sources("one", "two", "three")

    def damaged() -> Opened:
        raise CheckpointError("two is damaged")

    made[1] = Source(name="two", open=damaged, run=None)
    with pytest.raises(CheckpointError, match="two is damaged"):
        export(made, FORMATS["saelens"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    for number in range(6):
        write_sae(tmp_path / "run" / "saes" / f"sae{number}", seed=number)
    names = [f"sae{number}" for number in range(6)]
    opened = [
        Source(name=name, open=lambda name=name: of_ours(tmp_path / "run" / "saes" / name), run=None)  # type: ignore[misc]
        for name in names
    ]
    out = tmp_path / "out"
    export(opened, FORMATS["saelens"], out)
    n_complete, delays = 0, (0.1, 0.13, 0.17, 0.22, 0.28, 0.35, 0.43, 0.52)
    for delay in delays:
        child = os.fork()
        if child == 0:  # writes over and over until it is killed
            while True:
                export(opened, FORMATS["saelens"], out)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():  # it is missing for a moment, between two renames
            n_complete += 1
            assert sorted(path.name for path in out.iterdir()) == [*names, "suite.json"]
            for name in names:
                assert are_equal(sae_train.load(tmp_path / "run" / "saes" / name), sae_train.load(out, name))
    assert n_complete >= len(delays) // 2
    export(opened, FORMATS["saelens"], out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def of_ours(directory: Path) -> Opened:
    sae = sae_train.load(directory)
    return Opened(sae=sae, manifest=manifest_of(sae), format_name="ours")


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
