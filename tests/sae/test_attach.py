"""An SAE attached to real language models: codes, splicing and steering against hooks written by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from sae_train.assets import model_directory
from sae_train.errors import ConfigError
from sae_train.sae.autoencoder import SparseAutoencoder
from tools.random_sae import random_sae
from tools.tiny_models import save_model

BOS, EOS = 0, 1
IDS_BT = torch.randint(5, 3000, (2, 7), generator=torch.Generator().manual_seed(0))
IDS_BT[:, 0], IDS_BT[1, 4] = BOS, EOS
RULE_BT = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1]]).bool()
"""The tokens of IDS_BT that are not special."""


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.float32).eval()


@pytest.fixture
def sae() -> SparseAutoencoder:
    found = random_sae(256, 64)
    found.config = {"site": "residual2", "source": {"module": "model.layers.2", "side": "output"}}
    return found


@contextmanager
def changed(module: nn.Module, change: Callable[[Tensor], Tensor], *, side: str = "output") -> Iterator[list[Tensor]]:
    """Replace a tensor by `change` of it, by hand; yield the list of the tensors that were there."""
    seen: list[Tensor] = []

    def put(tensor: Tensor) -> Tensor:
        seen.append(tensor.detach().clone())
        return change(tensor)

    if side == "input":
        handle: Any = module.register_forward_pre_hook(lambda _, args: (put(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(
            lambda _, args, out: put(out) if isinstance(out, Tensor) else (put(out[0]), *out[1:])
        )
    yield seen
    handle.remove()


def n_hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


@torch.no_grad()
def logits_of(model: Any, ids_BT: Tensor = IDS_BT, **options: Any) -> Tensor:
    logits: Tensor = model(ids_BT, **options).logits
    return logits


def test_the_codes_of_each_forward_pass_are_collected(model: Any, sae: SparseAutoencoder) -> None:
    with changed(model.model.layers[2], lambda x: x) as seen:
        plain = logits_of(model)
        logits_of(model, IDS_BT[:1, :3])
    before = n_hooks(model)
    with sae.attach(model) as attached:
        assert torch.equal(logits_of(model), plain)  # reading changes nothing
        logits_of(model, IDS_BT[:1, :3])
    assert n_hooks(model) == before
    assert [code.shape for code in attached.codes] == [(2, 7), (1, 3)]
    for code, x in zip(attached.codes, seen, strict=True):
        assert torch.equal(code.dense(), sae.encode(x))
        assert float(code.value.max()) > 0
    assert torch.equal(attached.trained_on[0], RULE_BT)
    logits_of(model)
    assert len(attached.codes) == 2  # none after the block
    attached.clear()
    assert attached.codes == attached.trained_on == []


@pytest.mark.parametrize(
    ("site", "name", "side"),
    [
        ("residual1", "model.layers.1", "output"),
        ("residual-1", "model.layers.3", "output"),
        ("residual middle", "model.layers.2", "output"),
        ("mlp0", "model.layers.0.mlp", "output"),
        ("attention1", "model.layers.1.self_attn.o_proj", "input"),
        ("model.layers.2.mlp", "model.layers.2.mlp", "output"),
        ("model.layers.2.post_attention_layernorm.input", "model.layers.2.post_attention_layernorm", "input"),
    ],
)
def test_a_site_is_the_tensor_that_its_name_means(
    model: Any, sae: SparseAutoencoder, site: str, name: str, side: str
) -> None:
    with changed(model.get_submodule(name), lambda x: torch.where(RULE_BT[..., None], sae(x), x), side=side) as seen:
        expected = logits_of(model)
    with sae.attach(model, site, splice=True) as attached:
        assert torch.equal(logits_of(model), expected)
    assert torch.equal(attached.codes[0].dense(), sae.encode(seen[0]))
    assert not torch.allclose(expected, logits_of(model))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gemma2", "bert", "opt"])
def test_other_families(tmp_path: Path, kind: str) -> None:
    """OPT's modules see all tokens in one row, and GPT-2's and BERT's blocks may return tuples."""
    loader = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    other = loader.from_pretrained(save_model(tmp_path, kind)).eval()
    own, ids_BT = random_sae(32, 16), IDS_BT[:, 1:] % 300 + 5
    for site in ("residual1", "mlp1"):
        with torch.no_grad(), own.attach(other, site, splice=True, where="all") as attached:
            last = other(ids_BT)[0]
        assert attached.codes[0].shape == (2, 6)
        assert not torch.allclose(last, other(ids_BT)[0])


