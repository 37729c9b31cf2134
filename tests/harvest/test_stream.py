"""The live stream: a function of the config alone, whatever the ranks, and exact after a restore."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_train import config as schema
from sae_train.config import RunConfig
from sae_train.errors import UserError
from sae_train.harvest.build import build_stream, check_stream
from sae_train.harvest.filter import trainable, within
from sae_train.harvest.held_out import Half, HeldOutRows
from sae_train.harvest.lanes import Lane
from sae_train.harvest.language_model import Tokenizer
from sae_train.harvest.live import LiveStream
from sae_train.ranks.interface import Ranks, Solo
from tools.grid_of_threads import LOADING, on_ranks
from tools.one_of_each import only
from tools.tiny_models import live_config, save_loud_model, save_model, save_sentences, save_tokenizer

STEPS = 30


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sentences(tmp_path_factory.mktemp("text"), 200)


@pytest.fixture
def config(model: Path, text: Path) -> RunConfig:
    return live_config(model, text)


def stream_of(config: RunConfig, ranks: Ranks | None = None, *, start: bool = True) -> LiveStream:
    with LOADING:
        stream = build_stream(config.source, ranks=ranks or Solo())
    assert isinstance(stream, LiveStream)
    if start:
        stream.start()
    return stream


def batches_of(config: RunConfig, ranks: Ranks | None = None, *, steps: int = STEPS) -> list[Tensor]:
    stream = stream_of(config, ranks)
    return [only(stream.batch(step)).x_ND for step in range(steps)]


def held_out_rows(
    stream: LiveStream, half: Half, *, max_tokens: int = 10**6, ranks: Ranks | None = None
) -> list[HeldOutRows]:
    batches = stream.held_out.batches(half, max_tokens=max_tokens, ranks=ranks or Solo())
    return [only(batch.sites) for batch in batches]


def as_counts(rows: Tensor) -> Counter[bytes]:
    return Counter(row.numpy().tobytes() for row in rows)


@pytest.mark.parametrize("calibration_tokens", [1, 256, 4096])
def test_batches_and_pool_hold_what_the_lanes_read_nothing_lost_nothing_twice(model, text, calibration_tokens):
    config = live_config(model, text, harvest={"calibration_tokens": calibration_tokens})  # 4096: more than pools hold
    stream = stream_of(config)
    taken = [only(stream.batch(step)).x_ND for step in range(STEPS)]
    tokenizer, harvest = Tokenizer(config.model), config.harvest
    scaling = only(stream.scalings)
    for number, state in stream.lane_states().items():
        stretches = stream._corpus.stretches(4, context_length=harvest.context_length, tokenizer=tokenizer)
        lane = Lane(number, stretches=stretches, corpus=stream._corpus, tokenizer=tokenizer, seed=0, repeat=True,
                    context_length=harvest.context_length)  # fmt: skip
        rows = torch.cat([batch[16 * number : 16 * (number + 1)] for batch in taken] + [state["rows/residual1"]])
        expected: list[Tensor] = []
        while sum(map(len, expected)) < len(rows):
            ids_BT = lane.contexts(harvest.contexts_per_forward)
            raw_ND = only(stream.language_model.activations(ids_BT))[trainable(ids_BT, tokenizer)]
            assert within(raw_ND, limit=scaling.limit).all()
            expected.append(scaling.normalise(raw_ND).x_ND)
        assert as_counts(rows) == as_counts(torch.cat(expected))
        assert torch.equal(lane.state()["cursor"], state["cursor"])


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_sees_the_same_batches(config, size):
    alone = batches_of(config)
    together = on_ranks(size, lambda ranks: batches_of(config, ranks))
    for batch, parts in zip(alone, zip(*together, strict=True), strict=True):
        assert torch.equal(batch, torch.cat(parts))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (4, 2)])
@pytest.mark.parametrize("step", [0, 1, 13])
def test_a_restored_stream_goes_on_bit_for_bit_and_lanes_move_between_ranks(config, before, after, step):
    expected = batches_of(config)

    def first(ranks: Ranks) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
        stream = stream_of(config, ranks)
        for number in range(step):
            stream.batch(number)
        return stream.replicated_state(), stream.lane_states()

    saved = on_ranks(before, first)
    replicated = saved[0][0]
    lanes = {number: state for _, own in saved for number, state in own.items()}
    assert sorted(lanes) == list(range(4))

    def second(ranks: Ranks) -> list[Tensor]:
        stream = stream_of(config, ranks, start=False)
        stream.restore(replicated, lanes.__getitem__)
        return [only(stream.batch(number)).x_ND for number in range(step, STEPS)]

    for batch, parts in zip(expected[step:], zip(*on_ranks(after, second), strict=True), strict=True):
        assert torch.equal(batch, torch.cat(parts))


def test_state_is_tensors_on_the_cpu_that_later_steps_leave_alone(config):
    stream = stream_of(config)
    state = stream.replicated_state() | stream.lane_states()[1]
    copies = {key: value.clone() for key, value in state.items()}
    for step in range(STEPS):
        stream.batch(step)
    assert all(value.device.type == "cpu" and torch.equal(value, copies[key]) for key, value in state.items())


PROCESSES = """
import os, sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from pathlib import Path
from test_stream import batches_of
from tools.one_of_each import only
from tools.tiny_models import live_config
from sae_train.ranks.distributed import find_ranks, leave
ranks = find_ranks()
batches = batches_of(live_config({model!r}, {text!r}), ranks, steps=12)
torch.save(batches, Path({out!r}) / f"{{ranks.rank}}_of_{{ranks.size}}.pt")
leave()
os._exit(0)
"""


@pytest.mark.multirank
@pytest.mark.slow
def test_two_processes_see_the_batches_of_one(model, text, tmp_path):
    here = Path(__file__).resolve().parent
    script = tmp_path / "harvest.py"
    paths = [str(here), str(here.parent)]
    script.write_text(PROCESSES.format(paths=paths, model=str(model), text=str(text), out=str(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for arguments in ([], launcher):
        subprocess.run([sys.executable, *arguments, str(script)], env=environment, check=True, timeout=120)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("0_of_1", "0_of_2", "1_of_2"))
    for batch, *parts in zip(alone, first, second, strict=True):
        assert torch.equal(batch, torch.cat(parts))


def test_what_draws_the_stream_and_what_does_not(config, model, text):
    first = batches_of(config, steps=2)
    assert not torch.equal(batches_of(live_config(model, text, data_seed=1), steps=1)[0], first[0])
    same = live_config(model, text, seed=5, tokens=1280, k=2.0)
    assert torch.equal(torch.stack(batches_of(same, steps=2)), torch.stack(first))


def test_normalised_in_the_runs_precision(model, text):
    batches = batches_of(live_config(model, text, precision="float64", harvest={"calibration_tokens": 1024}))
    assert batches[0].dtype == torch.float64
    assert float(torch.cat(batches).square().sum(1).mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_other_families_stream_too(tmp_path, text, kind):
    stream = stream_of(live_config(save_model(tmp_path, kind), text))
    assert only(stream.batch(0)).x_ND.shape == (64, 32)
    assert stream.language_model.has_loss == (kind == "gpt2")


def test_tokens_of_outlying_norm_are_trained_on_nowhere(model, text, tmp_path):
    loud = save_loud_model(model, tmp_path, factor=1000)
    layer = schema.ModuleLayerConfig(kind="module", path="model.embed_tokens", side="output")
    stream = stream_of(live_config(tmp_path, text, layer=layer))
    scaling = only(stream.scalings)
    for step in range(STEPS):
        raw = only(stream.batch(step)).x_ND * scaling.scale + scaling.centre_D.float()
        assert (raw.norm(dim=1) <= scaling.limit * 1.001).all()
    assert 0 < only(stream.dropped_shares()) < 0.2
    tokenizer = Tokenizer(live_config(tmp_path).model)
    for batch in stream.held_out.batches("evaluation", max_tokens=10**6, ranks=Solo()):
        expected = trainable(batch.ids_BT, tokenizer) & (batch.ids_BT != loud)
        assert torch.equal(only(batch.sites).kept_BT, expected)


def test_held_out_batches(config):
    stream = stream_of(config)
    model = stream.language_model
    for half in ("calibration", "evaluation"):
        for batch in stream.held_out.batches(half, max_tokens=10**6, ranks=Solo()):
            rows = only(batch.sites)
            assert rows.raw_ND.dtype == torch.float32
            assert torch.equal(only(model.activations(batch.ids_BT))[rows.kept_BT], rows.raw_ND)
            assert not rows.kept_BT[:, 0].any()
            assert len(rows.context_N) == len(rows.raw_ND)
    calibration, evaluation = held_out_rows(stream, "calibration"), held_out_rows(stream, "evaluation")
    seen = [{int(index) for rows in half for index in rows.context_N} for half in (calibration, evaluation)]
    assert all(index % 2 == 0 for index in seen[0])
    assert all(index % 2 == 1 for index in seen[1])
    again = torch.cat([rows.raw_ND for rows in held_out_rows(stream, "calibration")])
    assert torch.equal(again, torch.cat([rows.raw_ND for rows in calibration]))
    assert 20 <= sum(len(rows.raw_ND) for rows in held_out_rows(stream, "evaluation", max_tokens=20)) < 20 + 16
    shares = on_ranks(2, lambda ranks: held_out_rows(stream_of(config, ranks), "evaluation", ranks=ranks))
    for index, rows in enumerate(evaluation):
        assert torch.equal(rows.raw_ND, shares[index % 2][index // 2].raw_ND)


def contexts_in_batches(config: RunConfig, monkeypatch: pytest.MonkeyPatch, *, steps: int) -> list[int]:
    """Return the number of contexts in each batch. The model's activations are replaced by context numbers."""
    stream = stream_of(config, start=False)
    count = 0

    (site,) = stream.language_model.sites.values()

    def numbered(ids_BT: Tensor) -> dict[str, Tensor]:
        nonlocal count
        numbers = torch.arange(count, count + len(ids_BT))
        count += len(ids_BT)
        signs = (numbers[:, None] >> torch.arange(site.d_model).clamp(max=30) & 1) * 2.0 - 1
        return {site.label: signs[:, None].expand(*ids_BT.shape, site.d_model)}

    monkeypatch.setattr(stream.language_model, "activations", numbered)
    stream.start()
    scaling = only(stream.scalings)
    offset = scaling.centre_D.float()
    batches = [only(stream.batch(step)).x_ND * scaling.scale + offset > 0 for step in range(steps)]
    return [len(batch.unique(dim=0)) for batch in batches]


