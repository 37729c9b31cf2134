"""Kernels that Numba compiles against plain torch and slow oracles, on any number of threads, and where they cannot
run."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_kernels import Problem, gradients, problem, sparse_reconstruction, with_rounded_rows
from torch import Tensor

from sae_train import kernels
from sae_train.kernels import (
    Workspace,
    backend,
    matches,
    numba_adam,
    numba_groups,
    numba_leading,
    numba_products,
    numba_scan,
    screened,
)
from sae_train.ranks.interface import Solo
from sae_train.training.optimizer import Adam
from sae_train.training.sphere_adam import SphereAdam
from tools import grid_world as world
from tools.small_runs import torch_threads

candidates, screen = (sys.modules[f"sae_train.kernels.{name}"] for name in ("candidates", "screen"))
SMALL = settings(deadline=None, max_examples=60)
THREADS = st.integers(1, 4)
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-39, 1.0, -1.0, 3e38, float("inf"), float("-inf"), float("nan")]
NUMBERS = st.sampled_from(SPECIAL) | st.floats(width=32)

SQUARED = st.sampled_from([x for x in SPECIAL if abs(x) != 3e38]) | st.floats(-(2.0**60), 2.0**60, width=32)
"""Numbers that have a square, or are none."""


@contextmanager
def plain() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "why_not_numba", lambda: "this test asks for plain torch")
        yield


def test_they_run_here() -> None:
    """Else the tests below would hold plain torch to itself."""
    if sys.platform != "linux":
        pytest.skip("compiled kernels run on Linux, by GNU's OpenMP")
    assert backend.why_not_numba() is None
    assert backend.notices(torch.device("cpu"), precision="float32", asked="auto") == []


@st.composite
def scans(draw: Any) -> tuple[Tensor, Tensor]:
    """Entries [N, F] and a bound of each row, of each column, or of all; alike, bf16 or fp32."""
    n, f = draw(st.integers(1, 9)), draw(st.integers(1, 40) | st.integers(60, 200))
    few = draw(st.lists(NUMBERS, min_size=1, max_size=6))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, f, generator=generator)
    chosen = torch.tensor(few)[torch.randint(len(few), (n, f), generator=generator)]
    entries = torch.where(torch.rand(n, f, generator=generator) < 0.5, drawn, chosen)
    entries = torch.where(torch.rand(n, f, generator=generator) < 0.5, entries, -entries)  # NaN of either sign
    shape = draw(st.sampled_from([(n, 1), (1, f), ()]))
    count = max(1, n if shape == (n, 1) else f if shape else 1)
    bound = torch.tensor(draw(st.lists(NUMBERS, min_size=count, max_size=count))).reshape(shape)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return entries.to(dtype), bound.to(dtype)


@SMALL
@given(case=scans(), n_threads=THREADS, most=st.none() | st.integers(0, 30))
@example(case=(torch.tensor([[torch.inf]]).bfloat16(), torch.tensor(1.0).bfloat16()), n_threads=1, most=None)
def test_what_reaches_a_bound(case: tuple[Tensor, Tensor], n_threads: int, most: int | None) -> None:
    """All of it, however many; of bf16 NaN may be among it."""
    entries, bound = case
    expected = (entries >= bound).reshape(-1).nonzero().squeeze(1)
    with torch_threads(n_threads):
        index = matches.flat_reaching(entries, bound)
        few = matches.few_reaching(entries, bound, most=len(expected) if most is None else most)
    is_number = ~entries.reshape(-1)[index].isnan()
    assert torch.equal(index[is_number], expected)
    assert torch.equal(index, index.sort().values)
    assert entries.dtype == torch.bfloat16 or bool(is_number.all())
    most = len(expected) if most is None else most
    assert (few is None) == (len(index) > most)
    assert few is None or torch.equal(few, index)


def test_more_than_there_was_room_for_is_looked_for_again() -> None:
    entries = torch.rand(300, 70, generator=torch.Generator().manual_seed(0)) + 0.1
    entries[:150] = 0
    for dtype in (torch.float32, torch.bfloat16):
        found = numba_scan.flat_reaching(entries.to(dtype), torch.full((300, 1), 0.05, dtype=dtype), most=torch.inf)
        assert found is not None
        assert found.tolist() == list(range(150 * 70, 300 * 70))


@SMALL
@given(
    values=st.lists(
        st.sampled_from([0.25, 0.5, 1.0, 2.0, float("inf")]) | st.floats(2.0**-90, 2.0**90, width=32), max_size=60
    ),
    n_groups=st.integers(1, 7),
    seed=st.integers(0, 2**31),
    n_threads=THREADS,
)
def test_leading_entries_of_groups(values: list[float], n_groups: int, seed: int, n_threads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    value, group = torch.tensor(values), torch.randint(n_groups, (len(values),), generator=generator)
    budget_G = torch.randint(6, (n_groups,), generator=generator)
    kept = []
    for each in range(n_groups):
        members = [i for i in range(len(values)) if group[i] == each]
        kept += sorted(members, key=lambda i: (-value[i], i))[: budget_G[each]]
    with torch_threads(n_threads):
        keep = numba_groups.leading(value, group, budget_G)
        order, start_G = numba_groups.by_group(group, n_groups)
    assert keep.nonzero().squeeze(1).tolist() == sorted(kept)
    assert torch.equal(order, group.sort(stable=True).indices)
    assert start_G.tolist() == [int((group < each).sum()) for each in range(n_groups + 1)]
    with plain():
        assert torch.equal(candidates._leading(value, group, budget_G), keep)


def test_a_long_group_of_few_different_values() -> None:
    """Quick selection must not take a square of its length."""
    for value in (torch.ones(300_000), torch.arange(300_000.0) + 1, (torch.arange(300_000) % 3 + 1.0)):
        group, budget_G = torch.zeros(len(value), dtype=torch.int64), torch.tensor([100_000])
        keep = numba_groups.leading(value, group, budget_G)
        order = value.sort(descending=True, stable=True).indices
        assert torch.equal(keep.nonzero().squeeze(1), order[:100_000].sort().values)


@SMALL
@given(
    n=st.integers(1, 9), f=st.integers(1, 150), size=st.sampled_from([1, 2, 4, 16]), k=st.integers(1, 40),
    few=st.lists(NUMBERS, min_size=1, max_size=6), share=st.floats(0, 1), seed=st.integers(0, 2**31), n_threads=THREADS,
    error=st.sampled_from([0.0, 1e-30, 0.1, 1.0, float("inf"), float("nan")]),
)  # fmt: skip
def test_leading_of_rows(
    n: int, f: int, size: int, k: int, few: list[float], share: float, seed: int, n_threads: int, error: float
) -> None:
    """The bound that maxima give, and what reaches it, as plain torch finds them one after the other."""
    generator = torch.Generator().manual_seed(seed)
    near = torch.randn(n, f, generator=generator)
    picked = torch.tensor(few)[torch.randint(len(few), (n, f), generator=generator)]
    near = torch.where(torch.rand(n, f, generator=generator) < share, picked, near).bfloat16()
    near = torch.where(torch.rand(n, f, generator=generator) < 0.5, near, -near)  # NaN of either sign
    error_N1 = error * torch.rand(n, 1, generator=generator)
    pre = screened.Screened(
        near_NF=near, x_NP=torch.zeros(n, 1), W_FP=torch.zeros(f, 1), b_F=torch.zeros(f), width=1, error_N1=error_N1,
        error_1F=error_N1[:1],
    )  # fmt: skip
    with torch_threads(n_threads):
        shares = {"of_near": 1 - screened.ROUNDOFF, "of_exact": 1 - 2 * screened.SUM_ROUNDOFF}
        bound, index = numba_leading.leading_of_rows(near, error_N1, k, size=size, **shares)
    maxima = pre.lows(candidates._group_maxima(pre.bits_NF, size), error_N1)
    expected = candidates._kth_of_rows(maxima, k)
    assert torch.equal(bound, expected)
    reached = near >= screened._lowered(expected, error_N1)
    found = torch.zeros(n * f, dtype=torch.bool)
    found[index] = True
    is_number = ~near.isnan().flatten()
    assert torch.equal(found[is_number], reached.flatten()[is_number])
    assert bool((index.diff() > 0).all())


@SMALL
@given(
    n=st.integers(1, 9), d=st.integers(1, 70), special=st.lists(SQUARED, max_size=4), seed=st.integers(0, 2**31),
    n_threads=THREADS,
)  # fmt: skip
def test_rounded_rows(n: int, d: int, special: list[float], seed: int, n_threads: int) -> None:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    rows.view(-1)[: len(special)] = torch.tensor(special)[: n * d]
    last = rows[:, 0].flip(0)
    with torch_threads(n_threads):
        found = screen.rounded_rows(rows, last)
    with plain():
        expected = screen.rounded_rows(rows, last)
    assert torch.equal(found.padded.isnan(), expected.padded.isnan())
    assert torch.equal(found.padded.nan_to_num(nan=7.0), expected.padded.nan_to_num(nan=7.0))
    wanted = torch.nn.functional.pad(torch.cat([rows, last[:, None]], 1), (0, found.padded.shape[1] - d - 1))
    assert torch.equal(found.padded.isnan(), wanted.isnan())
    assert torch.equal(found.padded.nan_to_num(nan=7.0), wanted.bfloat16().nan_to_num(nan=7.0))
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-30, equal_nan=True)


def as_float64(p: Problem) -> Problem:
    W_enc, b_enc, W_dec = (each.detach().double().requires_grad_() for each in (p.W_enc, p.b_enc, p.W_dec))
    value = p.matches._replace(value=p.matches.value.double())
    return Problem(p.x.double(), W_enc, b_enc, W_dec, value, p.mask)


@SMALL
@given(n=st.integers(1, 20), d=st.integers(1, 70), f=st.integers(1, 30), seed=st.integers(0, 10**6), n_threads=THREADS)
def test_products_of_rows_in_bf16(n: int, d: int, f: int, seed: int, n_threads: int) -> None:
    """Those of float64 over rounded rows, compiled or not; compiled, bit for bit the same on one thread."""
    p, results = problem(n, d, f, seed=seed, dtype=torch.float32), []
    for on in (n_threads, 1):
        with torch_threads(on):
            results.append(with_rounded_rows(p))
    with plain():
        results.append(with_rounded_rows(p))
    for found, again, simple in zip(*results, strict=True):
        assert torch.equal(found[0], again[0])
        for one, expected in (found, simple):
            scale = float(expected.abs().max()) + 1
            torch.testing.assert_close(one.double() / scale, expected / scale, rtol=1e-5, atol=1e-5)


@SMALL
@given(
    n=st.integers(1, 6), d=st.integers(1, 70), f=st.integers(1, 12), seed=st.integers(0, 10**6), n_threads=THREADS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_an_entry_does_not_depend_on_the_others(
    n: int, d: int, f: int, seed: int, n_threads: int, dtype: torch.dtype
) -> None:
    """Bit for bit, or a run's numbers would depend on what screening lets through."""
    generator = torch.Generator().manual_seed(seed)
    x, W = (torch.randn(rows, d + 3, generator=generator).to(dtype) for rows in (n, f))
    b = torch.randn(f, generator=generator)
    index = (torch.rand(n * f, generator=generator) < 0.6).nonzero().squeeze(1)
    with torch_threads(n_threads):
        found = numba_products.entries(x, W, b, index, width=d)
        alone = [numba_products.entries(x, W, b, index[i : i + 1], width=d) for i in range(len(index))]
        start = torch.searchsorted(index, torch.arange(n + 1) * f).int()
        products = numba_products.row_products(x[:, :d], W[:, :d], (index % f).int(), start)
    assert torch.equal(found, torch.cat([*alone, torch.empty(0)]))
    assert torch.equal(found, products + b[index % f])
    expected = x[:, :d].double() @ W[:, :d].double().t() + b
    torch.testing.assert_close(found.double(), expected.flatten()[index], rtol=1e-5, atol=1e-4)


