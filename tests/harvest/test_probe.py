"""The architecture without weights: nothing has storage, and what it shows holds for the real model."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from sae_train import config as schema
from sae_train.config import RunConfig
from sae_train.errors import UserError
from sae_train.harvest.architecture import without_weights
from sae_train.harvest.build import check_stream
from sae_train.harvest.checkpoints import read_model_config
from sae_train.harvest.language_model import LanguageModel
from sae_train.harvest.model_facts import model_facts
from tools.architectures import save_architecture
from tools.one_of_each import only
from tools.tiny_models import planned_config, save_model

CPU = torch.device("cpu")
TABLES = ("opt", "gpt_neo", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet", "bart", "bart_decoder")
"""Architectures with a table of learned positions; some begin behind its first rows."""


def module_config(folder: Path, path: str, **rest: object) -> RunConfig:
    layer = schema.ModuleLayerConfig(kind="module", path=path, side="output")
    return planned_config(folder, layer=layer, attention="eager", **rest)  # type: ignore[arg-type]


def refusal(config: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        check_stream(config.source, n_ranks=1)
    assert caught.value.status == 2
    return str(caught.value)


def block_of(name: str) -> str:
    from tools.architectures import ARCHITECTURES

    return ARCHITECTURES[name].block


@pytest.mark.parametrize(
    "name", [name if name in ("opt", "xlm-roberta") else pytest.param(name, marks=pytest.mark.slow) for name in TABLES]
)
def test_the_longest_context_is_the_one_that_the_real_model_takes(tmp_path: Path, name: str) -> None:
    save_architecture(tmp_path, name)
    config = module_config(tmp_path, block_of(name), harvest={"context_length": 32, "pool_batches": 64})
    longest = model_facts(config.source).max_positions
    assert longest is not None
    language_model = LanguageModel(config.source, device=CPU)
    assert only(language_model.activations(torch.full((1, longest), 9))).shape[1] == longest
    with pytest.raises((IndexError, RuntimeError)):
        language_model.activations(torch.full((1, longest + 1), 9))
    for length, is_taken in ((longest, True), (longest + 1, False), (longest + 2, False)):
        same = replace(config, harvest=replace(config.harvest, context_length=length))
        if is_taken:
            check_stream(same.source, n_ranks=1)
        else:
            assert f"takes at most {longest} positions" in refusal(same)


def test_padding_as_token_zero_moves_the_first_position_by_one(tmp_path: Path) -> None:
    """Positions of RoBERTa-like models begin behind the padding token, and are counted over tokens other than it."""
    save_architecture(tmp_path, "xlm-roberta")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"pad_token_id": 0}))
    assert model_facts(planned_config(tmp_path).source).max_positions == 65


def test_a_table_that_the_configuration_does_not_mention_ends_too(tmp_path: Path) -> None:
    """GPT-2's table is found by its lookups, whatever the configuration calls it."""
    save_model(tmp_path, "gpt2")
    config = planned_config(tmp_path)
    assert model_facts(config.source).max_positions == 64
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"n_positions": 20}))
    assert model_facts(config.source).max_positions == 20


@pytest.mark.parametrize("name", ["bloom", "mpt", "mamba"])
def test_a_model_without_a_table_takes_any_context(tmp_path: Path, name: str) -> None:
    save_architecture(tmp_path, name)
    assert model_facts(module_config(tmp_path, block_of(name)).source).max_positions is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mixtral", "gemma3"])
def test_the_probe_runs_in_the_models_dtype(tmp_path: Path, name: str, dtype: str) -> None:
    save_architecture(tmp_path, name)
    config = planned_config(tmp_path, attention="eager", dtype=dtype)
    built = without_weights(config.model, read_model_config(config.model))
    assert {weight.dtype for weight in built.parameters()} == {getattr(torch, dtype)}
    assert all(isinstance(weight.data, FakeTensor) for weight in built.parameters())
    facts = model_facts(config.source)
    assert (only(facts.sites).d_model, facts.note) == (32, None)


def test_a_large_model_takes_no_memory(tmp_path: Path) -> None:
    """The plan of a model with terabytes of weights is made without them."""
    save_model(tmp_path, "llama")
    values = json.loads((tmp_path / "config.json").read_text())
    large = {"hidden_size": 2**17, "intermediate_size": 2**19, "num_attention_heads": 2**10}
    large["num_key_value_heads"] = 2**10
    (tmp_path / "config.json").write_text(json.dumps(values | large | {"head_dim": 128}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = model_facts(planned_config(tmp_path).source)
    assert (only(facts.sites).d_model, facts.n_blocks) == (2**17, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


def test_experts_that_are_chosen_are_counted(tmp_path: Path) -> None:
    """A token passes two of four experts: each has three matrices of 32 by 48."""
    save_architecture(tmp_path, "mixtral")
    facts = model_facts(planned_config(tmp_path, layer=schema.BlockLayerConfig(kind="residual", index=0)).source)
    attention, router, experts = 2 * 32 * 32 + 2 * 32 * 16, 4 * 32, 2 * 3 * 32 * 48
    assert facts.flops_per_token == 2 * (attention + router + experts)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_decoder_of_an_encoder_decoder_is_refused(tmp_path: Path, name: str) -> None:
    save_architecture(tmp_path, name)
    blocks = "decoder.block.1" if name == "t5" else "decoder.layers.1"
    message = refusal(module_config(tmp_path, blocks))
    assert f"{blocks} belongs to the decoder of an encoder-decoder ({name})" in message
    check_stream(module_config(tmp_path, block_of(name)).source, n_ranks=1)
    assert "does not predict the next token" in refusal(module_config(tmp_path, block_of(name), sparsifier="gradient"))
    residual = planned_config(tmp_path, layer=schema.BlockLayerConfig(kind="residual", index=1))
    assert f"not known for models of type '{name}'" in refusal(residual)


def test_a_module_that_sees_tokens_sorted_by_expert_is_refused(tmp_path: Path) -> None:
    save_architecture(tmp_path, "mixtral")
    message = refusal(module_config(tmp_path, "model.layers.1.mlp.experts.act_fn"))
    assert "lies inside model.layers.1.mlp.experts, which sorts tokens by expert" in message
    check_stream(module_config(tmp_path, "model.layers.1.mlp.experts").source, n_ranks=1)


def test_a_part_that_needs_an_image_is_refused(tmp_path: Path) -> None:
    save_architecture(tmp_path, "gemma3")
    assert "never runs in a forward pass" in refusal(module_config(tmp_path, "model.vision_tower"))


def test_what_is_added_with_a_factor_is_not_called_mlp(tmp_path: Path) -> None:
    save_architecture(tmp_path, "granite")
    message = refusal(planned_config(tmp_path, layer=schema.BlockLayerConfig(kind="mlp", index=1)))
    assert "layer=mlp: not known for block 1 of models of type 'granite'" in message
    assert "layer.path=model.layers.1.NAME" in message
