"""What one step leaves for the next holds, or is not believed."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_train import kernels
from sae_train.kernels import Workspace, numba_adam, numba_rows
from sae_train.ranks.interface import Solo
from tools import grid_world as world

RUNS = [
    ["sparsifier=mutual_choice", "aux_loss=aux_k"],
    ["sparsifier=topk", "aux_loss=none", "nesting=matryoshka", "nesting.prefixes=[0.5,1.0]"],
    ["sparsifier=mutual_choice", "aux_loss=aux_zipf", "aux_loss.tau=0.5", "parametrisation=aligned"],
    ["sparsifier=feature_choice", "sparsifier.after=0.25", "aux_loss=aux_k"],
    ["sparsifier=gated", "aux_loss=none"],
]


def again(name: str, of: Tensor, known: Any, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return what is known beside what is found anew."""
    of = of.detach()
    if name == "bf16":
        return [(known, of.bfloat16())]
    if name == "padded":
        return [(known[:, : of.shape[1]], of.bfloat16())]
    if name == "squares":
        return [(known, numba_adam.squares(of))]
    if name == "along_rows":
        return list(zip(known, numba_adam.along_rows(of, weight), strict=True))
    assert name == "rounded"
    found = numba_rows.rounded(of, torch.zeros(len(of)), padded=known.padded.shape[1])
    known.padded[:, of.shape[1]] = 0  # what stands behind the rows is written anew in any case
    return list(zip(known, found, strict=True))


