"""Sites of every family: the right tensor, nothing computed after it, and splicing that changes nothing else."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sae_train import config as schema
from sae_train.config import RunConfig
from sae_train.errors import ConfigError, DataError, UserError
from sae_train.harvest.language_model import LanguageModel
from sae_train.harvest.model_facts import SiteFacts, model_facts
from sae_train.hub import hub_error
from tools.one_of_each import only
from tools.tiny_models import FAMILIES, OTHERS, live_config, save_model

CPU = torch.device("cpu")
IDS_BT = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS = ("residual", "mlp", "attention")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_model(tmp_path_factory.mktemp(kind), kind) for kind in (*FAMILIES, *OTHERS)}


def config_for(models: dict[str, Path], family: str, kind: str = "residual", index: int | str = 1) -> RunConfig:
    layer = schema.BlockLayerConfig(kind=kind, index=index)
    return live_config(models[family], layer=layer, attention="eager")


def module_config(models: dict[str, Path], family: str, path: str, side: str = "output") -> RunConfig:
    layer = schema.ModuleLayerConfig(kind="module", path=path, side=side)
    return live_config(models[family], layer=layer, attention="eager")


_LOADED: dict[str, LanguageModel] = {}


def loaded(config: RunConfig) -> LanguageModel:
    """Return the language model of a config; tests leave it as it was."""
    key = f"{config.model} {config.layer}"
    if key not in _LOADED:
        _LOADED[key] = LanguageModel(config.source, device=CPU)
    return _LOADED[key]


def site_of(language_model: LanguageModel) -> SiteFacts:
    return only(language_model.sites)


def activations_of(language_model: LanguageModel) -> Tensor:
    return only(language_model.activations(IDS_BT))


def block_of(language_model: LanguageModel) -> nn.Module:
    """Return the block that holds the site."""
    parts = site_of(language_model).place.module.split(".")
    while not parts[-1].isdigit():
        parts.pop()
    return language_model.model.get_submodule(".".join(parts))


def all_outputs(language_model: LanguageModel, module: nn.Module) -> Tensor:
    """Return a module's output in an undisturbed forward pass."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        language_model.model(IDS_BT)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("index", [0, 1])
def test_residual_is_what_transformers_calls_the_hidden_state(models, family, index):
    language_model = loaded(config_for(models, family, index=index))
    with torch.no_grad():
        hidden = language_model.model(IDS_BT, output_hidden_states=True).hidden_states[index + 1]
    assert torch.equal(activations_of(language_model), hidden)
    assert site_of(language_model).label == f"residual{index}"
    assert language_model.facts.n_blocks == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_is_what_is_added_to_the_residual_stream(models, family):
    language_model = loaded(config_for(models, family, "mlp"))
    block, added = block_of(language_model), activations_of(language_model)
    if family in ("bert", "roberta"):  # post-norm: the sum is normalised after it
        before = all_outputs(language_model, block.attention)
        expected = block.output.LayerNorm(added + before)
        assert torch.allclose(expected, all_outputs(language_model, block), atol=1e-5)
        return
    residual = activations_of(loaded(config_for(models, family)))
    target = language_model.model.get_submodule(site_of(language_model).place.module)
    handle = target.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out))
    without = all_outputs(language_model, block)
    handle.remove()
    assert torch.allclose(residual, without + added, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_the_heads_output_before_its_projection(models, family):
    language_model = loaded(config_for(models, family, "attention"))
    heads = activations_of(language_model)
    projection = language_model.model.get_submodule(site_of(language_model).place.module)
    assert torch.equal(projection(heads), all_outputs(language_model, projection))
    weight = projection.weight if isinstance(projection, nn.Linear) else projection.weight.T
    assert site_of(language_model).d_model == heads.shape[-1] == weight.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_runs_after_the_site_and_no_hook_stays(models, family, kind):
    language_model = loaded(config_for(models, family, kind))
    names = [name for name, part in language_model.model.named_modules() if not list(part.children())]
    before = hooks_of(language_model)
    full, stopped = ran_in(language_model, names, stop=False), ran_in(language_model, names, stop=True)
    assert stopped == full[: len(stopped)]
    block = site_of(language_model).place.module.split(".")
    later = ".".join([*block[: block.index("1")], "2."])
    assert any(name.startswith(later) for name in full)
    assert not any(name.startswith(later) for name in stopped)
    assert hooks_of(language_model) == before


def ran_in(language_model: LanguageModel, names: list[str], *, stop: bool) -> list[str]:
    """Return the names of the leaf modules that a forward pass begins, in order."""
    ran: list[str] = []

    def note(name: str) -> object:
        part = language_model.model.get_submodule(name)
        return part.register_forward_pre_hook(lambda _m, _a: ran.append(name), prepend=True)

    handles = [note(name) for name in names]
    if stop:
        activations_of(language_model)
    else:
        with torch.no_grad():
            language_model.model(IDS_BT)
    for handle in handles:
        handle.remove()
    return ran


def hooks_of(language_model: LanguageModel) -> list[int]:
    """Return the handles of all hooks: transformers hangs up its own."""
    return [key for part in language_model.model.modules() for key in (*part._forward_hooks, *part._forward_pre_hooks)]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("bert", "roberta")])
