"""The gradient of the language model's loss at a site, beside slow references; and what it costs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_train import config as schema
from sae_train.errors import ConfigError
from sae_train.harvest.build import check_stream
from sae_train.harvest.language_model import LanguageModel
from sae_train.harvest.model_facts import model_facts
from tools.one_of_each import only
from tools.small_runs import CPU
from tools.tiny_models import live_config, save_model

IDS_BT = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
SITES = [
    schema.BlockLayerConfig(kind="residual", index=1),
    schema.BlockLayerConfig(kind="residual", index=2),
    schema.BlockLayerConfig(kind="mlp", index=1),
    schema.BlockLayerConfig(kind="attention", index=1),
    schema.ModuleLayerConfig(kind="module", path="model.layers.1.mlp.gate_proj", side="output"),
    schema.ModuleLayerConfig(kind="module", path="model.layers.2", side="input"),
    schema.ModuleLayerConfig(kind="module", path="lm_head", side="output"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_model(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "gpt2", "opt", "bert")}


def loss_of(language_model: LanguageModel, site_BTD: Tensor) -> Tensor:
    """Return the summed cross-entropy, in nats, of what the model goes on to predict with `site_BTD` at its site."""
    place = only(language_model.sites).place
    module = language_model.model.get_submodule(place.module)

    def splice(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        return site_BTD if isinstance(output, Tensor) else (site_BTD, *output[1:])

    if place.side == "input":
        handle = module.register_forward_pre_hook(lambda _m, args: (site_BTD, *args[1:]))
    else:
        handle = module.register_forward_hook(splice)
    logits = language_model.model(IDS_BT).logits
    handle.remove()
    log_p = logits.log_softmax(-1)
    return sum((-log_p[b, t, IDS_BT[b, t + 1]] for b in range(2) for t in range(8)), torch.zeros(()))


@pytest.mark.parametrize(
    "layer", SITES, ids=lambda layer: getattr(layer, "path", f"{layer.kind}{getattr(layer, 'index', '')}")
)
def test_it_is_the_gradient_of_the_summed_loss_at_the_site(models: dict[str, Path], layer: schema.LayerConfig) -> None:
    """Beside autograd through a splice."""
    config = live_config(models["llama"], layer=layer, attention="eager")
    language_model = LanguageModel(config.source, device=CPU)
    language_model.model.double()
    plain = only(language_model.activations(IDS_BT))
    site_BTD, gradient_BTD = map(only, language_model.activations_and_gradients(IDS_BT))
    assert torch.equal(site_BTD, plain)
    leaf = plain.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(language_model, leaf * 1), leaf)
    assert torch.allclose(gradient_BTD, expected, rtol=1e-9, atol=1e-12)
    assert float(gradient_BTD.abs().sum()) > 0


def test_it_is_what_finite_differences_say(models: dict[str, Path]) -> None:
    """One entry, in float64, of a model whose norms do not round to fp32 on the way."""
    language_model = LanguageModel(live_config(models["gpt2"], attention="eager").source, device=CPU)
    language_model.model.double()
    site_BTD, gradient_BTD = map(only, language_model.activations_and_gradients(IDS_BT))
    step = torch.zeros_like(site_BTD)
    step[1, 3, 5] = 1e-5
    with torch.no_grad():
        slope = (loss_of(language_model, site_BTD + step) - loss_of(language_model, site_BTD - step)) / 2e-5
    assert float(gradient_BTD[1, 3, 5]) == pytest.approx(float(slope), rel=1e-6)


def test_only_what_follows_the_site_is_kept_and_weights_get_nothing(models: dict[str, Path]) -> None:
    """Before the site nothing asks for a gradient; after it everything does; no weight ever has one."""
    language_model = LanguageModel(live_config(models["llama"]).source, device=CPU)
    seen: dict[int, bool] = {}

    def note(index: int) -> torch.utils.hooks.RemovableHandle:
        block = language_model.model.model.layers[index]
        return block.input_layernorm.register_forward_hook(lambda _m, _a, out: seen.update({index: out.requires_grad}))

    handles = [note(index) for index in range(3)]
    gradient_BTD = only(language_model.activations_and_gradients(IDS_BT)[1])
    for handle in handles:
        handle.remove()
    assert seen == {0: False, 1: False, 2: True}
    assert not gradient_BTD.requires_grad
    assert all(
        parameter.grad is None and not parameter.requires_grad for parameter in language_model.model.parameters()
    )


def test_a_gradient_belongs_to_the_later_tokens_of_its_context(models: dict[str, Path]) -> None:
    """No context hears of another, however many go together; the last position predicts nothing."""
    language_model = LanguageModel(live_config(models["gpt2"]).source, device=CPU)
    both = [only(each) for each in language_model.activations_and_gradients(IDS_BT)]
    alone = [map(only, language_model.activations_and_gradients(ids)) for ids in IDS_BT.split(1)]
    for here, parts in zip(both, zip(*alone, strict=True), strict=True):
        assert torch.allclose(here, torch.cat(parts), rtol=1e-4, atol=1e-5)
    gradient_BTD = both[1]
    assert not gradient_BTD[:, -1].any()
    assert gradient_BTD[:, :-1].any(dim=-1).all()


def test_a_site_that_the_loss_does_not_depend_on_is_refused(models: dict[str, Path]) -> None:
    language_model = LanguageModel(live_config(models["llama"]).source, device=CPU)
    language_model.model.model.norm.register_forward_hook(lambda _m, _a, out: out.detach())
    with pytest.raises(ConfigError, match=r"layer.path=model.layers.1: .*does not depend on it"):
        language_model.activations_and_gradients(IDS_BT)


def test_where_a_module_sees_all_tokens_in_one_row(models: dict[str, Path]) -> None:
    layer = schema.ModuleLayerConfig(kind="module", path="model.decoder.layers.1.fc1", side="output")
    language_model = LanguageModel(live_config(models["opt"], layer=layer).source, device=CPU)
    site_BTD, gradient_BTD = map(only, language_model.activations_and_gradients(IDS_BT))
    assert site_BTD.shape == gradient_BTD.shape == (2, 9, 48)
    assert torch.equal(site_BTD, only(language_model.activations(IDS_BT)))


def test_the_way_to_the_loss_and_back_is_counted(models: dict[str, Path]) -> None:
    config = live_config(models["llama"])
    block, vocab = 4 * 32 * 32 + 3 * 32 * 48, LanguageModel(config.source, device=CPU).vocab
    assert model_facts(config.source).flops_per_token == 2 * 2 * block
    back = block + 32 * vocab
    assert (
        model_facts(live_config(models["llama"], sparsifier="gradient").source).flops_per_token
        == 2 * (3 * block + 32 * vocab) + 2 * back
    )


def test_a_model_without_a_loss_is_refused_before_its_weights_are_read(models: dict[str, Path]) -> None:
    config = live_config(models["bert"], sparsifier="gradient")
    with pytest.raises(ConfigError, match=r"sparsifier=gradient: .*does not predict the next token. Choose") as caught:
        check_stream(config.source, n_ranks=1)
    assert "sparsifier=topk" in str(caught.value)
