"""`harvest=tensors`: any float files, every kept row once an epoch, outliers left out, bad files refused."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from sae_train.config import RunConfig
from sae_train.errors import UserError
from sae_train.harvest.build import build_stream, check_stream
from sae_train.harvest.held_out import HALVES, Half, HeldOutRows
from sae_train.harvest.scaling import fit_scaling
from sae_train.harvest.tensor_files import TensorTable, read_headers
from sae_train.harvest.tensors import TensorStream
from sae_train.ranks.interface import Ranks, Solo
from tools.grid_of_threads import on_ranks
from tools.one_of_each import only
from tools.tiny_models import tensors_config

D = 8


def rows_of(n: int, *, seed: int = 0, width: int = D) -> Tensor:
    """Return rows whose first entry is their number, so that they can be told apart after scaling."""
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    rows[:, 0] = torch.arange(n) / n
    return rows


def write(folder: Path, *parts: Tensor, name: str = "activations") -> Path:
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(parts):
        save_file({name: part.contiguous()}, folder / f"part{number}.safetensors")
    return folder


def stream_of(config: RunConfig, *, ranks: Ranks | None = None) -> TensorStream:
    stream = build_stream(config.source, ranks=ranks or Solo())
    assert isinstance(stream, TensorStream)
    return stream


def started(config: RunConfig, *, ranks: Ranks | None = None) -> TensorStream:
    stream = stream_of(config, ranks=ranks)
    stream.start()
    return stream


def held_out_rows(
    stream: TensorStream, half: Half, *, max_tokens: int = 10**6, ranks: Ranks | None = None
) -> list[HeldOutRows]:
    batches = stream.held_out.batches(half, max_tokens=max_tokens, ranks=ranks or Solo())
    return [only(batch.sites) for batch in batches]


def numbers(stream: TensorStream, batch: Tensor, n: int) -> list[int]:
    """Return the numbers of the rows that a batch holds."""
    raw = batch.double() * only(stream.scalings).scale + only(stream.scalings).centre_D
    return [round(float(first) * n) for first in raw[:, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_by_index_over_files_of_any_float_type(tmp_path, dtype):
    whole = rows_of(100).to(dtype)
    write(tmp_path / "t", whole[:30], whole[30:31], whole[31:31], whole[31:])
    table = TensorTable(read_headers(str(tmp_path / "t"), key="harvest.path"), dtype=torch.float32)
    index = torch.randint(0, 100, (64,))
    assert torch.equal(table.rows(index), whole[index].float())
    assert torch.equal(torch.cat([rows for _, rows, _ in table.spans(13, 77)]), whole[13:77])


def test_files_are_mapped_not_read(tmp_path):
    folder = write(tmp_path / "t", torch.randn(200_000, 64))  # 51 MB

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    table = TensorTable(read_headers(str(folder), key="harvest.path"), dtype=torch.float32)
    table.rows(torch.arange(0, 500))
    assert resident() - before < 25e6


@given(
    n=st.integers(5200, 6000), batch=st.sampled_from([32, 64, 4096]), steps=st.integers(1, 4), seed=st.integers(0, 9)
)
@settings(max_examples=8)
def test_every_row_once_an_epoch_over_epoch_boundaries(tmp_path_factory, n, batch, steps, seed):
    folder = write(tmp_path_factory.mktemp("e") / "t", rows_of(n))
    stream = started(tensors_config(folder, data_seed=seed, batch_tokens=batch, tokens=batch * steps))
    n_training = n - min(int(0.05 * n), 100_000)
    per_epoch = -(-n_training // batch)
    read = [row for step in range(2 * per_epoch) for row in numbers(stream, only(stream.batch(step)).x_ND, n)]
    first, second = read[:n_training], read[n_training : 2 * n_training]
    assert sorted(first) == list(range(n_training))
    assert first != sorted(first)
    assert len(set(second)) == len(second)
    assert second != first[: len(second)]


def test_any_step_can_be_asked_for_and_ranks_share_it(tmp_path):
    config = tensors_config(write(tmp_path / "t", rows_of(3000), rows_of(3000, seed=1)))
    alone = started(config)
    batches = [only(alone.batch(step)).x_ND for step in range(100)]
    assert torch.equal(only(alone.batch(7)).x_ND, batches[7])

    def on_rank(ranks: Ranks) -> list[Tensor]:
        stream = started(config, ranks=ranks)
        return [only(stream.batch(step)).x_ND for step in range(100)]

    for parts in zip(batches, *on_ranks(2, on_rank), strict=True):
        assert torch.equal(parts[0], torch.cat(parts[1:]))


def test_normalised_rows_have_unit_mean_square_and_no_mean(tmp_path):
    folder = write(tmp_path / "t", rows_of(8000))
    stream = started(tensors_config(folder, batch_tokens=6400, tokens=6400, calibration_tokens=7600))
    batch = only(stream.batch(0)).x_ND
    assert batch.dtype == torch.float32
    assert float(batch.square().sum(1).mean()) == pytest.approx(1, abs=0.02)
    assert float(batch.mean(0).norm()) < 0.02
    assert only(stream.scalings).gamma == pytest.approx(
        float(only(stream.scalings).centre_D.norm()) / only(stream.scalings).scale
    )


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_batches_are_the_same_to_the_bit_from_one_file_or_three(tmp_path, dtype, precision):
    whole = rows_of(6000, width=37).to(dtype)
    one, three = write(tmp_path / "one", whole), write(tmp_path / "three", whole[:7], whole[7:3000], whole[3000:])
    given = {"precision": precision, "batch_tokens": 64}
    streams = [started(tensors_config(folder, **given)) for folder in (one, three)]
    for step in range(3):
        batches = [only(stream.batch(step)).x_ND for stream in streams]
        assert torch.equal(*batches)
        assert torch.equal(batches[0], only(streams[0].scalings).normalise(raw_of(streams[0], step)).x_ND)


def raw_of(stream: TensorStream, step: int) -> Tensor:
    """Return the rows of a step's batch as they were saved."""
    return stream._table.rows(stream._indices(64 * step, 64 * step + 64))