@SMALL
@given(n=st.integers(1, 20), d=st.integers(1, 70), f=st.integers(1, 30), seed=st.integers(0, 10**6), n_threads=THREADS)
def test_products_and_their_gradients(n: int, d: int, f: int, seed: int, n_threads: int) -> None:
    """Those of float64, which plain torch computes; and bit for bit the same on one thread."""
    p = problem(n, d, f, seed=seed, dtype=torch.float32)
    results = []
    for one, on in ((p, n_threads), (p, 1), (as_float64(p), 1)):
        with torch_threads(on):
            value, rows = sparse_reconstruction(one)
            row_products = kernels.row_products(one.x, one.W_dec, *one.place)
            results.append([rows, row_products, *gradients(rows.square().sum() + (value**3).sum(), one)])
    for found, again, expected in zip(*results, strict=True):
        assert torch.equal(found, again)
        scale = float(expected.detach().abs().max()) + 1
        torch.testing.assert_close(found.double() / scale, expected / scale, rtol=1e-5, atol=1e-5)


def test_nothing_of_unused_slots_and_empty_bags_is_read() -> None:
    rows = torch.full((3, 5), torch.nan)
    rows[:2] = 1
    index, weight = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([2.0, 3.0, torch.nan])
    start, order = torch.tensor([0, 0, 2, 2], dtype=torch.int32), torch.tensor([1, 0, 2])
    for n_threads in (1, 2, 3):
        with torch_threads(n_threads):
            out, totals = numba_products.bags_and_totals(rows, index, weight, start, order, out=torch.full((3, 5), 9.0))
            product = numba_products.row_products(rows, rows, index, start)
        assert out.tolist() == [[0.0] * 5, [5.0] * 5, [0.0] * 5]
        assert totals.tolist() == [0.0, 5.0, 0.0]
        assert product.tolist() == [5.0, 5.0, 0.0]


