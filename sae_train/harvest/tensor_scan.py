"""One pass over rows in files before training: rows over the outlier limit, rows of zeros, rows that are not finite.

Letters: N rows, D d_model.
"""

import torch
from torch import Tensor

from sae_train.errors import DataError
from sae_train.harvest.filter import row_norms
from sae_train.harvest.tensor_files import TensorTable
from sae_train.phases import Phases
from sae_train.ranks.interface import Ranks


def scan_rows(
    table: TensorTable, stop: int, limit: float, ranks: Ranks, phases: Phases, *, start: int = 0
) -> tuple[Tensor, int]:
    """Return the rows over `limit` among rows start..stop, and the number of rows that are all zero.

    Every rank reads its share, and all ranks get the same result. Collective.

    Raises:
        DataError: an activation or a gradient is not finite. It is raised on every rank, for the first such row.
    """
    size = -(-(stop - start) // ranks.size)
    mine = start + ranks.rank * size
    found = [torch.empty(0, dtype=torch.int64)]
    bad, n_zero = stop, 0
    for first, raw_ND, gradient_ND in table.spans(mine, min(mine + size, stop)):
        norms = row_norms(raw_ND)
        over = (~(norms <= limit)).nonzero()[:, 0]
        not_finite = [over[_broken(raw_ND[over])]]
        if gradient_ND is not None:
            not_finite.append(_broken(gradient_ND).nonzero()[:, 0])
        if any(map(len, not_finite)):
            bad = min(bad, first + int(torch.cat(not_finite).min()))
            break
        found.append(first + over)
        n_zero += int((norms == 0).sum())
        phases.advance(len(raw_ND))
    first_bad = int(ranks.gather(torch.tensor([bad], device=ranks.device)).min())
    outliers = ranks.gather_rows(torch.cat(found).to(ranks.device)).cpu()
    n_zero = int(ranks.sum(torch.tensor(n_zero, device=ranks.device)))
    if first_bad < stop:
        raise _not_finite(table, first_bad)
    return outliers, n_zero


def refuse_broken(raw_ND: Tensor, gradient_ND: Tensor | None, index_N: Tensor, table: TensorTable) -> None:
    """Refuse rows that are not finite.

    Args:
        raw_ND: activations of the rows.
        gradient_ND: their gradients, or None.
        index_N: the rows' indices in `table`, for the message.
        table: where the rows come from.

    Raises:
        DataError: for the first such row of the table.
    """
    broken_N = _broken(raw_ND)
    if gradient_ND is not None:
        broken_N |= _broken(gradient_ND)
    if bool(broken_N.any()):
        raise _not_finite(table, int(index_N[broken_N].min()))


def _broken(rows_ND: Tensor) -> Tensor:
    """Return [N] bool: which rows hold a number that is not finite."""
    return ~torch.isfinite(rows_ND).all(dim=1)


def _not_finite(table: TensorTable, row: int) -> DataError:
    return DataError(f"{table.place(row)}: not finite (NaN or infinite). Remove such rows, or harvest again in "
                     "float32 or bfloat16.")  # fmt: skip