@pytest.mark.parametrize("kind", KINDS)
def test_splicing(models, family, kind):
    language_model = loaded(config_for(models, family, kind))
    assert language_model.has_loss
    plain = language_model.logits(IDS_BT)
    given_to: list[Tensor] = []

    def identity(site_BTD: Tensor) -> Tensor:
        given_to.append(site_BTD)
        return site_BTD.clone()

    assert torch.equal(language_model.logits(IDS_BT, replace={site_of(language_model).label: identity}), plain)
    assert torch.equal(given_to[0], activations_of(language_model))
    assert not torch.allclose(
        language_model.logits(IDS_BT, replace={site_of(language_model).label: torch.zeros_like}), plain, atol=1e-3
    )
    assert torch.equal(language_model.logits(IDS_BT), plain), "a splice must leave nothing behind"


def test_a_splice_that_fails_leaves_no_hook(models):
    language_model = loaded(config_for(models, "llama"))
    before = hooks_of(language_model)

    def broken(site_BTD: Tensor) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        language_model.logits(IDS_BT, replace={site_of(language_model).label: broken})
    assert hooks_of(language_model) == before


@pytest.mark.parametrize(
    ("family", "path", "width"),
    [("llama", "model.layers.1.mlp.gate_proj", 48), ("llama", "model.embed_tokens", 32), ("llama", "lm_head", None),
     ("gpt2", "transformer.h.1.mlp.c_fc", 128), ("gpt2", "transformer.h.2", 32), ("bert", "encoder.layer.0", 32),
     ("opt", "model.decoder.layers.1.fc1", 48), ("xglm", "model.layers.1", 32)],
)  # fmt: skip
def test_any_named_module(models, family, path, width):
    language_model = loaded(module_config(models, family, path))
    expected = all_outputs(language_model, language_model.model.get_submodule(path))
    assert torch.equal(activations_of(language_model), expected.view(2, 9, -1))
    assert site_of(language_model).d_model == (width or expected.shape[-1])
    assert site_of(language_model).label == f"module.{path}"


def test_splicing_where_a_module_sees_all_tokens_in_one_row(models):
    language_model = loaded(module_config(models, "opt", "model.decoder.layers.1.fc1"))
    shapes: list[torch.Size] = []

    def identity(site_BTD: Tensor) -> Tensor:
        shapes.append(site_BTD.shape)
        return site_BTD.clone()

    assert torch.equal(
        language_model.logits(IDS_BT, replace={site_of(language_model).label: identity}), language_model.logits(IDS_BT)
    )
    assert shapes == [(2, 9, 48)]


@pytest.mark.parametrize("path", ["model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.2", "lm_head"])
def test_the_input_of_a_module_also_when_it_goes_by_name(models, path):
    language_model = loaded(module_config(models, "llama", path, side="input"))
    plain = language_model.logits(IDS_BT)
    assert site_of(language_model).label == f"module.{path}.input"
    assert torch.equal(language_model.logits(IDS_BT, replace={site_of(language_model).label: Tensor.clone}), plain)
    assert not torch.allclose(
        language_model.logits(IDS_BT, replace={site_of(language_model).label: torch.zeros_like}), plain, atol=1e-3
    )
    if path == "model.layers.2":
        before = loaded(config_for(models, "llama", index=1))
        assert torch.equal(activations_of(language_model), activations_of(before))