def test_batches_of_the_defaults_mix_at_least_256_contexts(monkeypatch):
    defaults = live_config(batch_tokens=2048, tokens=10**6, harvest={"lanes": 64, "context_length": 128,
                           "contexts_per_forward": 8, "pool_batches": 64, "calibration_tokens": 65_536})  # fmt: skip
    contexts = contexts_in_batches(defaults, monkeypatch, steps=70)
    assert min(contexts) >= 256
    assert sum(contexts) / len(contexts) > 600


def test_batches_of_small_pools_mix_too(config, monkeypatch):
    contexts = contexts_in_batches(config, monkeypatch, steps=STEPS)
    assert min(contexts) >= 16  # of 64 tokens from 4 lanes, whose pools hold 8 contexts each


def test_without_repeat_the_run_stops_as_soon_as_it_is_known_and_says_how_much_there_is(model, text):
    def attempt(tokens: int) -> int:
        stream = stream_of(live_config(model, text, tokens=tokens, repeat=False))
        for step in range(-(-tokens // 64)):
            stream.batch(step)
        return tokens

    with pytest.raises(UserError, match=r"the corpus gives (\d+) tokens") as caught:
        attempt(64 * 1000)
    there = int(str(caught.value).split("gives ")[1].split()[0])
    assert attempt(there) == there
    with pytest.raises(UserError, match=f"gives {there} tokens"):
        attempt(there + 64)


def test_repeat_goes_on_over_many_epochs(model, tmp_path):
    save_sentences(tmp_path, 24)
    batches = batches_of(live_config(model, tmp_path), steps=100)
    assert all(torch.isfinite(batch).all() for batch in batches)


def changed(config: RunConfig, **values: Any) -> RunConfig:
    return replace(config, harvest=replace(config.harvest, **values))


def refusal(config: RunConfig, *, n_ranks: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        check_stream(config.source, n_ranks=n_ranks)
    assert caught.value.status == 2
    return str(caught.value)


def test_facts(config):
    facts = check_stream(config.source, n_ranks=2)
    (site,) = facts.sites
    assert (facts.name, site.label, site.d_model, site.layer) == ("m", "residual1", 32, config.layer)
    assert facts.pool_bytes == 8 * 64 * 32 * 4 + 256 * 32 * 4
    assert facts.flops_per_token > 0
    assert site.record == {"site": "residual1", "module": "model.layers.1", "side": "output"}
    assert facts.sites_of(config.layer) == facts.sites


def test_refusals_before_weights(config, model, text, tmp_path):
    assert "harvest.lanes=4 over 3 ranks: not divisible. No multiple divides batch_tokens=64" in refusal(
        config, n_ranks=3
    )
    assert "Nearest harvest.lanes that divide batch_tokens=64: 8 or 16." in refusal(config, n_ranks=8)
    check_stream(changed(config, contexts_per_forward=4).source, n_ranks=1)
    check_stream(changed(config, contexts_per_forward=5, pool_batches=10).source, n_ranks=1)
    note = check_stream(changed(config, context_length=65, pool_batches=64).source, n_ranks=1).note
    assert "harvest.context_length=65 is longer than the 64 positions in the configuration of llama: it runs" in note
    many = {"lanes": 4096, "context_length": 8, "contexts_per_forward": 1, "pool_batches": 16}
    lanes = refusal(live_config(model, text, harvest=many, batch_tokens=4096, tokens=4096))
    assert "harvest.lanes=4096: lane" in lanes
    fewer = int(lanes.split("largest that works is harvest.lanes=")[1].split(";")[0])
    check_stream(
        live_config(model, text, harvest=many | {"lanes": fewer}, batch_tokens=4096, tokens=4096).source, n_ranks=1
    )
    refusal(live_config(model, text, harvest=many | {"lanes": 2 * fewer}, batch_tokens=4096, tokens=4096))
    several = refusal(live_config(tmp_path / "none", tmp_path / "gone.txt"), n_ranks=3)
    assert len(several.splitlines()) == 3


def test_a_tokenizer_that_does_not_belong_to_the_model(model, text, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    save_tokenizer(tmp_path, bos_token="<bos>", eos_token="<eos>")
    small = LlamaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    LlamaForCausalLM(small).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Use the tokenizer that belongs to the model"):
        stream_of(live_config(tmp_path, text))


def test_activations_that_are_not_finite_name_site_and_way_out(model, text, tmp_path):
    save_loud_model(model, tmp_path, factor=float("nan"))
    with pytest.raises(UserError, match=r"residual1: .* because its weight model.embed_tokens.weight is not. No other"):
        stream_of(live_config(tmp_path, text))


def test_another_corpus_than_the_checkpoints_is_refused(config, model, tmp_path):
    state = stream_of(config).replicated_state()
    save_sentences(tmp_path, 100, seed=1)
    other = stream_of(live_config(model, tmp_path), start=False)
    with pytest.raises(UserError, match="not the text that the checkpoint was made from"):
        other.restore(state, lambda lane: {})


def test_text_that_the_filters_empty_is_refused(model, tmp_path):
    empty = [f"<bos>{'<eos>' * (99 + n)}" for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in empty))
    with pytest.raises(UserError, match="gave no token that the filters keep"):
        stream_of(live_config(model, tmp_path, harvest={"lanes": 1}))  # a cut between lanes could leave half a mark


def test_a_site_that_becomes_all_outliers_is_refused(config, monkeypatch):
    stream = stream_of(config)
    loud = torch.full((32,), 1e6)
    monkeypatch.setattr(
        stream.language_model, "activations", lambda ids_BT: {"residual1": loud.expand(*ids_BT.shape, 32)}
    )
    for step in range(STEPS):
        batch = only(stream.batch(step)).x_ND  # in the end, all rows are shortened to the limit
    raw = batch * only(stream.scalings).scale + only(stream.scalings).centre_D.float()
    assert torch.allclose(raw.norm(dim=1), torch.tensor(only(stream.scalings).limit), rtol=1e-4)
    with pytest.raises(UserError, match=r"lane \d, residual1: 200 .* gave no activation within the outlier limit"):
        [stream.batch(step) for step in range(STEPS, 1000)]
