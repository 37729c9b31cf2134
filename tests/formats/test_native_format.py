"""Our own files: what is written is what is loaded, and what is not whole is refused with a reason."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_train.errors import CheckpointError
from sae_train.formats import native
from sae_train.ranks.interface import Solo
from sae_train.sae.autoencoder import SparseAutoencoder
from tools.random_sae import random_sae


def save(sae: SparseAutoencoder, directory: Path, **facts: str) -> None:
    native.save(sae, directory, facts=facts, n_features=sae.n_features, ranks=Solo())


def test_round_trip_is_exact(tmp_path: Path) -> None:
    sae = random_sae()
    save(sae, tmp_path / "saes" / "one", site="here")
    for path in (tmp_path, tmp_path / "saes" / "one", str(tmp_path)):
        loaded = native.load(path)
        x = torch.randn(3, 4, 6)
        assert torch.equal(loaded.encode(x), sae.encode(x))
        assert torch.equal(loaded(x), sae(x))
        assert loaded.config["site"] == "here"
        assert (loaded.k, loaded.inference) == (3.0, "threshold")
        assert not loaded.training


def test_file_holds_the_contract(tmp_path: Path) -> None:
    save(random_sae(), tmp_path)
    tensors = load_file(str(tmp_path / "sae.safetensors"))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"W_enc": (6, 10), "b_enc": (10,), "W_dec": (10, 6), "b_dec": (6,), "threshold": (10,)}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_several_saes_ask_for_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(random_sae(), tmp_path / "saes" / name)
    with pytest.raises(CheckpointError, match="holds 2 SAEs"):
        native.load(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "no_threshold", "shape", "rule", "notes", "nothing", "gone"])
def test_what_is_not_whole_is_refused(tmp_path: Path, damage: str) -> None:
    save(random_sae(), tmp_path / "x")
    file, notes = tmp_path / "x" / "sae.safetensors", tmp_path / "x" / "sae.json"
    tensors = load_file(str(file))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "no_threshold":
        save_file({k: v for k, v in tensors.items() if k != "threshold"}, str(file))
    elif damage == "shape":
        save_file(tensors | {"b_enc": torch.zeros(3)}, str(file))
    elif damage == "rule":
        notes.write_text(json.dumps(json.loads(notes.read_text()) | {"inference": "magic"}))
    elif damage == "notes":
        notes.write_text("{")
    elif damage == "nothing":
        notes.unlink()
    path = tmp_path / ("y" if damage == "gone" else "x")
    with pytest.raises(CheckpointError, match=str(path)):
        native.load(path)