def test_a_step_of_adam_does_not_depend_on_threads() -> None:
    generator, found = torch.Generator().manual_seed(0), []
    start = [torch.randn(37, 53, generator=generator) for _ in range(3)]
    for n_threads in (1, 3):
        weight, gradient, mean = (each.clone() for each in start)
        weight /= weight.norm(dim=1, keepdim=True)
        square = mean.square()
        with torch_threads(n_threads):
            along, beside = numba_adam.along_rows(gradient, weight)
            numba_adam.move(
                weight, gradient, along, mean, square, step=torch.tensor(3.0), scale=torch.tensor(2.0),
                halted=torch.tensor(False), lr=0.01, beta1=0.9, beta2=0.98, eps=1e-8,
            )  # fmt: skip
        found.append([weight, mean, square, along, beside])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("sparsifier", ["mutual_choice", "topk", "feature_choice", "batch_topk", "jumprelu", "gated"])
def test_a_run_is_that_of_plain_torch(tmp_path: Path, sparsifier: str) -> None:
    """The same matches while weights are equal, and weights that stay near."""
    world.write_activations(tmp_path)
    aux = "none" if sparsifier in ("jumprelu", "gated") else "aux_k"
    case = [f"sparsifier={sparsifier}", f"aux_loss={aux}"]
    config = world.config_of(tmp_path, case, precision="float32", steps=3, n_features=64, dead_window=16)
    compiled = world.build(config, Solo())
    assert type(compiled.learners[0].optimizer) is SphereAdam
    with plain():
        simple = world.build(config, Solo())
    assert type(simple.learners[0].optimizer) is Adam
    for step in range(3):
        compiled.step(compiled.stream.batch(step))
        with plain():
            simple.step(simple.stream.batch(step))
    for (name, one), other in zip(world.weights(compiled).items(), world.weights(simple).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "fp64")])