def test_float64_stays_float64(tmp_path):
    whole = rows_of(6000).double() + 1e-12
    stream = started(tensors_config(write(tmp_path / "t", whole), precision="float64", batch_tokens=32))
    batch = only(stream.batch(0)).x_ND
    assert batch.dtype == torch.float64
    raw = batch * only(stream.scalings).scale + only(stream.scalings).centre_D
    assert (raw[:, None] - whole[None]).abs().sum(-1).amin(1).max() < 1e-13


@pytest.mark.parametrize("size", [1, 2])
def test_rows_of_outlying_norm_are_left_out(tmp_path, size):
    n = 6000
    whole = rows_of(n)
    outliers = [5, 17, 2500, 5900]
    whole[outliers, 1:] *= 100
    config = tensors_config(write(tmp_path / "t", whole[:1000], whole[1000:]), batch_tokens=64)

    def on_rank(ranks: Ranks) -> tuple[TensorStream, list[Tensor]]:
        stream = started(config, ranks=ranks)
        return stream, [only(stream.batch(step)).x_ND for step in range(100)]

    results = on_ranks(size, on_rank)
    stream = results[0][0]
    median = whole[:5700].norm(dim=1).median()
    assert only(stream.scalings).limit == pytest.approx(10 * float(median), rel=0.05)
    read = Counter(row for _, batches in results for batch in batches for row in numbers(stream, batch, n))
    assert set(read) == set(range(5700)) - set(outliers)
    assert only(stream.dropped_shares()) == pytest.approx(3 / 5700)
    held_out = [rows for half in HALVES for rows in held_out_rows(stream, half)]
    assert sum(len(rows.raw_ND) for rows in held_out) == 299


