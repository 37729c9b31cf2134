"""The exported sparse autoencoder: raw activations in, codes and reconstructions out."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sae_train import kernels
from sae_train.ranks.interface import Solo
from sae_train.sae.code import SparseCode
from sae_train.sae.trainable import TrainableAutoencoder

if TYPE_CHECKING:
    from sae_train.sae.attach import Attached

CHUNK_BYTES = 64 * 2**20
"""Bytes of pre-activations that are computed at a time."""


class SparseAutoencoder(nn.Module):
    """A finished sparse autoencoder over raw activations, as in its file.

    `sae_train.load` returns one, and an export creates one by `fold`.

    `pre = x @ W_enc + b_enc`; under inference `threshold` the code is `pre` where `pre > threshold`, else 0. Under
    `topk` it is the round(k) largest positive `pre` of a token, ties to the lower feature. `x_hat = f @ W_dec + b_dec`.

    Attributes:
        W_enc: [d_model, n_features] fp32.
        b_enc: [n_features].
        W_dec: [n_features, d_model], rows of unit norm.
        b_dec: [d_model].
        threshold: [n_features], at least 0; +inf for a feature that never fires; zeros under `topk`.
        k: mean number of active features a token.
        inference: 'threshold' or 'topk'.
        config: the content of sae.json.
    """

    threshold: Tensor

    def __init__(
        self,
        *,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor,
        k: float,
        inference: str,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if inference not in ("threshold", "topk"):
            raise ValueError(f"inference={inference!r}: choose 'threshold' or 'topk'")
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.register_buffer("threshold", threshold)
        self.k, self.inference, self.config = k, inference, dict(config or {})

    @classmethod
    def fold(
        cls,
        trained: TrainableAutoencoder,
        *,
        centre_D: Tensor,
        scale: float,
        k: float,
        inference: str,
        encoder: tuple[Tensor, Tensor] | None = None,
    ) -> "SparseAutoencoder":
        """Return an autoencoder on raw activations from one trained on (raw - centre) / scale. Thresholds are 0.

        Codes are in raw units, so the encoder's weights stay and the biases take up centre and scale. It computes in
        float64 and casts to fp32.

        Args:
            trained: parameters on normalised activations.
            centre_D: centre of the normalisation.
            scale: scale of the normalisation.
            k: see the class.
            inference: see the class.
            encoder: W_enc [F, D] and b_enc [F] that replace those of `trained`.
        """
        W_enc, b_enc = (trained.W_enc, trained.b_enc) if encoder is None else encoder
        W_enc, b_enc, W_dec, b_dec = (
            parameter.detach().double() for parameter in (W_enc, b_enc, trained.W_dec, trained.b_dec)
        )
        centre_D = centre_D.to(W_dec)
        norm_F = W_dec.norm(dim=1)
        norm_F = torch.where(norm_F > 0, norm_F, 1)
        W_enc = W_enc * norm_F[:, None]
        b_enc = scale * norm_F * b_enc - W_enc @ centre_D
        return cls(
            W_enc=W_enc.t().float().contiguous(),
            b_enc=b_enc.float(),
            W_dec=(W_dec / norm_F[:, None]).float(),
            b_dec=(scale * b_dec + centre_D).float(),
            threshold=torch.zeros_like(norm_F, dtype=torch.float32),
            k=k,
            inference=inference,
        ).eval()

    @property
    def d_model(self) -> int:
        return self.W_dec.shape[1]

    @property
    def n_features(self) -> int:
        return self.W_dec.shape[0]

    def encode(self, x: Tensor, *, check_finite: bool = True) -> Tensor:
        """Return dense codes [..., n_features] in raw activation units.

        Args:
            x: raw activations [..., d_model] of any float dtype; computed in the weights' dtype.
            check_finite: refuse tokens without a finite code, for which the host waits for the device. Otherwise a NaN
                pre-activation gives 0, as if the feature did not fire.

        Raises:
            ValueError: the last dimension is not d_model, or the pre-activations of a token are not finite: `x` holds
                NaN or an infinite number there, or numbers so large that their products overflow.
        """
        chunks = [self._dense(pre_NF) for pre_NF in self._pre_activations(x, check_finite=check_finite)]
        return torch.cat(chunks).view(*x.shape[:-1], self.n_features)

    def encode_sparse(self, x: Tensor, *, check_finite: bool = True) -> SparseCode:
        """Return the codes of `encode` without the zeros, with as many slots as matches. Raises the same errors."""
        parts = (self._select(pre_NF) for pre_NF in self._pre_activations(x, check_finite=check_finite))
        return joined(parts, shape=tuple(x.shape[:-1]), n_features=self.n_features)

    def decode(self, codes: Tensor | SparseCode) -> Tensor:
        """Return reconstructions [..., d_model] of dense codes [..., n_features] or of a SparseCode.

        Raises:
            ValueError: the codes are not n_features wide.
        """
        width = codes.n_features if isinstance(codes, SparseCode) else codes.shape[-1]
        if width != self.n_features:
            raise ValueError(f"codes of {width} features: this autoencoder has n_features={self.n_features}")
        if isinstance(codes, Tensor):
            return codes.to(self.W_dec.dtype) @ self.W_dec + self.b_dec
        rows_ND = kernels.decode(codes.value, self.W_dec, codes.feature, codes.token, codes.start) + self.b_dec
        return rows_ND.view(*codes.shape, self.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of `x` [..., d_model]. Raises the errors of `encode`."""
        return self.decode(self.encode_sparse(x))

    def attach(
        self,
        model: nn.Module,
        site: str | None = None,
        *,
        splice: bool = False,
        steer: Mapping[int, float] | None = None,
        where: Tensor | Literal["all"] | None = None,
        collect: bool = True,
    ) -> "AbstractContextManager[Attached]":
        """Read or change the activations of a language model inside a `with` block; see `sae_train/sae/attach.py`.

        Example: `with sae.attach(model) as attached: model(ids)` puts the codes of `ids` into `attached.codes`.

        Args:
            model: a Hugging Face model, or any module in which `site` names a module.
            site: 'residual2', 'mlp0', 'attention-1', 'residual middle', or a module's dotted name, with '.input' for
                its input. Default: the site of `config`.
            splice: replace activations by their reconstructions.
            steer: amounts by feature, in units of its codes. Each is added times the feature's row of W_dec.
            where: the tokens that change: a mask [B, T], or 'all'. Default: `steer` changes every token, and `splice`
                all but special tokens, first positions and outliers.
            collect: keep the code of each forward pass.

        Raises:
            ConfigError: there is no such site or feature, or its width is not d_model. Inside the block, at a forward
                pass: activations of another width or device, or a mask of another shape.
        """
        from sae_train.sae.attach import attached  # it imports this module

        return attached(self, model, site, splice=splice, steer=steer or {}, where=where, collect=collect)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n_features={self.n_features}, k={self.k:g}, inference={self.inference!r}"

    def pre_activations(self, x: Tensor) -> Iterator[Tensor]:
        """Yield pre-activations [tokens, n_features] of `x` [..., d_model], a bounded number of tokens at a time."""
        step = max(1, CHUNK_BYTES // (self.n_features * self.W_enc.element_size()))
        for rows_ND in torch.split(self._rows(x), step):
            yield torch.addmm(self.b_enc, rows_ND, self.W_enc)

    def _pre_activations(self, x: Tensor, *, check_finite: bool) -> Iterator[Tensor]:
        """Yield `pre_activations`. With `check_finite`, raise a ValueError where those of a token are not finite."""
        first = 0
        for pre_NF in self.pre_activations(x):
            if check_finite:
                dtype = torch.promote_types(pre_NF.dtype, torch.float32)  # half precision would overflow in the sum
                is_finite_N = pre_NF.detach().sum(1, dtype=dtype).isfinite()  # a matrix of flags would be large
                if not is_finite_N.all():
                    row = first + int(is_finite_N.logical_not().nonzero()[0])
                    raise ValueError(
                        f"x: row {row} of {x.shape[:-1].numel()} has no finite code, because its activations are NaN, "
                        "infinite or too large. Leave it out, rescale the activations, or pass check_finite=False"
                    )
            first += len(pre_NF)
            yield pre_NF

    def _rows(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.d_model:
            raise ValueError(f"activations of shape {tuple(x.shape)}: the last dimension must be {self.d_model}")
        return x.reshape(-1, self.d_model).to(self.W_enc.dtype)

    def _dense(self, pre_NF: Tensor) -> Tensor:
        if self.inference == "threshold":
            return torch.where(pre_NF > self.threshold, pre_NF, 0)
        value, feature, token, _ = self._select(pre_NF)
        return torch.zeros_like(pre_NF).index_put((token.long(), feature.long()), value)

    def _select(self, pre_NF: Tensor) -> kernels.Matches:
        with torch.no_grad():
            if self.inference == "threshold":
                matches = kernels.select_where(pre_NF, pre_NF > self.threshold)
            else:
                k = min(round(self.k), self.n_features)
                matches = kernels.select_rows(
                    pre_NF, k=k, capacity=k * len(pre_NF), n_features=self.n_features, ranks=Solo(pre_NF.device)
                )
            used = int(matches.start[-1])
        token, feature = matches.token[:used], matches.feature[:used]
        return kernels.Matches(pre_NF[token.long(), feature.long()], feature, token, matches.start)


def joined(parts: Iterable[kernels.Matches], *, shape: tuple[int, ...], n_features: int) -> SparseCode:
    """Return the code of tokens [*shape] from the matches of consecutive stretches of tokens, without unused slots."""
    values: list[Tensor] = []
    features: list[Tensor] = []
    tokens: list[Tensor] = []
    starts: list[Tensor] = []
    n_tokens, n_matches = 0, 0
    for part in parts:
        values.append(part.value)
        features.append(part.feature)
        tokens.append(part.token + n_tokens)
        starts.append(part.start[1 if starts else 0 :] + n_matches)
        n_tokens, n_matches = n_tokens + len(part.start) - 1, n_matches + len(part.value)
    return SparseCode(
        value=torch.cat(values),
        feature=torch.cat(features),
        token=torch.cat(tokens),
        start=torch.cat(starts),
        shape=shape,
        n_features=n_features,
    )
