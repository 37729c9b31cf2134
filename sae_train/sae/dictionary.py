"""The trainable parameters of a sparse autoencoder, one row a feature."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from sae_train import kernels
from sae_train.sae.code import SparseCode
from sae_train.sae.keyed import keyed_generator

ENCODER_SCALE = 0.2
"""Norm of an encoder row at the start: better than 1 wherever both were tried (docs/quality.md). A guess at the reason:
at 1 the first reconstructions overshoot, as matched directions overlap, and correcting that silences features."""


class Dictionary(nn.Module):
    """Encoder and decoder over normalised activations (mean squared norm 1).

    Attributes:
        W_enc: [F, D] encoder rows.
        b_enc: [F].
        W_dec: [F, D] decoder rows of unit norm, so that an affinity is a match's contribution.
        b_dec: [D].
    """

    def __init__(self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
        super().__init__()
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)

    @classmethod
    def initial(
        cls, *, d_model: int, n_features: int, seed: int, dtype: torch.dtype, device: torch.device | str
    ) -> "Dictionary":
        """Draw random unit directions, the encoder a copy of the decoder; biases zero.

        The whole dictionary is drawn on the CPU from `seed` alone, so that any device and any sharding starts alike.
        """
        generator = keyed_generator(seed, "dictionary")
        rows = torch.randn(n_features, d_model, generator=generator, dtype=torch.float32).to(dtype)
        rows = (rows / rows.norm(dim=1, keepdim=True)).to(device)
        zeros = rows.new_zeros
        return cls(ENCODER_SCALE * rows, zeros(n_features), rows, zeros(d_model))

    @property
    def n_features(self) -> int:
        return self.W_dec.shape[0]

    @property
    def d_model(self) -> int:
        return self.W_dec.shape[1]

    def pre_activations(self, x_ND: Tensor, *, precision: str) -> Tensor:
        """Return pre_NF = x W_enc^T + b_enc from fp32 accumulators, without a graph.

        Args:
            x_ND: normalised activations in the dictionary's dtype.
            precision: of the product's factors: bf16, float32 or float64.
        """
        return kernels.affine(x_ND, self.W_enc, self.b_enc, precision=precision)

    def attach(self, x_ND: Tensor, code: SparseCode) -> SparseCode:
        """Return `code` with values that are differentiable in W_enc and b_enc, at the cost of the matches only."""
        value = kernels.attach(code.value, x_ND, self.W_enc, self.b_enc, code.feature, code.token, code.start)
        return replace(code, value=value)

    def decode(self, code: SparseCode, *, bias: bool = True) -> Tensor:
        """Return the reconstruction x_hat_ND; differentiable in the code's values, W_dec and b_dec."""
        rows_ND = kernels.decode(code.value, self.W_dec, code.feature, code.token, code.start)
        return rows_ND + self.b_dec if bias else rows_ND

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Remove from the decoder's gradient its component along each (unit) row."""
        grad = self.W_dec.grad
        if grad is not None:
            along_F1 = (grad * self.W_dec).sum(1, keepdim=True)
            grad.addcmul_(self.W_dec, along_F1, value=-1)

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every decoder row unit norm."""
        norm_F1 = self.W_dec.norm(dim=1, keepdim=True)
        self.W_dec.div_(torch.where(norm_F1 > 0, norm_F1, 1))
