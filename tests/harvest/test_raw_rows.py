"""Raw rows of a lane: the activations of every trainable token, in order, from any cursor, whatever their norm."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_train.errors import DataError
from sae_train.harvest.corpus import Corpus
from sae_train.harvest.lanes import Lane
from sae_train.harvest.language_model import LanguageModel, Tokenizer
from sae_train.harvest.raw_rows import Block, Patience, RawRows
from tools.one_of_each import only
from tools.small_runs import CPU
from tools.tiny_models import live_config, save_model, save_sentences

CONTEXTS, LENGTH = 3, 16


class Setting:
    """A tiny language model and text."""

    def __init__(self, folder: Path) -> None:
        source = live_config(save_model(folder / "model"), save_sentences(folder, 60)).source
        self.corpus, self.tokenizer = Corpus(source.data), Tokenizer(source.model)
        self.model = LanguageModel(source, device=CPU)

    def lane(self, *, repeat: bool = False) -> Lane:
        stretches = self.corpus.stretches(2, context_length=LENGTH, tokenizer=self.tokenizer)
        return Lane(1, stretches=stretches, corpus=self.corpus, tokenizer=self.tokenizer, seed=0, repeat=repeat,
                    context_length=LENGTH)  # fmt: skip

    def rows(self, *, gradients: bool = False, repeat: bool = False) -> RawRows:
        return RawRows(self.lane(repeat=repeat), language_model=self.model, tokenizer=self.tokenizer,
                       contexts_per_forward=CONTEXTS, reads_gradients=gradients)  # fmt: skip


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("setting"))


def blocks_of(rows: RawRows) -> list[Block]:
    blocks = []
    while (block := rows.next()) is not None:
        blocks.append(block)
    return blocks


def expected_rows(setting: Setting) -> tuple[Tensor, Tensor]:
    """Return activations and gradients of the lane's trainable tokens, context by context and token by token."""
    lane, found = setting.lane(), list[tuple[Tensor, Tensor]]()
    special = set(setting.tokenizer.special_ids)
    while len(ids_BT := lane.contexts(CONTEXTS)):
        site_BTD, gradient_BTD = map(only, setting.model.activations_and_gradients(ids_BT))
        for context, ids in enumerate(ids_BT.tolist()):
            places = [place for place, token in enumerate(ids) if place > 0 and token not in special]
            found += [(site_BTD[context, place], gradient_BTD[context, place]) for place in places]
    activations, gradients = zip(*found, strict=True)
    return torch.stack(activations), torch.stack(gradients)


def test_they_are_those_of_every_trainable_token(setting: Setting) -> None:
    activations, gradients = expected_rows(setting)
    blocks, plain = blocks_of(setting.rows(gradients=True)), blocks_of(setting.rows())
    assert torch.equal(torch.cat([only(block.raw) for block in blocks]), activations)
    assert torch.equal(torch.cat([only(block.gradients) for block in blocks]), gradients)
    assert torch.allclose(torch.cat([only(block.raw) for block in plain]), activations, rtol=1e-5, atol=1e-6)
    assert not any(block.gradients for block in plain)
    assert [block.is_last for block in blocks] == [False] * (len(blocks) - 1) + [True]


def test_a_blocks_cursor_leads_to_the_next_block(setting: Setting) -> None:
    rows, again = setting.rows(repeat=True), setting.rows(repeat=True)
    blocks = [rows.next() for _ in range(30)]
    for here, there in pairwise(blocks):
        assert here is not None
        assert there is not None
        again.go_to(here.cursor)
        found = again.next()
        assert found is not None
        assert torch.equal(only(found.raw), only(there.raw))
        assert all(torch.equal(value, there.cursor[name]) for name, value in again.cursor().items())


def test_the_rest_is_counted_from_the_cursor(setting: Setting) -> None:
    rows = setting.rows()
    sizes = [len(block) for block in blocks_of(setting.rows())]
    rows.next()
    assert rows.count_rest() == sum(sizes[1:])
    assert rows.has_ended


def test_patience_ends_after_200_passes_in_a_row_without_a_row() -> None:
    patience = Patience("lane 3", lacking="no token. Do this.")
    for n_rows in [0] * 199 + [1] + [0] * 199:
        patience.see(n_rows)
    with pytest.raises(DataError, match=r"lane 3: 200 forward passes in a row gave no token. Do this."):
        patience.see(0)
