"""sparsifier=gradient: gradients stay with their activations from the harvest to the choice, and what that chooses."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_train.config import RunConfig
from sae_train.errors import UserError
from sae_train.harvest.batch import Batch
from sae_train.harvest.build import Stream, build_stream, check_stream
from sae_train.harvest.filter import trainable, within
from sae_train.harvest.lanes import Lane
from sae_train.harvest.language_model import Tokenizer
from sae_train.harvest.live import LiveStream
from sae_train.harvest.model_facts import read_model_config
from sae_train.harvest.scaling import Scaling
from sae_train.harvest.tensors import TensorStream
from sae_train.ranks.interface import Ranks, Solo
from sae_train.sae.code import SparseCode
from sae_train.sae.step_info import StepInfo
from sae_train.training.run import plan_of
from tools import grid_world as world
from tools.grid_of_threads import LOADING, on_grid, on_ranks
from tools.one_of_each import only
from tools.sae_parts import selected, sparsifier_of
from tools.small_runs import CPU, kept_by_sorting, run_config
from tools.tiny_models import live_config, save_model, save_sentences, tensors_config

N, F, D = 24, 40, 8
STEPS = 14


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """Return `live(**dials)`: a configuration on a tiny model and text."""
    folder = tmp_path_factory.mktemp("live")
    text = save_sentences(folder, 200)
    model = save_model(folder / "model", "llama")
    return lambda **dials: live_config(model, text, **{"sparsifier": "gradient"} | dials)


def stream_of(config: RunConfig, ranks: Ranks | None = None, *, start: bool = True) -> Stream:
    with LOADING:
        stream = build_stream(config.source, ranks=ranks or Solo())
    if start:
        stream.start()
    return stream


def batches_of(config: RunConfig, ranks: Ranks | None = None) -> list[Batch]:
    stream = stream_of(config, ranks)
    return [only(stream.batch(step)) for step in range(STEPS)]


def together(batches: Iterable[Batch]) -> Batch:
    """Return the rows of several batches as one."""
    parts = list(batches)
    gradients = [batch.gradient_ND for batch in parts if batch.gradient_ND is not None]
    return Batch(torch.cat([batch.x_ND for batch in parts]), torch.cat(gradients))


def same(here: Batch, there: Batch) -> bool:
    assert here.gradient_ND is not None
    assert there.gradient_ND is not None
    return torch.equal(here.x_ND, there.x_ND) and torch.equal(here.gradient_ND, there.gradient_ND)


def side_by_side(batch: Batch) -> Tensor:
    assert batch.gradient_ND is not None
    return torch.cat([batch.x_ND, batch.gradient_ND], dim=1)


def as_counts(rows: Tensor) -> Counter[bytes]:
    return Counter(row.numpy().tobytes() for row in rows)


def test_activations_are_those_of_a_run_without_gradients(live: Callable[..., RunConfig]) -> None:
    plain, doubled = batches_of(live(sparsifier="topk")), batches_of(live())
    for here, there in zip(plain, doubled, strict=True):
        assert here.gradient_ND is None
        assert there.gradient_ND is not None
        assert there.gradient_ND.shape == there.x_ND.shape
        assert torch.equal(here.x_ND, there.x_ND)


def test_every_gradient_stays_with_its_activation(live: Callable[..., RunConfig]) -> None:
    """What came out and what is left in the pools is what the language model gives for the lanes' text."""
    config = live()
    stream = stream_of(config)
    assert isinstance(stream, LiveStream)
    scaling = only(stream.scalings)
    assert scaling.gradient_scale is not None
    taken = [only(stream.batch(step)) for step in range(STEPS)]
    tokenizer, squares = Tokenizer(config.model), list[float]()
    for number, state in stream.lane_states().items():
        lane = Lane(number, stretches=stream._corpus.stretches(4, context_length=16, tokenizer=tokenizer),
                    corpus=stream._corpus, tokenizer=tokenizer, seed=0, repeat=True, context_length=16)  # fmt: skip
        left = Batch(state["rows/residual1"], state["gradients/residual1"])
        rows = together([batch[16 * number : 16 * (number + 1)] for batch in taken] + [left])
        expected: list[Batch] = []
        while sum(map(len, expected)) < len(rows):
            ids_BT = lane.contexts(2)
            kept_BT = trainable(ids_BT, tokenizer)
            both = stream.language_model.activations_and_gradients(ids_BT)
            raw_ND, gradient_ND = (only(each)[kept_BT] for each in both)
            x_ND = (raw_ND - scaling.centre_D.float()) / scaling.scale
            expected.append(Batch(x_ND, gradient_ND / scaling.gradient_scale))
        read = together(expected)
        assert as_counts(side_by_side(rows)) == as_counts(side_by_side(read))
        assert read.gradient_ND is not None
        squares += (read.gradient_ND[:64] * scaling.gradient_scale).double().square().sum(1).tolist()
    assert scaling.gradient_scale**2 == pytest.approx(sum(squares) / len(squares), rel=1e-6)


