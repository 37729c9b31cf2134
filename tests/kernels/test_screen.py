"""Screened pre-activations: near ones never hide a pair, and what is kept is what sorting the exact ones keeps.

Near ones are made by plain fp32 products over rounded factors here, so that any processor runs these tests; one test
holds the product that a processor with bf16 units makes to the same.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_selection import check_layout, pairs
from torch import Tensor

from sae_train import kernels
from sae_train.kernels import Screened
from sae_train.ranks.interface import Ranks, Solo
from sae_train.sparsifiers import penalised
from tools import grid_world as world
from tools.grid_of_threads import on_grid
from tools.sae_parts import inputs_of
from tools.small_runs import kept_by_sorting

screen = sys.modules["sae_train.kernels.screen"]
SMALL = settings(deadline=None, max_examples=80)


@pytest.fixture(scope="module", autouse=True)
def _one_by_one() -> Iterator[None]:
    """Have candidates computed one by one however many they are, so that their values are the oracle's to the bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.screened, "MANY", 2.0)
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    world.write_activations(folder)
    return folder


KINDS = ["normal", "ties", "outliers", "few", "none", "tiny", "biased", "apart", "crossing"]
PRECISIONS = ["float32", "bf16"]
GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1)]


def factors(kind: str, n: int, d: int, f: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [n, d], W [f, d] and b [f] whose pre-activations are easy or hard to tell apart."""
    generator = torch.Generator().manual_seed(seed)
    x, W, b = (torch.randn(*shape, generator=generator) for shape in ((n, d), (f, d), (f,)))
    b *= 0.1
    if kind == "ties":  # equal rows have equal pre-activations; so have those of small whole numbers
        x, W, b = x.round(), W.round()[torch.arange(f) // 3], torch.zeros(f)
    elif kind == "outliers":
        x[::3] *= 100
        W[::5] *= 0.01
    elif kind == "few":
        b -= 2.0 * d**0.5
    elif kind == "none":
        b -= 100.0 * d
    elif kind == "tiny":
        x *= 1e-6
        W *= 1e-6
        b *= 1e-12
    elif kind == "apart":  # one row of W spoils the bound that tokens have of all
        W[0] *= 1e4
    elif kind == "crossing":  # of the first token rounding decides about the sign
        b = 1e-4 * torch.randn(f, generator=generator) - W @ x[0]
    elif kind == "biased":
        b = 50 + b
    return x, W, b


def rounded_product(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Return what a bf16 product over these fp32 factors leaves: fp32 sums, rounded once."""
    return (x.bfloat16().float() @ W.bfloat16().float().t() + b.bfloat16().float()).bfloat16()


def screened(x: Tensor, W: Tensor, b: Tensor, *, precision: str) -> Screened:
    rounded = (screen.rounded_rows(x, torch.ones(len(x))), screen.rounded_rows(W, b))
    found = screen.screened(rounded_product(x, W, b), x, W, b, rounded=rounded, precision=precision)
    assert isinstance(found, Screened)
    return found


def whole(pre: Screened) -> Tensor:
    """Return all exact pre-activations [N, F]."""
    return pre.exact(torch.arange(pre.near_NF.numel())).view(pre.shape)


@st.composite
def cases(draw: Any, *, tokens: int = 1, features: int = 1) -> tuple[tuple[Tensor, Tensor, Tensor], str]:
    """Factors, and a precision."""
    n, f = tokens * draw(st.integers(1, 12)), draw(st.integers(features, 48))
    kind, d, seed = draw(st.sampled_from(KINDS)), draw(st.integers(1, 40)), draw(st.integers(0, 2**31))
    return factors(kind, n, d, f, seed=seed), draw(st.sampled_from(PRECISIONS))


@SMALL
@given(case=cases())
def test_near_ones_are_as_near_as_they_say(case: tuple[tuple[Tensor, Tensor, Tensor], str]) -> None:
    (x, W, b), precision = case
    pre = screened(x, W, b, precision=precision)
    a = pre.x_ND.double() @ pre.W_FD.double().t() + b.double()
    acc = x.bfloat16().double() @ W.bfloat16().double().t() + b.bfloat16().double()
    miss = (acc - a).abs()
    rounding = 2.0**-22 * (acc.abs() + a.abs())  # of the bound itself, in fp32
    assert bool((miss <= pre.error_N1 + rounding).all())
    assert bool((miss <= pre.error_1F + rounding).all())
    magnitude = pre.x_ND.double().abs() @ pre.W_FD.double().abs().t() + b.double().abs()
    assert bool(((whole(pre).double() - a).abs() <= 1e-5 * magnitude).all())
    sums = x.bfloat16().float() @ W.bfloat16().float().t() + b.bfloat16().float()  # as a product in bf16 has them
    missed, of_result = (sums.double() - whole(pre).double()).abs(), 2.0**-23 * sums.abs()
    assert bool((missed <= torch.minimum(pre.error_N1, pre.error_1F) + of_result).all())


@SMALL
@given(
    case=cases(), share=st.floats(0, 1.2) | st.floats(0, 0.1), cut=st.none() | st.sampled_from([0.0, 1e-30, 1.0, 1e30])
)
def test_batch(case: tuple[tuple[Tensor, Tensor, Tensor], str], share: float, cut: float | None) -> None:
    pre = screened(*case[0], precision=case[1])
    exact_NF, hint = whole(pre), kernels.Hint()
    if cut is not None:
        hint.learn(torch.tensor(cut))
    budget = max(1, round(share * exact_NF.numel()))
    for _ in range(2):  # with a wrong hint or none, then with a better one
        matches = kernels.select_batch(
            pre, budget=budget, capacity=budget, n_features=pre.shape[1], ranks=Solo(), hint=hint
        )
        check_layout(matches, exact_NF, capacity=budget)
        assert pairs(matches) == kept_by_sorting(exact_NF, group="batch", budgets=[budget])


@SMALL
@given(case=cases(), k=st.integers(1, 50) | st.integers(1, 3))
def test_rows(case: tuple[tuple[Tensor, Tensor, Tensor], str], k: int) -> None:
    pre = screened(*case[0], precision=case[1])
    exact_NF, capacity = whole(pre), k * pre.shape[0]
    matches = kernels.select_rows(pre, k=k, capacity=capacity, n_features=pre.shape[1], ranks=Solo())
    check_layout(matches, exact_NF, capacity=capacity)
    assert pairs(matches) == kept_by_sorting(exact_NF, group="row", budgets=[k] * pre.shape[0])


@SMALL
@given(case=cases(), data=st.data())
def test_columns(case: tuple[tuple[Tensor, Tensor, Tensor], str], data: st.DataObject) -> None:
    pre = screened(*case[0], precision=case[1])
    n, f = pre.shape
    budgets = data.draw(st.lists(st.integers(0, n), min_size=f, max_size=f))
    exact_NF, capacity = whole(pre), sum(budgets) + 1
    matches = kernels.select_columns(pre, budget_F=torch.tensor(budgets), capacity=capacity, ranks=Solo())
    check_layout(matches, exact_NF, capacity=capacity)
    assert pairs(matches) == kept_by_sorting(exact_NF, group="column", budgets=budgets)


@SMALL
@given(
    case=cases(), level=st.sampled_from([0.0, -0.5, 0.5, 3.0, -1e-3]), seed=st.integers(0, 99), share=st.floats(0, 1)
)
def test_above(case: tuple[tuple[Tensor, Tensor, Tensor], str], level: float, seed: int, share: float) -> None:
    """Bounds of either sign, strictly; None where they may be too many, never where there surely are fewer."""
    pre = screened(*case[0], precision=case[1])
    exact_NF = whole(pre)
    bound_F = level * torch.rand(pre.shape[1], generator=torch.Generator().manual_seed(len(exact_NF)))
    bound_F[::3] = exact_NF[0, ::3]
    matches = kernels.select_few_above(pre, bound_F, most=exact_NF.numel())
    assert matches is not None
    check_layout(matches, exact_NF, capacity=len(matches.value))
    assert pairs(matches) == {(t, f) for t, f in (exact_NF > bound_F).nonzero().tolist()}
    most = share * exact_NF.numel()
    fewer = kernels.select_few_above(pre, bound_F, most=most)
    if fewer is None:
        assert float((exact_NF > bound_F - 3 * pre.error_1F - 2.0**-7 * (bound_F.abs() + pre.error_1F)).sum()) > most
    else:
        assert all(torch.equal(a, b) for a, b in zip(fewer, matches, strict=True))


@SMALL
@given(case=cases(), k=st.integers(1, 8), seed=st.integers(0, 99))
def test_rows_among_allowed_columns(case: tuple[tuple[Tensor, Tensor, Tensor], str], k: int, seed: int) -> None:
    pre = screened(*case[0], precision=case[1])
    allowed_F = torch.rand(pre.shape[1], generator=torch.Generator().manual_seed(seed)) < 0.4
    exact_NF = torch.zeros(pre.shape).masked_scatter(
        allowed_F.expand(pre.shape), pre.columns(allowed_F.nonzero().squeeze(1))
    )
    matches = kernels.select_rows(
        pre, k=k, capacity=k * pre.shape[0], n_features=pre.shape[1], ranks=Solo(), allowed_F=allowed_F
    )
    check_layout(matches, exact_NF, capacity=k * pre.shape[0])
    assert pairs(matches) == kept_by_sorting(exact_NF, group="row", budgets=[k] * pre.shape[0])


@SMALL
@given(
    grid=st.sampled_from(GRIDS),
    case=cases(tokens=6, features=2),
    share=st.floats(0, 0.3),
    k=st.integers(1, 4),
    of_cut=st.floats(0, 1.5),
    many=st.just(2.0) | st.floats(0, 0.5),
)
def test_on_several_ranks(
    grid: tuple[int, int],
    case: tuple[tuple[Tensor, Tensor, Tensor], str],
    share: float,
    k: int,
    of_cut: float,
    many: float,
) -> None:
    """Every grid keeps the pairs that one process keeps, though each rank bounds the errors of its own share.

    And though a hint may let through too many on some ranks only.
    """
    (x, W, b), precision = case
    n_tokens, n_features = len(x), len(W)
    exact_NF = whole(screened(x, W, b, precision=precision))
    budget = round(share * exact_NF.numel())
    budget_F = torch.full((n_features,), k)
    cut = exact_NF.flatten().topk(max(1, budget)).values[-1]

    def work(ranks: Ranks) -> list[set[tuple[int, int]]]:
        lo, hi = ranks.features.slice(n_features)
        own = n_tokens // ranks.data.size
        first = ranks.data.rank * own
        pre: kernels.PreActivations = screened(x[first : first + own], W[lo:hi], b[lo:hi], precision=precision)
        if ranks.rank % 2:  # as on a processor without such products
            pre = exact_NF[first : first + own, lo:hi]
        given = {"n_features": n_features, "ranks": ranks}
        most = own * (hi - lo)
        if many < 2:
            hint = kernels.Hint()
            hint.learn(of_cut * cut)
            kept = [kernels.select_batch(pre, budget=budget, capacity=budget, hint=hint, **given)]
        else:  # where it is less the whole product's values are kept of rows and columns
            kept = [
                kernels.select_batch(pre, budget=budget, capacity=budget, **given),
                kernels.select_rows(pre, k=k, capacity=own * k, **given),
                kernels.select_columns(pre, budget_F=budget_F[lo:hi], capacity=most, ranks=ranks),
            ]
        return [pairs(matches, first=(first, lo)) for matches in kept]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.screened, "MANY", many)
        found = [set().union(*parts) for parts in zip(*on_grid(grid, work), strict=True)]
    expected = [
        kept_by_sorting(exact_NF, group="batch", budgets=[budget]),
        kept_by_sorting(exact_NF, group="row", budgets=[k] * n_tokens),
        kept_by_sorting(exact_NF, group="column", budgets=[k] * n_features),
    ]
    assert found == expected[: len(found)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("spoiled", ["x", "W", "b"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_ends_in_a_layout(precision: str, spoiled: str, value: float) -> None:
    """Such a step is void; it must come to its end, in the shape of any other, and keep no NaN."""
    parts = dict(zip("xWb", factors("normal", 64, 16, 96, seed=0), strict=True))
    parts[spoiled].view(-1)[37] = value
    pre = screened(parts["x"], parts["W"], parts["b"], precision=precision)
    for matches in (
        kernels.select_batch(pre, budget=300, capacity=300, n_features=96, ranks=Solo()),
        kernels.select_rows(pre, k=5, capacity=320, n_features=96, ranks=Solo()),
        kernels.select_columns(pre, budget_F=torch.full((96,), 3), capacity=288, ranks=Solo()),
    ):
        assert not matches.value.isnan().any()
        assert int(matches.start[-1]) <= len(matches.value)


def test_little_is_computed_twice() -> None:
    """Normal directions, a 64th kept: near bounds let through little more than what is kept."""
    x, W, b = factors("normal", 512, 384, 2048, seed=1)
    pre = screened(x, W, b, precision="float32")
    budget, hint = 512 * 32, kernels.Hint()
    seen: list[int] = []
    exact = Screened.exact

    def counted(self: Screened, index: Tensor) -> Tensor:
        seen.append(len(index))
        return exact(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Screened, "exact", counted)
        for _ in range(2):
            kernels.select_batch(pre, budget=budget, capacity=budget, n_features=2048, ranks=Solo(), hint=hint)
    assert len(seen) == 2
    assert seen[0] < 2.5 * budget
    assert seen[1] < 1.6 * budget


@pytest.mark.parametrize("kind", ["apart", "none", "dead"])
def test_nothing_makes_it_compute_much_more(kind: str) -> None:
    """A large row, or no positive pair, or columns without one: no more than a part of the pairs, else the product."""
    x, W, b = factors("normal" if kind == "dead" else kind, 512, 64, 2048, seed=1)
    if kind == "dead":
        b[::3] = -1e3
    budget_F = torch.full((2048,), 8)
    budget_F[::7] = 0
    pre, seen = screened(x, W, b, precision="float32"), []
    exact = Screened.exact

    def counted(self: Screened, index: Tensor) -> Tensor:
        seen.append(len(index))
        return exact(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Screened, "exact", counted)
        patch.setattr(kernels.screened, "MANY", 1 / 16)
        kernels.select_batch(pre, budget=16384, capacity=16384, n_features=2048, ranks=Solo())
        kernels.select_rows(pre, k=32, capacity=16384, n_features=2048, ranks=Solo())
        kernels.select_columns(pre, budget_F=budget_F, capacity=16384, ranks=Solo())
    assert all(n < 3 * 16384 for n in seen), seen


@SMALL
@given(case=cases(), share=st.floats(0, 1))
def test_where_many_are_near_the_product_is_computed(
    case: tuple[tuple[Tensor, Tensor, Tensor], str], share: float
) -> None:
    """Rows keep its values; a batch those of pairs one by one, as a hint may spare it the product."""
    pre = screened(*case[0], precision=case[1])
    (n, f), whole_NF, exact_NF = pre.shape, pre.columns(torch.arange(pre.shape[1])), whole(pre)
    budget, k = max(1, round(share * n * f)), max(1, round(share * f))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.screened, "MANY", -1.0)
        of_batch = kernels.select_batch(pre, budget=budget, capacity=budget, n_features=f, ranks=Solo())
        of_rows = kernels.select_rows(pre, k=k, capacity=k * n, n_features=f, ranks=Solo())
    check_layout(of_batch, exact_NF, capacity=budget)
    assert pairs(of_batch) == kept_by_sorting(exact_NF, group="batch", budgets=[budget])
    check_layout(of_rows, whole_NF, capacity=k * n)
    assert pairs(of_rows) == kept_by_sorting(whole_NF, group="row", budgets=[k] * n)


def test_the_processor_makes_the_same_near_ones() -> None:
    """Its sums differ in their order alone: where that moves a rounding, by the last bit."""
    if not screen.has_bf16_products():
        pytest.skip("this processor has no AMX")
    for n, d, f in ((96, 64, 128), (33, 7, 41), (2048, 384, 1536)):
        x, W, b = factors("normal", n, d, f, seed=n)
        pre = kernels.screen(x, W, b, precision="float32", out=torch.empty(n, f, dtype=torch.bfloat16))
        expected = rounded_product(x, W, b)
        assert float((pre.near_NF != expected).float().mean()) < 0.01
        torch.testing.assert_close(pre.near_NF, expected, rtol=2.0**-7, atol=1e-4)
        a = x.double() @ W.double().t() + b.double()
        miss = (pre.near_NF.double() - a).abs() - 2.0**-8 * pre.near_NF.double().abs()
        assert bool((miss <= torch.minimum(pre.error_N1, pre.error_1F)).all())


@pytest.mark.parametrize(("kept", "is_screened"), [(10.0, True), (10.5, False), (float("inf"), False)])
def test_only_few_kept_are_screened(monkeypatch: pytest.MonkeyPatch, kept: float, is_screened: bool) -> None:
    monkeypatch.setattr(screen, "has_bf16_products", lambda: True)
    cpu = torch.device("cpu")
    assert kernels.can_screen(n_features=480, kept_a_token=kept, device=cpu, dtype=torch.float32) == is_screened
    assert not kernels.can_screen(n_features=480, kept_a_token=kept, device=cpu, dtype=torch.float64)


FEATURE_CHOICE = ["sparsifier=feature_choice", "sparsifier.after=0.25"]
PRICED = [[f"sparsifier={name}"] for name in ("jumprelu", "relu", "gated", "temporal_mask")]
SPARSIFIERS = [
    *PRICED,
    ["sparsifier=mutual_choice"],
    ["sparsifier=topk", "sparsifier.multi_weight=0.125"],
    FEATURE_CHOICE,
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("overrides", SPARSIFIERS, ids=lambda overrides: overrides[0].partition("=")[2])
def test_a_run_is_the_same_but_for_the_order_of_sums(
    rows: Path, monkeypatch: pytest.MonkeyPatch, precision: str, overrides: list[str]
) -> None:
    """Screened or computed whole, with features that an auxiliary loss revives: the same matches, and nearly so on.

    Less nearly in bf16, where a difference in an fp32 number's last bit is one of 2^-8 in one of so many weights.
    """
    trained = []
    for is_screened in (False, True):
        monkeypatch.setattr(screen, "has_bf16_products", lambda answer=is_screened: answer)
        said = overrides if overrides in PRICED else [*overrides, "aux_loss=aux_k"]
        monkeypatch.setattr(penalised, "DENSE_FROM", 1)  # without their zeros from the start
        config = world.config_of(rows, said, precision=precision, steps=40, n_features=1536)
        trainer = world.build(config, Solo())
        assert trainer.learners[0].is_screened == is_screened
        first = trainer.stream.batch(0)
        learner = trainer.learners[0]
        inputs = dataclasses.replace(inputs_of(trainer, first.x_ND), pre_NF=learner._pre_activations(first.x_ND))
        code = learner.sparsifier.encode(learner.dictionary, inputs).code
        for step in range(20):
            trainer.step(trainer.stream.batch(step))
        trained.append((code, {name: p.detach() for name, p in trainer.learners[0].dictionary.named_parameters()}))
    (whole_code, expected), (code, found) = trained
    assert torch.equal(code.start, whole_code.start)
    assert torch.equal(code.feature, whole_code.feature)
    torch.testing.assert_close(code.value, whole_code.value, rtol=1e-5, atol=1e-6)
    for name, parameter in expected.items():
        difference = float((found[name] - parameter).norm() / parameter.norm())
        assert difference < (1e-2 if precision == "bf16" else 1e-3), name


@SMALL
@given(
    case=cases(), share=st.floats(0, 1), of_cut=st.floats(0, 1.5) | st.sampled_from([0.99, 1.01]), many=st.floats(-1, 1)
)
def test_no_hint_moves_a_bit(
    case: tuple[tuple[Tensor, Tensor, Tensor], str], share: float, of_cut: float, many: float
) -> None:
    """However many entries a hint, or the want of one, lets through: values are the same numbers."""
    pre = screened(*case[0], precision=case[1])
    exact_NF = whole(pre)
    budget = max(1, round(share * exact_NF.numel()))
    hint = kernels.Hint()
    cut = exact_NF.flatten().topk(budget).values[-1]
    hint.learn(of_cut * cut)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for at, hinted in ((2.0, None), (many, None), (many, hint), (many, hint), (0.0, hint)):
            patch.setattr(kernels.screened, "MANY", at)
            found.append(
                kernels.select_batch(
                    pre, budget=budget, capacity=budget, n_features=pre.shape[1], ranks=Solo(), hint=hinted
                )
            )
    assert pairs(found[0]) == kept_by_sorting(exact_NF, group="batch", budgets=[budget])
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, found[0], strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_that_forgets_its_hints_goes_on_to_the_bit(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that is resumed: of rows whose norms wander, so that hints are now far off, now near."""
    monkeypatch.setattr(kernels.screened, "MANY", 1 / 16)
    monkeypatch.setattr(screen, "has_bf16_products", lambda: True)
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(6000, 64, generator=generator) * (torch.rand(6000, 64, generator=generator) < 0.06)
    size = torch.exp(0.15 * torch.randn(6000 // 50, 1, generator=generator)).repeat_interleave(50, dim=0)
    save_file({"activations": size * codes @ torch.randn(64, 32, generator=generator)}, tmp_path / "rows.safetensors")
    case = ["sparsifier=mutual_choice", "aux_loss=none"]
    config = world.config_of(tmp_path, case, precision=precision, steps=16, n_features=320)
    ends = []
    for forgotten in ((), (1, 2, 5), (3, 4, 11)):
        trainer = world.build(config, Solo())
        assert trainer.learners[0].is_screened
        for step in range(16):
            if step in forgotten:
                trainer.learners[0].sparsifier._hint = kernels.Hint()
            trainer.step(trainer.stream.batch(step))
        ends.append([parameter.detach().clone() for parameter in trainer.learners[0].dictionary.parameters()])
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(end, ends[0], strict=True))
