"""Folders are named as in the published suites, because SAELens takes the width of an SAE from the name alone."""

import re

import pytest

from sae_train.formats import gemma_scope, gemma_scope_2, qwen_scope
from sae_train.formats.foreign import origin_of
from sae_train.formats.manifest import ActivationSource, SaeManifest

GEMMA_SCOPE = {
    4096: "4k",
    16384: "16k",
    32768: "32k",
    65536: "65k",
    131072: "131k",
    262144: "262k",
    524288: "524k",
    1048576: "1m",
}
"""The widths that sae-lens 6.54.12 takes from a folder (`get_gemma_2_config_from_hf`)."""
QWEN_SCOPE = r"SAE-Res-(.+)-W(\d+)K-L0_(\d+)"
"""The pattern that sae-lens 6.54.12 finds in a repository's name. The width is in units of 1024."""


def manifest_of(n_features: int, *, inference: str) -> SaeManifest:
    source = ActivationSource(model="Qwen/Qwen3-8B-Base")
    return SaeManifest(inference=inference, k=50.0, d_model=8, n_features=n_features, site="residual3", source=source)


@pytest.mark.parametrize("n_features", GEMMA_SCOPE)
def test_widths_of_gemma_scope_are_decimal_thousands(n_features: int) -> None:
    manifest = manifest_of(n_features, inference="threshold")
    word, origin = GEMMA_SCOPE[n_features], origin_of(manifest)
    assert str(gemma_scope.folder(manifest, origin)) == f"residual/layer_3/width_{word}/average_l0_50"
    assert str(gemma_scope_2.folder(manifest, origin)) == f"resid_post/layer_3_width_{word}_l0_50"


@pytest.mark.parametrize("n_features", [32768, 65536, 81920, 131072, 1048576])
def test_widths_of_qwen_scope_are_multiples_of_1024(n_features: int) -> None:
    manifest = manifest_of(n_features, inference="topk")
    found = re.fullmatch(QWEN_SCOPE, str(qwen_scope.folder(manifest, origin_of(manifest))))
    assert found is not None
    assert found.groups() == ("Qwen3-8B-Base", str(n_features // 1024), "50")


@pytest.mark.parametrize("n_features", [512, 1000, 5000, 65535])
def test_other_widths_are_written_out(n_features: int) -> None:
    """A rounded word such as 65k would give SAELens the wrong width."""
    manifest = manifest_of(n_features, inference="threshold")
    assert gemma_scope.width_word(n_features) == str(n_features)
    assert f"-W{n_features}-" in str(qwen_scope.folder(manifest, origin_of(manifest)))
