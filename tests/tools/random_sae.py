"""An exported autoencoder of random weights, and the manifest of an autoencoder."""

from typing import Any

import torch

from sae_train.formats.manifest import SaeManifest
from sae_train.sae.autoencoder import SparseAutoencoder


def random_sae(d_model: int = 6, n_features: int = 10, seed: int = 0) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(n_features, d_model, generator=generator), dim=1)
    return SparseAutoencoder(
        W_enc=W_dec.T.contiguous(),
        b_enc=0.1 * torch.randn(n_features, generator=generator),
        W_dec=W_dec,
        b_dec=torch.randn(d_model, generator=generator),
        threshold=torch.full((n_features,), 0.2),
        k=3.0,
        inference="threshold",
        config={},
    )


def manifest_of(sae: SparseAutoencoder, *, n_features: int | None = None, **facts: Any) -> SaeManifest:
    """Return the manifest of an SAE, whose features may be a part of `n_features`."""
    return SaeManifest(
        inference=sae.inference, k=sae.k, d_model=sae.d_model, n_features=n_features or sae.n_features, **facts
    )