def test_held_out_rows_are_the_last_ones_in_blocks_that_take_turns(tmp_path):
    n = 40_000
    whole = rows_of(n)
    config = tensors_config(write(tmp_path / "t", whole))
    stream = started(config)
    halves = {half: held_out_rows(stream, half) for half in HALVES}
    for parity, batches in enumerate(halves.values()):
        raw, context = torch.cat([b.raw_ND for b in batches]), torch.cat([b.context_N for b in batches])
        row = (raw[:, 0] * n).round().long()
        assert torch.equal((row - 38_000) // 256, context)
        assert (context % 2 == parity).all()
    assert sum(len(b.raw_ND) for batches in halves.values() for b in batches) == 2000
    assert sum(len(b.raw_ND) for b in held_out_rows(stream, "evaluation", max_tokens=300)) == 512

    def share(ranks: Ranks) -> list[Tensor]:
        return [rows.raw_ND for rows in held_out_rows(started(config, ranks=ranks), "calibration", ranks=ranks)]

    parts = on_ranks(2, share)
    assert torch.equal(torch.cat([*parts[0], *parts[1]]), torch.cat([b.raw_ND for b in halves["calibration"]]))


def test_a_held_out_directory_leaves_all_rows_to_train_on(tmp_path):
    config = tensors_config(write(tmp_path / "t", rows_of(500)), held_out=write(tmp_path / "h", rows_of(600, seed=1)))
    stream = started(config)
    read = [row for step in range(8) for row in numbers(stream, only(stream.batch(step)).x_ND, 500)]
    assert set(read) == set(range(500))
    assert sum(len(b.raw_ND) for b in held_out_rows(stream, "evaluation")) == 256


def test_state_restores_without_a_scan(tmp_path, monkeypatch):
    whole = rows_of(6000)
    whole[3] *= 1000
    config = tensors_config(write(tmp_path / "t", whole))
    stream = started(config)
    expected = [only(stream.batch(step)).x_ND for step in range(50, 200)]
    state = {key: value.clone() for key, value in stream.replicated_state().items()}
    resumed = stream_of(config)
    monkeypatch.setattr("sae_train.harvest.tensors.scan_rows", lambda *_a, **_k: pytest.fail("scanned again"))
    resumed.restore(state, lambda lane: pytest.fail("tensors have no lanes"))
    assert all(torch.equal(only(resumed.batch(step + 50)).x_ND, batch) for step, batch in enumerate(expected))
    assert stream.lane_states() == {}
    write(tmp_path / "t", rows_of(6001))
    with pytest.raises(UserError, match="not the files that the checkpoint was made from"):
        stream_of(config).restore(state, lambda lane: {})


def refusal(config: RunConfig, *, n_ranks: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        check_stream(config.source, n_ranks=n_ranks)
    assert caught.value.status == 2
    return str(caught.value)


def test_facts_come_from_headers(tmp_path):
    config = tensors_config(write(tmp_path / "t", rows_of(6000)))
    facts = check_stream(config.source, n_ranks=2)
    (site,) = facts.sites
    assert (site.d_model, site.label, site.layer, site.record) == (D, "tensors", None, {})
    assert (facts.name, facts.pool_bytes, facts.flops_per_token, facts.model_bytes) == ("tensors", 0, 0, 0)
    assert facts.sites_of(config.sae.layer) == facts.sites


def test_refusals_from_headers(tmp_path):
    good = write(tmp_path / "good", rows_of(6000))
    assert "no such directory" in refusal(tensors_config(tmp_path / "nothing"))
    assert "no *.safetensors files" in refusal(tensors_config(tmp_path))
    assert "Did you mean 'activation'" in refusal(tensors_config(write(tmp_path / "a", rows_of(9), name="activation")))
    integers = write(tmp_path / "i", torch.ones(6000, D, dtype=torch.int32))
    assert "is of type I32. Save floats" in refusal(tensors_config(integers))
    assert "not [n, d_model]" in refusal(tensors_config(write(tmp_path / "s", torch.ones(9, 3, D))))
    widths = write(tmp_path / "w", rows_of(6000), rows_of(10, width=D + 1))
    assert "part1.safetensors: 9 columns, but part0.safetensors has 8" in refusal(tensors_config(widths))
    assert "hold no rows" in refusal(tensors_config(write(tmp_path / "z", rows_of(0))))
    assert "Give at least 5140 rows" in refusal(tensors_config(write(tmp_path / "few", rows_of(5000))))
    (tmp_path / "cut").mkdir()
    whole = (good / "part0.safetensors").read_bytes()
    (tmp_path / "cut" / "a.safetensors").write_bytes(whole[:1000])
    assert "not a complete safetensors file" in refusal(tensors_config(tmp_path / "cut"))
    narrow = write(tmp_path / "n", rows_of(600, width=4))
    assert "4 columns, but harvest.path has 8" in refusal(tensors_config(good, held_out=narrow))
    assert "Give more than 256" in refusal(tensors_config(good, held_out=write(tmp_path / "hf", rows_of(200))))
    assert "5700 rows to train on" in refusal(tensors_config(good, repeat=False, tokens=6000))
    both = refusal(tensors_config(tmp_path / "nothing"), n_ranks=3)
    assert "batch_tokens=64 over 3 ranks" in both
    assert "Nearest batch_tokens: 63 or 66" in both
    assert "no such directory" in both


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("row", "place"), [(10, "part0.safetensors, row 10"), (4100, "part1.safetensors, row 1100"),
                                            (5999, "part1.safetensors, row 2999")])  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_rows_that_are_not_finite_are_named(tmp_path, size, row, place, value):
    whole = rows_of(6000)
    whole[row, 3] = value
    config = tensors_config(write(tmp_path / "t", whole[:3000], whole[3000:]), calibration_tokens=16)

    def on_rank(ranks: Ranks) -> str:
        with pytest.raises(UserError) as caught:
            started(config, ranks=ranks)
        return str(caught.value)

    for message in on_ranks(size, on_rank):
        assert f"{place}: not finite" in message


def test_large_but_finite_rows_are_outliers(tmp_path):
    whole = rows_of(6000)
    whole[77] = 3e38
    stream = started(tensors_config(write(tmp_path / "t", whole)))
    assert only(stream.dropped_shares()) == pytest.approx(1 / 5700)


@pytest.mark.parametrize("value", [0.0, 3.7])
def test_constant_activations_are_refused(tmp_path, value):
    config = tensors_config(write(tmp_path / "t", torch.full((6000, D), value)))
    with pytest.raises(UserError, match=r"all-zero activations|all have the same activation"):
        started(config)


def test_without_repeat_outliers_count(tmp_path):
    whole = rows_of(6000)
    whole[:70] *= 1000
    config = tensors_config(write(tmp_path / "t", whole), repeat=False, tokens=5632 + 64)
    check_stream(config.source, n_ranks=1)
    with pytest.raises(UserError, match=r"5630 rows are left to train on without the 70 of outlying norm"):
        started(config)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 40), shift=st.floats(-50, 50))
