"""Which tokens are trained on: the rule by token, and the limit on norms.

Special tokens and the first position of a context give no row at all. A few other tokens carry norms 10 to 1000 times
the rest (attention sinks). One of them would absorb a batch's budget, so no row over the outlier limit is trained on.
Sites share their tokens, and each site has a limit of its own. A row over the limit is therefore replaced, not removed.
Letters: B contexts, T positions, N rows, D d_model.
"""

from collections.abc import Mapping, Sequence
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


def next_kept(kept_N: Tensor) -> Tensor:
    """Return [N] int64: for each row the index of the next kept row. A kept row is its own.

    After the last row comes the first. At least one row is kept. Example: [F, T, F, T, F] gives [1, 1, 3, 3, 1].
    """
    place_N = torch.arange(len(kept_N), device=kept_N.device)
    twice = torch.cat([place_N, place_N + len(kept_N)]).masked_fill(~kept_N.repeat(2), 2 * len(kept_N))
    return twice.flip(0).cummin(0).values.flip(0)[: len(kept_N)] % len(kept_N)


def shortened_to(rows_ND: Tensor, *, limit: float) -> Tensor:
    """Return rows of norms above `limit`, scaled down to that norm."""
    return rows_ND * (limit / row_norms(rows_ND)).to(rows_ND.dtype)[:, None]


def check_finite(rows: Mapping[str, Sequence[Tensor]], *, language_model: "LanguageModel") -> None:
    """Refuse activations or gradients that are not finite.

    Args:
        rows: tensors of each site, by its label.
        language_model: gives the likely cause.

    Raises:
        DataError: for the first site with such a tensor, with the likely cause.
    """
    finite = [torch.isfinite(each).all() for several in rows.values() for each in several]
    if not finite or bool(torch.stack(finite).all()):  # one reading of the device for all sites
        return
    broken = next(label for label, several in rows.items() if not all(bool(each.isfinite().all()) for each in several))
    raise DataError(f"{language_model.describe(broken)}: {language_model.why_not_finite()}")
