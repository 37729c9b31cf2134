"""Multi-TopK: the loss of a second reconstruction, from four times as many matches, against a dense and slow one."""

import pytest
import torch
from torch import Tensor

from sae_train.cli.compose import compose_config
from sae_train.errors import ConfigError
from sae_train.ranks.interface import Solo
from sae_train.sae.code import SparseCode
from sae_train.sae.firing import Firing
from sae_train.sae.step_info import StepInfo, StepInputs
from sae_train.sae.trainable import TrainableAutoencoder
from tools.sae_parts import sparsifier_of
from tools.small_runs import CPU, run_config

N, D, F = 24, 6, 20


def dictionary_of(seed: int = 1) -> TrainableAutoencoder:
    dictionary = TrainableAutoencoder.initial(d_model=D, n_features=F, seed=seed, dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (dictionary.b_enc, dictionary.b_dec):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return dictionary


def encoded(
    dictionary: TrainableAutoencoder, x_ND: Tensor, *, tokens: int = 0, **settings: object
) -> tuple[SparseCode, Tensor | None]:
    config = run_config(sparsifier="topk", batch_tokens=N, tokens=100 * N, **settings)
    sparsifier = sparsifier_of(config, n_features=F)
    info = StepInfo(step=0, tokens=tokens, total_tokens=100 * N, batch_tokens=N, learning_rate=1e-3, seed=0)
    pre_NF = dictionary.pre_activations(x_ND)
    firing = Firing(F, half_life_tokens=1000, device=CPU)
    inputs = StepInputs(x_ND=x_ND, pre_NF=pre_NF, info=info, firing=firing, ranks=Solo())
    code, decoded, penalty = sparsifier.encode(dictionary, inputs)
    assert decoded is code
    assert isinstance(code, SparseCode)
    return code, penalty


def slow(dictionary: TrainableAutoencoder, x_ND: Tensor, *, k: int, sizes: tuple[int, ...]) -> Tensor:
    pre_NF = x_ND @ dictionary.W_enc.t() + dictionary.b_enc
    rank_NF = pre_NF.detach().argsort(dim=1, descending=True).argsort(dim=1)
    code_NF = torch.where((rank_NF < k) & (pre_NF > 0), pre_NF, 0)
    losses = [
        (x_ND - code_NF[:, :size] @ dictionary.W_dec[:size] - dictionary.b_dec).square().sum(1).mean() for size in sizes
    ]
    return torch.stack(losses).sum()


@pytest.mark.parametrize("prefixes", [None, [0.25, 0.6, 1.0]], ids=["plain", "nested"])
@pytest.mark.parametrize(
    ("k", "rest", "wide"),
    [(2, {}, 8), (4, {"start_k": 2.0, "anneal": 0.5}, 12), (9, {}, F), (2, {"start_k": 5.0, "anneal": 0.5}, 12)],
    ids=["4k", "k rounds first", "no more than there are", "annealed"],
)
def test_it_is_the_loss_of_four_times_as_many_and_so_are_its_gradients(
    k: float, rest: dict[str, float], wide: int, prefixes: list[float] | None
) -> None:
    x_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dictionary = dictionary_of()
    tokens = 34 * N  # where k anneals it is 3.36 on the way up by then, 2.96 on the way down
    _, penalty = encoded(dictionary, x_ND, tokens=tokens, k=k, multi_weight=0.3, prefixes=prefixes, **rest)
    assert penalty is not None
    penalty.backward()
    found = {name: parameter.grad for name, parameter in dictionary.named_parameters()}
    dictionary.zero_grad(set_to_none=True)
    expected = 0.3 * slow(dictionary, x_ND, k=wide, sizes=(F,) if prefixes is None else (5, 12, F))
    expected.backward()
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0)
    for name, parameter in dictionary.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-13)


def test_the_code_is_that_of_topk_and_weight_zero_adds_nothing() -> None:
    x_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, nothing = encoded(dictionary_of(), x_ND, k=3)
    multi, _ = encoded(dictionary_of(), x_ND, k=3, multi_weight=1.0)
    assert nothing is None
    assert torch.equal(plain.dense(), multi.dense())
    assert len(plain.value) == len(multi.value) == 3 * N


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"multi_weight=-1: must not be negative\. Multi-TopK's is 0\.125, 0 is off"):
        compose_config(["sparsifier=topk", "sparsifier.multi_weight=-1"])
    with pytest.raises(ConfigError, match="mutual_choice has no 'multi_weight'"):
        compose_config(["sparsifier.multi_weight=0.125"])