def test_the_activation_alone_decides_what_is_left_out_and_goes_through_a_checkpoint() -> None:
    scaling = Scaling(centre_D=torch.ones(2, dtype=torch.float64), scale=2.0, limit=3.0, gamma=0.7, gradient_scale=10.0)
    rows, gradients = torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[500.0, 0.0], [0.0, 0.1]])
    assert within(rows, limit=scaling.limit).tolist() == [True, False]
    batch = scaling.normalise(rows, gradients)
    assert batch.gradient_ND is not None
    assert batch.x_ND.tolist() == [[0.0, 0.5], [1.0, 0.5]]
    assert batch.gradient_ND.tolist() == [[50.0, 0.0], [0.0, pytest.approx(0.01)]]
    assert Scaling.from_state(scaling.state(), device=CPU).state().keys() == scaling.state().keys()
    assert Scaling.from_state(scaling.state(), device=CPU).gradient_scale == 10.0


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_sees_the_same_gradients(live: Callable[..., RunConfig], size: int) -> None:
    by_rank = on_ranks(size, lambda ranks: batches_of(live(), ranks))
    for batch, parts in zip(batches_of(live()), zip(*by_rank, strict=True), strict=True):
        assert same(batch, together(parts))


def test_pools_with_gradients_are_restored_bit_for_bit(live: Callable[..., RunConfig]) -> None:
    expected, first = batches_of(live()), stream_of(live())
    for step in range(5):
        first.batch(step)
    replicated, lanes = first.replicated_state(), first.lane_states()
    second = stream_of(live(), start=False)
    second.restore(replicated, lanes.__getitem__)
    assert only(second.scalings).gradient_scale == only(first.scalings).gradient_scale
    for step in range(5, STEPS):
        assert same(only(second.batch(step)), expected[step])