def test_other_dtypes_are_plain_torchs(dtypes: tuple[str, str]) -> None:
    """Rows and weights that a kernel would misread: what plain torch says to them is said here."""
    names = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
    p = problem(9, 8, 21, seed=3, dtype=torch.float32)
    rows, W = p.x.to(names[dtypes[0]]), p.W_dec.detach().to(names[dtypes[1]])

    def found(call: Any) -> Any:
        try:
            return [each.float() for each in call()]
        except (RuntimeError, KeyError) as error:
            return type(error)

    def attached() -> tuple[Tensor, ...]:
        W_enc, b_enc = W.clone().requires_grad_(), p.b_enc.detach().to(W.dtype).requires_grad_()
        value = kernels.attach(p.matches.value.to(rows.dtype), rows, W_enc, b_enc, *p.place)
        return torch.autograd.grad(value.float().square().sum(), (W_enc, b_enc))

    for call in (attached, lambda: (kernels.row_products(rows, W, *p.place),)):
        here = found(call)
        with plain():
            there = found(call)
        assert type(here) is type(there)
        assert here is there or all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


def test_a_step_of_adam_in_another_default_dtype() -> None:
    before = torch.get_default_dtype()
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            rows = [torch.eye(3, dtype=torch.float32) for _ in range(4)]
            numba_adam.move(
                rows[0], rows[1] + 1, torch.zeros(3, dtype=torch.float32), rows[2], rows[3], step=torch.tensor(1.0),
                scale=None, halted=torch.tensor(False), lr=0.1, beta1=0.9, beta2=0.98, eps=1e-8,
            )  # fmt: skip
        finally:
            torch.set_default_dtype(before)
        found.append(rows[0])
    assert torch.equal(found[0], found[1])
    assert bool(found[0].isfinite().all())


