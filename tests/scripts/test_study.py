"""The synthetic dictionary is what it says, and its measures give known answers for dictionaries that are known."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import study_report
import study_sparsifiers
import synthetic_dictionary as synthetic

from sae_train.cli.compose import compose_config
from sae_train.sae.nesting import prefix_sizes
from tools.sae_parts import sparsifier_of

N = 20_000


@pytest.fixture(scope="module")
def held() -> dict[str, torch.Tensor]:
    known = synthetic.truth(0)
    active = synthetic.activity(known, N, torch.Generator().manual_seed(1))
    return {"directions": known.directions, "density": known.density, "parent": known.parent, "active": active,
            "group": known.group}  # fmt: skip


def test_directions_fire_as_often_as_designed(held: dict[str, torch.Tensor]) -> None:
    share, said = held["active"].double().mean(0), held["density"]
    assert bool(((share - said).abs() < 5 * (said * (1 - said) / N).sqrt()).all())
    assert float(held["active"].sum(1).double().mean()) == pytest.approx(synthetic.MEAN_ACTIVE, rel=0.02)
    ordered = said[held["parent"] < 0].sort(descending=True).values
    assert float(ordered[0] / ordered[-1]) > 20  # Zipf, not uniform


def test_children_come_one_at_a_time_and_only_with_their_parent(held: dict[str, torch.Tensor]) -> None:
    parents = held["parent"][held["parent"] >= 0].unique().tolist()
    assert len(parents) == synthetic.N_TRUE // 16
    for parent in parents:
        children = held["active"][:, held["parent"] == parent]
        assert children.shape[1] == synthetic.CHILDREN
        assert int(children.sum(1).max()) == 1
        assert bool(held["active"][children.any(1), parent].all())


def test_groups_fire_together_more_often_than_chance(held: dict[str, torch.Tensor]) -> None:
    lifts = []
    for group in range(int(held["group"].max()) + 1):
        members = held["active"][:, held["group"] == group].double()
        expected = members.mean(0)
        lifts.append(float((members[:, 0] * members[:, 1]).mean() / (expected[0] * expected[1])))
    assert sorted(lifts)[len(lifts) // 2] > 2


def test_the_truth_itself_is_recovered_and_absorbs_nothing(held: dict[str, torch.Tensor]) -> None:
    found = synthetic.recovery(held["active"], held["directions"], held)
    assert (found.found, found.parents_found) == (1, 1)
    assert found.absorbed == found.missed == [0] * (synthetic.N_TRUE // 16)
    assert found.cosine == pytest.approx(1)


def test_absorption_is_the_share_of_child_tokens_on_which_the_parents_feature_is_silent(
    held: dict[str, torch.Tensor],
) -> None:
    fires = held["active"].clone()
    children = (held["parent"] >= 0).nonzero().flatten().tolist()
    first = {int(held["parent"][child]): child for child in reversed(children)}
    expected = []
    for parent, child in sorted(first.items()):  # a child of each family takes its parent's place
        fires[held["active"][:, child], parent] = False
        own = held["active"][:, held["parent"] == parent].any(1)
        expected.append(float(held["active"][own][:, child].double().mean()))
    found = synthetic.recovery(fires, held["directions"], held)
    assert found.absorbed == pytest.approx(expected)
    assert found.missed == [0] * len(expected)
    lost = synthetic.recovery(fires, held["directions"].roll(1, dims=1), held)
    assert lost.parents_found == 0
    assert lost.absorbed == [None] * len(expected)


def test_rows_come_back_from_their_codes(held: dict[str, torch.Tensor]) -> None:
    known = synthetic.truth(0)
    rows = synthetic.activations(known, held["active"][:2000], torch.Generator().manual_seed(2))
    norms = rows.norm(dim=1)
    assert bool(rows.isfinite().all())
    assert float(norms.square().mean()) == pytest.approx(synthetic.MEAN_ACTIVE, rel=0.3)  # nearly orthogonal directions
    assert torch.equal(synthetic.truth(0).directions, known.directions)
    assert not torch.equal(synthetic.truth(1).directions, known.directions)


def row(seed: int, method: str, fvu: float, **figures: object) -> dict[str, object]:
    return {"source": "a", "k": 32, "seed": seed, "method": method, "fvu": fvu, "l0": 32.0, **figures}


def test_comparisons_are_of_equal_points_only() -> None:
    rows = [row(0, "topk", 0.2), row(0, "jumprelu", 0.1), row(1, "jumprelu", 0.3), row(2, "topk", 0.1),
            row(3, "topk", 0.2), row(3, "jumprelu", 0.1, l0=30.0)]  # fmt: skip
    assert study_report.paired(rows, "fvu", "jumprelu", "topk") == [0.5]
    assert "x0.500 (1 pair)" in study_report.claims(rows)


def test_absorption_is_compared_on_parents_that_both_found_less_what_is_missed_anyway() -> None:
    one = row(0, "temporal_mask", 0.2, absorbed=[0.5, None, 0.3], missed=[0.1, None, 0.1])
    other = row(0, "topk", 0.2, absorbed=[0.9, 0.9, None], missed=[0.2, 0.2, None])
    assert study_report.paired([one, other], "absorption", "temporal_mask", "topk") == pytest.approx([0.4 - 0.7])
    other["absorbed"] = other["missed"] = [None, None, None]
    assert study_report.paired([one, other], "absorption", "temporal_mask", "topk") == []


@pytest.mark.parametrize("method", study_sparsifiers.KNOWN)
def test_every_method_of_the_study_can_be_run(method: str) -> None:
    config = compose_config([*study_sparsifiers.KNOWN[method], "k=16", "n_features=1024", "tokens=300000"])
    for n_features in {int(dials["n_features"]) for dials in study_sparsifiers.SOURCES.values()}:
        assert prefix_sizes(config.nesting, n_features=n_features)
        assert sparsifier_of(config, n_features=n_features)
    assert (method in study_sparsifiers.METHODS) != (method in study_sparsifiers.OPEN)