@pytest.mark.parametrize("is_screened", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("case", RUNS, ids=lambda case: "-".join(case[:2]).replace("sparsifier=", ""))
def test_what_a_run_knows_is_what_it_would_find(
    case: list[str], precision: str, is_screened: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two gradients of a weight, a step that halts, and weights that change between two steps."""
    world.write_activations(tmp_path)
    config = world.config_of(tmp_path, case, precision=precision, steps=12, n_features=1536, dead_window=16)
    trainer = world.build(config, Solo())
    trainer.learners[0].is_screened = is_screened and trainer.learners[0].is_screened
    asked, noted = set(), Workspace.noted

    def checked(self: Workspace, of: Tensor, name: str) -> Any:
        known = noted(self, of, name)
        if known is not None:
            asked.add(name)
            for one, other in again(name, of, known, trainer.learners[0].dictionary.W_dec.detach()):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
        return known

    monkeypatch.setattr(Workspace, "noted", checked)
    for step in range(12):
        if step == 4:
            with torch.no_grad():
                for parameter in trainer.learners[0].dictionary.parameters():
                    parameter.mul_(1.01)
        if step == 8:
            trainer.learners[0].halt.flag = torch.ones((), dtype=torch.bool)
        trainer.step(trainer.stream.batch(step))
        trainer.learners[0].halt.flag = torch.zeros((), dtype=torch.bool)
        if "bf16" in asked:
            assert (
                noted(trainer.learners[0].dictionary.workspace, trainer.learners[0].dictionary.W_dec, "bf16")
                is not None
            )
        if "rounded" in asked:
            assert (
                noted(trainer.learners[0].dictionary.workspace, trainer.learners[0].dictionary.W_enc, "rounded")
                is not None
            )
    if trainer.learners[0].is_screened and "parametrisation=aligned" not in case:
        assert "rounded" in asked
    if precision == "bf16" and "sparsifier=gated" not in case:
        assert "bf16" in asked


def test_a_note_holds_until_its_tensor_changes() -> None:
    space, rows = Workspace(), torch.zeros(3, 3)
    assert space.noted(rows, "sum") is None
    space.note(rows, sum=0.0)
    assert space.noted(rows, "sum") == 0.0
    assert space.noted(rows.detach(), "sum") == 0.0  # the same numbers by another name
    for other in (rows.clone(), rows.t(), rows[:2], rows.view(torch.int32), rows.view(9)):
        assert space.noted(other, "sum") is None
    rows.add_(1)
    assert space.noted(rows, "sum") is None
    space.note(rows, sum=9.0)
    torch.autograd.graph.increment_version(rows)
    assert space.noted(rows, "sum") is None


def test_no_other_tensor_comes_to_an_address_that_is_noted() -> None:
    """An allocator gives what was just given back to whoever asks next for as much."""
    space, addresses = Workspace(), set()
    for name in ("rows", "columns", "sums"):
        of = torch.ones(1000, 7)
        addresses.add(of.data_ptr())
        space.note(of, **{name: 0.0})
        del of
    assert len(addresses) == 3
    assert all(torch.ones(1000, 7).data_ptr() not in addresses for _ in range(20))


def test_what_was_found_of_lent_memory_goes_with_it() -> None:
    """Of that no reference is held, so another tensor may come to its address."""
    space, like, came_again = Workspace(), torch.zeros(()), 0
    for _ in range(20):
        gradient = space.take((1000, 7), like=like)
        address = gradient.data_ptr()
        space.note(gradient, sum=0.0)
        assert space.noted(gradient.detach(), "sum") == 0.0
        del gradient
        others = [torch.empty(1000, 7) for _ in range(8)]
        came_again += any(other.data_ptr() == address for other in others)
        assert all(space.noted(other, "sum") is None for other in others)
    assert came_again > 0


def test_memory_that_is_lent_again_is_another_tensor() -> None:
    space, like = Workspace(), torch.zeros(())
    gradient = space.take((5, 3), like=like)
    space.note(gradient, sum=0.0)
    space.note(gradient[2:], few=0.0)
    assert space.noted(gradient, "sum") == 0.0
    assert space.noted(gradient[2:], "few") == 0.0
    space.keep([gradient])
    again = space.take((5, 3), like=like)
    assert again.data_ptr() == gradient.data_ptr()
    assert space.noted(again, "sum") is None
    assert space.noted(again[2:], "few") is None


def test_what_is_found_where_lent_memory_was_is_known() -> None:
    space, like = Workspace(), torch.zeros(())
    for shape in [(1000, 7)] * 20 + [(0, 7)]:
        space.take(shape, like=like)  # and lost at once
        other = torch.empty(shape)
        space.note(other, sum=0.0)
        assert space.noted(other, "sum") == 0.0


def test_gradients_are_added_where_they_stand() -> None:
    """What is noted of one does not make another tensor of the sum, which would not be given back."""
    space = Workspace()
    W = torch.nn.Parameter(torch.randn(40, 6))
    feature, token, start = torch.tensor([3, 7], dtype=torch.int32), torch.tensor([0, 1]).int(), torch.arange(3).int()
    value = torch.ones(2, requires_grad=True)
    first = kernels.decode(value, W, feature, token, start, workspace=space)
    second = kernels.decode(value.detach(), W, feature, token, start, workspace=space)
    (first.square().sum() + second.sum()).backward()
    assert W.grad is not None
    assert space.noted(W.grad, "along_rows") is None
    assert space.noted(W.grad, "squares") is None
    space.keep([W.grad])
    assert space.take((40, 6), like=W.detach()).data_ptr() == W.grad.data_ptr()


def test_gradients_of_rows_that_are_bf16_themselves() -> None:
    """Of weights that no fp32 ones stand behind."""
    rows = torch.randn(10, 64).bfloat16()
    feature, token, start = torch.tensor([3, 9]).int(), torch.tensor([0, 1]).int(), torch.arange(3).int()
    found = []
    for W in (rows.requires_grad_(), rows.detach().float().requires_grad_()):
        value, space = torch.tensor([2.0, 3.0], requires_grad=True), Workspace()
        kernels.decode(value, W, feature, token, start, workspace=space, precision="bf16").sum().backward()
        assert W.grad is not None
        assert space.noted(W.grad, "along_rows") is None or W.dtype == torch.float32
        found.append((value.grad, W.grad.float()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_copy_begins_with_nothing() -> None:
    space, rows = Workspace(), torch.zeros(3)
    space.note(rows, sum=0.0)
    for other in (copy.deepcopy(space), pickle.loads(pickle.dumps(space))):
        assert other.noted(rows, "sum") is None


def test_nothing_is_known_of_what_changes_uncounted() -> None:
    space = Workspace()
    with torch.inference_mode():
        rows = torch.zeros(3)
        space.note(rows, sum=0.0)
        assert space.noted(rows, "sum") is None