def test_rows_over_the_outlier_limit_are_not_spliced(model: Any, sae: SparseAutoencoder) -> None:
    with changed(model.model.layers[2], lambda x: x) as seen:
        logits_of(model)
    norm_BT = seen[0].norm(dim=-1)
    limit = float(norm_BT[RULE_BT].median())
    sae.config["normalisation"] = {"outlier_limit": limit}
    kept_BT = RULE_BT & (norm_BT <= limit)
    assert 0 < int(kept_BT.sum()) < int(RULE_BT.sum())
    with changed(model.model.layers[2], lambda x: torch.where(kept_BT[..., None], sae(x), x)):
        expected = logits_of(model)
    with sae.attach(model, splice=True) as attached:
        assert torch.equal(logits_of(model), expected)
    assert torch.equal(attached.trained_on[0], kept_BT)
    assert torch.equal(attached.codes[0].dense(), sae.encode(seen[0]))  # also of the tokens that keep theirs


def test_a_mask_or_all_replaces_the_rule(model: Any, sae: SparseAutoencoder) -> None:
    mask_BT = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    for where, wanted in ((mask_BT, mask_BT), ("all", torch.ones_like(mask_BT))):
        with changed(model.model.layers[2], lambda x, kept=wanted: torch.where(kept[..., None], sae(x), x)):
            expected = logits_of(model)
        with sae.attach(model, splice=True, where=where, collect=False) as attached:
            assert torch.equal(logits_of(model), expected)
        assert attached.codes == []
    with sae.attach(model, splice=True, where=mask_BT[:, :5]), pytest.raises(ConfigError, match=r"shape \[2, 5\]"):
        logits_of(model)
    with pytest.raises(ConfigError, match="truth values"), sae.attach(model, where=mask_BT.long()):
        pass


def test_steering_adds_decoder_rows(model: Any, sae: SparseAutoencoder) -> None:
    delta = 3.0 * sae.W_dec[5] - 2.0 * sae.W_dec[9]
    with changed(model.model.layers[2], lambda x: x + delta):
        expected = logits_of(model)
    with sae.attach(model, steer={5: 3.0, 9: -2.0}):
        torch.testing.assert_close(logits_of(model), expected)
    with changed(model.model.layers[2], lambda x: torch.where(RULE_BT[..., None], sae(x), x) + delta):
        expected = logits_of(model)
    with sae.attach(model, splice=True, steer={5: 3.0, 9: -2.0}):  # the reconstruction is steered
        torch.testing.assert_close(logits_of(model), expected)
    with changed(model.model.layers[2], lambda x: x + RULE_BT[..., None] * delta):
        expected = logits_of(model)
    with sae.attach(model, steer={5: 3.0, 9: -2.0}, where=RULE_BT):
        torch.testing.assert_close(logits_of(model), expected)


def generated(model: Any, n: int, **options: Any) -> Tensor:
    """Return three tokens without a special one, and the n most likely that follow."""
    n_new = {"max_new_tokens": n, "min_new_tokens": n}
    ids: Tensor = model.generate(IDS_BT[:1, 1:4], do_sample=False, pad_token_id=1, **n_new, **options)
    return ids


