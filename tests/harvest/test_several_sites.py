"""Several sites in one stream: each has the rows that it has alone, bit for bit, with one cursor for all."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sae_train import config as schema
from sae_train.config import RunConfig, SourceConfig
from sae_train.errors import Preempted
from sae_train.harvest.batch import Batch
from sae_train.harvest.build import build_stream
from sae_train.harvest.language_model import Tokenizer
from sae_train.harvest.live import LiveStream
from sae_train.phases import Phases
from sae_train.ranks.interface import Ranks, Solo
from tools.grid_of_threads import LOADING, on_ranks
from tools.tiny_models import live_config, save_loud_model, save_model, save_sentences

STEPS = 12
SITES: dict[str, schema.LayerConfig] = {
    "attention1": schema.BlockLayerConfig(kind="attention", index=1),
    "module.model.embed_tokens": schema.ModuleLayerConfig(kind="module", path="model.embed_tokens", side="output"),
    "residual1": schema.BlockLayerConfig(kind="residual", index="middle"),
    "module.model.layers.1.mlp.gate_proj": schema.ModuleLayerConfig(
        kind="module", path="model.layers.1.mlp.gate_proj", side="output"
    ),
    "mlp0": schema.BlockLayerConfig(kind="mlp", index=0),
    "module.model.layers.1.mlp.gate_proj.input": schema.ModuleLayerConfig(
        kind="module", path="model.layers.1.mlp.gate_proj", side="input"
    ),
}
"""Sites of two widths, not in the order of the forward pass; one module is a site twice. Embeddings have outliers."""
EMBEDDINGS = "module.model.embed_tokens"

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """Return `configure(sparsifier)`: a run on a model with a token of huge norm, at the embeddings."""
    folder = tmp_path_factory.mktemp("several")
    text = save_sentences(folder, 200)
    save_loud_model(save_model(folder / "plain", "llama"), folder / "model", factor=1000)
    return lambda sparsifier="topk", **dials: live_config(folder / "model", text, sparsifier=sparsifier, **dials)


def source_of(config: RunConfig, *labels: str) -> SourceConfig:
    """Return the settings of a stream of some of SITES, of all where none is named."""
    return replace(config.source, layers=tuple(SITES[label] for label in labels or SITES))


def opened(source: SourceConfig, ranks: Ranks | None = None) -> LiveStream:
    with LOADING:
        stream = build_stream(source, ranks=ranks or Solo())
    assert isinstance(stream, LiveStream)
    return stream


def batches_of(source: SourceConfig, ranks: Ranks | None = None) -> list[dict[str, Batch]]:
    stream = opened(source, ranks)
    try:
        stream.start()
        return [stream.batch(step) for step in range(STEPS)]
    finally:
        stream.close()


def same(here: Batch, there: Batch) -> bool:
    if here.gradient_ND is None or there.gradient_ND is None:
        return here.gradient_ND is there.gradient_ND and torch.equal(here.x_ND, there.x_ND)
    return torch.equal(here.x_ND, there.x_ND) and torch.equal(here.gradient_ND, there.gradient_ND)


@pytest.mark.parametrize("sparsifier", ["topk", "gradient"])
def test_each_site_has_the_rows_that_it_has_alone(configure: Configure, sparsifier: str) -> None:
    config = configure(sparsifier)
    together = batches_of(source_of(config))
    for label in SITES:
        alone = batches_of(source_of(config, label))
        assert all(list(batch) == [label] for batch in alone)
        assert all(same(batch[label], one[label]) for batch, one in zip(together, alone, strict=True))
    assert all((batch["residual1"].gradient_ND is not None) == (sparsifier == "gradient") for batch in together)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_ranks_and_prefetch_change_no_row(configure: Configure, prefetch: int) -> None:
    plain = batches_of(source_of(configure("gradient")))
    early = source_of(configure("gradient", harvest={"prefetch": prefetch}))
    by_rank = on_ranks(2, lambda ranks: batches_of(early, ranks))
    for batch, *parts in zip(plain, *by_rank, strict=True):
        for label, rows in batch.items():
            own = [part[label] for part in parts]
            gradients = [each.gradient_ND for each in own if each.gradient_ND is not None]
            assert same(rows, Batch(torch.cat([each.x_ND for each in own]), torch.cat(gradients)))


def test_a_row_is_the_same_token_at_every_site_unless_it_was_replaced(configure: Configure) -> None:
    """A norm keeps tokens of huge embeddings within its limit, so it shows the token of every row."""
    name = "model.layers.0.input_layernorm"
    normed = schema.ModuleLayerConfig(kind="module", path=name, side="output")
    stream = opened(replace(configure().source, layers=(SITES[EMBEDDINGS], normed)))
    stream.start()
    module = stream.language_model.model.get_submodule(name)
    table = stream.language_model.model.get_input_embeddings().weight
    loud = table[table.norm(dim=1) > stream.scalings[EMBEDDINGS].limit]
    replaced = kept = 0
    for step in range(STEPS):
        batch = {label: rows.x_ND * stream.scalings[label].scale + stream.scalings[label].centre_D.float()
                 for label, rows in stream.batch(step).items()}  # fmt: skip
        here, there = module(batch[EMBEDDINGS]), batch[f"module.{name}"]
        is_loud = torch.isclose(module(loud)[:, None], there, atol=1e-4).all(-1).any(0)
        assert torch.equal(torch.isclose(here, there, atol=1e-4).all(-1), ~is_loud)
        replaced, kept = replaced + int(is_loud.sum()), kept + int((~is_loud).sum())
    assert kept > replaced > 5


def test_the_share_over_the_limit_is_each_sites_own(configure: Configure) -> None:
    config = configure()
    stream = opened(source_of(config))
    stream.start()
    shares = stream.dropped_shares()
    assert list(shares) == list(SITES)
    assert 0 < shares[EMBEDDINGS] < 0.2
    for label in ("residual1", EMBEDDINGS):
        alone = opened(source_of(config, label))
        alone.start()
        assert alone.dropped_shares() == {label: shares[label]}


def test_held_out_rows_are_each_sites_own(configure: Configure) -> None:
    config = configure()
    stream = opened(source_of(config))
    stream.start()
    special = Tokenizer(config.model).special_ids
    whole = list(stream.held_out.batches("evaluation", max_tokens=400, ranks=Solo(), with_logits=True))
    for label in SITES:
        alone = opened(source_of(config, label))
        alone.start()
        own = list(alone.held_out.batches("evaluation", max_tokens=400, ranks=Solo()))
        asked = list(stream.held_out.batches("evaluation", max_tokens=400, ranks=Solo(), sites=[label]))
        for batch, one, other in zip(whole, own, asked, strict=True):
            assert list(one.sites) == list(other.sites) == [label]
            for rows in (one.sites[label], other.sites[label]):
                assert torch.equal(rows.raw_ND, batch.sites[label].raw_ND)
                assert torch.equal(rows.context_N, batch.sites[label].context_N)
                assert rows.kept_BT is not None
                assert torch.equal(rows.kept_BT, batch.sites[label].kept_BT)
            assert one.logits_BTV is None
    plain_BT = ~torch.isin(whole[0].ids_BT, torch.tensor(special))
    plain_BT[:, 0] = False
    kept = {label: rows.kept_BT for label, rows in whole[0].sites.items()}
    assert torch.equal(kept["module.model.layers.1.mlp.gate_proj.input"], plain_BT)
    lost_BT = plain_BT & ~kept[EMBEDDINGS]
    assert lost_BT.any()
    assert len(whole[0].ids_BT[lost_BT].unique()) == 1  # the token of huge norm
    assert torch.equal(whole[0].logits_BTV, stream.language_model.logits(whole[0].ids_BT))


def told_after(n: int) -> Phases:
    """Return phases that end a refill at the n-th look at the signals, and at each one after that."""
    looks = iter(range(n))

    def look() -> None:
        if next(looks, None) is None:
            raise Preempted("told")

    return Phases(alone=look)


@pytest.mark.parametrize("sparsifier", ["topk", "gradient"])
def test_a_run_that_stops_in_the_middle_of_refills_goes_on_bit_for_bit(configure: Configure, sparsifier: str) -> None:
    source = source_of(configure(sparsifier), "residual1", EMBEDDINGS, "module.model.layers.1.mlp.gate_proj")
    expected, torn, stopped = batches_of(source), opened(source), 0
    torn.start()
    for step in range(STEPS):
        for n in (1, 4):
            try:
                torn.fill(told_after(n))
            except Preempted:
                stopped += 1
                replicated, lanes = torn.replicated_state(), torn.lane_states()
                torn = opened(source)
                torn.restore(replicated, lanes.__getitem__)
        batch = torn.batch(step)
        assert all(same(rows, expected[step][label]) for label, rows in batch.items())
    assert stopped >= 4
    assert set(lanes[0]) >= {"rows/residual1", f"rows/{EMBEDDINGS}", f"dropped/{EMBEDDINGS}", "pool", "cursor", "seen"}
    assert (f"gradients/{EMBEDDINGS}" in lanes[0]) == (sparsifier == "gradient")
    assert {f"scaling_centre/{EMBEDDINGS}", "scaling_numbers/residual1"} <= set(replicated)
