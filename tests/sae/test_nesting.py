"""Matryoshka: each prefix's reconstruction against a decode of its own, its gradients, its shards and its refusals."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_train.config import MatryoshkaConfig, NestingConfig
from sae_train.errors import ConfigError
from sae_train.ranks.interface import Ranks, Solo
from sae_train.sae.code import SparseCode
from sae_train.sae.losses import reconstruct, reconstruction_loss
from sae_train.sae.nesting import decode_prefixes, prefix_sizes
from sae_train.sae.trainable import TrainableAutoencoder
from tools.command_line import Command, changed
from tools.grid_of_threads import on_grid
from tools.small_runs import run_config

D_MODEL, FEATURES = 5, 12


def dictionary_of(features: tuple[int, int] | None = None) -> TrainableAutoencoder:
    return TrainableAutoencoder.initial(
        d_model=D_MODEL, n_features=FEATURES, seed=1, dtype=torch.float64, device="cpu", features=features
    )


def code_of(dense_NF: torch.Tensor, *, spare: int = 0) -> SparseCode:
    """Return a code with these values, differentiable in them, and `spare` unused slots."""
    token, feature = dense_NF.nonzero(as_tuple=True)
    pad = torch.zeros(spare, dtype=torch.int32)
    start = torch.cat([torch.zeros(1), (dense_NF != 0).sum(1).cumsum(0)]).int()
    return SparseCode(
        value=torch.cat([dense_NF[token, feature], dense_NF.new_zeros(spare)]),
        feature=torch.cat([feature.int(), pad]),
        token=torch.cat([token.int(), pad]),
        start=start,
        shape=(len(dense_NF),),
        n_features=dense_NF.shape[1],
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, ...], int]:
    n_tokens = draw(st.integers(1, 6))
    values = draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.5]), min_size=n_tokens * FEATURES,
                           max_size=n_tokens * FEATURES))  # fmt: skip
    smaller = draw(st.sets(st.integers(1, FEATURES - 1), max_size=4))
    dense = torch.tensor(values, dtype=torch.float64).view(n_tokens, FEATURES)
    return dense, (*sorted(smaller), FEATURES), draw(st.integers(0, 3))


@given(cases())
def test_each_prefix_is_a_decode_of_its_own(case: tuple[torch.Tensor, tuple[int, ...], int]) -> None:
    dense_NF, sizes, spare = case
    dictionary = dictionary_of()
    torch.nn.init.normal_(dictionary.b_dec, generator=torch.Generator().manual_seed(0))
    x_ND = torch.randn(len(dense_NF), D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    slow_NF = dense_NF.clone().requires_grad_()
    slow = sum(
        reconstruction_loss(x_ND, slow_NF[:, :size] @ dictionary.W_dec[:size] + dictionary.b_dec, n_tokens=7)
        for size in sizes
    )
    assert isinstance(slow, torch.Tensor)
    slow.backward()
    expected = {name: p.grad for name, p in dictionary.named_parameters()}
    dictionary.zero_grad(set_to_none=True)

    fast_NF = dense_NF.clone().requires_grad_()
    code = code_of(fast_NF, spare=spare)
    errors, fast = reconstruct(dictionary, x_ND, code, sizes=sizes, n_tokens=7, ranks=Solo())
    fast.backward()
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(errors.error, x_ND - dense_NF @ dictionary.W_dec - dictionary.b_dec, check_dtype=True)
    torch.testing.assert_close(errors.norm, errors.error.norm(dim=1))
    kept = dense_NF != 0
    assert fast_NF.grad is not None
    assert slow_NF.grad is not None
    torch.testing.assert_close(fast_NF.grad[kept], slow_NF.grad[kept])
    for name in ("W_dec", "b_dec"):
        torch.testing.assert_close(dict(dictionary.named_parameters())[name].grad, expected[name])


@pytest.mark.parametrize("grid", [(1, 2), (1, 3), (2, 2)])
def test_shards_of_the_features_make_the_same_prefixes(grid: tuple[int, int]) -> None:
    sizes = (2, 3, 7, FEATURES)
    dense_NF = torch.rand(6, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    dense_NF = torch.where(dense_NF > 0.6, dense_NF, 0)
    whole = decode_prefixes(dictionary_of(), code_of(dense_NF), sizes, ranks=Solo())

    def share(ranks: Ranks) -> torch.Tensor:
        lo, hi = ranks.features.slice(FEATURES)
        first, last = ranks.data.slice(6)
        own = code_of(dense_NF[first:last, lo:hi])
        return decode_prefixes(dictionary_of((lo, hi)), own, sizes, ranks=ranks)

    found = on_grid(grid, share)
    for rank, prefixes in enumerate(found):
        row = rank // grid[1]
        tokens = slice(row * 6 // grid[0], (row + 1) * 6 // grid[0])
        torch.testing.assert_close(prefixes, whole[:, tokens])


def matryoshka(*prefixes: float) -> MatryoshkaConfig:
    return MatryoshkaConfig(name="matryoshka", prefixes=list(prefixes))


def test_prefixes_are_counted_in_whole_features() -> None:
    assert prefix_sizes(NestingConfig(name="none"), n_features=100) == (100,)
    assert prefix_sizes(matryoshka(1 / 32, 3 / 32, 7 / 32, 15 / 32, 1), n_features=65536) == (
        2048, 6144, 14336, 30720, 65536,
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"0.25 of n_features=102 is 25.5, not a whole .* Nearest n_features: 100 or 104"
    ):
        prefix_sizes(matryoshka(0.25, 0.5, 1.0), n_features=102)
    with pytest.raises(ConfigError, match="Choose other shares"):
        prefix_sizes(matryoshka(0.3701, 0.501, 1.0), n_features=100)


@pytest.mark.parametrize(
    ("prefixes", "said"),
    [
        ([0.25, 0.5], "the last prefix must be 1"),
        ([], "the last prefix must be 1"),
        ([0.5, 0.25, 1.0], "must be above 0 and ascend"),
        ([0.5, 0.5, 1.0], "must be above 0 and ascend"),
        ([0.0, 1.0], "must be above 0 and ascend"),
        ([1.0], "one prefix nests nothing"),
    ],
)
def test_prefixes_that_mean_nothing_are_refused(prefixes: list[float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_config(prefixes=prefixes)


@pytest.mark.parametrize(
    "sparsifier",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("mutual_choice", "topk", "feature_choice")],
)
def test_a_nested_run_is_made_and_loads(tmp_path: Path, command: Command, tiny: list[str], sparsifier: str) -> None:
    import sae_train

    done = command(*changed(tiny, f"sparsifier={sparsifier}", "nesting=matryoshka", "tokens=4096"))
    assert done.status == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert f"{sparsifier}.matryoshka.k8" in run.name
    sae = sae_train.load(run)
    assert sae.config["prefixes"] == [8, 24, 56, 120, 256]
    refused = command(*changed(tiny, "nesting=matryoshka", "n_features=250"))
    assert refused.status == 2
    assert "Nearest n_features: 224 or 256." in refused.stderr
