"""Splicing into a language model at several sites: what is run, what is shared, and what each figure means."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_train.config import BlockLayerConfig, LayerConfig, RunConfig
from sae_train.evaluation.evaluate import evaluate_all
from sae_train.evaluation.metric import Subject
from sae_train.harvest.held_out import TextHeldOut
from sae_train.harvest.language_model import LanguageModel
from sae_train.phases import Phases
from sae_train.ranks.interface import Ranks, Solo
from tools.grid_of_threads import on_ranks
from tools.held_out_rows import held_out_text, subject
from tools.small_runs import CPU
from tools.tiny_models import live_config, save_model

SITES = {
    "attention0": BlockLayerConfig(kind="attention", index=0),
    "residual1": BlockLayerConfig(kind="residual", index=1),
    "mlp2": BlockLayerConfig(kind="mlp", index=2),
}
SAES = [("one threshold", "attention0"), ("topk", "residual1"), ("one threshold", "residual1"), ("zipf", "mlp2")]
TOKENS = 150


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return live_config(save_model(tmp_path_factory.mktemp("model")))


def loaded(config: RunConfig, *layers: LayerConfig) -> LanguageModel:
    """Return the language model with these sites, or with all of `SITES`."""
    return LanguageModel(replace(config.source, layers=layers or tuple(SITES.values())), device=CPU)


@pytest.fixture(scope="module")
def model(config: RunConfig) -> LanguageModel:
    return loaded(config)


def figures_of(
    subjects: list[Subject], held_out: TextHeldOut, model: LanguageModel, ranks: Ranks | None = None, **options: Any
) -> list[dict[str, Any]]:
    return evaluate_all(
        subjects, held_out, max_tokens=TOKENS, language_model=model, ranks=ranks or Solo(), **options
    )  # fmt: skip


def subjects_of(saes: list[tuple[str, str]]) -> list[Subject]:
    return [subject(name, Solo(), site=site) for name, site in saes]


def counted(model: LanguageModel, work: Callable[[], object]) -> int:
    """Return the number of forward passes of `work`."""
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = model.model.register_forward_pre_hook(count)
    work()
    handle.remove()
    return passes


def test_one_clean_pass_one_zeroed_a_site_and_one_spliced_an_sae(config: RunConfig, model: LanguageModel) -> None:
    held_out = held_out_text(config, model)
    n_batches = len(list(held_out.batches("evaluation", max_tokens=TOKENS, ranks=Solo())))
    for saes in (SAES, SAES[:1], SAES[1:3]):
        n_sites = len({site for _, site in saes})
        passes = counted(model, lambda saes=saes: figures_of(subjects_of(saes), held_out, model))  # type: ignore[misc]
        assert passes == n_batches * (1 + n_sites + len(saes))


def test_an_sae_among_others_has_the_figures_that_it_has_alone(config: RunConfig, model: LanguageModel) -> None:
    """Alone on a language model that has no other site."""
    together = figures_of(subjects_of(SAES), held_out_text(config, model), model)
    for sae, figures in zip(SAES, together, strict=True):
        own = loaded(config, SITES[sae[1]])
        assert figures_of(subjects_of([sae]), held_out_text(config, own), own) == [figures]
    assert len({figures["ce"] for figures in together}) == 1
    assert len({figures["delta_ce"] for figures in together}) == len(SAES)


def test_the_outliers_of_a_site_are_left_out_of_its_own_figures_alone(config: RunConfig, model: LanguageModel) -> None:
    before = figures_of(subjects_of(SAES), held_out_text(config, model), model)
    held_out = held_out_text(config, model)
    (batch, *_) = held_out.batches("evaluation", max_tokens=TOKENS, ranks=Solo())
    held_out.limits["residual1"] = float(batch.sites["residual1"].raw_ND.norm(dim=1).median())
    after = figures_of(subjects_of(SAES), held_out, model)
    changed = [site == "residual1" for _, site in SAES]
    assert [old != new for old, new in zip(before, after, strict=True)] == changed
    assert 0 < after[1]["evaluation_tokens"] < before[1]["evaluation_tokens"]
    assert after[1]["ce"] != after[0]["ce"] == before[0]["ce"]


@pytest.mark.parametrize(("name", "site"), SAES)
def test_the_losses_are_those_of_hooks_written_by_hand(
    config: RunConfig, model: LanguageModel, name: str, site: str
) -> None:
    evaluated = subject(name, Solo(), site=site)
    (figures,) = figures_of([evaluated], held_out_text(config, model), model)
    losses: dict[str, list[Tensor]] = {"ce": [], "spliced": [], "zeroed": []}
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "ce": lambda acts: acts, "spliced": lambda acts: evaluated.sae(acts), "zeroed": torch.zeros_like,
    }  # fmt: skip
    for batch in held_out_text(config, model).batches("evaluation", max_tokens=TOKENS, ranks=Solo()):
        ids_BT, kept_BT = batch.ids_BT, batch.sites[site].kept_BT
        assert ids_BT is not None
        assert kept_BT is not None
        for kind, change in changes.items():
            logits = hooked_logits(model, site, ids_BT, kept_BT, change)[:, :-1]
            loss_BT = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids_BT[:, 1:], reduction="none")
            losses[kind].append(loss_BT[kept_BT[:, :-1]])
    ce, spliced, zeroed = (float(torch.cat(losses[kind]).mean()) for kind in ("ce", "spliced", "zeroed"))
    assert figures["ce"] == pytest.approx(ce, rel=1e-5)
    assert figures["ce"] + figures["delta_ce"] == pytest.approx(spliced, rel=1e-5)
    assert figures["ce_recovered"] == pytest.approx((zeroed - spliced) / (zeroed - ce), rel=1e-3)


def hooked_logits(
    model: LanguageModel, site: str, ids_BT: Tensor, kept_BT: Tensor, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return logits with `change` applied to the kept activations, by hooks on the Llama's own modules."""

    def put(acts_BTD: Tensor) -> Tensor:
        return torch.where(kept_BT.unsqueeze(-1), change(acts_BTD).to(acts_BTD.dtype), acts_BTD)

    block = model.model.model.layers[int(site[-1])]
    if site.startswith("attention"):
        handle = block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: (put(args[0]),))
    else:
        module = block.mlp if site.startswith("mlp") else block
        handle = module.register_forward_hook(lambda _, args, output: put(output))
    with torch.no_grad():
        logits: Tensor = model.model(ids_BT).logits
    handle.remove()
    return logits


