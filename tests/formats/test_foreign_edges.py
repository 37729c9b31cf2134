"""Corners of reading foreign SAEs: zero decoder rows, SAELens 5, folders with other SAEs, and any JSON in headers."""

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import sae_train
from sae_train.errors import CheckpointError
from sae_train.formats.manifest import SaeManifest
from sae_train.formats.record import FILE
from sae_train.formats.registry import FORMATS
from sae_train.sae.autoencoder import SparseAutoencoder
from tools.foreign_definitions import DEFINITIONS
from tools.foreign_files import put, tensors_in, write
from tools.random_sae import manifest_of

D, F, K = 12, 31, 5
ZERO = 7
"""The feature whose decoder row is zero."""
pytestmark = pytest.mark.filterwarnings("ignore:.*(k=|its numbers|class|site|apply_b_dec|same tensors|model|layer)")


def weights(*, has_zero_row: bool = True) -> dict[str, Tensor]:
    """Return tensors with rows of norms .1 to .96. The feature with a zero row has the largest pre-activations."""
    g = torch.Generator().manual_seed(5)
    rows = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    rows *= 0.1 + 0.86 * torch.rand(F, 1, generator=g)
    made = {"W_enc": (1.5 * rows.t()).contiguous(), "b_enc": 0.2 * torch.randn(F, generator=g), "W_dec": rows,
            "b_dec": torch.randn(D, generator=g)}  # fmt: skip
    if has_zero_row:
        made["W_dec"][ZERO], made["b_enc"][ZERO] = 0, 50
    return made


def activations() -> Tensor:
    return weights()["b_dec"] + 2 * torch.randn(60, D, generator=torch.Generator().manual_seed(6))


def save(directory: Path, tensors: dict[str, Tensor], header: str, values: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "sae_weights.safetensors")
    (directory / header).write_text(json.dumps(values))
    return directory


def fires(sae: SparseAutoencoder) -> np.ndarray[Any, Any]:
    return sae.encode(activations()).detach().numpy() > 0


LLAMASCOPIUM = {"sae_type": "sae", "hook_point_in": "h", "hook_point_out": "h", "d_model": D, "expansion_factor": F / D,
                "use_decoder_bias": True, "top_k": K, "norm_activation": "inference",
                "sparsity_include_decoder_norm": True}  # fmt: skip
NAMES = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}


def llamascopium(directory: Path, act_fn: str, tensors: dict[str, Tensor]) -> Path:
    own = {NAMES[name]: tensor for name, tensor in tensors.items()}
    if act_fn == "jumprelu":
        own["activation_function.log_jumprelu_threshold"] = torch.full((F,), -0.5)
        own["activation_function.log_jumprelu_threshold"][ZERO] = -math.inf
    return save(directory, own, "config.json", LLAMASCOPIUM | {"act_fn": act_fn})


@pytest.mark.parametrize("rule", ["relu", "jumprelu", "topk"])
def test_llamascopium_divides_by_the_norms_of_rows(rule: str, tmp_path: Path) -> None:
    """Its codes of a feature with a zero row are 0 / 0, unless norms are left out."""
    directory = llamascopium(tmp_path / "sae", rule, weights())
    with pytest.raises(CheckpointError, match=f"^{directory}/.*: W_D has rows of zeros"):
        sae_train.load(directory)
    whole = LLAMASCOPIUM | {"act_fn": rule, "sparsity_include_decoder_norm": False}
    (directory / "config.json").write_text(json.dumps(whole))
    theirs, _ = DEFINITIONS["llamascopium"](directory, activations().double().numpy())
    ours = fires(sae_train.load(directory))
    assert np.array_equal(theirs > 0, ours)
    assert ours[:, ZERO].all()


