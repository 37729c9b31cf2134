"""Which tokens are trained on: the rule by token, and the limit on norms.

Special tokens and the first position of a context give no row at all. A few other tokens carry norms 10 to 1000 times
the rest (attention sinks). One of them would absorb a batch's budget, so rows over the outlier limit are left out too.
Letters: B contexts, T positions, N rows, D d_model.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.errors import DataError

if TYPE_CHECKING:
    from sae_train.harvest.language_model import LanguageModel, Tokenizer


def trainable(ids_BT: Tensor, tokenizer: "Tokenizer") -> Tensor:
    """Return [B, T] bool: true but for special tokens and the first position, where models park attention.

    Example: with special tokens 0 and 1, the contexts [[0, 7, 8], [9, 1, 8]] give [[F, T, T], [F, F, T]].
    """
    special = torch.tensor(tokenizer.special_ids, dtype=ids_BT.dtype, device=ids_BT.device)
    kept_BT = ~torch.isin(ids_BT, special)
    kept_BT[:, 0] = False
    return kept_BT


def row_norms(raw_ND: Tensor) -> Tensor:
    """Return norms [...] of rows [..., D], float64 for float64 rows and float32 for all others."""
    dtype = torch.float64 if raw_ND.dtype == torch.float64 else torch.float32
    norms: Tensor = torch.linalg.vector_norm(raw_ND, dim=-1, dtype=dtype)
    return norms


def within(raw_ND: Tensor, *, limit: float) -> Tensor:
    """Return [...] bool: true for rows [..., D] with a norm of at most `limit`, and false for NaN."""
    return row_norms(raw_ND) <= limit


def check_finite(*rows: Tensor | None, site: str, language_model: "LanguageModel") -> None:
    """Refuse activations or gradients that are not finite.

    Raises:
        DataError: with the likely cause.
    """
    if not all(bool(torch.isfinite(each).all()) for each in rows if each is not None):
        raise DataError(f"{site}: {language_model.why_not_finite()}")