@pytest.mark.parametrize("splice", [False, True])
def test_a_generation_with_a_cache_equals_one_without(model: Any, sae: SparseAutoencoder, splice: bool) -> None:
    """The first-token rule holds for the real first token, and not for the token of each step."""
    found = []
    for use_cache in (True, False):
        with torch.no_grad(), sae.attach(model, splice=splice, steer={3: 20.0}) as attached:
            ids = model.generate(
                IDS_BT[:1, 1:4],
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
                use_cache=use_cache,
                pad_token_id=1,
            )
        lengths = [code.shape for code in attached.codes]
        assert lengths == ([(1, 3), *[(1, 1)] * 5] if use_cache else [(1, n) for n in range(3, 9)])
        found.append((ids, attached))
    (cached, by_step), (whole, at_once) = found
    assert torch.equal(cached, whole)
    assert not torch.equal(generated(model, 6), whole)
    assert torch.equal(torch.cat(by_step.trained_on, 1), at_once.trained_on[-1])
    assert by_step.trained_on[0].tolist() == [[False, True, True]]  # no special token is there
    codes = torch.cat([code.dense() for code in by_step.codes], 1)
    torch.testing.assert_close(codes, at_once.codes[-1].dense(), atol=1e-3, rtol=1e-4)


def test_a_mask_of_the_prompt_leaves_what_is_generated(model: Any, sae: SparseAutoencoder) -> None:
    changed_at = []
    for where in (torch.ones(1, 3, dtype=torch.bool), "all"):
        steered = sae.attach(model, steer={3: 50.0}, where=where, collect=False)
        with steered, changed(model.model.layers[3], lambda x: x) as after:
            generated(model, 3)
        changed_at.append(after)
    assert torch.equal(changed_at[0][0], changed_at[1][0])
    assert not torch.equal(changed_at[0][1], changed_at[1][1])


def test_padding_on_the_left_moves_the_first_token(model: Any, sae: SparseAutoencoder) -> None:
    ids_BT = torch.tensor([[7, 7, 20, 21, 22], [30, 31, 32, 33, 34]])
    seen_BT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with sae.attach(model) as attached:
        logits_of(model, ids_BT, attention_mask=seen_BT)
        model.generate(ids_BT, attention_mask=seen_BT, max_new_tokens=2, min_new_tokens=2, pad_token_id=1)
    assert attached.trained_on[0].tolist() == [[False, False, False, True, True], [False, True, True, True, True]]
    assert torch.equal(attached.trained_on[1], attached.trained_on[0])
    assert attached.trained_on[2].tolist() == [[True], [True]]


def test_gradients_flow_through_the_reconstruction(model: Any, sae: SparseAutoencoder) -> None:
    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [sae.W_dec, sae.W_enc, model.model.embed_tokens.weight]))

    with changed(model.model.layers[2], lambda x: torch.where(RULE_BT[..., None], sae(x), x)):
        expected = gradients(model(IDS_BT, labels=IDS_BT).loss)
    with sae.attach(model, splice=True) as attached:
        found = gradients(model(IDS_BT, labels=IDS_BT).loss)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert float(ours.abs().max()) > 0
    assert attached.codes[0].value.requires_grad
    with torch.no_grad(), sae.attach(model) as attached:
        model(IDS_BT)
    assert not attached.codes[0].value.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_the_dtype_of_the_model(sae: SparseAutoencoder, dtype: torch.dtype) -> None:
    half = transformers.AutoModelForCausalLM.from_pretrained(model_directory(), dtype=dtype).eval()
    with changed(half.model.layers[3], lambda x: x) as after, sae.attach(half, splice=True, steer={0: 1.0}) as attached:
        assert logits_of(half).dtype == dtype
    assert after[0].dtype == dtype
    assert attached.codes[0].value.dtype == torch.float32


def test_attached_saes_nest(model: Any, sae: SparseAutoencoder) -> None:
    other = random_sae(256, 32, seed=1)
    with changed(model.model.layers[2], lambda x: other(sae(x))), changed(model.model.layers[0].mlp, other):
        expected = logits_of(model)
    before = n_hooks(model)
    with (
        sae.attach(model, splice=True, where="all"),
        other.attach(model, "residual2", splice=True, where="all") as inner,
        other.attach(model, "mlp0", splice=True, where="all"),
    ):
        assert torch.equal(logits_of(model), expected)
    assert inner.codes[0].n_features == 32
    assert n_hooks(model) == before