FIVE = {"d_in": D, "d_sae": F, "dtype": "float32", "hook_name": "blocks.3.hook_resid_post", "model_name": "org/m"}
HEADERS_OF_5: dict[str, dict[str, Any]] = {
    "a function": {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    "an architecture": {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
                        "normalize_activations": False},
    "neither": {"activation_fn": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": None},
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS_OF_5)
def test_topk_of_saelens_5_is_not_taken_for_relu(case: str, tmp_path: Path) -> None:
    """sae-lens 6.54.12 reads these headers as `topk` too, and codes were equal when both were compared by hand."""
    tensors = weights(has_zero_row=False)
    directory = save(tmp_path / "five", tensors, "cfg.json", FIVE | HEADERS_OF_5[case])
    six = save(tmp_path / "six", tensors, "cfg.json", {"architecture": "topk", "k": K})
    sae = sae_train.load(directory)
    theirs, reconstructed = DEFINITIONS["saelens"](six, activations().double().numpy())
    assert (sae.inference, sae.k, sae.config["site"]) == ("topk", K, "residual3")
    assert np.array_equal(fires(sae), theirs > 0)
    own = sae.decode(sae.encode(activations())).detach().numpy()
    assert (np.linalg.norm(own - reconstructed, axis=1) < 1e-6 * np.linalg.norm(reconstructed, axis=1)).all()


def test_functions_of_saelens_5_that_have_no_native_form(tmp_path: Path) -> None:
    tensors = weights(has_zero_row=False)
    for own, message in (
        ({"architecture": "standard", "activation_fn_str": "tanh-relu"}, "activation_fn='tanh-relu'"),
        ({"normalize_activations": True}, "normalize_activations=True"),
    ):
        directory = save(tmp_path / "sae", tensors, "cfg.json", FIVE | own)
        with pytest.raises(CheckpointError, match=f"^{directory}/cfg.json: .*{message}"):
            sae_train.load(directory)
    assert sae_train.load(save(tmp_path / "sae", tensors, "cfg.json", FIVE)).inference == "threshold"


def test_a_missing_k_is_that_of_the_other_program_and_is_told(tmp_path: Path) -> None:
    directory = save(tmp_path / "sae", weights(has_zero_row=False), "cfg.json", {"architecture": "topk"})
    sae = sae_train.load(directory)
    assert sae.k == 100
    assert any("k=100, because the header has none" in each for each in sae.config["assumed"])


def test_groups_that_leave_out_features_are_refused(tmp_path: Path) -> None:
    tensors: dict[str, Any] = weights(has_zero_row=False)
    tensors |= {"k": torch.tensor(K), "threshold": torch.tensor(0.4), "group_sizes": torch.tensor([10, 21])}
    torch.save(tensors, tmp_path / "ae.pt")
    sae_train.load(tmp_path)
    for wrong in (torch.tensor([10, 20]), torch.ones(F + 1), [10, 21], torch.tensor([31]).to("meta"), torch.tensor(3j)):
        torch.save(tensors | {"group_sizes": wrong}, tmp_path / "ae.pt")
        with pytest.raises(CheckpointError, match="group_sizes do not sum to the 31 features"):
            sae_train.load(tmp_path)


@pytest.mark.parametrize(
    ("folder", "site", "k"),
    [
        ("residual/layer_3/copy/mlp/layer_7/width_31/average_l0_45", "mlp7", 45),
        ("average_l0_9/attention/layer_12/average_l0_45", "attention12", 45),
        ("residual/layer_3/other/layer_7/average_l0_45", None, 45),
        ("layer_7", None, 0),
    ],
)
def test_the_innermost_folders_of_gemma_scope_count(folder: str, site: str | None, k: int, tmp_path: Path) -> None:
    directory = tmp_path / folder
    directory.mkdir(parents=True)
    arrays = {name: tensor.numpy() for name, tensor in weights(has_zero_row=False).items()}
    np.savez(directory / "params.npz", **arrays, threshold=np.ones(F, dtype=np.float32))
    sae = sae_train.load(directory)
    assert (sae.config.get("site"), sae.k) == (site, k)


def test_the_innermost_folders_of_gemma_scope_2_count(tmp_path: Path) -> None:
    directory = tmp_path / "resid_post" / "layer_1" / "attn_out" / "layer_23_width_31_l0_10"
    directory.mkdir(parents=True)
    tensors = {name.replace("W_", "w_"): tensor for name, tensor in weights(has_zero_row=False).items()}
    save_file(tensors | {"threshold": torch.ones(F)}, directory / "params.safetensors")
    assert sae_train.load(directory).config["site"] == "attention23"


@pytest.mark.parametrize(("name", "pattern"), [("qwen_scope", "layer{}.sae.pt"), ("openai", "{}.pt")])
def test_a_folder_of_several_files_is_told_from_an_empty_one(name: str, pattern: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "all")
    whole = tensors_in(file)
    file.unlink()
    saes = {}
    for layer in (4, 11):
        bias = next(key for key in whole if key in ("b_dec", "pre_bias"))
        saes[layer] = torch.full_like(whole[bias], layer)
        put(file.with_name(pattern.format(layer)), whole | {bias: saes[layer]})
    for layer, b_dec in saes.items():
        assert torch.equal(sae_train.load(file.parent, pattern.format(layer)).b_dec, b_dec)
    with pytest.raises(CheckpointError, match=r"holds 2 files that may be an SAE each\. Give the name of one"):
        sae_train.load(file.parent)
    for wrong in ("other", "../all", f"../{file.parent.name}/{pattern.format(4)}"):
        with pytest.raises(CheckpointError, match=f"none is named '{wrong}'"):
            sae_train.load(file.parent, wrong)


def test_a_manifest_holds_a_k_that_counts() -> None:
    values = {"inference": "threshold", "d_model": 3, "n_features": 4, "k": 2}
    assert SaeManifest.from_json(values).k == 2
    for wrong in (-1, -0.5, 10**400, -(10**400), math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^k=.*at least 0"):
            SaeManifest.from_json(values | {"k": wrong})
    with pytest.raises(ValueError, match="no such rule") as caught:
        SaeManifest.from_json(values | {"inference": "x" * 10_000})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_damage_within_a_compressed_array(method: int, tmp_path: Path) -> None:
    file = write("gemma_scope", tmp_path / "sae")
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression=method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    sae_train.load(file)
    whole = file.read_bytes()
    for place in range(40, 400, 9):
        file.write_bytes(whole[:place] + b"\xff\xff\xff\xff" + whole[place + 4 :])
        with pytest.raises(CheckpointError, match=f"^{file}: "):
            sae_train.load(file)


@pytest.mark.parametrize(
    "shape", ["(True, 84)", "(-7, -12)", "(84,)", "(7, 12, 1)", "(0, 5)", "(7.0, 12)", "(7, 12", "3"]
)
def test_shapes_of_arrays_that_are_none(shape: str, tmp_path: Path) -> None:
    file = write("gemma_scope", tmp_path / "sae")
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    before = members["W_enc.npy"]
    assert b"(7, 12), }" in before
    length = len(before) - 7 * 12 * 4
    header = before[:length].replace(b"(7, 12), }", f"{shape}, }}".encode())
    members["W_enc.npy"] = header.rstrip().ljust(length - 1)[: length - 1] + b"\n" + before[length:]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=f"^{file}: "):
        sae_train.load(file)


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.just(10**400), st.floats(),
                    st.text(max_size=8), st.sampled_from(["topk", "relu", "none", "../x", "x" * 3000]))  # fmt: skip
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


def changed(values: Any, data: st.DataObject) -> Any:
    """Return JSON with one value replaced at any depth, or one key left out."""
    if isinstance(values, dict) and values and data.draw(st.integers(0, 5)):
        key = data.draw(st.sampled_from(sorted(values)))
        if not data.draw(st.integers(0, 5)):
            return {each: value for each, value in values.items() if each != key}
        return values | {key: changed(values[key], data)}
    return data.draw(ANY_JSON)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return an SAE of each format, with a record."""
    made = {}
    for name in FORMATS:
        made[name] = write(name, tmp_path_factory.mktemp("valid") / name)
        own = manifest_of(sae_train.load(made[name])).as_json()
        record = {"format": name, "name": "one", "sae": own, "assumed": ["a"], "files": ["a"], "config": {}, "run": {}}
        (made[name].parent / FILE).write_text(json.dumps(record))
    return made


@pytest.mark.filterwarnings("ignore")  # an assumption may be any text
@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(FORMATS)), data=st.data())
def test_any_json_in_headers_and_records_is_opened_or_refused(
    name: str, data: st.DataObject, valid: dict[str, Path]
) -> None:
    file = valid[name]
    target = data.draw(st.sampled_from(sorted(file.parent.glob("*.json"))))
    whole = target.read_text()
    target.write_text(json.dumps(changed(json.loads(whole), data)))
    try:
        sae = sae_train.load(file)
        assert 0 <= sae.k < math.inf
        json.dumps(sae.config, allow_nan=False)  # it can be written again
        assert sae.encode(torch.zeros(2, sae.d_model)).shape == (2, sae.n_features)
    except CheckpointError as error:
        said = str(error)
        assert said.startswith(str(file.parent))
        assert len(said) < 1000
        assert all(line.isprintable() for line in said.splitlines())
    finally:
        target.write_text(whole)
