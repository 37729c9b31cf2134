"""Sparse products, exact selection and the decoder's update, in plain tensors.

torch is the reference and the CPU path. Files named `triton_*` hold the CUDA path of single operations. `select_*` take
pre-activations and return `Matches`. `decode` and `attach` are differentiable products that cost k rows a token.

Letters: N tokens of this rank, D d_model, F n_features, M slots of matches, C candidates, R ranks.
"""

from sae_train.kernels.approximate_product import Approximate, PreActivations, approximate
from sae_train.kernels.attaching import attach, attach_dense, of_features
from sae_train.kernels.bags import sums_by_feature
from sae_train.kernels.decoding import decode
from sae_train.kernels.dense_product import affine, writes_fp32
from sae_train.kernels.match_products import row_products
from sae_train.kernels.matches import FeatureOrder, Matches
from sae_train.kernels.selection import select_batch, select_columns, select_rows, select_where
from sae_train.kernels.unit_rows import adam, along_rows, move_unit_rows

__all__ = [
    "Approximate",
    "FeatureOrder",
    "Matches",
    "PreActivations",
    "adam",
    "affine",
    "along_rows",
    "approximate",
    "attach",
    "attach_dense",
    "decode",
    "move_unit_rows",
    "of_features",
    "row_products",
    "select_batch",
    "select_columns",
    "select_rows",
    "select_where",
    "sums_by_feature",
    "writes_fp32",
]