def test_pools_take_twice_the_room(live: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, doubled = (check_stream(live(sparsifier=name).source, n_ranks=1) for name in ("topk", "gradient"))
    assert (doubled.sites, doubled.pool_bytes) == (plain.sites, 2 * plain.pool_bytes)
    plans = [plan_of(live(sparsifier=name), facts, n_ranks=1)
             for name, facts in (("topk", plain), ("gradient", doubled))]  # fmt: skip
    assert plans[1].checkpoint_bytes - plans[0].checkpoint_bytes == plain.pool_bytes
    assert plans[1].operations > 2 * plans[0].operations
    enough = plans[1].memory_bytes - 3 * doubled.pool_batch_bytes
    monkeypatch.setattr("sae_train.training.plan.available_bytes", lambda: enough)
    plan_of(live(sparsifier="topk"), plain, n_ranks=1)
    with pytest.raises(UserError, match=r"harvest.pool_batches=8: with pools of .* Largest that fits: 5\. "):
        plan_of(live(), doubled, n_ranks=1)


def test_memory_has_room_for_slopes_or_logits(live: Callable[..., RunConfig]) -> None:
    """Of what a step and the way back through the language model's loss take, the larger."""

    def memory(sparsifier: str, n_features: int, contexts: int = 2) -> int:
        harvest = {"contexts_per_forward": contexts}
        config = live(sparsifier=sparsifier, n_features=n_features, harvest=harvest)
        facts = check_stream(config.source, n_ranks=1)
        plan = plan_of(config, facts, n_ranks=1)
        (sae,) = plan.saes.values()
        return plan.memory_bytes - 4 * 4 * sae.parameters - facts.pool_bytes - facts.model_bytes

    matrix, vocab = 4 * 64 * 1024, read_model_config(live().model).vocab_size
    assert (memory("topk", 1024), memory("gradient", 1024)) == (2 * matrix, 4 * matrix)
    for contexts in (2, 4):
        assert memory("topk", 16, contexts) == 2 * 4 * 64 * 16
        assert memory("gradient", 16, contexts) == 4 * 4 * contexts * 16 * vocab
    assert memory("gradient", 1024, 4) == 4 * matrix


def write(folder: Path, n: int = 6000, **tensors: Tensor) -> Path:
    """Write two files of activations; `tensors` goes with the first's, activations as gradients with the second's."""
    folder.mkdir(exist_ok=True)
    rows = torch.randn(n, D, generator=torch.Generator().manual_seed(0)) + 1
    half = n // 2
    save_file({"activations": rows[:half].contiguous(), **tensors}, folder / "a.safetensors")
    save_file({"activations": rows[half:].contiguous(), "gradients": 3 * rows[half:]}, folder / "b.safetensors")
    return folder


def held_out_width(stream: Stream) -> int:
    batch = next(iter(stream.held_out.batches("evaluation", max_tokens=1, ranks=Solo())))
    return only(batch.sites).raw_ND.shape[1]


def test_gradients_of_files(tmp_path: Path) -> None:
    rows = torch.randn(6000, D, generator=torch.Generator().manual_seed(0)) + 1
    folder = write(tmp_path / "t", gradients=3 * rows[:3000].half())
    rows_only = tmp_path / "held_out"
    rows_only.mkdir()
    save_file({"activations": rows[:600].contiguous()}, rows_only / "a.safetensors")
    config = tensors_config(folder, held_out=rows_only, sparsifier="gradient")
    stream = stream_of(config)
    assert isinstance(stream, TensorStream)
    scaling = only(stream.scalings)
    assert scaling.gradient_scale is not None
    plain = batches_of(tensors_config(folder, held_out=rows_only, sparsifier="topk"))
    for step in range(STEPS):
        x_ND, gradient_ND = only(stream.batch(step)).x_ND, only(stream.batch(step)).gradient_ND
        assert gradient_ND is not None
        assert torch.equal(x_ND, plain[step].x_ND)
        raw_ND = x_ND * scaling.scale + scaling.centre_D.float()
        assert torch.allclose(gradient_ND * scaling.gradient_scale, 3 * raw_ND, rtol=1e-2, atol=1e-2)
    assert held_out_width(stream) == held_out_width(stream_of(tensors_config(folder, sparsifier="gradient"))) == D
    assert stream.fingerprint() != stream_of(tensors_config(folder, sparsifier="topk")).fingerprint()


def at(n: int, row: int, value: float) -> Tensor:
    gradients = torch.ones(n, D)
    gradients[row, 1] = value
    return gradients


def begun(config: RunConfig) -> Stream:
    check_stream(config.source, n_ranks=1)
    return stream_of(config)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {},
            r"a.safetensors: no tensor 'gradients' in it. Known: activations. sparsifier=gradient needs .*=topk",
        ),
        ({"gradient": torch.ones(3000, D)}, r"no tensor 'gradients' in it. Did you mean 'gradient'\?"),
        ({"gradients": torch.ones(2999, D)}, r"'gradients' has shape \[2999, 8\], and 'activations' \[3000, 8\]"),
        ({"gradients": torch.ones(3000, D + 1)}, r"'gradients' has shape \[3000, 9\], and 'activations' \[3000, 8\]"),
        ({"gradients": torch.ones(3000)}, r"'gradients' has shape \[3000\], not \[n, d_model\]"),
        ({"gradients": torch.ones(3000, D).int()}, r"'gradients' is of type I32. Save floats"),
        ({"gradients": at(3000, 2999, torch.nan)}, r"a.safetensors, row 2999: not finite"),
        ({"gradients": at(3000, 7, torch.inf)}, r"a.safetensors, row 7: not finite"),
    ],
)
def test_files_without_usable_gradients_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    config = tensors_config(write(tmp_path / "t", **tensors), sparsifier="gradient", calibration_tokens=8)
    with pytest.raises(UserError) as caught:
        begun(config)
    assert re.search(message, str(caught.value)), caught.value
    assert caught.value.status == 2


