"""What settings of layers mean in a model: one site or several, each once, and which of them is wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_train import config as schema
from sae_train.config import SourceConfig
from sae_train.errors import UserError
from sae_train.harvest.build import StreamFacts, StreamSite, check_stream
from sae_train.harvest.language_model import LanguageModel
from sae_train.harvest.model_facts import model_facts
from tools.small_runs import CPU
from tools.tiny_models import planned_config, save_model

IDS_BT = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a llama of three blocks."""
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


def block(kind: str, index: int | str) -> schema.BlockLayerConfig:
    return schema.BlockLayerConfig(kind=kind, index=index)


def module(path: str, side: str = "output") -> schema.ModuleLayerConfig:
    return schema.ModuleLayerConfig(kind="module", path=path, side=side)


def source_of(model: Path, *layers: schema.LayerConfig, **dials: Any) -> SourceConfig:
    return replace(planned_config(model, **dials).source, layers=layers)


def facts_of(model: Path, *layers: schema.LayerConfig, **dials: Any) -> StreamFacts:
    return check_stream(source_of(model, *layers, **dials), n_ranks=1)


def labels(sites: tuple[StreamSite, ...]) -> list[str]:
    return [site.label for site in sites]


def refusal(model: Path, *layers: schema.LayerConfig, **dials: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        facts_of(model, *layers, **dials)
    assert caught.value.status == 2
    return str(caught.value).splitlines()


def test_settings_that_mean_one_site_have_one(model: Path) -> None:
    middle, one, last = block("residual", "middle"), block("residual", 1), block("residual", -1)
    facts = facts_of(model, middle, last, one)
    assert labels(facts.sites) == ["residual1", "residual2"]
    assert [site.layer for site in facts.sites] == [middle, last]
    assert labels(facts.sites_of(middle)) == labels(facts.sites_of(one)) == ["residual1"]
    assert labels(facts.sites_of(last)) == ["residual2"]
    assert facts.sites_of(one)[0].layer == one


@pytest.mark.parametrize(
    ("index", "blocks"), [("all", [0, 1, 2]), ("every=1", [0, 1, 2]), ("every=2", [1]), ("every=3", [2])]
)
@pytest.mark.parametrize("kind", ["residual", "mlp", "attention"])
def test_all_and_every_nth_block(model: Path, kind: str, index: str, blocks: list[int]) -> None:
    facts = facts_of(model, block(kind, "middle"), block(kind, index))
    several = facts.sites_of(block(kind, index))
    assert labels(several) == [f"{kind}{number}" for number in blocks]
    assert [site.layer for site in several] == [block(kind, number) for number in blocks]
    for site in several:
        (again,) = facts.sites_of(site.layer)  # as the setting of the SAE that is trained there
        assert again.label == site.label
    assert labels(facts.sites) == list(dict.fromkeys([f"{kind}1", *labels(several)]))


def test_the_same_tensor_under_two_names_is_two_sites(model: Path) -> None:
    """The names are the SAEs' own, and an SAE has the name that it has alone."""
    source = source_of(model, block("residual", 1), module("model.layers.1"), module("model.layers.2", "input"))
    language_model = LanguageModel(source, device=CPU)
    first, *others = language_model.activations(IDS_BT).values()
    assert len(others) == 2
    assert all(torch.equal(other, first) for other in others)


def test_widths_numbers_of_bytes_and_operations_are_of_all_sites(model: Path) -> None:
    narrow, wide, early = block("residual", 1), module("model.layers.1.mlp.gate_proj"), block("mlp", 0)
    facts = facts_of(model, early, wide, narrow)
    assert [site.d_model for site in facts.sites] == [32, 48, 32]
    alone = [facts_of(model, layer) for layer in (early, wide, narrow)]
    for name in ("pool_bytes", "pool_batch_bytes", "ahead_bytes"):
        assert getattr(facts, name) == sum(getattr(one, name) for one in alone)
    assert facts.flops_per_token == max(one.flops_per_token for one in alone) == alone[2].flops_per_token
    assert facts.record == alone[0].record
    assert [site.record["site"] for site in facts.sites] == ["mlp0", "module.model.layers.1.mlp.gate_proj", "residual1"]
    backward = [facts_of(model, *layers, sparsifier="gradient").flops_per_token for layers in
                ((early,), (narrow,), (narrow, early))]  # fmt: skip
    assert backward[2] == backward[0] > backward[1]


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("gpt2", "bfloat16"), ("bert", "float32")])
def test_bytes_of_the_model_are_those_of_its_weights(tmp_path: Path, kind: str, dtype: str) -> None:
    """GPT-2's embedding and its head are one matrix."""
    source = planned_config(save_model(tmp_path, kind), dtype=dtype).source
    facts = check_stream(source, n_ranks=1)
    weights = LanguageModel(source, device=CPU).model.parameters()
    assert facts.model_bytes == sum(weight.numel() * weight.element_size() for weight in weights)


