"""Triton's kernels against their twins in plain torch: interpreted where there is no GPU, which shows indexing and
arithmetic, not races or resources; compiled for a GPU that need not be there; and run on one where there is one."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_train import kernels
from sae_train.harvest.build import check_stream
from sae_train.kernels import attaching, backend, decoding, unit_rows
from sae_train.ranks.interface import Solo
from sae_train.sae.trainable import PARAMETRISATIONS
from sae_train.training.optimizer import Adam
from sae_train.training.provenance import device_notices, resolve_precision
from sae_train.training.run import plan_of
from tools import grid_world
from tools.grid_world import build, config_of, weights, write_activations
from tools.small_runs import schema_of
from tools.sparse_problems import Problem, gradients, problem, sparse_reconstruction, with_rounded_rows

if sys.platform != "linux":
    pytest.skip("there is no Triton but on Linux", allow_module_level=True)

from triton.runtime.errors import PTXASError

from sae_train.kernels import triton_adam, triton_bags, triton_match_products

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = settings(max_examples=15)
gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's kernels work on this machine's device, be it a CPU."""
    monkeypatch.setattr(backend, "DEVICES", ("cuda", "cpu"))


class Bags:
    """Random bags of rows, some of them empty; what lies in unused slots is poison."""

    def __init__(self, n_rows: int, width: int, n_bags: int, used: int, *, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        slots = used + 3
        rows = torch.randn(n_rows + 1, width, generator=generator)
        rows[-1] = torch.nan
        index = torch.randint(n_rows, (slots,), generator=generator, dtype=torch.int32)
        weight = torch.randn(slots, generator=generator)
        order = torch.randperm(used, generator=generator)
        index[used:], weight[used:] = n_rows, torch.nan
        inner = torch.randint(used + 1, (n_bags - 1,), generator=generator).sort().values
        start = torch.cat([torch.zeros(1), inner, torch.full((1,), used)]).int()
        self.rows, self.index = rows.to(DEVICE, dtype), index.to(DEVICE)
        self.weight = weight.to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32)
        self.order = torch.cat([order, torch.arange(used, slots)]).to(DEVICE)
        self.start = start.to(DEVICE)

    def expected(self, *, ordered: bool) -> tuple[Tensor, Tensor]:
        """Return sums and totals in float64, bag by bag."""
        order = self.order if ordered else torch.arange(len(self.order), device=DEVICE)
        sums, totals = [], []
        for first, last in zip(self.start[:-1].tolist(), self.start[1:].tolist(), strict=True):
            slot = order[first:last]
            weight = self.weight[slot].double()
            sums.append((weight[:, None] * self.rows[self.index[slot].long()].double()).sum(0))
            totals.append(weight.sum())
        return torch.stack(sums), torch.stack(totals)


