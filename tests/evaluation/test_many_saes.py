"""The SAEs of a run are evaluated together: what they share, and that none of them changes another's figures."""

from typing import Any

import pytest

from sae_train.errors import DataError
from sae_train.evaluation.evaluate import evaluate_all
from sae_train.evaluation.metric import Subject
from sae_train.evaluation.rounds import rounds
from sae_train.phases import Phases
from sae_train.ranks.interface import Ranks, Solo
from tools.grid_of_threads import on_grid, on_ranks
from tools.held_out_rows import CASES, SITES, SIZES, Rows, subject

SAES = [(name, site) for site in SITES for name in CASES]


def evaluated(subjects: list[Subject], ranks: Ranks, **options: Any) -> list[dict[str, Any]]:
    return evaluate_all(subjects, Rows(), max_tokens=1, language_model=None, ranks=ranks, **options)


def subjects_of(ranks: Ranks, saes: list[tuple[str, str]] = SAES) -> list[Subject]:
    return [subject(name, ranks, site=site) for name, site in saes]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    """The figures of each SAE by itself, in one process."""
    return [evaluated([each], Solo())[0] for each in subjects_of(Solo())]


def test_an_sae_among_others_has_the_figures_that_it_has_alone(alone: list[dict[str, Any]]) -> None:
    assert evaluated(subjects_of(Solo()), Solo()) == alone
    assert evaluated(subjects_of(Solo())[::-1], Solo()) == alone[::-1]


def test_each_site_leaves_out_its_own_outliers(alone: list[dict[str, Any]]) -> None:
    n_kept = [each["evaluation_tokens"] for each in alone[:: len(CASES)]]
    assert n_kept[0] == sum(SIZES) > n_kept[1] > n_kept[2] > 0
    fvu = [[each["fvu"] for each in alone[at : at + len(CASES)]] for at in range(0, len(alone), len(CASES))]
    assert fvu[0] != fvu[1] != fvu[2]


@pytest.mark.parametrize("grid", [(2, 1), (1, 2), (3, 2)])
def test_figures_of_saes_that_all_ranks_share(grid: tuple[int, int], alone: list[dict[str, Any]]) -> None:
    """The batches are dealt to the ranks, which differ in their number of batches."""
    for found in on_grid(grid, lambda ranks: evaluated(subjects_of(ranks), ranks)):
        for got, expected in zip(found, alone, strict=True):
            density = got.pop("density")
            assert density == pytest.approx(expected["density"], rel=1e-9)
            assert got == pytest.approx({k: v for k, v in expected.items() if k != "density"}, rel=1e-9)


@pytest.mark.parametrize("size", [2, 4])
def test_saes_that_live_on_one_rank_each_are_evaluated_as_in_one_process(
    size: int, alone: list[dict[str, Any]]
) -> None:
    """Ranks have different numbers of SAEs, and the last has none; every one of them reads all batches."""

    def work(ranks: Ranks) -> tuple[list[dict[str, Any]], int]:
        own = SAES[ranks.rank :: size - 1] if ranks.rank < size - 1 else []
        meetings = 0

        def meet() -> None:
            nonlocal meetings
            meetings += 1
            ranks.barrier()

        return evaluated(subjects_of(Solo(), own), ranks, deal=Solo(), phases=Phases(together=meet)), meetings

    for rank, (found, meetings) in enumerate(on_ranks(size, work)):
        assert found == (alone[rank :: size - 1] if rank < size - 1 else [])
        assert meetings == len(SIZES)


def test_a_batch_that_one_rank_cannot_read_ends_all_ranks() -> None:
    def work(ranks: Ranks) -> str:
        own = subjects_of(Solo(), [("topk", SITES[ranks.rank])])
        with pytest.raises(DataError) as told:
            evaluate_all(own, Rows(bad=(3, "here")), max_tokens=1, language_model=None, ranks=ranks, deal=Solo())
        return str(told.value)

    assert on_ranks(3, work) == ["this batch is bad"] * 3


@pytest.mark.parametrize("n_readers", [0, 1, 2])
def test_the_progress_counts_each_batch_once(n_readers: int) -> None:
    """The ranks deal the batches out, or `n_readers` of them read all."""

    def work(ranks: Ranks) -> int:
        deal = Solo() if n_readers else ranks
        batches = Rows().batches("evaluation", max_tokens=1, ranks=deal, sites=["here"])
        own = batches if n_readers == 0 or ranks.rank >= 2 - n_readers else iter(())
        return sum(turn.n_tokens for turn in rounds(own, ranks, deal=deal))

    assert on_ranks(2, work) == [sum(SIZES)] * 2