def test_the_forward_pass_ends_at_the_last_site(model: Path) -> None:
    language_model = LanguageModel(source_of(model, block("mlp", 1), block("residual", 0)), device=CPU)
    ran: list[str] = []
    for name, part in language_model.model.named_modules():
        part.register_forward_pre_hook(lambda _m, _a, name=name: ran.append(name))
    language_model.activations(IDS_BT)
    assert "model.layers.1.mlp.down_proj" in ran
    assert "model.layers.2" not in ran
    ran.clear()
    language_model.activations(IDS_BT, ["residual0"])
    assert "model.layers.0.mlp.down_proj" in ran
    assert "model.layers.1" not in ran


def test_which_of_several_is_wrong(model: Path) -> None:
    good = block("residual", 1)
    index, path = refusal(model, good, block("residual", 7), block("mlp", 7), module("model.layers.1.mpl"))
    assert index == f"layer.index=7: {model} has 3 blocks. Choose -3 to 2, or 'middle'."  # once for both kinds
    assert path.startswith(f"layer.path=model.layers.1.mpl: no such module in {model}. Did you mean")
    (line,) = refusal(model, good, block("mlp", "every=4"))
    assert line == f"layer.index=every=4: {model} has 3 blocks. Choose every=1 to every=3, or all."
    both = refusal(model, module("model.layers"), good, module("model.rotary_emb"))
    assert len(both) == 2
    assert both[0].startswith("layer.path=model.layers: this module never runs")
    assert both[1].startswith("layer.path=model.rotary_emb: its output has shape")


def test_a_site_that_the_loss_does_not_depend_on_is_named(model: Path) -> None:
    source = source_of(model, block("residual", 0), block("mlp", 1), sparsifier="gradient")
    language_model = LanguageModel(source, device=CPU)
    language_model.activations_and_gradients(IDS_BT)
    cut = language_model.model.model.layers[1]  # the later site keeps its way to the loss
    cut.register_forward_pre_hook(lambda _m, args: (args[0].detach(), *args[1:]))
    with pytest.raises(UserError, match=r"layer.path=model.layers.0: .*does not depend on it"):
        language_model.activations_and_gradients(IDS_BT)


def test_no_family_knows_the_model(tmp_path: Path) -> None:
    lines = refusal(save_model(tmp_path, "xglm"), block("residual", "all"), block("mlp", 1), attention="eager")
    assert [line.split(":")[0] for line in lines] == ["layer=residual", "layer=mlp"]
    assert "for models of type 'xglm', only for" in lines[0]


def test_facts_of_the_model_and_of_the_stream_agree(model: Path) -> None:
    source = source_of(model, block("attention", "all"), block("residual", 2))
    found, facts = model_facts(source), facts_of(model, *source.layers)
    assert list(found.sites) == labels(facts.sites) == ["attention0", "attention1", "attention2", "residual2"]
    assert facts.model_bytes == found.weight_bytes