def test_hooks_are_gone_after_an_error(model: Any, sae: SparseAutoencoder) -> None:
    before, plain = n_hooks(model), logits_of(model)
    with pytest.raises(IndexError), sae.attach(model, splice=True):
        model(torch.full((1, 2), 10**6))
    assert n_hooks(model) == before
    with sae.attach(model) as attached:
        with pytest.raises(IndexError):
            model(torch.full((1, 2), 10**6))
        assert torch.equal(logits_of(model), plain)  # the pass that failed is over
    assert len(attached.codes) == 1


def test_the_model_inside_may_be_called_without_its_head(model: Any, sae: SparseAutoencoder) -> None:
    with sae.attach(model) as attached, torch.no_grad():
        model.model(IDS_BT)
        model(inputs_embeds=model.get_input_embeddings()(IDS_BT))
    assert torch.equal(attached.trained_on[0], RULE_BT)
    assert attached.trained_on[1][:, 0].tolist() == [False, False]
    assert torch.equal(attached.codes[0].dense(), attached.codes[1].dense())
    with sae.attach(model), pytest.raises(ConfigError, match="Call the whole model"):
        model.model.layers[2](torch.zeros(1, 2, 256), position_embeddings=(torch.ones(1, 2, 64), torch.zeros(1, 2, 64)))