def test_gradients_that_are_all_zero_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    rows = torch.randn(6000, D, generator=torch.Generator().manual_seed(0))
    save_file({"activations": rows, "gradients": torch.zeros(6000, D)}, folder / "a.safetensors")
    with pytest.raises(UserError, match="gradients of the calibration tokens are all zero"):
        stream_of(tensors_config(folder, sparsifier="gradient"))


def info(n_tokens: int) -> StepInfo:
    return StepInfo(step=0, tokens=0, total_tokens=4096, batch_tokens=n_tokens, learning_rate=1e-3, seed=0)


def chosen(pre_NF: Tensor, slope_NF: Tensor | None, *, beta: float, k: float = 4.0, ranks: Ranks | None = None,
           n_tokens: int | None = None, n_features: int | None = None) -> SparseCode:  # fmt: skip
    """Return the code that is kept of pre-activations, given slopes."""
    config = run_config(sparsifier="gradient", beta=beta, k=k, batch_tokens=n_tokens or len(pre_NF))
    sparsifier = sparsifier_of(config, n_features=n_features or pre_NF.shape[1])
    own = None if slope_NF is None else slope_NF.clone()  # the sparsifier may overwrite it
    return selected(sparsifier, pre_NF, info(n_tokens or len(pre_NF)), ranks=ranks, slope_NF=own)


def drawn(seed: int) -> Tensor:
    return torch.randn(N, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.3, 1.0, 1e6])
def test_scores_choose_and_affinities_are_kept(beta: float) -> None:
    """Beside sorting; features of a token whose slopes are all zero go by their affinities."""
    pre_NF, slope_NF = drawn(0), drawn(1) ** 3
    slope_NF[3] = 0
    code = chosen(pre_NF, slope_NF, beta=beta)
    score_NF = pre_NF * (1 + beta * slope_NF.abs() / slope_NF.abs().mean())
    expected = kept_by_sorting(score_NF, group="row", budgets=[4] * N)
    dense = code.dense()
    assert {(t, f) for t, f in dense.nonzero().tolist()} == expected
    assert torch.equal(dense[dense != 0], pre_NF[dense != 0])
    assert expected != kept_by_sorting(pre_NF, group="row", budgets=[4] * N)
    assert dense[3].nonzero().tolist() == chosen(pre_NF, None, beta=beta).dense()[3].nonzero().tolist()


@pytest.mark.parametrize("slopes", ["beta is zero", "all zero", "none"])
def test_without_effect_it_is_topk(slopes: str) -> None:
    pre_NF = drawn(0).float().mul(3).round()  # many ties
    pre_NF[5] = -pre_NF[5].abs()  # and slots that nothing fills
    assert pre_NF[0, 0] != 0
    given = {"beta is zero": drawn(1).float(), "all zero": torch.zeros(N, F), "none": None}[slopes]
    topk = sparsifier_of(run_config(sparsifier="topk", k=4, batch_tokens=N), n_features=F)
    expected = selected(topk, pre_NF, info(N))
    code = chosen(pre_NF, given, beta=0.0 if slopes == "beta is zero" else 1.0)
    for name in ("value", "feature", "token", "start"):
        assert torch.equal(getattr(code, name), getattr(expected, name)), name