def test_facts_come_without_weights(models, tmp_path):
    (tmp_path / "config.json").write_text((models["llama"] / "config.json").read_text())
    facts = model_facts(replace_model(config_for(models, "llama"), str(tmp_path)).source)
    site = only(facts.sites)
    assert (site.d_model, facts.n_blocks, site.index, facts.max_positions) == (32, 3, 1, None)
    two_blocks = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert facts.flops_per_token == 2 * two_blocks


@given(index=st.integers(-5, 5))
def test_block_indices(models, index):
    config = config_for(models, "gpt2", index=index)
    if -3 <= index < 3:
        assert only(model_facts(config.source).sites).index == index % 3
    else:
        with pytest.raises(ConfigError, match=r"3 blocks. Choose -3 to 2"):
            model_facts(config.source)


def test_middle_is_half_of_the_blocks(models):
    assert only(model_facts(config_for(models, "gpt2", index="middle").source).sites).index == 1


def test_dtype_is_the_configs_not_the_checkpoints(models):
    config = config_for(models, "llama")
    half = replace(config, model=replace(config.model, dtype="bfloat16"))
    assert activations_of(LanguageModel(half.source, device=CPU)).dtype == torch.bfloat16
    assert activations_of(LanguageModel(config.source, device=CPU)).dtype == torch.float32


def test_a_local_model_never_touches_the_network(models, monkeypatch):
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    LanguageModel(config_for(models, "llama").source, device=CPU)


def replace_model(config: RunConfig, name: str) -> RunConfig:
    return replace(config, model=replace(config.model, id=name))


def refusal(config: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        LanguageModel(config.source, device=CPU)
    assert caught.value.status == 2
    return str(caught.value)


def test_refusals(models, tmp_path):
    llama = config_for(models, "llama")
    assert "for models of type 'xglm', only for gpt2" in refusal(config_for(models, "xglm"))
    assert "layer=module" in refusal(config_for(models, "xglm"))
    assert "Did you mean 'model.layers.1.mlp'" in refusal(module_config(models, "llama", "model.layers.1.mpl"))
    assert "never runs" in refusal(module_config(models, "llama", "model.layers"))
    assert "not [contexts, positions, width]" in refusal(module_config(models, "llama", "model.rotary_emb"))
    assert "not a tensor" in refusal(module_config(models, "llama", "model"))
    gemma = config_for(models, "gemma2")
    sdpa = replace(gemma, model=replace(gemma.model, attention="sdpa"))
    assert "Choose model.attention=eager" in refusal(sdpa)
    assert "no such directory" in refusal(replace_model(llama, "./nothing/here"))
    assert "config.json" in refusal(replace_model(llama, str(tmp_path)))
    (tmp_path / "config.json").write_text((models["llama"] / "config.json").read_text())
    assert "weights cannot be read" in refusal(replace_model(llama, str(tmp_path)))
    whole = (models["llama"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    assert "weights cannot be read" in refusal(replace_model(llama, str(tmp_path)))
    weights = load_file(models["llama"] / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 of its weights, model.layers.1.mlp.up_proj.weight" in refusal(replace_model(llama, str(tmp_path)))
    assert "hub cannot be reached" in refusal(replace_model(llama, "someone/no-such-model"))


def test_the_library_says_which_of_its_failures_it_was():
    class GatedRepoError(OSError): ...

    class RepositoryNotFoundError(OSError): ...

    def message(error: Exception) -> str:
        nested = OSError("wrapped")
        nested.__cause__ = error
        found = hub_error("model.id", "a/b", nested)
        assert isinstance(found, DataError)
        return str(found)

    assert "gated" in message(GatedRepoError("x"))
    assert "nor found" in message(RepositoryNotFoundError("x"))
    assert "cannot be reached" in message(ConnectionError("x"))
    assert "cannot be loaded: wrapped" in message(KeyError("x"))