class Adapter(nn.Module):
    """A wrapper that calls the model inside, as adapters do."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.config = base, base.config

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.base(*args, **options)


def test_a_wrapped_model_is_watched_inside(model: Any, sae: SparseAutoencoder) -> None:
    with sae.attach(model, splice=True):
        expected = logits_of(model)
    with sae.attach(Adapter(model), splice=True) as attached:
        assert torch.equal(logits_of(model), expected)
        assert torch.equal(logits_of(Adapter(model)), expected)
    assert torch.equal(attached.trained_on[0], RULE_BT)
    assert len(attached.codes) == 2


def test_a_module_that_is_run_again_for_its_gradients_is_refused(sae: SparseAutoencoder) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.float32).train()
    other.activation_checkpointing_enable()
    with sae.attach(other, "mlp2", splice=True):
        loss = other(IDS_BT, labels=IDS_BT).loss
        with pytest.raises(ConfigError, match="gradient checkpointing off"):
            loss.backward()


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ("residual9", r"site='residual9': LlamaForCausalLM has 4 blocks\. Choose -4 to 3, or 'middle'\."),
        ("resid2", r"site='resid2': no such site or module of LlamaForCausalLM\. Did you mean 'residual2'"),
        ("model.layer.2", r"Did you mean 'model\.layers\.2'"),
        ("model.layers.2.mlp.act_fn", r"its activations are 512 wide, and this SAE takes d_model=256"),
        ("", "no such site"),
    ],
)
def test_a_wrong_site_is_named(model: Any, sae: SparseAutoencoder, site: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said), sae.attach(model, site):
        logits_of(model)


def test_wrong_arguments_are_named(model: Any, sae: SparseAutoencoder) -> None:
    for said, own, given in [
        (r"256 wide there, and this SAE takes d_model=32", random_sae(32, 16), {"site": "residual2"}),
        (r"names no site of a language model", random_sae(256, 16), {}),
        (r"steer=\{64: \.\.\.\}: no such feature\. Choose 0 to 63", sae, {"steer": {64: 1.0}}),
        (r"steer=\{-1: ", sae, {"steer": {-1: 1.0}}),
        (r"where: neither 'all' nor", sae, {"where": "rule"}),
    ]:
        with pytest.raises(ConfigError, match=said), own.attach(model, **given):
            pass
    with pytest.raises(ConfigError, match="no torch module"), sae.attach("gpt2"):  # type: ignore[arg-type]
        pass
    elsewhere = transformers.AutoModelForCausalLM.from_config(model.config).to("meta")
    with sae.attach(elsewhere), pytest.raises(ConfigError, match=r"on meta, and this SAE is on cpu.*sae\.to"):
        elsewhere(IDS_BT.to("meta"))


@pytest.mark.parametrize("feature", [3, np.int64(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32)])
@pytest.mark.parametrize("amount", [2, 2.0, np.float32(2), torch.tensor(2.0)])
def test_features_and_amounts_may_be_numbers_of_other_libraries(
    model: Any, sae: SparseAutoencoder, feature: Any, amount: Any
) -> None:
    with torch.no_grad(), sae.attach(model, steer={3: 2.0}):
        expected = model(IDS_BT).logits
    with torch.no_grad(), sae.attach(model, steer={feature: amount}):
        assert torch.equal(model(IDS_BT).logits, expected)


@pytest.mark.parametrize("steer", [[1], {1: "a"}, {1: None}, {1: float("nan")}, {1.5: 1.0}, {True: 1.0}, {"1": 1.0}])
def test_wrong_steering_is_named(model: Any, sae: SparseAutoencoder, steer: Any) -> None:
    with pytest.raises(ConfigError, match="steer"), sae.attach(model, steer=steer):
        pass


def test_a_site_that_is_never_reached_is_named(model: Any, sae: SparseAutoencoder) -> None:
    with pytest.raises(ConfigError, match="a ModuleList, which"), sae.attach(model, "model.layers"):
        pass
    model.add_module("unused", nn.Linear(256, 256))
    try:
        with pytest.raises(ConfigError, match="no forward pass reached it"), sae.attach(model, "unused"):
            model(IDS_BT)
        with sae.attach(model, "unused"):  # nothing was run, so nothing is wrong
            pass
    finally:
        del model.unused


def test_a_decoder_has_the_mask_of_its_own_tokens(tmp_path: Path) -> None:
    settings = transformers.BartConfig(
        vocab_size=300, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    both = transformers.BartForConditionalGeneration(settings).eval()
    sae = random_sae(32, 16)
    ids, own = torch.randint(5, 300, (2, 10)), torch.randint(5, 300, (2, 6))
    attention = torch.ones(2, 10, dtype=torch.int64)
    attention[0, 5:] = 0
    with torch.no_grad():
        with sae.attach(both, "model.decoder.layers.1") as attached:
            both(input_ids=ids, attention_mask=attention, decoder_input_ids=own)
        assert attached.trained_on[0].int().tolist() == [[0, 1, 1, 1, 1, 1]] * 2
        with sae.attach(both, "model.encoder.layers.1") as attached:
            both(input_ids=ids, attention_mask=attention, decoder_input_ids=own)
    assert attached.trained_on[0].int().tolist() == [[0] + [1] * 4 + [0] * 5, [0] + [1] * 9]


@pytest.mark.parametrize("splice", [False, True])
def test_a_static_cache_keeps_padding_out(model: Any, sae: SparseAutoencoder, splice: bool) -> None:
    """A static cache makes a mask by pairs, from which the padding follows. The padding's id is no special one."""
    ids = IDS_BT.clone()
    attention = torch.ones_like(ids)
    ids[0, :3], attention[0, :3] = 77, 0
    found = {}
    for cache in ("dynamic", "static"):
        with torch.no_grad(), sae.attach(model, splice=splice) as attached:
            out = model.generate(ids, attention_mask=attention, max_new_tokens=4, do_sample=False,
                                 cache_implementation=cache, disable_compile=True)  # fmt: skip
        found[cache] = out, torch.cat(attached.trained_on, dim=1)
    assert found["dynamic"][1][0, :4].tolist() == [False] * 4
    for one, other in zip(*found.values(), strict=True):
        assert torch.equal(one, other)


def test_a_mask_serves_a_generation_without_a_cache(model: Any, sae: SparseAutoencoder) -> None:
    where = torch.zeros_like(IDS_BT, dtype=torch.bool)
    where[:, 2:5] = True
    made = {}
    for uses_cache in (True, False):
        with torch.no_grad(), sae.attach(model, steer={3: 50.0}, where=where):
            made[uses_cache] = model.generate(IDS_BT, max_new_tokens=4, do_sample=False, use_cache=uses_cache)
    assert torch.equal(made[True], made[False])
