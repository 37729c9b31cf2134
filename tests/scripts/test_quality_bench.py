"""The parts of the quality bench that a comparison stands on: matched thresholds, folded gates, the search for k."""

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_train.ranks.interface import Solo
from tools.one_of_each import only

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib


def model(threshold_F: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights, rows [600, 8] and their pre-activations [600, F]."""
    torch.manual_seed(0)
    F = len(threshold_F)
    w = {"W_enc": torch.randn(8, F), "b_enc": torch.randn(F), "W_dec": torch.rand(F, 1) * torch.randn(F, 8)}
    x_ND = torch.randn(600, 8)
    return w | {"b_dec": torch.zeros(8), "threshold": threshold_F}, x_ND, x_ND @ w["W_enc"] + w["b_enc"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("same", "threshold"), ("own", "factor"), ("some_zero", "factor"), ("never", "factor"), ("most_zero", "largest")],
)
def test_matched_thresholds_keep_k_a_row(scripts: ModuleType, kind: str, expected: str) -> None:
    score = scripts.import_module("quality_score")
    own_F = torch.linspace(0.05, 1.0, 40)
    if kind == "same":
        own_F[:] = 0.3
    own_F[: {"some_zero": 3, "most_zero": 30}.get(kind, 0)] = 0
    if kind == "never":
        own_F[:2] = torch.inf
    if kind == "most_zero":
        own_F[30:] = 3.0  # what these features' own thresholds drop is large enough to be kept otherwise
    w, x_ND, pre_NF = model(own_F)
    matching, cut, threshold_F = score.matched_thresholds(w, x_ND, 4.0)
    assert matching == expected
    assert int((pre_NF > threshold_F).sum()) == 4 * len(x_ND)
    assert threshold_F[own_F.isinf()].isinf().all()
    if matching == "factor":
        finite_F = own_F.isfinite()
        torch.testing.assert_close(threshold_F[finite_F], cut * own_F[finite_F], rtol=0, atol=0)
    if matching == "largest":
        size_NF = torch.where(pre_NF > own_F, pre_NF * w["W_dec"].norm(dim=1), 0)
        largest = size_NF.flatten().topk(4 * len(x_ND)).indices
        assert (pre_NF > threshold_F).flatten()[largest].all()


def test_gates_fold_into_thresholds(scripts: ModuleType) -> None:
    peers = scripts.import_module("quality_peers")
    torch.manual_seed(0)
    w_enc_DF, w_dec_FD, b_dec_D, x_ND = torch.randn(8, 40), torch.randn(40, 8), torch.randn(8), torch.randn(500, 8)
    r_F, b_gate_F, b_mag_F = torch.randn(3, 40).unbind()
    u_NF = (x_ND - b_dec_D) @ w_enc_DF
    code_NF = (u_NF + b_gate_F > 0) * (r_F.exp() * u_NF + b_mag_F).relu()
    weights = peers.ungate(w_enc_DF, r_F, b_gate_F, b_mag_F) | {"W_dec": w_dec_FD, "b_dec": b_dec_D}
    w = peers.fold(weights, shifted=True)
    pre_NF = x_ND @ w["W_enc"] + w["b_enc"]
    torch.testing.assert_close(pre_NF * (pre_NF > w["threshold"]), code_NF, rtol=1e-4, atol=1e-4)
    expected_ND = code_NF @ w_dec_FD + b_dec_D
    assert peers.check(w, x_ND, expected_ND, rule="threshold", k=4) is w
    with pytest.raises(SystemExit, match="differs from the peer's own"):
        peers.check(w | {"threshold": torch.zeros(40)}, x_ND, expected_ND, rule="threshold", k=4)


def test_the_search_follows_a_power_law(scripts: ModuleType) -> None:
    bench = scripts.import_module("bench_quality")
    assert bench.next_coefficient([], first=0.1, k=32) == 0.1
    assert bench.next_coefficient([(1.0, 320.0), (4.0, 160.0)], first=0.1, k=32) == pytest.approx(100)
    assert bench.next_coefficient([(1.0, 8.0), (0.25, 16.0)], first=0.1, k=32) == pytest.approx(0.0625, rel=0.01)
    assert bench.next_coefficient([(1.0, 64.0), (4.0, 16.0)], first=0.1, k=32) == pytest.approx(2)
    stuck = [(1.0, 700.0), (22.0, 790.0), (660.0, 790.0)]
    assert bench.next_coefficient(stuck[:2], first=1.0, k=32) == pytest.approx(660)
    assert bench.next_coefficient(stuck, first=1.0, k=32) is None


@pytest.mark.parametrize("power", [-0.5, -1.0, -1.7])
def test_the_search_comes_to_k(scripts: ModuleType, power: float) -> None:
    bench = scripts.import_module("bench_quality")
    tried: list[tuple[float, float]] = []
    while (coefficient := bench.next_coefficient(tried, first=0.1, k=32)) is not None:
        tried.append((coefficient, 2000 / (1 + 10 * coefficient) ** -power))
        assert len(tried) <= 6
    assert abs(tried[-1][1] - 32) <= 3.2
    rows = [{"method": "m", "recipe": "r", "coefficient": c, "l0": l0} for c, l0 in reversed(tried)]
    assert bench.nearest(rows, 32) == [rows[0]]


def test_ours_beside_the_peers_is_scored_as_its_command_says(
    scripts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its defaults but for sizes, and by paths from where it is typed."""
    bench, rows = scripts.import_module("bench_peers"), torch.randn(6000, 16)
    for name, part in (("train", rows[:4096]), ("held_out", rows[4096:])):
        (tmp_path / name).mkdir()
        save_file({"activations": part.contiguous()}, tmp_path / name / "rows.safetensors")
    monkeypatch.chdir(tmp_path)
    given = ["--train", "train", "--held-out", "held_out", "--work", "work", "--k", "4", "--batch", "256"]
    args = bench.parse([*given, "--tokens", "2048"])
    args.work.mkdir()
    fvu, l0, dead = bench.quality(("ours", "mutual_choice", False), args, 64).split(", ")
    assert 0 < float(fvu) < 2
    assert 3 < float(l0) < 5
    assert dead.endswith("%")
    for wrong in (["--train", "nowhere"], ["--train", "train", "--held-out", "nowhere"]):
        with pytest.raises(SystemExit):
            bench.parse([*wrong, "--work", "work"])


def test_threads_as_torch_chooses_are_not_said(scripts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = scripts.import_module("bench_quality")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in bench.quiet_environment(argparse.Namespace(threads=0))
    assert bench.quiet_environment(argparse.Namespace(threads=3))["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("threads", [0, 1])
def test_a_peers_threads_are_as_asked(
    scripts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    peers, usual, found = scripts.import_module("quality_peers"), torch.get_num_threads(), []

    def peer(*_: object) -> tuple[dict[str, Tensor], str]:
        found.append(torch.get_num_threads())
        return {"W_enc": torch.ones(2, 2)}, "threshold"

    save_file({"activations": torch.randn(40, 2)}, tmp_path / "rows.safetensors")
    monkeypatch.setitem(peers.PEERS, "peer", peer)
    for name in ("SPARSIFY_DISABLE_TRITON", "WANDB_MODE"):
        monkeypatch.setenv(name, "")  # so that what the script sets is taken back
    sizes = {"n-features": 2, "k": 1, "tokens": 32, "batch": 8, "seed": 0, "threads": threads}
    typed = ["quality_peers.py", "--method", "peer.any", "--train", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", typed + [word for name, n in sizes.items() for word in (f"--{name}", str(n))])
    try:
        peers.main()
    finally:
        torch.set_num_threads(usual)
    assert found == [threads or usual]


@pytest.mark.slow
def test_the_bundled_models_activations_as_files(scripts: ModuleType, tmp_path: Path) -> None:
    bundled = scripts.import_module("bundled_activations")
    stream = bundled.started(tokens=3 * bundled.BATCH)
    bundled.write_train(stream, tmp_path / "train", tokens=2 * bundled.BATCH + 5)
    bundled.write_held_out(stream, tmp_path / "held_out")
    again = bundled.started(tokens=3 * bundled.BATCH)
    expected = torch.cat([only(again.batch(0)).x_ND, only(again.batch(1)).x_ND])
    raw = load_file(tmp_path / "train" / "rows.safetensors")["activations"]
    torch.testing.assert_close(only(again.scalings).normalise(raw).x_ND, expected, rtol=1e-4, atol=1e-5)
    held = load_file(tmp_path / "held_out" / "rows.safetensors")["activations"]
    for half, part in zip(
        ("calibration", "evaluation"), scripts.import_module("quality_score").halves(tmp_path / "held_out"), strict=True
    ):
        batches = again.held_out.batches(half, max_tokens=bundled.HELD_OUT, ranks=Solo())
        rows = torch.cat([only(batch.sites).raw_ND for batch in batches])
        assert torch.equal(part, rows[: len(part)])
        assert len(part) > len(rows) - bundled.BLOCK
    assert len(held) % (2 * bundled.BLOCK) == 0
