"""Many architectures of transformers: the plan without weights, and activations equal to a hook set by hand."""

from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sae_train import config as schema
from sae_train.config import RunConfig
from sae_train.harvest.language_model import LanguageModel
from sae_train.harvest.model_facts import model_facts
from sae_train.sites.families import FAMILIES
from tools.architectures import ARCHITECTURES, save_architecture
from tools.one_of_each import only
from tools.tiny_models import live_config

CPU = torch.device("cpu")
IDS_BT = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(0))
FAST = ("mixtral", "gemma3", "xlm-roberta", "opt", "bloom", "bart", "jetmoe", "falcon")  # falcon writes into its sites
NEAR = {"rtol": 1e-4, "atol": 1e-5}  # of two models that were loaded apart: products depend on where weights lie


def block_config(folder: Path, kind: str = "residual") -> RunConfig:
    return live_config(folder, layer=schema.BlockLayerConfig(kind=kind, index=1), attention="eager")


def module_config(folder: Path, path: str) -> RunConfig:
    return live_config(folder, layer=schema.ModuleLayerConfig(kind="module", path=path, side="output"),
                       attention="eager")  # fmt: skip


def output_of(model: nn.Module, module: str) -> Tensor:
    """Return a module's output in an undisturbed forward pass, by a hook of this test's own."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(
        lambda _m, _a, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    needs_more = getattr(model.config, "is_encoder_decoder", False)
    with torch.no_grad():
        model(input_ids=IDS_BT, **({"decoder_input_ids": IDS_BT} if needs_more else {}))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ARCHITECTURES]
)
def test_plan_and_activations(tmp_path: Path, name: str) -> None:
    expected = ARCHITECTURES[name]
    by_hand = save_architecture(tmp_path, name).from_pretrained(tmp_path, attn_implementation="eager").eval()
    prefix = "" if expected.has_loss else by_hand.base_model_prefix + "."
    own = expected.block if expected.block in dict(by_hand.named_modules()) else prefix + expected.block
    right = output_of(by_hand, own)
    config = block_config(tmp_path) if expected.has_family else module_config(tmp_path, expected.block)
    language_model = LanguageModel(config.source, device=CPU)
    facts, site = language_model.facts, only(language_model.sites)
    assert (site.place.module, site.d_model, facts.has_loss) == (expected.block, right.shape[-1], expected.has_loss)
    assert (facts.n_blocks, site.index) == ((3, 1) if expected.has_family else (None, None))
    found = only(language_model.activations(IDS_BT))
    torch.testing.assert_close(found, right, **NEAR)
    assert torch.equal(found, output_of(language_model.model, site.place.module))
    assert facts.flops_per_token > 0
    assert (facts.note is not None) == (name == "jetmoe")
    if expected.has_loss:
        plain = language_model.logits(IDS_BT)
        torch.testing.assert_close(plain, by_hand(input_ids=IDS_BT).logits.detach(), **NEAR)
        assert torch.equal(language_model.logits(IDS_BT, replace={site.label: Tensor.clone}), plain)
        assert not torch.allclose(
            language_model.logits(IDS_BT, replace={site.label: torch.zeros_like}), plain, atol=1e-4
        )
    if expected.has_family:
        again = model_facts(module_config(tmp_path, site.place.module).source)
        assert only(again.sites).place == site.place
        language_model = LanguageModel(replace(config.source, layers=layers_of(language_model)), device=CPU)
        check_parts_of_a_block(language_model, site.place.module)
        check_each_site_alone(language_model)


def layers_of(language_model: LanguageModel) -> tuple[schema.LayerConfig, ...]:
    """Return every kind of site that the architecture has, at two blocks."""
    family = FAMILIES[language_model.model.config.get_text_config().model_type]
    kinds = ("residual", *(["mlp"] if family.mlp else []), *(["attention"] if family.attention else []))
    return tuple(schema.BlockLayerConfig(kind=kind, index=index) for index in (1, 0) for kind in kinds)


def check_parts_of_a_block(language_model: LanguageModel, block: str) -> None:
    """`mlp` is added to the residual stream, and `attention` is what its projection reads."""
    kind, found = language_model.model.config.get_text_config().model_type, language_model.activations(IDS_BT)
    assert torch.equal(found["residual1"], output_of(language_model.model, block))
    before_norm = FAMILIES[kind].blocks in ("encoder.layer", "layer")
    if FAMILIES[kind].mlp is not None and not before_norm:
        part = language_model.model.get_submodule(language_model.sites["mlp1"].place.module)
        handle = part.register_forward_hook(
            lambda _m, _a, out: torch.zeros_like(out) if isinstance(out, Tensor) else (out[0] * 0, *out[1:])
        )
        without = output_of(language_model.model, block)
        handle.remove()
        assert without.any(), "the stream itself is not added by the part"
        assert torch.allclose(found["residual1"], without + found["mlp1"], atol=1e-4)
        assert not torch.allclose(found["residual1"], without, atol=1e-4)
    place = language_model.sites["attention1"].place
    projection = language_model.model.get_submodule(place.module)
    read = output_of(language_model.model, place.module)
    assert torch.allclose(projection(found["attention1"]), read, atol=1e-6)
    assert place.side == "input"


def check_each_site_alone(language_model: LanguageModel) -> None:
    """All sites of one pass are those of a pass of their own, bit for bit, though some models write in place."""
    together = language_model.activations(IDS_BT)
    if language_model.has_loss:
        of_whole_pass, logits = language_model.activations_and_logits(IDS_BT)
        assert all(torch.equal(of_whole_pass[label], together[label]) for label in together)
        assert torch.equal(logits, language_model.logits(IDS_BT))
    both = language_model.activations_and_gradients(IDS_BT) if language_model.has_loss else None
    for label, site in language_model.sites.items():
        own = language_model.activations(IDS_BT, [label])
        assert list(own) == [label]
        assert torch.equal(own[label], together[label])
        if both is not None:
            alone = copy(language_model)
            alone.sites = {label: site}
            activations, gradients = alone.activations_and_gradients(IDS_BT)
            assert torch.equal(activations[label], both[0][label])
            assert torch.equal(gradients[label], both[1][label])


def test_the_walk_is_as_wide_as_it_claims() -> None:
    assert len(ARCHITECTURES) >= 40
