"""The parts of the check of formats that its verdicts stand on: codes of other norms, mistakes, loaders alone."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from sae_train.formats.comparison import Verified
from sae_train.formats.folding import native_sae
from tools.random_sae import manifest_of
from tools.wrong_saes import MISTAKES, D, F, sae_of

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib


def test_a_program_with_other_decoder_norms_is_equal(scripts: ModuleType, tmp_path: Path) -> None:
    """Its codes are smaller by the norms of its rows, and ours are folded to norm 1."""
    verify_formats, verify_peers = (scripts.import_module(name) for name in ("verify_formats", "verify_peers"))
    own = sae_of("threshold")
    norm_F = 0.3 + torch.rand(F)
    W_enc, b_enc, W_dec = own.W_enc / norm_F, own.b_enc / norm_F, own.W_dec * norm_F[:, None]
    cut_F = own.threshold / norm_F

    class Other:
        """The foreign program's SAE."""

        def encode(self, x_ND: torch.Tensor) -> torch.Tensor:
            pre_NF = x_ND @ W_enc + b_enc
            return pre_NF.where(pre_NF > cut_F, 0)

        def decode(self, code_NF: torch.Tensor) -> torch.Tensor:
            return code_NF @ W_dec + own.b_dec

    read = native_sae(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=own.b_dec, threshold=cut_F, k=5.0,
                      shifts_input=False, folds_rows=True)  # fmt: skip
    x_ND = own.b_dec.detach() + torch.randn(100, D)
    for mistake, sae in (("", read), ("another threshold", own)):
        if mistake:
            sae.threshold *= 1.1
        out = tmp_path / f"{len(mistake)}.safetensors"
        save_file(verify_peers.compute(Other(), x_ND), out)
        item = verify_formats.Item("saelens", "one", mistake, tmp_path, sae, out, "sae-lens", has_own_norms=True)
        result = verify_formats.result_of(item, x_ND, {})
        assert result.is_equal == (not mistake), result
        assert result.is_right


def test_an_export_in_other_units_is_not_equal(scripts: ModuleType, tmp_path: Path) -> None:
    """Codes that are half as large with rows twice as long reconstruct the same, and are not our codes."""
    verify_formats = scripts.import_module("verify_formats")
    sae = sae_of("threshold")
    x_ND = sae.b_dec.detach() + torch.randn(100, D)
    codes = sae.encode(x_ND).detach()
    for norm, is_equal in ((1.0, True), (2.0, False)):
        out = tmp_path / f"{norm}.safetensors"
        index = codes.flatten().nonzero()[:, 0]
        found = {"index": index, "value": codes.flatten()[index] / norm, "rows": norm * sae.W_dec.detach()}
        save_file(found | {"reconstructions": sae.decode(codes).detach()}, out)
        item = verify_formats.Item("saelens", "one", "", tmp_path, sae, out, "sae-lens")
        assert verify_formats.result_of(item, x_ND, {}).is_equal == is_equal


@pytest.mark.parametrize(
    ("codes", "reconstruction", "is_equal"), [(9e-6, 9e-7, True), (2e-5, 0, False), (0, 2e-6, False)]
)
def test_the_bounds_of_the_script_do_not_grow(
    scripts: ModuleType, tmp_path: Path, codes: float, reconstruction: float, is_equal: bool
) -> None:
    verify_formats = scripts.import_module("verify_formats")
    verified = Verified(reader="test", codes=codes, reconstruction=reconstruction, support_differences=0, firings=1,
                        most_codes=1e-3, most_reconstruction=1e-3)  # fmt: skip
    assert verified.is_equal
    item = verify_formats.Item("sparsify", "one", "", tmp_path, sae_of("topk"), tmp_path / "one", "eai-sparsify")
    assert verify_formats.Result(item, verified, "").is_equal == is_equal


def test_a_file_that_does_not_load_is_not_right(scripts: ModuleType, tmp_path: Path) -> None:
    verify_formats = scripts.import_module("verify_formats")
    (tmp_path / "one.txt").write_text("KeyError: 'd_in'\nmore")
    item = verify_formats.Item("sparsify", "one", "", tmp_path, sae_of("topk"), tmp_path / "one.safetensors",
                               "eai-sparsify")  # fmt: skip
    result = verify_formats.result_of(item, torch.zeros(1, D), {})
    assert not result.is_right
    assert verify_formats.line_of(result) == "WRONG: sparsify in eai-sparsify: one: KeyError: 'd_in'"


@pytest.mark.parametrize("rule", MISTAKES)
def test_mistakes_of_the_script_are_those_of_the_tests(scripts: ModuleType, rule: str) -> None:
    wrong = scripts.import_module("verify_subjects").mistakes(sae_of(rule))
    assert set(wrong) == set(MISTAKES[rule])
    for name, sae in wrong.items():
        same = sae.k == sae_of(rule).k and all(
            torch.equal(tensor, sae_of(rule).state_dict()[key]) for key, tensor in sae.state_dict().items()
        )
        assert not same, name


def test_the_loaders_need_no_package_of_ours(tmp_path: Path) -> None:
    """Other programs' environments have torch, numpy and safetensors, and not this package."""
    code = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'sae_train':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        f"sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "import verify_peers\n"
        "print(*verify_peers.loaders().PEERS)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    from sae_train.formats.peers import PEERS

    assert done.stdout.split() == list(PEERS)


def test_an_export_of_a_subject_is_where_the_script_says(scripts: ModuleType, tmp_path: Path) -> None:
    from sae_train.formats.registry import FORMATS

    sae = sae_of("threshold")
    exported = scripts.import_module("verify_subjects").exported
    directory = exported(sae, manifest_of(sae, site="residual2"), FORMATS["gemma_scope"], tmp_path / "out")
    assert (directory / "params.npz").is_file()