def test_gradients_are_written_to_what_the_last_step_gave_back() -> None:
    space, like = Workspace(), torch.zeros(())
    first, second = (space.take((3, 2), like=like) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    foreign = torch.zeros(3, 2)
    space.keep([second, foreign])
    assert space.take((3, 2), like=like) is second
    assert space.take((3, 2), like=like).data_ptr() not in (second.data_ptr(), foreign.data_ptr())
    assert space.take((2, 3), like=like).shape == (2, 3)
    space.keep([])
    space.keep([second])  # no longer lent
    assert space.take((3, 2), like=like) is not second


NOTICE = """
import torch
from sae_train.kernels import backend
from sae_train.kernels.matches import flat_reaching
assert flat_reaching(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor(2.0)).tolist() == [1, 2]
print(*backend.notices(torch.device("cpu"), precision="float32", asked="auto"))
"""


def notice(before: str = "", **environment: str) -> str:
    """Return what a run on a CPU says of its kernels in a process of its own, whatever they are, they work."""
    done = subprocess.run(
        [sys.executable, "-c", before + NOTICE], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_a_place_for_compiled_files_they_are_compiled_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert notice(NUMBA_CACHE_DIR=str(tmp_path / "file")) == ""
    assert notice(NUMBA_CACHE_DIR=str(tmp_path / "file" / "below")) == ""
    package = Path(kernels.__file__).parent.parent
    shutil.copytree(package, tmp_path / "sae_train", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (tmp_path / "sae_train" / "kernels" / "__pycache__").write_text("")
    before = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    assert notice(before, XDG_CACHE_HOME=str(tmp_path / "file"), HOME=str(tmp_path / "file")) == ""
    small = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    small += "resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999))\n"  # as on a disk that is full
    assert notice(small, NUMBA_CACHE_DIR=str(tmp_path / "full")) == ""


def test_broken_compiled_files_are_not_believed(tmp_path: Path) -> None:
    assert notice(NUMBA_CACHE_DIR=str(tmp_path)) == ""
    left = [path for path in tmp_path.rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert left
    whole = {path: path.read_bytes() for path in left}
    changed = {path: bytes([*data[:40], data[40] ^ 0x40, *data[41:]]) for path, data in whole.items()}
    for broken in (dict.fromkeys(left, b""), dict.fromkeys(left, b"neither"), changed):
        for path in left:
            path.write_bytes(broken[path])
        assert notice(NUMBA_CACHE_DIR=str(tmp_path)) == ""


def test_a_forked_child_can_call_them() -> None:
    """It has none of the threads that its parent's torch keeps."""
    script = """
import os, torch
from sae_train.kernels.matches import flat_reaching
ones = torch.ones(300, 500)
assert len(flat_reaching(ones, torch.tensor(1.0))) == 150_000
child = os.fork()
if child == 0:
    os._exit(0 if len(flat_reaching(ones[:3, :4], torch.tensor(1.0))) == 12 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_fork_waits_for_what_another_thread_compiles(tmp_path: Path) -> None:
    """The child would wait for it for ever."""
    script = """
import os, signal, threading, time, torch
from sae_train.kernels import backend, numba_leading
assert backend.why_not_numba() is None
near, error = torch.ones(9, 50).bfloat16(), torch.zeros(9, 1)
def lead():
    numba_leading.leading_of_rows(near, error, 3, size=2, of_near=1.0, of_exact=1.0)
thread = threading.Thread(target=lead)
thread.start()
time.sleep(0.3)
assert thread.is_alive()
child = os.fork()
if child == 0:
    signal.alarm(60)
    lead()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
thread.join()
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_helper_that_has_changed_is_compiled_anew(tmp_path: Path) -> None:
    """Numba by itself looks at the file of the kernel, not at those that its helpers stand in."""
    package = Path(kernels.__file__).parent.parent
    shutil.copytree(package, tmp_path / "sae_train", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    before = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    assert notice(before) == ""
    team = tmp_path / "sae_train" / "kernels" / "numba_team.py"
    source = team.read_text()
    start = source.index("    return n * thread()")
    team.write_text(source[:start] + "    return 0, 0\n" + source[source.index("\n", start) :])
    assert "a kernel did not do what it should" in notice(before)


def test_a_machine_without_them_says_so_in_one_line() -> None:
    end = "Plain torch does their work, slower."
    assert notice("import sys; sys.modules['numba'] = None\n") == (
        f"no compiled kernels on cpu: import of numba halted; None in sys.modules. {end}"
    )
    assert notice(NUMBA_DISABLE_JIT="1") == f"no compiled kernels on cpu: NUMBA_DISABLE_JIT is set. {end}"
    other = "import ctypes, torch, numba; del numba\ndef gone(path): raise OSError('gone')\nctypes.CDLL = gone\n"
    assert notice(other).startswith("no compiled kernels on cpu: torch's OpenMP has no GOMP_parallel (gone). Plain")


def test_a_run_without_them_says_so_once(tmp_path: Path) -> None:
    save_file({"activations": torch.randn(6000, 16)}, tmp_path / "rows.safetensors")
    command = [sys.executable, "-m", "sae_train", "harvest=tensors", f"harvest.path={tmp_path}", "n_features=64", "k=4"]
    command += ["tokens=1024", "batch_tokens=256", "tracking=none", f"runs={tmp_path}"]
    done = subprocess.run(command, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no compiled kernels on cpu: NUMBA_DISABLE_JIT is set") == 1
