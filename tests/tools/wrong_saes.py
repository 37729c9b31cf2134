"""SAEs of both rules for tests of exports, and the SAEs that faulty exports of them would give."""

import torch
from torch import Tensor

from sae_train.sae.autoencoder import SparseAutoencoder
from tools.random_sae import random_sae

D, F = 24, 80


def sae_of(rule: str) -> SparseAutoencoder:
    """Return a random SAE; its thresholds are all different, one is 0 and one is +inf."""
    base = random_sae(D, F)
    if rule == "topk":
        return altered(base, threshold=torch.zeros(F), k=5.0, inference="topk")
    threshold_F = 0.4 + torch.rand(F, generator=torch.Generator().manual_seed(1))
    threshold_F[3], threshold_F[7] = 0.0, torch.inf
    return altered(base, threshold=threshold_F, k=5.0)


def altered(
    sae: SparseAutoencoder, *, k: float | None = None, inference: str | None = None, **tensors: Tensor
) -> SparseAutoencoder:
    """Return a copy of an SAE with some of its facts replaced."""
    own = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()} | tensors
    return SparseAutoencoder(**own, k=sae.k if k is None else k, inference=inference or sae.inference).eval()


MISTAKES = {
    "threshold": ("bias not folded", "bf16 rounding", "threshold 0.1% higher", "threshold 0.1% lower"),
    "topk": ("bias not folded", "bf16 rounding", "k one less", "k one more"),
}
"""By rule."""


def mistaken(sae: SparseAutoencoder, mistake: str) -> SparseAutoencoder:
    """Return an SAE as an export with a mistake would give it."""
    match mistake:
        case "bias not folded":
            return altered(sae, b_enc=(sae.b_enc - sae.b_dec @ sae.W_enc).detach())
        case "bf16 rounding":
            return altered(sae, **{name: tensor.bfloat16().float() for name, tensor in sae.state_dict().items()})
        case "threshold 0.1% higher" | "threshold 0.1% lower":
            return altered(sae, threshold=sae.threshold * (1.001 if mistake.endswith("higher") else 1 / 1.001))
    return altered(sae, k=sae.k + (1 if mistake == "k one more" else -1))
