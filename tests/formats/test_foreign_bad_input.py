"""Foreign files that are damaged, hostile or of another kind: a message, nothing executed, nothing large made."""

import io
import json
import math
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sae_train
from sae_train.errors import CheckpointError
from sae_train.formats.record import FILE
from sae_train.formats.registry import FORMATS
from sae_train.sae.autoencoder import SparseAutoencoder
from tools.foreign_files import PICKLED, header_of, matrix, put, tensors_in, write
from tools.random_sae import manifest_of, random_sae

MOST_BYTES = 256 * 2**20
"""What opening a small file may take of memory."""
pytestmark = [pytest.mark.filterwarnings("ignore:.*(k=|its numbers|class|site|apply_b_dec|pickle protocol)")]


def refused(file: Path, message: str = "") -> str:
    """Open a file, which must be refused; return the message."""
    with pytest.raises(CheckpointError) as caught:
        sae_train.load(file)
    said = str(caught.value)
    assert message in said
    assert len(said) < 2000
    return said


def opened_or_refused(file: Path) -> SparseAutoencoder | None:
    """Open a file; return None where a message of readable length refuses it. Any other error fails the test."""
    said = ""
    try:
        return sae_train.load(file)
    except CheckpointError as error:
        said = str(error)
    assert said.startswith(str(file.parent))
    assert len(said) < 2000
    return None


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_that_are_missing_unknown_or_of_another_form(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    sae_train.load(file)
    whole = tensors_in(file)
    first = matrix(whole)
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "missing": ({key: each for key, each in whole.items() if key != first}, first),
        "transposed": (whole | {first: whole[first].t().contiguous()}, "shape"),
        "a vector": (whole | {first: whole[first].flatten()}, first),
        "no rows": (whole | {first: whole[first][:0]}, first),
        "of integers": (whole | {first: whole[first].long()}, "int64"),
        "NaN": (whole | {first: torch.full_like(whole[first], math.nan)}, "not finite"),
        "infinite": (whole | {first: whole[first] / 0}, "not finite"),
    }
    if name != "gemma_scope_2":  # its own loader ignores further tensors
        changes["unknown"] = (whole | {"extra_tensor": whole[first]}, "extra_tensor")
    for change, (tensors, message) in changes.items():
        put(file, tensors)
        assert message in refused(file), change


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast_and_noted(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    if file.suffix == ".npz" and dtype == torch.bfloat16:
        return  # numpy has no bfloat16
    whole = tensors_in(file)
    put(file, {key: each.to(dtype) if isinstance(each, Tensor) and each.ndim else each for key, each in whole.items()})
    sae = sae_train.load(file)
    assert all(tensor.dtype == torch.float32 for tensor in sae.state_dict().values())
    assert any(str(dtype).removeprefix("torch.") in each for each in sae.config["assumed"])


@pytest.mark.parametrize("name", FORMATS)
def test_files_that_are_cut_empty_or_no_files(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    content = file.read_bytes()
    for length in (0, 1, 7, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        refused(file, str(file))
    file.unlink()
    file.mkdir()
    refused(file.parent)
    file.rmdir()
    file.symlink_to(file.name)  # a loop
    refused(file.parent)
    file.unlink()
    file.write_bytes(content)
    sae_train.load(file)


@pytest.mark.parametrize("name", FORMATS)
def test_links_out_of_the_directory_are_refused(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert "is a link to" in refused(file.parent)
    inside = file.parent / "real"
    file.unlink()
    elsewhere.rename(inside)
    file.symlink_to(inside)
    sae_train.load(file.parent)


HEADERS: dict[str, Any] = {
    "not JSON": "{", "empty": "", "a list": "[1]", "a number": "3", "not text": b"\xff\xfe\x00",
    "deep": "[" * 100_000, "a deep object": '{"a":' * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("name", ["saelens", "sparsify", "dictionary_learning", "gemma_scope_2", "llamascopium"])
def test_headers_that_are_no_objects(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    header = header_of(file)
    assert header is not None
    for content in HEADERS.values():
        header.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert str(header) in refused(file)


VALUES: list[Any] = [None, True, -1, 0, 1.5, 10**400, math.nan, math.inf, "x" * 5000, "", [], [1], {}, {"a": {"b": 1}}]


@pytest.mark.parametrize("name", ["saelens", "sparsify", "dictionary_learning", "gemma_scope_2", "llamascopium"])
def test_a_header_with_any_value_is_opened_or_refused(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    path = header_of(file)
    assert path is not None
    whole = json.loads(path.read_text())
    before = sae_train.load(file)
    for changed in variants(whole):
        path.write_text(json.dumps(changed))
        after = opened_or_refused(file)
        assert after is None or after.d_model == before.d_model


def variants(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a header with each key left out, and with each key's value replaced, also in the objects inside it."""
    for key, value in values.items():
        yield {other: each for other, each in values.items() if other != key}
        for new in VALUES:
            yield values | {key: new}
        if isinstance(value, dict):
            for inner in variants(value):
                yield values | {key: inner}


class Payload:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("name", PICKLED)
@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_wants_to_run_code_runs_nothing(name: str, how: str, tmp_path: Path) -> None:
    file, proof = write(name, tmp_path / "sae"), tmp_path / "ran"
    content = tensors_in(file) | {"extra": Payload(proof)}
    if how == "plain pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    said = refused(file)
    assert not proof.exists()
    assert "could run code" in said or how == "plain pickle"
    with open(file, "rb") as opened:  # the payload does work where it is let
        if how == "plain pickle":
            pickle.load(opened)
            assert proof.exists()


def test_objects_in_an_array_are_refused(tmp_path: Path) -> None:
    file, proof = write("gemma_scope", tmp_path / "sae"), tmp_path / "ran"
    arrays = {name: each.numpy() for name, each in tensors_in(file).items()}
    np.savez(file, **arrays | {"threshold": np.array([Payload(proof)] * 12, dtype=object)})
    assert "object" in refused(file)
    assert not proof.exists()


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let this process take no more than `MOST_BYTES` besides what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", ["gemma_scope", "dictionary_learning", "qwen_scope"])
def test_archives_that_unpack_to_gigabytes_are_refused(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    with zipfile.ZipFile(file) as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    largest = max(members, key=lambda each: len(members[each]))
    with zipfile.ZipFile(file, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            with archive.open(member, "w", force_zip64=True) as opened:
                opened.write(content)
                if member == largest:
                    for _ in range(6):
                        opened.write(bytes(2**28 // 6))
    assert "unpack to" in refused(file)


@pytest.mark.usefixtures("little_memory")
def test_an_array_that_claims_a_huge_shape_is_refused(tmp_path: Path) -> None:
    file = write("gemma_scope", tmp_path / "sae")
    arrays = {name: each.numpy() for name, each in tensors_in(file).items()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            shape = (10**6, 10**6) if name == "W_enc" else array.shape
            np.lib.format.write_array_header_1_0(content, {"descr": "<f4", "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", content.getvalue() + array.tobytes())
    assert "claims the shape [1000000, 1000000]" in refused(file)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", PICKLED)
def test_a_tensor_that_repeats_one_number_is_refused(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    tensors = tensors_in(file)
    first = matrix(tensors)
    tensors[first] = torch.zeros(1, 1).expand(100_000, 100_000)
    torch.save(tensors, file)
    refused(file)
    tensors[first] = torch.zeros(1, 1).expand(*tensors_in(write(name, tmp_path / "other"))[first].shape)
    torch.save(tensors, file)
    assert "does not hold a number for each" in refused(file)


@pytest.mark.parametrize("name", PICKLED)
def test_other_kinds_of_tensors_are_refused(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    whole = tensors_in(file)
    first = matrix(whole)
    for other in (whole[first].to_sparse(), whole[first].to("meta"), 3, "text", None, [1.0], {"a": 1}):
        torch.save(whole | {first: other}, file)
        refused(file, first)
    for content in ([1, 2], whole[first], {1: whole[first]}, "text"):
        torch.save(content, file)
        refused(file)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", ["saelens", "sparsify", "llamascopium", "gemma_scope_2"])
def test_safetensors_whose_header_lies_are_refused(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "sae")
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    first = next(key for key in header if key != "__metadata__" and len(header[key]["shape"]) == 2)
    lies: list[dict[str, Any]] = [
        {"shape": [10**6, 10**6]}, {"data_offsets": [0, 10**15]}, {"data_offsets": [8, 0]}, {"dtype": "F64"},
        {"dtype": "I32"}, {"dtype": "nothing"}, {"shape": [-1, 3]},
    ]  # fmt: skip
    for lie in lies:
        text = json.dumps(header | {first: header[first] | lie}).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        refused(file)
    for claimed in (2**63, 2**40, 0):
        file.write_bytes(struct.pack("<Q", claimed) + content[8:])
        refused(file)


def test_a_device_is_no_header(tmp_path: Path) -> None:
    file = write("saelens", tmp_path / "sae")
    header = file.parent / "cfg.json"
    header.unlink()
    header.symlink_to("/dev/zero")
    refused(file)


def test_records_that_are_damaged_or_of_another_sae(tmp_path: Path) -> None:
    file = write("saelens", tmp_path / "sae")
    record = file.parent / FILE
    for content in ("{", "[]", "{}", '{"sae": 3}', '{"sae": {"inference": "threshold"}}', "[" * 100_000):
        record.write_text(content)
        assert str(record) in refused(file)
    own = manifest_of(random_sae(d_model=7, n_features=12)).as_json()
    for change in ({"n_features": 13}, {"inference": "topk"}, {"d_model": 8}):
        record.write_text(json.dumps({"format": "saelens", "sae": own | change}))
        assert "is the record of another SAE" in refused(file)
    record.write_text(json.dumps({"format": "sparsify", "sae": own}))
    assert "an export to 'sparsify'" in refused(file)
    record.write_text(json.dumps({"format": "saelens", "sae": own}))
    assert sae_train.load(file).k == own["k"]


def test_there_is_no_sae(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    assert "holds no SAE of a known format" in refused(tmp_path)
    assert "holds no SAE of a known format" in refused(tmp_path / "notes.txt")
    assert "no such file" in refused(tmp_path / "missing")
    refused(tmp_path / ("x" * 300))
    refused(tmp_path / "a\0b")


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("valid")
    return {name: write(name, folder / name) for name in FORMATS}


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(FORMATS)), data=st.data())
def test_damaged_bytes_are_opened_or_refused(name: str, data: st.DataObject, valid: dict[str, Path]) -> None:
    file = valid[name]
    files = [each for each in file.parent.iterdir() if each.is_file()]
    target = data.draw(st.sampled_from(sorted(files)))
    whole = target.read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    target.write_bytes(bytes(damaged))
    try:
        opened_or_refused(file)
    finally:
        target.write_bytes(whole)
