"""Operations on torch's meta device, which has no values to read and refuses mixed devices: it stands for a GPU."""

import pytest
import torch
from torch import Tensor

from sae_train import kernels
from sae_train.ranks.interface import Solo

N, D, F, M = 6, 4, 10, 12


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def places() -> tuple[Tensor, Tensor, Tensor]:
    return empty(M, dtype=torch.int32), empty(M, dtype=torch.int32), empty(N + 1, dtype=torch.int32)


def is_there(value: Tensor, *shape: int) -> bool:
    return value.device.type == "meta" and value.shape == shape


def test_products_and_their_gradients() -> None:
    W_enc, W_dec, b, scale = (empty(*shape).requires_grad_() for shape in ((F, D), (F, D), (F,), (F,)))
    value = kernels.attach(empty(M), empty(N, D), W_enc, b, *places())
    value = value * kernels.of_features(scale, *places())
    rows = kernels.decode(value, W_dec, *places())
    assert is_there(rows, N, D)
    (rows.sum() + kernels.attach_dense(empty(N, F), empty(N, D), W_enc, b).sum()).backward()
    assert all(each.grad is not None and is_there(each.grad, *each.shape) for each in (W_enc, W_dec, b, scale))
    assert is_there(kernels.row_products(empty(N, D), W_dec, *places()), M)
    assert is_there(kernels.sums_by_feature(empty(M, 2), places()[0], n_features=F), F, 2)
    assert is_there(kernels.affine(empty(N, D), W_enc, b, precision="float32"), N, F)


@pytest.mark.parametrize("is_approximate", [False, True], ids=["exact", "near"])
def test_selection(is_approximate: bool) -> None:
    pre = kernels.approximate(empty(N, D), empty(F, D), empty(F)) if is_approximate else empty(N, F)
    where = {"n_features": F, "ranks": Solo("meta")}
    allowed = empty(F, dtype=torch.bool)
    for matches in (
        kernels.select_batch(pre, budget=7, capacity=M, **where),
        kernels.select_rows(pre, k=2, capacity=M, **where),
        kernels.select_rows(pre, k=2, capacity=M, allowed_F=allowed, **where),
        kernels.select_columns(pre, budget_F=torch.arange(F) % 3, capacity=M, ranks=Solo("meta")),
    ):
        assert is_there(matches.value, M)
        assert is_there(matches.feature, M)
        assert is_there(matches.start, N + 1)


def test_devices_are_not_mixed() -> None:
    """A tensor left on the host is an error here, as it is on a GPU."""
    there, here = empty(N, F), torch.ones(F, dtype=torch.bool)
    with pytest.raises(RuntimeError):
        kernels.select_rows(there, k=2, capacity=M, n_features=F, ranks=Solo("meta"), allowed_F=here)
    with pytest.raises(RuntimeError):
        kernels.along_rows(empty(F, D), torch.zeros(F, D))
