"""Sparse products, exact selection and the decoder's update, in plain tensors.

Everything here costs k rows a token instead of n_features. torch is the reference and the CPU path; files named
`triton_*` hold the CUDA path of single operations, and `backend.py` chooses between the two. `select_*` take
pre-activations and return `Matches`. `decode` and `attach` are differentiable products over matches.

Letters: N tokens of this rank, D d_model, F n_features, M slots of matches, C candidates, R ranks.
"""

from sae_train.kernels.attaching import attach, attach_dense, of_features
from sae_train.kernels.bags import sums_by_feature
from sae_train.kernels.decoding import decode
from sae_train.kernels.dense_product import affine, writes_fp32
from sae_train.kernels.match_products import row_products
from sae_train.kernels.matches import FeatureOrder, Matches
from sae_train.kernels.near_product import Near, PreActivations, near
from sae_train.kernels.selection import select_above, select_batch, select_columns, select_few_above, select_rows
from sae_train.kernels.unit_rows import adam, along_rows, move_unit_rows

__all__ = [
    "FeatureOrder",
    "Matches",
    "Near",
    "PreActivations",
    "adam",
    "affine",
    "along_rows",
    "attach",
    "attach_dense",
    "decode",
    "move_unit_rows",
    "near",
    "of_features",
    "row_products",
    "select_above",
    "select_batch",
    "select_columns",
    "select_few_above",
    "select_rows",
    "sums_by_feature",
    "writes_fp32",
]
