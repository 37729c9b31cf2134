"""Files made to harm or mislead: repeated keys, numbers and tensors of odd kinds, links, permissions, records."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sae_train
from sae_train.errors import CheckpointError
from sae_train.formats.record import FILE
from sae_train.formats.registry import FORMATS
from tools.exports import write_sae
from tools.foreign_files import (
    PICKLED,
    header_of,
    matrix,
    open_folder,
    put,
    tensors_in,
    without_privileges,
    write,
)
from tools.random_sae import manifest_of, random_sae

pytestmark = pytest.mark.filterwarnings("ignore:.*(k=|its numbers|class|site|same tensors|model|layer)")


def refused(path: Path, message: str) -> str:
    """Open a path, which must be refused with a message that names it; return the message."""
    with pytest.raises(CheckpointError) as caught:
        sae_train.load(path)
    said = str(caught.value)
    assert message in said
    assert said.startswith(str(path if path.is_dir() else path.parent))
    assert len(said) < 1000
    assert all(line.isprintable() for line in said.splitlines())
    return said


@pytest.mark.parametrize("name", FORMATS)
def test_a_key_that_is_given_twice(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    path = header_of(file)
    if path is None:
        path = file.parent / FILE  # a format without a header has a record at most
        path.write_text(json.dumps({"format": name, "sae": manifest_of(sae_train.load(file)).as_json()}))
    sae_train.load(file)
    whole = path.read_text()
    path.write_text(whole.rstrip()[:-1] + ', "k": 4, "k": 4}')
    refused(file, "the key 'k' is given twice")
    path.write_text(whole.rstrip()[:-1] + ', "inner": [{"a": {"b": 1, "b": 2}}]}')
    refused(file, "the key 'b' is given twice")


@pytest.mark.parametrize("name", ["dictionary_learning", "saelens"])
def test_something_else_in_place_of_a_header(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    path = header_of(file)
    assert path is not None
    path.unlink()
    path.mkdir()
    refused(file.parent, str(file.parent))
    path.rmdir()
    path.symlink_to("missing")
    refused(file.parent, str(file.parent))


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_without_permission(name: str) -> None:
    with open_folder() as folder:
        file = write(name, folder / "sae")
        for each in file.parent.iterdir():
            each.chmod(0)
        with without_privileges():
            refused(file, "Permission denied")
        for each in file.parent.iterdir():
            each.chmod(0o644)
        with without_privileges():
            sae_train.load(file)
        file.parent.chmod(0)
        with without_privileges():
            refused(file.parent, "Permission denied")
        file.parent.chmod(0o755)


def test_links_of_directories_in_a_loop(tmp_path: Path) -> None:
    file = write("saelens", tmp_path / "sae")
    (tmp_path / "sae" / "again").symlink_to(".")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "round").symlink_to("round")
    refused(tmp_path / "round", "no such file")
    for each in ("sae", "up"):
        assert sae_train.load(tmp_path / each).n_features == 12
    (tmp_path / "sae" / "outside").symlink_to(tmp_path)
    refused(file.parent, "is a link to")


@pytest.mark.parametrize("name", PICKLED)
def test_a_bare_pickle_is_not_opened(name: str, tmp_path: Path) -> None:
    """torch would take memory for each size that such a file claims before it reads a number."""
    file = write(name, tmp_path / "sae")
    torch.save(tensors_in(file), file, _use_new_zipfile_serialization=False)
    refused(file, "a bare pickle")
    file.write_bytes(pickle.dumps({"a": 1}))
    refused(file, "a bare pickle")
    hidden = io.BytesIO()
    with zipfile.ZipFile(hidden, "w") as archive:
        archive.writestr("data.pkl", b"")
    file.write_bytes(pickle.dumps({"a": 1}) + hidden.getvalue())  # which zipfile takes for an archive
    refused(file, "a bare pickle")


@pytest.mark.parametrize("name", PICKLED)
def test_a_size_that_is_not_in_the_archive(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    with zipfile.ZipFile(file) as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    for member, content in members.items():
        if member.endswith("data.pkl"):
            assert b"K\x54" in content  # 84 numbers
            members[member] = content.replace(b"K\x54", b"J" + struct.pack("<i", 2**30))
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    refused(file, str(file))


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_that_only_float64_holds(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    tensors = tensors_in(file)
    first = matrix(tensors)
    put(file, tensors | {first: tensors[first].double() * 1e200})
    refused(file, f"{file}: ")


THREE = torch.tensor(3.0)
ODD: dict[str, Callable[[], Any]] = {
    "meta": lambda: THREE.to("meta"), "sparse": lambda: THREE[None].to_sparse(), "two": lambda: torch.ones(2),
    "none": lambda: torch.ones(0), "complex": lambda: THREE.to(torch.complex64), "text": lambda: "3",
    "quantised": lambda: torch.quantize_per_tensor(THREE, 1, 0, torch.qint8), "huge": lambda: 10**400,
    "NaN": lambda: float("nan"), "infinite": lambda: torch.tensor(float("inf")), "bool": lambda: True,
    "half": lambda: torch.tensor(2.5), "negative": lambda: -3, "zero": lambda: 0, "nested": lambda: [[[[3]]]],
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # torch's of quantised and jagged tensors
@pytest.mark.parametrize("kind", ODD)
def test_a_k_that_is_no_whole_number(kind: str, tmp_path: Path) -> None:
    file = write("dictionary_learning", tmp_path / "sae")
    tensors = topk_tensors()
    torch.save(tensors, file)
    (file.parent / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK"}}))
    assert sae_train.load(file).k == 3
    torch.save(tensors | {"k": ODD[kind]()}, file)
    refused(file, "k")


def topk_tensors() -> dict[str, Any]:
    sae = random_sae(d_model=7, n_features=12)
    linear: dict[str, Tensor] = {"encoder.weight": sae.W_enc.t(), "encoder.bias": sae.b_enc,
                                 "decoder.weight": sae.W_dec.t(), "b_dec": sae.b_dec}  # fmt: skip
    plain = {name: tensor.detach().contiguous().clone() for name, tensor in linear.items()}
    return plain | {"k": torch.tensor(3, dtype=torch.int32), "threshold": torch.tensor(-1.0)}


def test_a_trained_topk_may_have_a_threshold(tmp_path: Path) -> None:
    """Only config.json tells it from BatchTopKSAE then. Without that file the reader says what it took."""
    file = write("dictionary_learning", tmp_path / "sae")
    torch.save(topk_tensors() | {"threshold": torch.tensor(0.4)}, file)
    header = file.parent / "config.json"
    for name, rule in (("AutoEncoderTopK", "topk"), ("BatchTopKSAE", "threshold")):
        header.write_text(json.dumps({"trainer": {"dict_class": name}}))
        assert sae_train.load(file).inference == rule
    header.unlink()
    assumed = sae_train.load(file).config["assumed"]
    assert any("those of BatchTopKSAE" in each for each in assumed)
    assert any("AutoEncoderTopK has the same tensors" in each for each in assumed)


@pytest.mark.filterwarnings("ignore")  # torch's of such tensors
@pytest.mark.parametrize("name", PICKLED)
def test_jagged_and_quantised_tensors(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    whole = tensors_in(file)
    for key in [each for each, value in whole.items() if isinstance(value, Tensor) and value.ndim]:
        flat = whole[key].flatten()
        for other in (torch.nested.nested_tensor([flat, flat[1:]]), torch.quantize_per_tensor(whole[key], 0.1, 0,
                      torch.qint8), whole[key].to(torch.complex64), whole[key].to(torch.float8_e4m3fn)):  # fmt: skip
            torch.save(whole | {key: other}, file)
            refused(file, key)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("gemma_scope", "gemma_scope_2")])
def test_messages_stay_short_and_printable(name: str, tmp_path: Path) -> None:
    """The reader of gemma_scope_2 ignores further tensors, as its own programs do. An .npz has names of files."""
    file = write(name, tmp_path / "sae")
    whole = tensors_in(file)
    put(file, whole | {f"key{number:04}": torch.ones(1) for number in range(500)})
    refused(file, "key0000, key0001")
    put(file, whole | {"\x1b[31mred\n": torch.ones(1), "x" * 5000: torch.ones(1)})
    refused(file, "x1b[31mred")


def test_a_header_that_is_a_deep_pickle(tmp_path: Path) -> None:
    file = write("openai", tmp_path / "sae")
    whole, deep = tensors_in(file), []
    for _ in range(300):
        deep = [deep]
    for value in (deep, "\x1b" * 5000, torch.ones(3), {"a": 1}):
        torch.save(whole | {"activation": value}, file)
        refused(file, "activation=")


def test_an_array_that_is_there_twice(tmp_path: Path) -> None:
    file = write("gemma_scope", tmp_path / "sae")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("W_enc", archive.read("W_enc.npy"))
    refused(file, "one array twice")


def test_codes_with_a_sign_are_refused(tmp_path: Path) -> None:
    file = write("sparsify", tmp_path / "sae")
    path = file.parent / "cfg.json"
    header = json.loads(path.read_text())
    path.write_text(json.dumps(header | {"signed": False}))
    sae_train.load(file)
    path.write_text(json.dumps(header | {"signed": True}))
    refused(file, "signed=True")


def test_a_directory_with_a_name_of_openai(tmp_path: Path) -> None:
    file = write("openai", tmp_path / "sae")
    (file.parent / "other.pt").mkdir()
    assert sae_train.load(file.parent).config["format"] == "openai"


def test_our_own_files_are_read_as_carefully(tmp_path: Path) -> None:
    write_sae(tmp_path)
    notes, file = tmp_path / "sae.json", tmp_path / "sae.safetensors"
    whole, tensors = notes.read_text(), tensors_in(file)
    for content in ("[1]", "3", "[" * 100_000, '"x"', whole.replace('"d_model": 16', f'"d_model": "{"a" * 3000}"')):
        notes.write_text(content)
        refused(tmp_path, str(tmp_path))
    notes.write_text(whole)
    for dtype in (torch.float64, torch.int32, torch.complex64):
        put(file, tensors | {"W_enc": tensors["W_enc"].to(dtype)})
        refused(tmp_path, "not floating-point numbers of one kind")
    put(file, tensors)
    sae_train.load(tmp_path)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("valid")
    return {name: write(name, folder / name) for name in FORMATS}


def damaged_inside(whole: bytes, draw: st.DataObject) -> bytes:
    """Return a file whose checksums and lengths are right, and whose content is damaged."""
    if whole[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            members = {each.filename: archive.read(each) for each in archive.infolist()}
        chosen = draw.draw(st.sampled_from(sorted(name for name in members if name.endswith((".pkl", ".npy")))))
        end = len(members[chosen]) if chosen.endswith(".pkl") else 128  # an array's header
        members[chosen] = damaged(members[chosen], end, draw)
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return made.getvalue()
    (length,) = struct.unpack("<Q", whole[:8])
    return whole[:8] + damaged(whole[8:], length, draw)


def damaged(content: bytes, end: int, draw: st.DataObject) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.draw(st.integers(1, 4))):
        changed[draw.draw(st.integers(0, end - 1))] = draw.draw(st.integers(0, 255))
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(FORMATS)), draw=st.data())
def test_damage_within_right_checksums(name: str, draw: st.DataObject, valid: dict[str, Path]) -> None:
    file = valid[name]
    whole = file.read_bytes()
    file.write_bytes(damaged_inside(whole, draw))
    try:
        sae_train.load(file)
    except CheckpointError as error:
        assert str(error).startswith(str(file.parent))  # noqa: PT017 (any other error fails, and so does a long message)
        assert len(str(error)) < 1000  # noqa: PT017
    finally:
        file.write_bytes(whole)
        assert os.path.getsize(file) == len(whole)
