"""Sparse products and selection: the one interface, in plain tensors.

Everything that costs k rows a token instead of n_features stands here, so that faster kernels slot in behind the
same names. `select_*` take pre-activations and return `Matches`; `decode` and `attach` are differentiable
products over matches. On a CPU selection works on short candidate lists (`candidates.py`), of pre-activations that a
product in bf16 has screened where the processor has one (`screen.py`); elsewhere on groups of neighbours, never waiting
for the device (`grouped.py`). Both keep the pairs that slow dense passes keep, and a test says so. `backend.py` says
where kernels compiled by Triton or by Numba do the work.

Letters: N tokens of this rank, D d_model, F n_features, M slots, R ranks.
"""

from sae_train.kernels.affine import affine
from sae_train.kernels.heap import keep_freed_memory
from sae_train.kernels.hint import Hint
from sae_train.kernels.matches import FeatureOrder, Matches, flat_nonzero
from sae_train.kernels.products import attach, attach_dense, decode, of_features, row_products, sums_by_feature
from sae_train.kernels.rows import Missed, missed, norms_and_sum, scaled_and_sum
from sae_train.kernels.screen import can_screen, screen
from sae_train.kernels.screened import PreActivations, Screened
from sae_train.kernels.selection import select_above, select_batch, select_columns, select_few_above, select_rows
from sae_train.kernels.table import Table
from sae_train.kernels.workspace import Workspace

__all__ = [
    "FeatureOrder",
    "Hint",
    "Matches",
    "Missed",
    "PreActivations",
    "Screened",
    "Table",
    "Workspace",
    "affine",
    "attach",
    "attach_dense",
    "can_screen",
    "decode",
    "flat_nonzero",
    "keep_freed_memory",
    "missed",
    "norms_and_sum",
    "of_features",
    "row_products",
    "scaled_and_sum",
    "screen",
    "select_above",
    "select_batch",
    "select_columns",
    "select_few_above",
    "select_rows",
    "sums_by_feature",
]
