"""The trainable parameters of a sparse autoencoder, one row a feature."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from sae_train import kernels
from sae_train.kernels.function import applied
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code, DenseCode, SparseCode
from sae_train.sae.random import keyed_generator

ENCODER_SCALE = 0.2
"""Norm of an encoder row at the start. It was better than 1 wherever both were tried. A guess at the reason: at 1 the
first reconstructions overshoot, because matched directions overlap, and correcting that silences features."""

DRAWN_TOGETHER = 256
"""Features whose initial rows come from one generator, so that a rank draws few rows of other ranks."""
REPLICATED = ("b_dec",)
"""Names of the parameters that every rank holds whole."""


class ExtraParameter(NamedTuple):
    """A parameter [F] that a sparsifier adds to the autoencoder."""

    start: float
    """Value of every feature at the start."""
    rate: float = 1.0
    """Learning rate as a multiple of the other parameters' learning rate."""


class TrainableAutoencoder(nn.Module):
    """Encoder and decoder over normalised activations (mean squared norm 1): all features, or one rank's share.

    The learner creates it by `initial`. Sparsifiers and losses compute with it, and the optimizer moves its parameters.

    Attributes:
        W_enc: [F, D] encoder rows.
        b_enc: [F] encoder biases.
        W_dec: [F, D] decoder rows. While they have unit norm, an affinity is the norm of a match's contribution.
        b_dec: [D] decoder bias.
        precision: type of the factors of matrix products: bf16, float32 or float64.
        has_unit_norms: whether decoder rows are kept at unit norm.
    """

    W_enc: Tensor
    precision = "float32"
    has_unit_norms = True

    def __init__(self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
        super().__init__()
        self._add_encoder(W_enc)
        self.b_enc = nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)

    def _add_encoder(self, rows_FD: Tensor) -> None:
        self.W_enc = nn.Parameter(rows_FD)

    @classmethod
    def initial(
        cls,
        *,
        d_model: int,
        n_features: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str,
        features: tuple[int, int] | None = None,
        precision: str = "float32",
        has_unit_norms: bool = True,
        extra: Mapping[str, ExtraParameter] | None = None,
    ) -> Self:
        """Return an autoencoder with random unit decoder rows, encoder rows that are scaled copies, and zero biases.

        Rows are drawn on the CPU by feature from `seed` alone, so every device and every layout starts from the same
        numbers.

        Args:
            d_model: width of the activations.
            n_features: features of the whole dictionary.
            seed: the SAE's seed.
            dtype, device: of all parameters.
            features: lo, hi of this rank's features; None holds all.
            precision, has_unit_norms: see the class.
            extra: parameters [F] that the sparsifier adds, by name.
        """
        lo, hi = features or (0, n_features)
        rows_FD = _random_rows(lo, hi, d_model=d_model, seed=seed).to(dtype)
        rows_FD = (rows_FD / rows_FD.norm(dim=1, keepdim=True)).to(device)
        zeros = rows_FD.new_zeros
        made = cls(cls.start(rows_FD), zeros(hi - lo), rows_FD, zeros(d_model))
        made.precision, made.has_unit_norms = precision, has_unit_norms
        for name, parameter in (extra or {}).items():
            made.register_parameter(name, nn.Parameter(torch.full_like(made.b_enc, parameter.start)))
        return made

    @staticmethod
    def start(rows_FD: Tensor) -> Tensor:
        """Return the encoder's parameter [F, D] at the start, given the decoder's rows [F, D]."""
        return ENCODER_SCALE * rows_FD

    @property
    def n_features(self) -> int:
        return self.W_dec.shape[0]

    @property
    def d_model(self) -> int:
        return self.W_dec.shape[1]

    def pre_activations(self, x_ND: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return pre-activations x W_enc^T + b_enc [N, F] from fp32 accumulators, without a graph.

        Args:
            x_ND: normalised activations in the parameters' dtype.
            out: [N, F] memory for the result, in the parameters' dtype.
        """
        return kernels.affine(x_ND, self.W_enc, self.b_enc, precision=self.precision, out=out)

    def approximate_pre_activations(self, x_ND: Tensor, *, out: Tensor | None = None) -> kernels.Approximate:
        """Return pre-activations of a bf16 product, which only find candidates.

        Args:
            x_ND, out: see `pre_activations`; `out` is bf16.
        """
        return kernels.approximate(x_ND, self.W_enc, self.b_enc, out=out)

    def slopes(self, gradient_ND: Tensor) -> Tensor:
        """Return g W_dec^T [N, F]: the derivative of a loss with respect to each feature's value, without a graph.

        Args:
            gradient_ND: g, the gradient of the loss with respect to normalised activations, in the parameters' dtype.
        """
        return kernels.affine(gradient_ND, self.W_dec, self.b_enc.new_zeros(self.n_features), precision=self.precision)

    def attach(self, x_ND: Tensor, code: SparseCode) -> SparseCode:
        """Return `code` with values that are differentiable in W_enc and b_enc. It costs the matches, not [N, F]."""
        places = code.feature, code.token, code.start
        value = kernels.attach(code.value, x_ND, self.W_enc, self.b_enc, *places, **self._shared(code))
        return replace(code, value=value)

    def attach_dense(self, x_ND: Tensor, pre_NF: Tensor) -> Tensor:
        """Return `pre_NF`, the pre-activations of `x_ND`, with their graph to W_enc and b_enc."""
        return kernels.attach_dense(pre_NF, x_ND, self.W_enc, self.b_enc)

    def decode(self, code: Code, *, ranks: Ranks, bias: bool = True, frozen: bool = False) -> Tensor:
        """Return the reconstruction [N, D] from all features, differentiable in the code's values, W_dec and b_dec.

        Args:
            code: the matches of this rank's features.
            ranks: the grid of ranks. Those of a row hold the other features. Each rank's gradients are of its own.
            bias: whether b_dec is added.
            frozen: whether only the values get a gradient.
        """
        W_dec, b_dec = (self.W_dec.detach(), self.b_dec.detach()) if frozen else (self.W_dec, self.b_dec)
        if isinstance(code, DenseCode):
            rows_ND = code.value @ W_dec
        else:
            places = code.feature, code.token, code.start
            rows_ND = self.bags(code, W_dec, *places)
        rows_ND = sum_of_shares(rows_ND, ranks)
        return rows_ND.add_(b_dec) if bias else rows_ND

    def bags(self, code: SparseCode, W_dec: Tensor, feature_M: Tensor, bag_M: Tensor, start_B: Tensor) -> Tensor:
        """Return the sum of value times decoder row over each bag of matches [B, D], differentiable.

        Args:
            code: matches that supply the values [M].
            W_dec: [F, D] decoder rows.
            feature_M: decoder row of each match.
            bag_M: bag of each match, ascending.
            start_B: [B+1] first match of each bag.
        """
        return kernels.decode(code.value, W_dec, feature_M, bag_M, start_B, **self._shared(code))

    def _shared(self, code: SparseCode) -> dict[str, Any]:
        """Return the keyword arguments that all products over the matches have in common."""
        return {"order": code.order, "precision": self.precision}

    def moved(self) -> None:
        """Drop values computed from parameters. The optimizer calls it after each change of them."""


class AlignedAutoencoder(TrainableAutoencoder):
    """An autoencoder in which a feature's encoder row and decoder row have an inner product of one at every step.

    The encoder row is d + (I - d d^T) v with the decoder's unit row d. The row v is free and 0 at the start. Its
    component along d has no effect. Gradients reach d through both terms. The constraint is from arXiv 2605.18629, and
    its construction is not public. This one is ours.

    Attributes:
        W_free: [F, D] rows v.
    """

    def _add_encoder(self, rows_FD: Tensor) -> None:
        self.W_free = nn.Parameter(rows_FD)
        self._made: Tensor | None = None

    @staticmethod
    def start(rows_FD: Tensor) -> Tensor:
        return torch.zeros_like(rows_FD)

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]  # computed from parameters here, a parameter elsewhere
        """[F, D] encoder rows, with the graph to W_free and W_dec. Whoever changes these calls `moved`."""
        if self._made is None:
            with torch.enable_grad():
                along_F1 = (self.W_free * self.W_dec).sum(1, keepdim=True)
                self._made = self.W_free + (1 - along_F1) * self.W_dec
        return self._made

    def moved(self) -> None:
        self._made = None


PARAMETRISATIONS = {"free": TrainableAutoencoder, "aligned": AlignedAutoencoder}


def _random_rows(lo: int, hi: int, *, d_model: int, seed: int) -> Tensor:
    """Return random rows [hi - lo, D] in float32, not yet normalised, that depend on feature number and seed alone."""
    blocks = range(lo // DRAWN_TOGETHER, -(-hi // DRAWN_TOGETHER))
    drawn = [
        torch.randn(DRAWN_TOGETHER, d_model, generator=keyed_generator(seed, "dictionary", block)) for block in blocks
    ]
    first = lo - blocks.start * DRAWN_TOGETHER
    return torch.cat(drawn)[first : first + hi - lo]


def sum_of_shares(part_ND: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum of the partial reconstructions of a row's ranks [N, D], differentiable in this rank's part."""
    if ranks.features.size == 1:
        return part_ND
    return applied(_SumOfShares, part_ND, ranks.features)


class _SumOfShares(torch.autograd.Function):
    """Sum partial reconstructions over the ranks of a row. The backward pass is the identity.

    Every rank computes the same loss from the sum, so the gradient of a part equals the gradient of the sum.
    """

    @staticmethod
    def forward(ctx: Any, part_ND: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(part_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None
