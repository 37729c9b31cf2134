"""SAEs in foreign formats: ours, theirs and ours again; and the other programs' own arithmetic on the written files."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sae_train
from sae_train.errors import CheckpointError
from sae_train.formats.export import Source, export
from sae_train.formats.foreign import Opened, origin_of
from sae_train.formats.llamascopium import _expansion
from sae_train.formats.manifest import ActivationSource, SaeManifest
from sae_train.formats.record import FILE
from sae_train.formats.registry import FORMATS, format_named
from sae_train.sae.autoencoder import SparseAutoencoder
from tools.foreign_definitions import DEFINITIONS

D, F = 20, 57
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
FOLDED = {("sparsify", "topk"), ("dictionary_learning", "topk"), ("llamascopium", "threshold")}
"""Formats that hold a bias with the shift by b_dec in it, or the logarithm of thresholds."""


def random_native(kind: str, *, seed: int = 0) -> SparseAutoencoder:
    """Return an SAE with unit rows, of a kind that is a challenge to a format."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(F, D, generator=g, dtype=torch.float64), dim=1)
    if kind.endswith("zero_row"):  # its bias puts it among the k largest
        rows[5] = 0
    threshold, k = torch.rand(F, generator=g) * 2, 6.0
    if kind == "infinite":
        threshold[::5] = math.inf
    elif kind == "relu":
        threshold = torch.zeros(F)
    elif kind == "common":
        threshold = torch.full((F,), 0.75)
    elif kind.startswith("topk"):
        threshold, k = torch.zeros(F), {"topk_above": 50.0, "topk_all": 80.0}.get(kind, 6.0)
    return SparseAutoencoder(
        W_enc=(rows.t() * 1.3 + 0.1 * torch.randn(D, F, generator=g, dtype=torch.float64)).float().contiguous(),
        b_enc=torch.randn(F, generator=g) * 0.3 + 2 * rows.eq(0).all(dim=1),
        W_dec=rows.float(),
        b_dec=torch.randn(D, generator=g),
        threshold=threshold,
        k=k,
        inference="topk" if kind.startswith("topk") else "threshold",
    ).eval()


KINDS = ("threshold", "infinite", "relu", "common", "zero_row", "topk", "topk_above", "topk_all", "topk_zero_row")
HELD = [(name, kind) for name in FORMATS for kind in KINDS if FORMATS[name].refusal(random_native(kind)) is None]


def manifest_for(sae: SparseAutoencoder, *, site: str | None = "residual2", model: str | None = "org/m") -> SaeManifest:
    return SaeManifest(inference=sae.inference, k=sae.k, d_model=sae.d_model, n_features=sae.n_features, site=site,
                       source=ActivationSource(model=model, context_length=64, prepends_bos=True),
                       figures={"l0": sae.k})  # fmt: skip


def written(sae: SparseAutoencoder, name: str, out: Path, **given: str | int) -> Path:
    """Export one SAE; return the directory with its files."""
    opened = Opened(sae=sae, manifest=manifest_for(sae), format_name="ours")
    (done,) = export([Source(name="one", open=lambda: opened, run=None)], format_named(name), out, **given)  # type: ignore[arg-type]
    return done.directory


def differences(sae: SparseAutoencoder, other: SparseAutoencoder) -> dict[str, float]:
    """Return the largest difference of each tensor, relative to its largest entry. Equal infinities differ by 0."""
    found = {}
    for name in TENSORS:
        own, theirs = getattr(sae, name).detach(), getattr(other, name).detach()
        assert torch.equal(own.isinf(), theirs.isinf())
        finite = own[own.isfinite()]
        scale = float(finite.abs().max()) if len(finite) and finite.any() else 1.0
        found[name] = float((own - theirs)[own.isfinite()].abs().max()) / scale if len(finite) else 0.0
    return found


def tokens(sae: SparseAutoencoder) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return sae.b_dec.detach() + 2 * torch.randn(40, D, generator=g)


@pytest.mark.filterwarnings("ignore:.*k=")
@pytest.mark.parametrize("has_record", [True, False])
@pytest.mark.parametrize(("name", "kind"), HELD)
def test_ours_to_theirs_to_ours(name: str, kind: str, has_record: bool, tmp_path: Path) -> None:
    sae = random_native(kind)
    directory = written(sae, name, tmp_path / "out")
    if not has_record:
        (directory / FILE).unlink()
    back = sae_train.load(tmp_path / "out")
    found = differences(sae, back)
    if (name, sae.inference) in FOLDED:
        assert max(found.values()) < 1e-6
        assert all(found[each] == 0 for each in ("W_enc", "W_dec", "b_dec"))
    else:
        assert all(torch.equal(getattr(sae, each), getattr(back, each)) for each in TENSORS)
    assert back.inference == sae.inference
    if has_record:
        assert back.k == sae.k
        assert (back.config["site"], back.config["source"]["model"]) == ("residual2", "org/m")
    elif sae.inference == "topk":
        assert back.k == min(sae.k, F)
    assert not back.training


