"""Sparse products and selection: the one interface, in plain tensors.

Everything that costs k rows a token instead of n_features stands here, so that faster kernels slot in behind the
same names. `select_*` take dense pre-activations and return `Matches`; `decode` and `attach` are differentiable
products over matches. On a CPU selection works on short candidate lists (`candidates.py`); elsewhere it is made
of dense passes that never wait for the device (`reference.py`). Both keep the same pairs, and a test says so.

Letters: N tokens of this rank, D d_model, F n_features, M slots, R ranks.
"""

from sae_train.kernels.matches import Matches, flat_nonzero
from sae_train.kernels.products import affine, attach, attach_dense, decode, of_features
from sae_train.kernels.selection import select_above, select_batch, select_columns, select_rows, select_where

__all__ = [
    "Matches",
    "affine",
    "attach",
    "attach_dense",
    "decode",
    "flat_nonzero",
    "of_features",
    "select_above",
    "select_batch",
    "select_columns",
    "select_rows",
    "select_where",
]