def test_the_sign_and_the_unit_of_the_gradient_do_not_matter() -> None:
    pre_NF, slope_NF = drawn(0), drawn(1)
    whole = chosen(pre_NF, slope_NF, beta=1.0).dense()
    assert torch.equal(chosen(pre_NF, -1024 * slope_NF, beta=1.0).dense(), whole)


@pytest.mark.parametrize("grid", [(2, 1), (1, 2), (2, 2)])
def test_the_mean_is_of_the_whole_batch(grid: tuple[int, int]) -> None:
    """On ranks whose own slopes are of very different sizes."""
    pre_NF, slope_NF = drawn(0), drawn(1)
    slope_NF[: N // 2] *= 50
    slope_NF[:, : F // 2] *= 20
    n_rows, n_columns = grid

    def part(ranks: Ranks) -> Tensor:
        rows, columns = ranks.data.slice(N), ranks.features.slice(F)
        own = (slice(*rows), slice(*columns))
        return chosen(pre_NF[own], slope_NF[own], beta=1.0, ranks=ranks, n_tokens=N, n_features=F).dense()

    parts = on_grid(grid, part)
    together = torch.cat([torch.cat(parts[r * n_columns : (r + 1) * n_columns], dim=1) for r in range(n_rows)])
    assert torch.equal(together, chosen(pre_NF, slope_NF, beta=1.0).dense())


def trained(folder: Path, *case: str) -> dict[str, Tensor]:
    config = world.config_of(folder, list(case), precision="float32", steps=20)
    weights: dict[str, Tensor] = world.learn(config, Solo())["weights"]
    return weights


def test_a_run_with_beta_zero_is_a_run_of_topk(tmp_path: Path) -> None:
    """It harvests no gradients, and files need not have them."""
    world.write_activations(tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({"activations": load_file(tmp_path / "rows.safetensors")["activations"]}, plain / "rows.safetensors")
    topk = trained(tmp_path, "sparsifier=topk")
    same = trained(plain, "sparsifier=gradient", "sparsifier.beta=0")
    other = trained(tmp_path, "sparsifier=gradient")
    for name, value in topk.items():
        assert torch.equal(value, same[name]), name
    assert not torch.allclose(topk["W_dec"], other["W_dec"], atol=1e-2)


def test_with_beta_zero_approximate_pre_activations_serve_as_for_topk(tmp_path: Path) -> None:
    world.write_activations(tmp_path)
    reads_all = [
        world.build(world.config_of(tmp_path, case, precision="float32"), Solo(), start=False)
        .learners[0]
        .sparsifier.reads_all
        for case in (["sparsifier=topk"], ["sparsifier=gradient", "sparsifier.beta=0"], ["sparsifier=gradient"])
    ]
    assert reads_all == [False, False, True]


@pytest.mark.parametrize("grid", [(2, 1), (1, 2), (2, 2)])
def test_a_run_in_any_layout_keeps_the_same_matches(tmp_path: Path, grid: tuple[int, int]) -> None:
    """On threads; tests/ranks/test_grid.py does it on processes."""
    world.write_activations(tmp_path)
    case = ["sparsifier=gradient", "aux_loss=aux_k"]
    config = world.config_of(tmp_path, case, precision="float64", steps=12)
    alone = world.learn(config, Solo())
    for result in on_grid(grid, lambda ranks: world.learn(config, ranks)):
        for here, there in zip(alone["matches"], result["matches"], strict=True):
            assert torch.equal(here, there)
        for name, value in alone["weights"].items():
            assert torch.allclose(value, result["weights"][name], rtol=1e-9, atol=1e-12), name


def test_a_run_goes_on_bit_for_bit(tmp_path: Path, live: Callable[..., RunConfig]) -> None:
    """From a checkpoint in the middle of its pools, gradients and all."""
    config = live(k=5.0, n_features=64, batch_tokens=64, tokens=64 * 20)
    world.save(config, Solo(), tmp_path, steps=9)
    resumed = world.resume(config, Solo(), tmp_path)
    for name, value in world.learn(config, Solo())["weights"].items():
        assert torch.equal(value, resumed[name]), name