@pytest.mark.parametrize(("name", "kind"), HELD)
def test_the_other_programs_arithmetic_gives_our_codes(name: str, kind: str, tmp_path: Path) -> None:
    sae = random_native(kind)
    directory = written(sae, name, tmp_path / "out")
    x_ND = tokens(sae)
    theirs, reconstructed = DEFINITIONS[name](directory, x_ND.double().numpy())
    ours = sae.encode(x_ND).detach()
    assert np.array_equal(theirs > 0, ours.numpy() > 0)
    assert np.abs(theirs - ours.numpy()).max() < 1e-5 * theirs[theirs > 0].std()
    errors = np.linalg.norm(reconstructed - sae.decode(ours).detach().numpy(), axis=1)
    assert (errors < 1e-6 * np.linalg.norm(reconstructed, axis=1)).all()


def test_every_format_holds_what_it_says(subtests: pytest.Subtests) -> None:
    refused = {(name, kind) for name in FORMATS for kind in KINDS} - set(HELD)
    for name, kind in refused:
        is_topk = kind.startswith("topk")
        with subtests.test(name=name, kind=kind):
            assert name == "openai" or name in (
                ("gemma_scope", "gemma_scope_2") if is_topk else ("sparsify", "qwen_scope")
            )
    assert {name for name, _ in HELD} == set(FORMATS) - {"openai"}


@pytest.mark.parametrize(("name", "kind"), [("sparsify", "threshold"), ("gemma_scope", "topk"), ("openai", "relu")])
def test_a_refusal_names_the_formats_that_can(name: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"--to {name}: cannot hold one exactly: .*Formats that can: saelens, "):
        written(random_native(kind), name, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def ratios() -> Iterator[tuple[int, int]]:
    yield from ((3584, n) for n in (3777, 3778, 65536, 131072))
    yield from ((d, d * 8 + offset) for d in (256, 384, 576, 768, 2304) for offset in range(0, 40, 7))


def test_llamascopium_reads_the_width_that_was_written() -> None:
    for d_model, n_features in ratios():
        assert int(d_model * _expansion(d_model, n_features)) == n_features


@pytest.mark.parametrize(
    ("site", "given", "expected", "n_assumed"),
    [
        ("residual2", {}, ("org/m", 2, "residual"), 0),
        ("mlp11", {}, ("org/m", 11, "mlp"), 0),
        ("tensors", {}, ("org/m", 0, "residual"), 2),
        ("tensors", {"layer": 3}, ("org/m", 3, "residual"), 1),
        ("tensors", {"layer": 3, "site": "attention", "model": "other"}, ("other", 3, "attention"), 0),
        (None, {}, ("org/m", 0, "residual"), 2),
        ("module.lm_head", {}, ("org/m", 0, "residual"), 2),
        ("residual2", {"site": "mlp"}, ("org/m", 2, "mlp"), 0),
    ],
)
def test_the_origin_is_recorded_given_or_assumed(
    site: str | None, given: dict[str, str | int], expected: tuple[str, int, str], n_assumed: int
) -> None:
    origin = origin_of(manifest_for(random_native("relu"), site=site), **given)  # type: ignore[arg-type]
    assert (origin.model, origin.layer, origin.site) == expected
    assert len(origin.assumed) == n_assumed


@pytest.mark.parametrize("name", FORMATS)
def test_a_k_that_rounds_to_nothing_is_refused(name: str) -> None:
    sae = random_native("topk")
    sae.k = 0.4
    reason = FORMATS[name].refusal(sae)
    assert reason is not None
    assert "0.4 rounds to 0" in reason or name in ("gemma_scope", "gemma_scope_2", "openai")


@pytest.mark.parametrize(
    ("side", "module", "expected"),
    [
        ("input", "model.layers.2.self_attn.o_proj", "model.layers.2.self_attn.o_proj.input"),
        ("output", "gpt_neox.layers.2", "gpt_neox.layers.2.output"),
        (None, None, "model.layers.2.self_attn.o_proj.input"),
    ],
)
def test_the_header_of_gemma_scope_2_names_the_recorded_module(
    side: str | None, module: str | None, expected: str, tmp_path: Path
) -> None:
    sae = random_native("threshold")
    manifest = replace(
        manifest_for(sae, site="attention2"), source=ActivationSource(model="org/m", module=module, side=side)
    )
    opened = Opened(sae=sae, manifest=manifest, format_name="ours")
    (done,) = export([Source(name="one", open=lambda: opened, run=None)], FORMATS["gemma_scope_2"], tmp_path / "out")
    assert json.loads((done.directory / "config.json").read_text())["hf_hook_point_in"] == expected