def close(found: Tensor, expected: Tensor, *, tolerance: float = 2e-6) -> None:
    """Check that two tensors differ by fp32 rounding, relative to the largest entry."""
    one, other = found.detach().double().cpu(), expected.detach().double().cpu()
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("ordered", [True, False], ids=["by order", "in place"])
@SMALL
@given(
    n_rows=st.integers(1, 9), width=st.integers(1, 9), n_bags=st.integers(1, 5), used=st.integers(0, 40),
    seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_bags_are_weighted_sums(
    ordered: bool, n_rows: int, width: int, n_bags: int, used: int, seed: int, dtype: torch.dtype
) -> None:
    bags = Bags(n_rows, width, n_bags, used, seed=seed, dtype=dtype)
    order = bags.order if ordered else None
    sums, totals = triton_bags.bags(bags.rows, bags.index, bags.weight, bags.start, order)
    expected_sums, expected_totals = bags.expected(ordered=ordered)
    close(sums, expected_sums)
    close(totals, expected_totals)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("width", [513, 1024, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bags_of_rows_wider_than_a_block(width: int, dtype: torch.dtype) -> None:
    bags = Bags(4, width, 3, 21, seed=width, dtype=dtype)
    close(
        triton_bags.bags(bags.rows, bags.index, bags.weight, bags.start, bags.order)[0],
        bags.expected(ordered=True)[0],
    )


def test_a_bag_may_hold_everything_between_empty_ones() -> None:
    bags = Bags(50, 20, 4, 1500, seed=0, dtype=torch.float32)
    bags.start = torch.tensor([0, 0, 1500, 1500, 1500], dtype=torch.int32, device=DEVICE)
    sums, totals = triton_bags.bags(bags.rows, bags.index, bags.weight, bags.start, bags.order)
    close(sums, bags.expected(ordered=True)[0])
    assert not bool(sums[[0, 2, 3]].any() or totals[[0, 2, 3]].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [1, 7, 64, 4096, 4100])
def test_products_of_rows(width: int, dtype: torch.dtype) -> None:
    bags = Bags(6, width, 5, 23, seed=width, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(5, width, generator=generator).to(DEVICE)
    found = triton_match_products.row_products(rows, bags.rows, bags.index, bags.start)
    token = torch.repeat_interleave(torch.arange(5, device=DEVICE), bags.start.diff().long())
    expected = (rows[token].double() * bags.rows[bags.index[:23].long()].double()).sum(1)
    close(found[:23], expected)
    assert not bool(found[23:].any())
    assert torch.equal(found, triton_match_products.row_products(rows, bags.rows, bags.index, bags.start))


def test_sums_have_a_fixed_order() -> None:
    bags = Bags(30, 70, 7, 200, seed=3, dtype=torch.float32)
    runs = [triton_bags.bags(bags.rows, bags.index, bags.weight, bags.start, bags.order)[0] for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("on_host", [True, False], ids=["count read", "count on device"])
@pytest.mark.parametrize(("n", "d", "f"), [(1, 1, 1), (13, 5, 17), (7, 33, 12), (20, 3, 2)])
def test_public_products_and_their_gradients(
    interpreted: None, n: int, d: int, f: int, on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and all gradients against dense autograd in float64, and sums by feature."""
    exact = problem(n, d, f, seed=n)
    if not on_host:
        for module in (decoding, attaching):
            monkeypatch.setattr(module, "used_slots", lambda start, *given: given)
    x, W_enc, b_enc, W_dec = (t.detach().to(DEVICE, torch.float32) for t in exact[:4])
    matches = kernels.Matches(exact.matches.value.float().to(DEVICE), *(t.to(DEVICE) for t in exact.matches[1:]))
    p = Problem(x, W_enc.requires_grad_(), b_enc.requires_grad_(), W_dec.requires_grad_(), matches, exact.mask)
    assert backend.uses_triton(DEVICE)
    dense = torch.where(exact.mask, torch.relu(exact.x @ exact.W_enc.t() + exact.b_enc), 0)
    expected = dense @ exact.W_dec
    value, found = sparse_reconstruction(p)
    close(found, expected)
    sparse = gradients(found.square().sum() + (value**3 + value).sum(), p)
    for one, other in zip(sparse, gradients(expected.square().sum() + (dense**3 + dense).sum(), exact), strict=True):
        close(one, other, tolerance=1e-5)
    product_M = kernels.row_products(p.x, p.W_dec, *p.place)
    sums = kernels.sums_by_feature(torch.stack([product_M, product_M**2], 1), p.matches.feature, n_features=f)
    all_products = torch.where(exact.mask, exact.x @ exact.W_dec.t(), 0)
    close(sums[:, 0], all_products.sum(0))
    close(sums[:, 1], (all_products**2).sum(0), tolerance=1e-5)
    for one, other in with_rounded_rows(p):
        assert one.dtype == torch.float32
        close(one, other, tolerance=1e-5)


def whole_numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float().to(DEVICE)


@pytest.mark.parametrize(("n", "d", "f"), [(1, 1, 1), (13, 5, 17), (9, 40, 6)])
def test_sums_of_whole_numbers_are_torchs_exactly(n: int, d: int, f: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and every gradient: such sums have no rounding, whatever their order."""
    x, W_enc, W_dec = (whole_numbers(*shape, seed=i) for i, shape in enumerate(((n, d), (f, d), (f, d))))
    b_enc, by_feature = whole_numbers(f, seed=3), whole_numbers(f, seed=4)
    matches = kernels.Matches(*(each.to(DEVICE) for each in problem(n, d, f, seed=n).matches))
    places = matches.feature, matches.token, matches.start
    is_used = torch.arange(len(matches.value), device=DEVICE) < matches.start[-1]
    value = torch.where(is_used, whole_numbers(len(matches.value), seed=5), 0)
    found: list[list[Tensor]] = []
    for devices in ((), ("cuda", "cpu")):
        monkeypatch.setattr(backend, "DEVICES", devices)
        leaves = [each.clone().requires_grad_() for each in (W_enc, b_enc, W_dec, by_feature)]
        attached = kernels.attach(value, x, leaves[0], leaves[1], *places)
        rows = kernels.decode(attached, leaves[2], *places)
        scaled = kernels.of_features(leaves[3], *places) * attached.detach()
        loss = (rows * whole_numbers(n, d, seed=6)).sum() + scaled.sum()
        products = kernels.row_products(x, W_dec, *places)
        sums = kernels.sums_by_feature(torch.stack([value, 2 * value], 1), matches.feature, n_features=f)
        found.append([rows.detach(), products, sums, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_offsets_may_pass_two_to_the_31() -> None:
    """The last rows of a matrix of more elements than int32 counts; only those rows are ever touched."""
    n_rows, width = 2**21 + 3, 1024
    rows = torch.empty(n_rows, width, dtype=torch.bfloat16, device=DEVICE)
    assert rows.numel() > 2**31
    rows[-2:] = torch.tensor([[2.0], [3.0]])
    index = torch.tensor([n_rows - 2, n_rows - 1], dtype=torch.int32, device=DEVICE)
    start = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE)
    weight = torch.tensor([1.0, 10.0], device=DEVICE)
    assert triton_bags.bags(rows, index, weight, start)[0].unique().tolist() == [32.0]
    ones = torch.ones(1, width, device=DEVICE)
    assert triton_match_products.row_products(ones, rows, index, start).tolist() == [2.0 * width, 3.0 * width]


@pytest.mark.parametrize(
    ("parametrisation", "d", "clipped"), [("free", 1, False), ("free", 5, True), ("aligned", 37, False)]
)
def test_the_decoders_update_is_that_of_torch(
    parametrisation: str, d: int, clipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 20 steps, whose gradients reach the clip half-way where there is one, and two of which are halted."""
    kind, start = PARAMETRISATIONS[parametrisation], {"d_model": d, "n_features": 3, "seed": 0}
    plain, fused = (kind.initial(**start, dtype=torch.float32, device=DEVICE) for _ in range(2))
    clip = math.sqrt(sum(p.numel() for p in plain.parameters())) if clipped else 0.0
    adam, sphere = (Adam(each, schema_of(clip=clip), rates={"W_dec": 0.7}) for each in (plain, fused))
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        drawn = {name: 0.1 * step * torch.randn(p.shape, generator=generator) for name, p in plain.named_parameters()}
        before = {key: t.clone() for key, t in (sphere.state() | dict(fused.named_parameters())).items()}
        is_halted, norms = step in (7, 8), []
        for dictionary, optimizer, devices in ((plain, adam, ()), (fused, sphere, ("cuda", "cpu"))):
            monkeypatch.setattr(backend, "DEVICES", devices)
            for name, parameter in dictionary.named_parameters():
                parameter.grad = (
                    drawn[name].to(DEVICE).clone() if not is_halted else torch.full_like(parameter, torch.nan)
                )
            W_enc = dictionary.W_enc
            norms.append(optimizer.gradient_norm(Solo()))
            optimizer.step(lr=0.02, norm=norms[-1], halted=torch.tensor(is_halted, device=DEVICE))
            notices = dictionary.W_enc is not W_enc
            assert notices == (parametrisation == "aligned"), "rows that are made of others must notice a step"
        after = sphere.state() | dict(fused.named_parameters())
        if is_halted:
            assert all(torch.equal(before[key], after[key]) for key in before)
            continue
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)
        for key, value in (adam.state() | dict(plain.named_parameters())).items():
            close(after[key], value, tolerance=1e-5)
        close(fused.W_dec.norm(dim=1), torch.ones(3, device=DEVICE), tolerance=3e-7)


def test_the_first_of_steps() -> None:
    """One step against float64; a row of zeros stays, and eps of 0 does not make a number of 0 / 0."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 5, 45, generator=generator).unbind(0)
    weight = weight / weight.norm(dim=1, keepdim=True)
    weight[2], gradient[2] = 0, 0
    exact_weight, exact = weight.double(), gradient.double()
    along = (exact * exact_weight).sum(1, keepdim=True)
    exact = exact - along * exact_weight
    moved = exact_weight - 0.01 * torch.where(exact == 0, 0, exact / exact.abs())
    moved = moved / torch.where(moved.norm(dim=1, keepdim=True) > 0, moved.norm(dim=1, keepdim=True), 1)
    weight, gradient = weight.to(DEVICE), gradient.to(DEVICE)
    along_F, square_F = triton_adam.along_rows(gradient, weight)
    close(along_F, along.squeeze(1).to(DEVICE))
    close(square_F, exact.square().sum(1).to(DEVICE))
    for eps in (1e-12, 0.0):
        row = slice(0, 2 if eps == 0 else 5)  # whose zeros are 0 / 0 indeed
        moving, mean, square = weight[row].clone(), torch.zeros_like(weight[row]), torch.zeros_like(weight[row])
        triton_adam.move(
            moving, gradient[row], along_F[row], mean, square, step=torch.ones((), device=DEVICE), scale=None,
            halted=torch.tensor(False, device=DEVICE), lr=0.01, beta1=0.9, beta2=0.999, eps=eps,
        )  # fmt: skip
        close(moving, moved[row].to(DEVICE))
        close(mean / (1 - 0.9), exact[row].to(DEVICE))
        close(square / (1 - 0.999), exact[row].square().to(DEVICE))


@pytest.mark.parametrize(
    "case",
    [
        ["sparsifier=mutual_choice", "aux_loss=aux_zipf", "aux_loss.tau=0.5", "parametrisation=aligned"],
        ["sparsifier=topk", "aux_loss=aux_k", "nesting=matryoshka", "nesting.prefixes=[0.5,1.0]"],
    ],
    ids=["mutual choice, aligned", "topk, nested"],
)
def test_whole_steps_are_those_of_plain_torch(case: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_activations(tmp_path)
    monkeypatch.setattr(grid_world, "N", 16)  # tokens a step: the interpreter takes milliseconds for each
    config = config_of(tmp_path, case, precision="float32", steps=2, n_features=20, dead_window=16)
    learned = []
    for devices in ((), ("cuda", "cpu")):
        monkeypatch.setattr(backend, "DEVICES", devices)
        trainer = build(config, Solo(DEVICE))
        for step in range(2):
            trainer.step(trainer.stream.batch(step))
        learned.append(weights(trainer) | trainer.learners[0].optimizer.state())
    for name, plain in learned[0].items():
        close(learned[1][name], plain, tolerance=2e-5)


def test_float64_rows_are_moved_by_torch(interpreted: None) -> None:
    assert not unit_rows._moves_by_triton(torch.zeros(1, 1, dtype=torch.float64, device=DEVICE))
    assert unit_rows._moves_by_triton(torch.zeros(1, 1, device=DEVICE))


def test_a_machine_without_triton_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    backend.why_not_triton.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(backend, "has_bf16", lambda device: True)
    said = device_notices(torch.device("cuda"), precision="bf16", asked="auto")
    backend.why_not_triton.cache_clear()
    assert len(said) == 1
    assert "no Triton kernels on cuda: the package triton is not installed" in said[0]
    assert "\n" not in said[0]
    assert device_notices(torch.device("cpu"), precision="float32", asked="auto") == []


@pytest.mark.parametrize(("capability", "falls_back"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_a_gpu_without_bf16_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], falls_back: bool
) -> None:
    """One that emulates bf16, as torch does before Ampere, has none; Triton is not for it, either."""
    write_activations(tmp_path)
    device, config = torch.device("cuda", 1), config_of(tmp_path, [], precision="auto")
    facts = check_stream(config.source, n_ranks=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda which: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(backend, "_failure_of_a_kernel", lambda device: None)
    monkeypatch.setattr(torch.version, "hip", None)
    backend.why_not_triton.cache_clear()
    precision = resolve_precision(config.precision, stored=None, device=device)
    said = {asked: device_notices(device, precision=of, asked=asked) for asked, of in (
        ("auto", precision), ("bf16", "bf16"), ("float32", "float32"),
    )}  # fmt: skip
    backend.why_not_triton.cache_clear()
    assert precision == ("float32" if falls_back else "bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sae_train.training.plan.available_bytes", lambda: 10**12)
    held = plan_of(config, facts, n_ranks=1).holdings
    assert [each.n_bytes > 0 for each in held if "rounded to bf16" in each.what] == [not falls_back]
    if not falls_back:
        assert list(said.values()) == [[], [], []]
        return
    assert {asked: len(lines) for asked, lines in said.items()} == {"auto": 2, "bf16": 2, "float32": 1}
    assert "no fast bf16 products on cuda:1" in said["auto"][1]
    assert "compute capability 8.0, this GPU has 7.5" in said["float32"][0]
    assert not any("\n" in line for lines in said.values() for line in lines)


@pytest.mark.parametrize(
    "error", [FileNotFoundError("Python.h"), RuntimeError("no driver\nmore"), PTXASError("too old")]
)
def test_what_a_machine_lacks_is_a_reason(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def ends(*parts: Tensor) -> Tensor:
        raise error

    assert backend._failure_of_a_kernel(DEVICE) is None
    monkeypatch.setattr(triton_bags, "bags", ends)
    said = backend._failure_of_a_kernel(DEVICE)
    assert said == f"a kernel ended with {type(error).__name__}: {str(error).splitlines()[0]}"


def test_a_kernel_that_we_broke_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_bags, "bags", lambda rows: rows)
    with pytest.raises(TypeError):
        backend._failure_of_a_kernel(DEVICE)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae_train.kernels import triton_adam as a, triton_bags as p, triton_match_products as m

def compiled(kernel, constants, **types):
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": 4, "enable_fp_fusion": True})
    assert len(made.asm["cubin"]) > 0
    ptx = made.asm["ptx"]
    assert not any(word in ptx for word in ("atom.", "red.global", "red.relaxed")), "a sum without an order"
    print(kernel.__name__)
    return [line for line in made.asm["ttir"].splitlines() if "arith.muli" in line]

fp32, i32 = "*fp32", "*i32"
matrices = {n: fp32 for n in "gradients weights alongs means squares unbias scales".split()}
betas = dict(BETA1=0.9, REST1=0.1, BETA2=0.999, REST2=0.001, EPS=1e-8)
import triton.language as tl
for rows, capability, shared in ((fp32, 80, True), ("*bf16", 90, False)):
    flags = dict(ORDERED=shared, ACC=tl.float32, ROWS=8, BLOCK=128)
    bags = dict(rows=rows, index=i32, weight=fp32, order="*i64", start=i32)
    compiled(p._bags_kernel, flags, **bags, sums=fp32, totals=fp32)
    compiled(m._row_products_kernel, dict(ACC=tl.float32, ROWS=4, BLOCK=128), rows=fp32, weights=rows, feature=i32,
             start=i32, products=fp32)
    offsets = compiled(a._along_kernel, dict(BLOCK=128 if shared else 16384), **matrices)
    constants = dict(**betas, SCALED=shared, BLOCK=128 if shared else 16384)
    offsets += compiled(a._move_kernel, constants, halted=i32, rate="fp32", **matrices)
    assert offsets and all("i64" in line for line in offsets), "rows may begin past 2^31 numbers"
"""


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """What the interpreter lets pass and the compiler does not; nothing of it is run."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == 8


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("sparsifier", ["topk", "mutual_choice", "feature_choice"])
def test_a_step_never_waits_for_the_gpu(sparsifier: str, tmp_path: Path) -> None:
    write_activations(tmp_path)
    config = config_of(tmp_path, [f"sparsifier={sparsifier}", "aux_loss=aux_k"], precision="float32", steps=6)
    trainer = build(config, Solo(DEVICE))
    assert backend.uses_triton(DEVICE)
    trainer.step(trainer.stream.batch(0))  # compiles
    for step in range(1, 6):
        rows = trainer.stream.batch(step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.step(rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.gpu
def test_the_last_programs_of_a_matrix_past_two_to_the_31() -> None:
    """Writes, too: the last bag, and the optimizer's last row."""
    n_rows, width = 2**21 + 3, 1024
    if torch.cuda.mem_get_info()[0] < 45e9:
        pytest.skip("needs 45 GB of free memory on the GPU")
    start = torch.zeros(n_rows + 1, dtype=torch.int32, device=DEVICE)
    start[-1] = 1
    ones = torch.ones(1, width, device=DEVICE)
    index = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    sums = triton_bags.bags(ones, index, torch.full((1,), 7.0, device=DEVICE), start)
    assert sums[-1].unique().tolist() == [7.0]
    del sums
    weight, gradient, mean, square = (torch.zeros(n_rows, width, device=DEVICE) for _ in range(4))
    weight[-1, 0] = gradient[-1, 1] = 1.0
    along_F, square_F = triton_adam.along_rows(gradient, weight)
    assert (float(along_F[-1]), float(square_F[-1])) == (0.0, 1.0)
    triton_adam.move(
        weight, gradient, along_F, mean, square, step=torch.ones((), device=DEVICE), scale=None,
        halted=torch.tensor(False, device=DEVICE), lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8,
    )  # fmt: skip
    torch.testing.assert_close(weight[-1, :2].cpu(), torch.tensor([0.5**0.5, -(0.5**0.5)]))
    assert not bool(weight[-2].any())
