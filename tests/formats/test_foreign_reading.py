"""SAEs that other programs wrote: `load` gives codes and reconstructions that their own arithmetic gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import sae_train
from sae_train.errors import CheckpointError
from tools.foreign_definitions import DEFINITIONS

D, F = 12, 31
Tensors = dict[str, Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:.*(k=|its numbers|class|site|apply_b_dec)")


class Parts:
    """Random weights as a peer trains them: decoder rows of norms .1 to .96, thresholds of either sign."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(3)
        self.rows = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
        self.rows *= 0.1 + 0.86 * torch.rand(F, 1, generator=g)
        self.W_enc = self.rows.t() * 1.5 + 0.1 * torch.randn(D, F, generator=g)
        self.b_enc, self.b_dec = 0.2 * torch.randn(F, generator=g), torch.randn(D, generator=g)
        self.threshold = torch.rand(F, generator=g) - 0.05
        self.gate, self.r_mag = 0.3 * torch.randn(F, generator=g), 0.2 * torch.randn(F, generator=g)
        self.x_ND = self.b_dec + 2 * torch.randn(50, D, generator=g)

    @property
    def linear(self) -> Tensors:
        return {"encoder.weight": self.W_enc.t(), "encoder.bias": self.b_enc, "decoder.weight": self.rows.t()}

    @property
    def plain(self) -> Tensors:
        return {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.rows, "b_dec": self.b_dec}


PARTS = Parts()


def saelens(architecture: str, tensors: Tensors, **header: Any) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        own = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32"} | header
        return save(directory, "sae_weights.safetensors", tensors, "cfg.json", own)

    return write


def llamascopium(act_fn: str, tensors: Tensors, **header: Any) -> Callable[[Path], Path]:
    own = {"sae_type": "sae", "hook_point_in": "h", "hook_point_out": "h", "d_model": D, "expansion_factor": F / D,
           "use_decoder_bias": True, "act_fn": act_fn, "norm_activation": "inference",
           "sparsity_include_decoder_norm": True}  # fmt: skip
    weights = {"W_E": PARTS.W_enc, "b_E": PARTS.b_enc, "W_D": PARTS.rows, "b_D": PARTS.b_dec} | tensors
    return lambda directory: save(directory, "sae_weights.safetensors", weights, "config.json", own | header)


def dictionary_learning(dict_class: str, tensors: dict[str, Any]) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        directory.mkdir()
        torch.save({key: plain(value) for key, value in tensors.items()}, directory / "ae.pt")
        (directory / "config.json").write_text(json.dumps({"trainer": {"dict_class": dict_class}}))
        return directory

    return write


def sparsify(**header: Any) -> Callable[[Path], Path]:
    tensors = {"encoder.weight": PARTS.W_enc.t(), "encoder.bias": PARTS.b_enc, "W_dec": PARTS.rows,
               "b_dec": PARTS.b_dec}  # fmt: skip
    own = {"activation": "topk", "d_in": D, "num_latents": F} | header
    return lambda directory: save(directory, "sae.safetensors", tensors, "cfg.json", own)


def openai(decoder: Tensors) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        directory.mkdir()
        tensors = {"pre_bias": PARTS.b_dec, "latent_bias": PARTS.b_enc, "encoder.weight": PARTS.W_enc.t(),
                   "stats_last_nonzero": torch.zeros(F, dtype=torch.int64), "latents_activation_frequency": PARTS.gate,
                   "latents_mean_square": PARTS.gate} | decoder  # fmt: skip
        torch.save({key: plain(value) for key, value in tensors.items()} | {"activation": "ReLU",
                   "activation_state_dict": {}}, directory / "autoencoder_12.pt")  # fmt: skip
        return directory

    return write


def plain(value: Any) -> Any:
    return value.detach().clone().contiguous() if isinstance(value, Tensor) else value


def save(directory: Path, weights: str, tensors: Tensors, header: str, values: dict[str, Any]) -> Path:
    directory.mkdir()
    save_file({name: plain(tensor) for name, tensor in tensors.items()}, directory / weights)
    (directory / header).write_text(json.dumps(values))
    return directory