def test_scaling_is_the_moments_of_what_is_within_the_limit(seed, n, shift):
    rows = torch.randn(3, n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    rows[0, 0] *= 1e4
    norms = rows.norm(dim=-1).flatten()
    scaling = fit_scaling(list(rows), ranks=Solo(), site="here")
    assert scaling.limit == 10 * float(norms.median())
    kept = rows.flatten(0, 1)[norms <= scaling.limit]
    assert torch.allclose(scaling.centre_D, kept.mean(0))
    assert scaling.scale == pytest.approx(float((kept - kept.mean(0)).square().sum(1).mean().sqrt()))


def test_rows_that_are_all_zero_are_counted_and_said(tmp_path):
    rows = torch.randn(8000, 8, generator=torch.Generator().manual_seed(0))
    rows[::3] = 0
    save_file({"activations": rows}, tmp_path / "a.safetensors")
    stream = build_stream(tensors_config(tmp_path).source, ranks=Solo())
    stream.start()
    n_training = 8000 - 400
    n_zero = int((rows[:n_training] == 0).all(dim=1).sum())
    assert stream.data_figures() == {"rows": n_training, "zero_rows": n_zero, "outliers": 0}
    (line,) = stream.notices()
    assert f"{n_zero:,} of {n_training:,} rows to train on (33.3%) are all zero" in line
    resumed = build_stream(tensors_config(tmp_path).source, ranks=Solo())
    resumed.restore(stream.replicated_state(), lambda lane: {})
    assert resumed.data_figures() == stream.data_figures()
    together = on_ranks(2, lambda ranks: figures_of(tensors_config(tmp_path), ranks))
    assert together == [stream.data_figures()] * 2


def test_a_few_rows_of_zeros_are_counted_and_not_said(tmp_path):
    rows = torch.randn(8000, 8, generator=torch.Generator().manual_seed(0))
    rows[::500] = 0
    save_file({"activations": rows}, tmp_path / "a.safetensors")
    stream = build_stream(tensors_config(tmp_path).source, ranks=Solo())
    stream.start()
    assert stream.data_figures()["zero_rows"] == 16
    assert stream.notices() == []


def figures_of(config, ranks):
    stream = build_stream(config.source, ranks=ranks)
    stream.start()
    return stream.data_figures()