def test_no_logits_are_alive_when_the_next_batch_is_read(config: RunConfig, model: LanguageModel) -> None:
    alive: list[int] = []

    def count(*_: object) -> None:
        tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
        alive.append(sum(each.ndim == 3 and each.shape[-1] == model.vocab for each in tensors))

    handle = model.model.register_forward_pre_hook(count)
    figures_of(subjects_of(SAES[:1]), held_out_text(config, model), model)
    handle.remove()
    assert len(alive) > 3
    assert alive[::3] == [0] * len(alive[::3])  # at each clean pass
    assert all(n > 0 for n in alive[1::3])


def test_saes_on_one_rank_each_are_spliced_as_in_one_process(config: RunConfig) -> None:
    model = loaded(config)
    expected = figures_of(subjects_of(SAES), held_out_text(config, model), model)
    models = [loaded(config) for _ in range(2)]  # two threads must not hook one module at the same time

    def work(ranks: Ranks) -> list[dict[str, Any]]:
        own = models[ranks.rank]
        phases = Phases(together=ranks.barrier)
        return figures_of(
            subjects_of(SAES[ranks.rank :: 2]), held_out_text(config, own), own, ranks, deal=Solo(), phases=phases
        )

    found = on_ranks(2, work)
    assert found == [expected[::2], expected[1::2]]
