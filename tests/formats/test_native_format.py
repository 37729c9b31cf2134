"""Our own files: what is written is what is loaded, and what is not whole is refused with a reason."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_train.errors import CheckpointError
from sae_train.formats import native
from sae_train.formats.manifest import ActivationSource, Normalisation, SaeManifest
from sae_train.ranks.interface import Solo
from sae_train.sae.autoencoder import SparseAutoencoder
from tools.random_sae import manifest_of, random_sae


def save(sae: SparseAutoencoder, directory: Path, **facts: Any) -> SaeManifest:
    """Write an SAE; return its manifest."""
    manifest = manifest_of(sae, **facts)
    native.save(sae, directory, manifest=manifest, ranks=Solo())
    return manifest


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


def test_one_of_several_saes_is_loaded_by_its_name(tmp_path: Path) -> None:
    names = [f"residual{block}.topk.k4.f10.s0" for block in (1, 2)]
    for seed, name in enumerate(names):
        save(random_sae(seed=seed), tmp_path / "saes" / name)
    for seed, name in enumerate(names):
        assert torch.equal(native.load(tmp_path, name).b_dec, random_sae(seed=seed).b_dec)
        assert torch.equal(native.load(tmp_path / "saes" / name, name).b_dec, random_sae(seed=seed).b_dec)
        assert native.read_manifest(tmp_path, name).n_features == 10


def test_a_message_lists_the_names_of_several_saes(tmp_path: Path) -> None:
    names = [f"residual{block}.topk.k4.f10.s0" for block in (1, 2)]
    for name in names:
        save(random_sae(), tmp_path / "saes" / name)
    with pytest.raises(CheckpointError, match=r"holds 2 SAEs\. Give the name of one") as told:
        native.load(tmp_path)
    assert all(name in str(told.value) for name in names)
    with pytest.raises(CheckpointError, match=r"holds no SAE 'residual1.topk.k4.s0'\. Did you mean 'residual1"):
        native.load(tmp_path, "residual1.topk.k4.s0")
    with pytest.raises(CheckpointError, match=r"holds no SAE 'x'\. Known: ") as told:
        native.load(tmp_path, "x")
    assert all(name in str(told.value) for name in names)
    with pytest.raises(CheckpointError, match=f"is the SAE {names[0]} itself, not 'x'"):
        native.load(tmp_path / "saes" / names[0], "x")


def test_the_names_of_many_saes_are_listed_one_a_line(tmp_path: Path) -> None:
    for number in range(30):
        save(random_sae(), tmp_path / "saes" / f"{number:02}")
    with pytest.raises(CheckpointError) as told:
        native.load(tmp_path, "none of them")
    assert str(told.value).splitlines()[1:] == [f"  {number:02}" for number in range(30)]


FULL = {
    "site": "residual2",
    "source": ActivationSource(
        model="org/model", revision="abc", site="residual2", module="model.layers.2", side="output", dtype="bfloat16",
        context_length=128, prepends_bos=True, data="org/text", split="train", text_column="text",
    ),
    "tokens": 800_000,
    "sparsifier": "mutual_choice",
    "prefixes": [2, 10],
    "seed": 3,
    "normalisation": Normalisation(scale=2.5, centre_norm=1.0, gamma=1.0, outlier_limit=30.0, folded=True),
    "figures": {"l0": 31.9, "density": {"gini": 0.4}},
    "sae_train_version": "1",
}  # fmt: skip


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = save(random_sae(), tmp_path, **FULL)
    assert native.read_manifest(tmp_path) == written
    assert all(getattr(written, field.name) is not None for field in dataclasses.fields(written))
    config = native.load(tmp_path).config
    assert config["source"]["context_length"] == 128
    assert config["figures"]["density"] == {"gini": 0.4}
    assert {"format_version", "inference", "k", "d_model", "n_features", *FULL} == config.keys()


def test_an_older_manifest_has_fewer_keys_and_a_newer_one_has_more(tmp_path: Path) -> None:
    save(random_sae(), tmp_path)
    notes = tmp_path / "sae.json"
    older = {"inference": "threshold", "k": 3, "d_model": 6, "n_features": 10, "source": {"data": "x"}}
    notes.write_text(json.dumps(older | {"added_later": [1], "source": {"data": "x", "added_later": 1}}))
    manifest = native.read_manifest(tmp_path)
    assert (manifest.k, manifest.source.data, manifest.normalisation) == (3.0, "x", None)
    assert native.load(tmp_path).config["added_later"] == [1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": None}, "k=None: not float"),
        ({"k": float("nan")}, "k=nan: must be a finite number"),
        ({"k": True}, "k=True: not float"),
        ({"tokens": "many"}, "tokens='many': not int or NoneType"),
        ({"source": {"context_length": 1.5}}, "source.context_length=1.5: not int or NoneType"),
        ({"normalisation": {"scale": 1.0}}, "normalisation: .*missing"),
        ({"format_version": 2}, "format_version=2: a newer sae-train wrote it"),
        ({"n_features": 11}, "shapes do not fit d_model=6 and n_features=11 of sae.json: W_enc"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    save(random_sae(), tmp_path)
    notes = tmp_path / "sae.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | change))
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: {said}"):
        native.load(tmp_path)


@pytest.mark.parametrize("key", ["inference", "k", "d_model", "n_features"])
def test_a_manifest_without_a_required_key_is_refused(tmp_path: Path, key: str) -> None:
    save(random_sae(), tmp_path)
    notes = tmp_path / "sae.json"
    notes.write_text(json.dumps({name: v for name, v in json.loads(notes.read_text()).items() if name != key}))
    with pytest.raises(CheckpointError, match=f"lacks {key}; this is not a sae-train export"):
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
