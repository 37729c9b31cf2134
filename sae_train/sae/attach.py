"""`sae.attach(model)`: an SAE at its site of a running language model. It collects codes, splices or steers.

At each forward pass, in this order:

1. The code of every token is collected, from the activations as the model computed them.
2. `splice` replaces the activations of some tokens by their reconstructions.
3. `steer` adds amount times the feature's row of W_dec to the activations of some tokens.

By default `splice` leaves alone the tokens that no SAE is trained on: special tokens, the first token of each context,
padding, and activations whose norm is over the SAE's outlier limit or not finite. `steer` changes every token. `where`
replaces both rules. forward_pass.py finds these tokens. Letters: B contexts, T positions, D d_model.
"""

import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sae_train.errors import ConfigError
from sae_train.sae.attach_site import Site, find_site
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.sae.code import SparseCode
from sae_train.sae.forward_pass import PassWatcher, special_ids
from sae_train.sites.hooks import hooked_always

Where = Tensor | Literal["all"] | None


class Attached:
    """An SAE at a site of a model. `SparseAutoencoder.attach` creates it; it stays readable after the block.

    Attributes:
        site: name of the site, such as 'residual2' or 'model.layers.2.mlp'.
        codes: the code of each forward pass, with leading shape [B, T]; empty with `collect=False`.
        n_visits: forward passes that reached the site.
        trained_on: for each code a mask [B, T] of the tokens that the default rule of `splice` changes. Codes of other
            tokens lie outside of what the SAE was trained for.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        site: Site,
        watcher: PassWatcher,
        *,
        splice: bool,
        steer: Mapping[int, float],
        where: Where,
        collect: bool,
    ) -> None:
        self.site = site.label
        self.codes: list[SparseCode] = []
        self.trained_on: list[Tensor] = []
        self.n_visits = 0
        self._sae, self._watcher, self._where = sae, watcher, where
        self._splices, self._steer, self._collects = splice, dict(steer), collect
        limit = (sae.config.get("normalisation") or {}).get("outlier_limit")
        self._limit = float("inf") if limit is None else float(limit)

    def clear(self) -> None:
        """Remove the codes that have been collected."""
        self.codes.clear()
        self.trained_on.clear()

    def visit(self, site: Tensor) -> Tensor | None:
        """Return the activations that take the place of `site` in the model; None where they do not change.

        Args:
            site: activations [B, T, D], or [B * T, D] from modules that see all tokens in one row.
        """
        now = self._watcher.current(self.site)
        if now.is_visited:  # a module that the model calls again, as ALBERT does: the first call is the site
            return None
        now.is_visited = True
        self.n_visits += 1
        is_one_row = site.ndim == 2 and len(site) == math.prod(now.shape)
        x_BTD = site.unflatten(0, now.shape) if is_one_row and now.shape else site
        self._check(x_BTD)
        plain_BT = now.plain(x_BTD.shape[:-1], device=x_BTD.device) & self._within_limit(x_BTD)
        code = None
        if self._collects or self._splices:
            code = self._sae.encode_sparse(x_BTD, check_finite=False)
        if self._collects and code is not None:
            self.codes.append(code)
            self.trained_on.append(plain_BT)
        changed = x_BTD
        if self._splices and code is not None:
            mask_BT = now.mask(self._where, plain_BT)
            changed = torch.where(mask_BT[..., None], self._sae.decode(code).to(x_BTD.dtype), changed)
        if self._steer:
            mask_BT = now.mask(self._where, torch.ones_like(plain_BT))
            delta_D = sum(amount * self._sae.W_dec[feature] for feature, amount in self._steer.items())
            changed = changed + mask_BT[..., None] * torch.as_tensor(delta_D).to(x_BTD.dtype)
        return None if changed is x_BTD else changed.reshape(site.shape)

    def _within_limit(self, x_BTD: Tensor) -> Tensor:
        """Return [B, T] bool: false for activations over the outlier limit, and for those that are not finite."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        norm_BT: Tensor = torch.linalg.vector_norm(x_BTD.detach(), dim=-1, dtype=dtype)
        return (norm_BT <= self._limit) & norm_BT.isfinite()

    def _check(self, x_BTD: Tensor) -> None:
        sae = self._sae
        if x_BTD.shape[-1] != sae.d_model:
            raise ConfigError(
                f"site={self.site!r}: its activations are {x_BTD.shape[-1]} wide, and this SAE takes d_model="
                f"{sae.d_model}. Attach it to the model and site that it was trained on."
            )
        if x_BTD.device != sae.W_enc.device:
            raise ConfigError(
                f"site={self.site!r}: its activations are on {x_BTD.device}, and this SAE is on {sae.W_enc.device}. "
                f"Move it before attaching: sae.to({str(x_BTD.device)!r})."
            )


@contextmanager
def attached(
    sae: SparseAutoencoder,
    model: nn.Module,
    site: str | None,
    *,
    splice: bool,
    steer: Mapping[int, float],
    where: Where,
    collect: bool,
) -> Iterator[Attached]:
    """Attach an SAE to a model inside the block; see `SparseAutoencoder.attach` for arguments and errors."""
    steer = _check(sae, model, steer=steer, where=where)
    found = find_site(model, site, config=sae.config, d_model=sae.d_model)
    watcher = PassWatcher(special_ids(model))
    held = Attached(sae, found, watcher, splice=splice, steer=steer, where=where, collect=collect)
    with watcher.watching(model, found.place.module), hooked_always(model, found.place, held.visit):
        yield held
    if watcher.n_passes and not held.n_visits:
        raise ConfigError(
            f"site={found.label!r}: no forward pass reached it, so nothing was collected or changed. Choose a module "
            "that the model calls."
        )


def _check(sae: SparseAutoencoder, model: nn.Module, *, steer: Any, where: Where) -> dict[int, float]:
    """Refuse arguments that cannot be used; return the amounts by feature as plain numbers.

    Raises:
        ConfigError: for the first of them.
    """
    if not isinstance(model, nn.Module):
        has_one = isinstance(getattr(model, "model", None), nn.Module)
        raise ConfigError(
            f"model: a {type(model).__name__} is no torch module. Give {'its .model' if has_one else 'the model'}."
        )
    if not isinstance(steer, Mapping):
        raise ConfigError(f"steer: a {type(steer).__name__}. Give a mapping from features to amounts, as {{17: 4.0}}.")
    amounts = {_feature(feature, sae.n_features): _amount(amount) for feature, amount in steer.items()}
    is_usable = where.dtype == torch.bool if isinstance(where, Tensor) else where in (None, "all")
    if not is_usable:
        raise ConfigError("where: neither 'all' nor a tensor of truth values. Give a mask [B, T], or leave it out.")
    return amounts


def _feature(feature: Any, n_features: int) -> int:
    """Return the index of a feature, which may be a whole number of NumPy or torch."""
    try:
        index = -1 if isinstance(feature, bool) else operator.index(feature)
    except TypeError:
        index = -1
    if not 0 <= index < n_features:
        raise ConfigError(f"steer={{{feature!r}: ...}}: no such feature. Choose 0 to {n_features - 1}.")
    return index


def _amount(amount: Any) -> float:
    """Return an amount, which may be a number of NumPy or torch."""
    try:
        number = math.nan if isinstance(amount, str) else float(amount)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"steer={{...: {amount!r}}}: not a finite number. Give an amount, in units of codes.")
    return number