P = PARTS
GATED = {"W_enc": P.W_enc, "W_dec": P.rows, "b_dec": P.b_dec, "b_gate": P.gate, "b_mag": P.b_enc, "r_mag": P.r_mag}
K, OFF, CUT = torch.tensor(5, dtype=torch.int32), torch.tensor(-1.0), torch.tensor(0.4)
NORM = {"dataset_average_activation_norm.h": torch.tensor(7.5)}
GARBAGE = {"dataset_average_activation_norm.h": torch.tensor(-6.5e6)}
LOGS = {"activation_function.log_jumprelu_threshold": (P.threshold.abs() + 0.01).log()}
FILES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "saelens standard": ("saelens", saelens("standard", P.plain, apply_b_dec_to_input=True)),
    "saelens standard, unshifted": ("saelens", saelens("standard", P.plain, apply_b_dec_to_input=False)),
    "saelens, shift by default": ("saelens", saelens("standard", P.plain)),
    "saelens jumprelu": ("saelens", saelens("jumprelu", P.plain | {"threshold": P.threshold})),
    "saelens gated": ("saelens", saelens("gated", GATED, apply_b_dec_to_input=True)),
    "saelens topk, rescaled": ("saelens", saelens("topk", P.plain, k=5, rescale_acts_by_decoder_norm=True)),
    "saelens topk": ("saelens", saelens("topk", P.plain, k=5, rescale_acts_by_decoder_norm=False)),
    "saelens topk, by default": ("saelens", saelens("topk", P.plain, k=5)),
    "sparsify": ("sparsify", sparsify(k=5)),
    "sparsify, k by default": ("sparsify", sparsify(d_in=D)),
    "dl jumprelu": (
        "dictionary_learning",
        dictionary_learning("JumpReluAutoEncoder", P.plain | {"threshold": P.threshold}),
    ),
    "dl topk": (
        "dictionary_learning",
        dictionary_learning("AutoEncoderTopK", P.linear | {"b_dec": P.b_dec, "k": K, "threshold": OFF}),
    ),
    "dl batchtopk": (
        "dictionary_learning",
        dictionary_learning("BatchTopKSAE", P.linear | {"b_dec": P.b_dec, "k": K, "threshold": CUT}),
    ),
    "dl batchtopk, off": (
        "dictionary_learning",
        dictionary_learning("BatchTopKSAE", P.linear | {"b_dec": P.b_dec, "k": K, "threshold": OFF}),
    ),
    "dl matryoshka": (
        "dictionary_learning",
        dictionary_learning(
            "MatryoshkaBatchTopKSAE", P.plain | {"k": K, "threshold": CUT, "group_sizes": torch.tensor([10, 21])}
        ),
    ),
    "dl gated": (
        "dictionary_learning",
        dictionary_learning(
            "GatedAutoEncoder",
            {
                "encoder.weight": P.W_enc.t(),
                "decoder.weight": P.rows.t(),
                "decoder_bias": P.b_dec,
                "r_mag": P.r_mag,
                "mag_bias": P.b_enc,
                "gate_bias": P.gate,
            },
        ),
    ),
    "dl standard": ("dictionary_learning", dictionary_learning("AutoEncoder", P.linear | {"bias": P.b_dec})),
    "dl new": ("dictionary_learning", dictionary_learning("AutoEncoderNew", P.linear | {"decoder.bias": P.b_dec})),
    "openai": ("openai", openai({"decoder.weight": P.rows.t()})),
    "openai, tied": ("openai", openai({"decoder.linear.weight": P.W_enc.t()})),
    "llamascopium relu": ("llamascopium", llamascopium("relu", GARBAGE)),
    "llamascopium jumprelu": ("llamascopium", llamascopium("jumprelu", LOGS)),
    "llamascopium jumprelu, norms left out": (
        "llamascopium",
        llamascopium("jumprelu", LOGS, sparsity_include_decoder_norm=False),
    ),
    "llamascopium topk": ("llamascopium", llamascopium("topk", {}, top_k=5)),
    "llamascopium topk, norms left out": (
        "llamascopium",
        llamascopium("topk", {}, top_k=5, sparsity_include_decoder_norm=False),
    ),
    "llamascopium, dataset-wise": (
        "llamascopium",
        llamascopium("jumprelu", LOGS | NORM, norm_activation="dataset-wise"),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_peers_file_gives_the_peers_codes(case: str, tmp_path: Path) -> None:
    """Their codes and ours differ by a positive factor of each feature, which its decoder row takes up."""
    name, write = FILES[case]
    directory = write(tmp_path / "sae")
    sae = sae_train.load(directory)
    theirs, reconstructed = DEFINITIONS[name](directory, P.x_ND.double().numpy())
    ours = sae.encode(P.x_ND).detach()
    assert np.array_equal(theirs > 0, ours.numpy() > 0)
    assert 0 < (theirs > 0).mean() < 1
    errors = np.linalg.norm(reconstructed - sae.decode(ours).detach().numpy(), axis=1)
    assert (errors < 2e-6 * np.linalg.norm(reconstructed, axis=1)).all()
    if sae.inference == "threshold":  # unit rows; those of a topk SAE stay where folding would change the selection
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(F), atol=1e-6)
        assert (sae.threshold >= 0).all()


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "normalised tokens": (
        saelens("standard", P.plain, normalize_activations="layer_norm"),
        "normalize_activations='layer_norm'",
    ),
    "scaled by the data": (
        saelens("standard", P.plain, normalize_activations="expected_average_only_in"),
        "normalize_activations",
    ),
    "an architecture in training": (saelens("batchtopk", P.plain), "architecture='batchtopk'"),
    "a transcoder": (saelens("transcoder", P.plain), "architecture='transcoder'"),
    "a scaling factor": (saelens("standard", P.plain | {"scaling_factor": torch.full((F,), 2.0)}), "scaling_factor"),
    "groupmax": (sparsify(k=5, activation="groupmax"), "activation='groupmax'"),
    "transcode": (sparsify(k=5, transcode=True), "transcode=True"),
    "skip": (sparsify(k=5, skip_connection=True), "skip_connection=True"),
    "another width": (sparsify(k=5, d_in=D + 1), f"d_in={D + 1}"),
    "an unknown class": (dictionary_learning("CrossCoder", P.plain), "dict_class='CrossCoder'"),
    "another class's tensors": (dictionary_learning("AutoEncoderTopK", P.plain), "lacks decoder.weight"),
    "no thresholds": (llamascopium("batchtopk", {}), "act_fn='batchtopk'"),
    "token-wise": (llamascopium("relu", {}, norm_activation="token-wise"), "norm_activation='token-wise'"),
    "no norm": (llamascopium("relu", {}, norm_activation="dataset-wise"), "no usable mean norm"),
    "a senseless norm": (llamascopium("relu", GARBAGE, norm_activation="dataset-wise"), "no usable mean norm"),
    "two sites": (llamascopium("relu", {}, hook_point_out="other"), "a transcoder"),
    "two factors": (llamascopium("relu", {}, use_glu_encoder=True), "use_glu_encoder=true"),
    "another width in SAELens": (saelens("standard", P.plain, d_sae=F + 1), f"d_sae={F + 1}"),
    "zero rows, rescaled": (
        saelens("topk", P.plain | {"W_dec": P.rows * torch.arange(F)[:, None]}, k=5, rescale_acts_by_decoder_norm=True),
        "W_dec has rows of zeros",
    ),
    "another activation": (saelens("standard", P.plain, activation_fn_str="tanh-relu"), "activation_fn='tanh-relu'"),
    "another kind": (llamascopium("relu", {}, sae_type="crosscoder"), "sae_type='crosscoder'"),
    "another ratio": (llamascopium("relu", {}, expansion_factor=4), "expansion_factor=4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_native_form_cannot_hold_is_refused(case: str, tmp_path: Path) -> None:
    write, message = REFUSED[case]
    directory = write(tmp_path / "sae")
    with pytest.raises(CheckpointError) as caught:
        sae_train.load(directory)
    assert message in str(caught.value)
    assert str(directory) in str(caught.value)


def test_openais_topk_is_refused(tmp_path: Path) -> None:
    directory = openai({"decoder.weight": P.rows.t()})(tmp_path / "sae")
    file = directory / "autoencoder_12.pt"
    torch.save(torch.load(file) | {"activation": "TopK"}, file)
    with pytest.raises(CheckpointError, match=r"activation='TopK'.*normalises each token"):
        sae_train.load(directory)


def test_assumptions_are_warnings_and_in_the_config(tmp_path: Path) -> None:
    directory = sparsify()(tmp_path / "layers.4")
    with pytest.warns(UserWarning, match="sparsify: ") as caught:
        sae = sae_train.load(directory)
    assert [str(each.message) for each in caught] == [f"sparsify: {each}" for each in sae.config["assumed"]]
    assert any("k=32" in each for each in sae.config["assumed"])
    assert (sae.k, sae.config["site"], sae.config["format"]) == (32, "residual4", "sparsify")


def test_a_class_is_found_by_its_tensors(tmp_path: Path) -> None:
    for number, (case, (name, write)) in enumerate(FILES.items()):
        if name == "dictionary_learning" and case != "dl batchtopk, off":  # it has the tensors of a TopK SAE
            named = write(tmp_path / f"named{number}")
            before = sae_train.load(named)
            (named / "config.json").unlink()
            after = sae_train.load(named)
            assert torch.equal(before.encode(P.x_ND), after.encode(P.x_ND))
            assert any("no config.json names its class" in each for each in after.config["assumed"])


def test_metadata_of_saelens_5_stands_at_the_top(tmp_path: Path) -> None:
    top = {"model_name": "org/m", "hook_name": "blocks.3.hook_mlp_out", "context_size": 128}
    for number, header in enumerate((top, {"metadata": top})):
        sae = sae_train.load(saelens("standard", P.plain, **header)(tmp_path / str(number)))
        assert (sae.config["site"], sae.config["source"]["model"]) == ("mlp3", "org/m")
        assert sae.config["source"]["context_length"] == 128


def test_folders_of_gemma_scope_tell_site_and_l0(tmp_path: Path) -> None:
    directory = tmp_path / "attention" / "layer_7" / "width_31" / "average_l0_45"
    directory.mkdir(parents=True)
    weights = P.plain | {"threshold": P.threshold}
    np.savez(directory / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    sae = sae_train.load(tmp_path)
    assert (sae.k, sae.config["site"]) == (45, "attention7")
    assert torch.equal(sae.encode(P.x_ND), sae_train.load(directory / "params.npz").encode(P.x_ND))


@pytest.mark.parametrize(
    ("kind", "site"), [("resid_post", "residual9"), ("mlp_out", "mlp9"), ("attn_out", "attention9")]
)
def test_folders_of_gemma_scope_2_tell_the_site(kind: str, site: str, tmp_path: Path) -> None:
    directory = tmp_path / kind / "layer_9_width_31_l0_10"
    tensors = {"w_enc": P.W_enc, "b_enc": P.b_enc, "w_dec": P.rows, "b_dec": P.b_dec, "threshold": P.threshold}
    directory.parent.mkdir()
    header = {"architecture": "jump_relu", "model_name": "gemma-3-1b-pt", "l0": 10}
    save(directory, "params.safetensors", tensors | {"statistics": P.b_dec}, "config.json", header)
    sae = sae_train.load(directory)
    assert (sae.k, sae.config["site"], sae.config["source"]["model"]) == (10, site, "google/gemma-3-1b-pt")
    skipping = save(
        tmp_path / "t", "params.safetensors", tensors | {"affine_skip_connection": P.rows}, "config.json", {}
    )
    with pytest.raises(CheckpointError, match="holds affine_skip_connection: a transcoder"):
        sae_train.load(skipping)


def test_a_folder_of_qwen_scope_holds_k(tmp_path: Path) -> None:
    tensors = {"W_enc": P.W_enc.t(), "W_dec": P.rows.t(), "b_enc": P.b_enc, "b_dec": P.b_dec}
    for folder, is_known in (("SAE-Res-Qwen3-8B-Base-W31-L0_6", True), ("sae", False)):
        directory = tmp_path / folder
        directory.mkdir()
        torch.save({name: plain(tensor) for name, tensor in tensors.items()}, directory / "layer11.sae.pt")
        if not is_known:
            with pytest.raises(CheckpointError, match="its k stands in the name of its folder"):
                sae_train.load(directory)
            continue
        sae = sae_train.load(directory)
        assert (sae.k, sae.inference, sae.config["site"]) == (6, "topk", "residual11")
        theirs, _ = DEFINITIONS["qwen_scope"](directory, P.x_ND.double().numpy())
        assert np.allclose(theirs, sae.encode(P.x_ND).detach().numpy(), atol=1e-5)


def test_k_of_saelens_5_stands_among_the_activations_arguments(tmp_path: Path) -> None:
    old = saelens(
        "standard", P.plain, activation_fn_str="topk", activation_fn_kwargs={"k": 7}, hook_point="blocks.1.hook_mlp_out"
    )
    sae = sae_train.load(old(tmp_path / "sae"))
    assert (sae.k, sae.inference, sae.config["site"]) == (7, "topk", "mlp1")


def test_folders_further_up_have_any_name(tmp_path: Path) -> None:
    gemma = tmp_path / "layer_9" / "average_l0_77" / "mlp" / "layer_3" / "width_31" / "average_l0_8"
    gemma.mkdir(parents=True)
    weights = P.plain | {"threshold": P.threshold}
    np.savez(gemma / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    sae = sae_train.load(gemma)
    assert (sae.k, sae.config["site"]) == (8, "mlp3")
    second = tmp_path / "layer_9" / "mlp_out" / "resid_post" / "layer_2_width_31"
    second.parent.mkdir(parents=True)
    tensors = {"w_enc": P.W_enc, "b_enc": P.b_enc, "w_dec": P.rows, "b_dec": P.b_dec, "threshold": P.threshold}
    save(second, "params.safetensors", tensors, "config.json", {"model_name": "gemma-v3-1b-pt"})
    config = sae_train.load(second).config
    assert (config["site"], config["source"]["model"]) == ("residual2", "google/gemma-3-1b-pt")


def test_a_transcoder_of_gemma_scope_2_is_refused(tmp_path: Path) -> None:
    tensors = {"w_enc": P.W_enc, "b_enc": P.b_enc, "w_dec": P.rows, "b_dec": P.b_dec, "threshold": P.threshold}
    header = {"hf_hook_point_in": "a.output", "hf_hook_point_out": "b.output"}
    directory = save(tmp_path / "sae", "params.safetensors", tensors, "config.json", header)
    with pytest.raises(CheckpointError, match="a transcoder"):
        sae_train.load(directory)
