"""Verification of exports: right ones pass, wrong ones fail, and the reader that was used is named."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sae_train.errors import CheckpointError
from sae_train.formats.comparison import BAND, Verified, compare, probes
from sae_train.formats.export import Source, export
from sae_train.formats.foreign import Opened
from sae_train.formats.peers import PEERS
from sae_train.formats.registry import FORMATS
from sae_train.formats.verify import BUILT_IN, verify_export
from sae_train.sae.autoencoder import SparseAutoencoder
from tools.random_sae import manifest_of
from tools.wrong_saes import MISTAKES, D, F, altered, mistaken, sae_of

CASES = [
    (name, rule) for name, each in FORMATS.items() for rule in MISTAKES if each.refusal(sae_of(rule)) is None
]  # fmt: skip


def exported(sae: SparseAutoencoder, name: str, out: Path) -> Path:
    opened = Opened(sae=sae, manifest=manifest_of(sae, site="residual2"), format_name="ours")
    (written,) = export([Source(name="one", open=lambda: opened, run=None)], FORMATS[name], out / "export")
    return written.directory


def verified(written: SparseAutoencoder, sae: SparseAutoencoder, name: str, out: Path) -> Verified:
    return verify_export(FORMATS[name], exported(written, name, out), sae)


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_a_right_export_passes(tmp_path: Path, name: str, rule: str) -> None:
    sae = sae_of(rule)
    directory = exported(sae, name, tmp_path)
    for x in (None, 2 * torch.randn(7, 5, D)):
        found = verify_export(FORMATS[name], directory, sae, x=x)
        assert found.is_equal, found
        assert found.firings > 0
        assert found.reader.startswith((BUILT_IN, PEERS[name].package))


@pytest.mark.parametrize(
    ("name", "rule", "mistake"), [(*case, mistake) for case in CASES for mistake in MISTAKES[case[1]]]
)
def test_a_wrong_export_fails(tmp_path: Path, name: str, rule: str, mistake: str) -> None:
    sae = sae_of(rule)
    found = verified(mistaken(sae, mistake), sae, name, tmp_path)
    assert not found.is_equal
    if mistake.startswith(("threshold", "k")):  # where both fire, the codes are right
        assert found.support_differences > 0
        assert found.codes <= found.most_codes


@pytest.mark.parametrize("tensor", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_one_wrong_number_fails(tmp_path: Path, tensor: str) -> None:
    sae = sae_of("threshold")
    changed = getattr(sae, tensor).detach().clone()
    changed.view(-1)[3 * changed.shape[-1] if changed.ndim == 2 else 3] *= 1.01
    assert not verified(altered(sae, **{tensor: changed}), sae, "saelens", tmp_path).is_equal


def test_the_record_is_not_believed(tmp_path: Path) -> None:
    """sae_train.json holds k and the rule, too; what counts is the file that other programs read."""
    sae = sae_of("topk")
    directory = exported(altered(sae, k=9.0), "saelens", tmp_path)
    right = exported(sae, "saelens", tmp_path / "right")
    (directory / "sae_train.json").write_bytes((right / "sae_train.json").read_bytes())
    assert not verify_export(FORMATS["saelens"], directory, sae).is_equal


def one_feature(pre: float, *, other: float = 100.0) -> tuple[SparseAutoencoder, torch.Tensor]:
    """Return an SAE of two features with thresholds 1, and a token on which they have these pre-activations."""
    sae = SparseAutoencoder(W_enc=torch.eye(2), b_enc=torch.zeros(2), W_dec=torch.eye(2), b_dec=torch.zeros(2),
                            threshold=torch.ones(2), k=1.0, inference="threshold")  # fmt: skip
    return sae.eval(), torch.tensor([[pre, other]])


@pytest.mark.parametrize("above", [True, False])
def test_either_support_is_right_in_the_band_and_one_outside(above: bool) -> None:
    for distance, different in ((0.4 * BAND, 0), (2.5 * BAND, 1)):
        sign = 1 if above else -1
        scale = 100 / 2**0.5 if above else 100  # the root mean square of active codes, about
        sae, x_ND = one_feature(1 + sign * distance * scale)
        code = torch.tensor([[0.0 if above else float(x_ND[0, 0]), 100.0]])  # the other support
        found = compare(sae, x_ND, [(code, code)], reader="test")
        assert found.support_differences == different
        assert found.is_equal == (different == 0), found


def test_numbers_that_are_not_finite_fail() -> None:
    sae, x_ND = one_feature(2.0)
    nan = torch.tensor([[torch.nan, 100.0]])
    assert not compare(sae, x_ND, [(nan, x_ND)], reader="test").is_equal
    assert not compare(sae, x_ND, [(x_ND, nan)], reader="test").is_equal
    two = [(nan, x_ND), (x_ND, x_ND)]
    assert not compare(sae, torch.cat([x_ND, x_ND]), two, reader="test").is_equal


def test_shapes_and_lengths_are_checked() -> None:
    sae, x_ND = one_feature(2.0)
    for parts in ([], [(x_ND[:, :1], x_ND)], [(x_ND, x_ND[:, :1])]):
        with pytest.raises(ValueError, match="codes"):
            compare(sae, x_ND, parts, reader="test")


def test_activations_of_large_norm_do_not_fail_a_right_export(tmp_path: Path) -> None:
    """One channel at 3000 costs float32 codes five digits; that is rounding, and bf16 still is more."""
    sae = sae_of("threshold")
    b_dec = sae.b_dec.detach().clone()
    b_dec[0] = 3000
    b_enc = (sae.b_enc.double() - b_dec.double() @ sae.W_enc.double()).float().detach()
    large = altered(sae, b_dec=b_dec, b_enc=b_enc)
    found = verified(large, large, "gemma_scope", tmp_path)
    assert found.codes > 1e-5
    assert found.is_equal
    assert not verified(mistaken(large, "bf16 rounding"), large, "gemma_scope", tmp_path / "wrong").is_equal


@pytest.mark.parametrize("rule", MISTAKES)
def test_probes_fire_and_repeat(rule: str) -> None:
    sae = sae_of(rule)
    x_ND = probes(sae, 64)
    assert x_ND.shape == (64, D)
    assert torch.equal(x_ND, probes(sae, 64))
    fires_NF = sae.encode(x_ND) > 0
    assert fires_NF.any(dim=1).float().mean() > 0.9
    if rule == "topk":
        assert (fires_NF.sum(dim=1) == round(sae.k)).float().mean() > 0.9
    else:
        relative_NF = (torch.cat(list(sae.pre_activations(x_ND[:32]))) / sae.threshold - 1).abs()
        assert (relative_NF < 1e-3).any(dim=1).float().mean() > 0.9


def test_an_sae_that_never_fires_is_verified(tmp_path: Path) -> None:
    sae = altered(sae_of("threshold"), threshold=torch.full((F,), torch.inf), k=0.0)
    found = verified(sae, sae, "saelens", tmp_path)
    assert found.is_equal
    assert found.firings == 0


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Install a package named as sparsify's, with a given source, and take it away again."""
    if "sparsify" in sys.modules:
        pytest.skip("sparsify itself is imported")

    def install(source: str) -> None:
        (tmp_path / "packages").mkdir()
        (tmp_path / "packages" / "sparsify.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path / "packages")

    yield install
    sys.modules.pop("sparsify", None)


def test_a_program_that_breaks_in_import_is_replaced_and_named(
    tmp_path: Path, package: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    package("print('noise')\nraise RuntimeError('operator torchvision::nms does not exist\\nmore')")
    sae = sae_of("topk")
    found = verified(sae, sae, "sparsify", tmp_path)
    assert found.is_equal
    assert found.reader.startswith(f"{BUILT_IN} (eai-sparsify")
    assert "RuntimeError: operator torchvision::nms does not exist)" in found.reader
    assert "noise" not in capsys.readouterr().out


OTHER_PROGRAM = """
class SparseCoder:
    @staticmethod
    def load_from_disk(path, device):
        from types import SimpleNamespace
        from sae_train.formats import sparsify
        sae = sparsify.read(path / "sae.safetensors").sae
        def encode(x):
            value, feature = sae.encode(x).topk(5)
            return value * FACTOR, feature, None
        return SimpleNamespace(num_latents=80, cfg=SimpleNamespace(k=5), encode=encode,
                               decode=lambda v, f: sae.decode(v.new_zeros(len(v), 80).scatter_(1, f, v)))
"""


@pytest.mark.parametrize(("factor", "is_equal"), [("1.0", True), ("1.0001", False)])
def test_the_codes_of_the_program_itself_are_compared(
    tmp_path: Path, package: Callable[[str], None], factor: str, is_equal: bool
) -> None:
    package(OTHER_PROGRAM.replace("FACTOR", factor))
    sae = sae_of("topk")
    found = verified(sae, sae, "sparsify", tmp_path)
    assert found.reader.startswith("eai-sparsify")
    assert found.is_equal == is_equal


@pytest.mark.parametrize("error", ["AssertionError()", "KeyError('d_in')"])
def test_a_program_that_cannot_load_the_files_is_an_error(
    tmp_path: Path, package: Callable[[str], None], error: str
) -> None:
    package(f"class SparseCoder:\n    @staticmethod\n    def load_from_disk(path, device):\n        raise {error}")
    sae = sae_of("topk")
    with pytest.raises(CheckpointError, match=f"eai-sparsify .*cannot use this export: {error.split('(')[0]}"):
        verified(sae, sae, "sparsify", tmp_path)


def test_a_directory_without_the_format_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no SAE of the format gemma_scope"):
        verify_export(FORMATS["gemma_scope"], tmp_path, sae_of("threshold"))
