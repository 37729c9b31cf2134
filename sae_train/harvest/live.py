"""Activations harvested while training: lanes of text through the language model into pools.

Letters: B contexts, T positions, N tokens, D d_model, L lanes of this rank, C capacity of a lane's pool.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae_train.config import LiveHarvestConfig, RunConfig
from sae_train.errors import DataError
from sae_train.harvest.held_out import TextHeldOut, check_finite, trainable
from sae_train.harvest.lanes import Lane, check_lanes
from sae_train.harvest.language_model import LanguageModel, Tokenizer
from sae_train.harvest.pool import LanePool
from sae_train.harvest.scaling import Scaling, fit_scaling
from sae_train.harvest.source import Stream, run_dtype, whole_batches
from sae_train.harvest.text import Corpus
from sae_train.ranks import Ranks

_FRUITLESS_FORWARDS = 200


@dataclass(frozen=True, slots=True)
class Block:
    """What one forward pass gave: raw rows [N, D] without special tokens, and the lane's cursor after it."""

    raw_ND: Tensor
    cursor: dict[str, Tensor]


class LiveLane:
    """A lane of text, its pool, and counts of what the outlier limit left out."""

    def __init__(self, text: Lane, pool: LanePool, *, language_model: LanguageModel, tokenizer: Tokenizer,
                 contexts_per_forward: int, site: str) -> None:  # fmt: skip
        self.text, self.pool = text, pool
        self._language_model, self._tokenizer = language_model, tokenizer
        self._contexts_per_forward, self._site = contexts_per_forward, site
        self.seen = self.dropped = self._fruitless = 0

    def forward(self) -> Block | None:
        """Run the next contexts of the lane; None where its documents end."""
        ids_BT = self.text.contexts(self._contexts_per_forward)
        if not len(ids_BT):
            return None
        largest = int(ids_BT.max())
        if largest >= self._language_model.vocab:
            raise DataError(f"the tokenizer gives token {largest}, the language model knows "
                            f"{self._language_model.vocab}. Use the tokenizer that belongs to the model.")  # fmt: skip
        raw_BTD = self._language_model.activations(ids_BT)
        raw_ND = raw_BTD[trainable(ids_BT, self._tokenizer).to(raw_BTD.device)]
        check_finite(raw_ND, site=self._site)
        if not len(raw_ND):
            self._note_fruitless()
        return Block(raw_ND, self.text.state())

    def absorb(self, block: Block, scaling: Scaling, dtype: torch.dtype) -> None:
        """Put a block's rows within the outlier limit into the pool."""
        kept = scaling.keeps(block.raw_ND)
        rows_ND = scaling.normalise(block.raw_ND[kept].to(dtype))
        self.pool.add(rows_ND)
        if len(rows_ND):
            self._fruitless = 0
        elif len(kept):
            self._note_fruitless()
        self.seen += len(kept)
        self.dropped += len(kept) - len(rows_ND)

    def refill(self, scaling: Scaling, dtype: torch.dtype) -> None:
        """Fill the pool as far as whole forward passes fit, and shuffle it."""
        while self.pool.has_room:
            block = self.forward()
            if block is None:
                break
            self.absorb(block, scaling, dtype)
        self.pool.shuffle()

    def remaining_tokens(self) -> int:
        """Return how many trainable tokens its text still holds; reads it to its end."""
        total = 0
        while len(ids_BT := self.text.contexts(64)):
            total += int(trainable(ids_BT, self._tokenizer).sum())
        return total

    def _note_fruitless(self) -> None:
        """Give up on a lane whose text the filters empty, rather than read it for ever."""
        self._fruitless += 1
        if self._fruitless == _FRUITLESS_FORWARDS:
            raise DataError(f"lane {self.text.index}: {self._fruitless} forward passes in a row gave no token that the "
                            "filters keep. Look at its text: it may be made of special tokens.")  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        counts = torch.tensor([self.seen, self.dropped])
        return {**self.text.state(), **self.pool.state(), "counts": counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.text.load_state(state)
        self.pool.load_state(state)
        self.seen, self.dropped = state["counts"].tolist()


class LiveStream(Stream):
    """The stream of design.md 7; see `Stream`."""

    language_model: LanguageModel

    def __init__(self, config: RunConfig, *, ranks: Ranks) -> None:
        assert isinstance(config.harvest, LiveHarvestConfig)
        self._config, self._ranks, self._harvest = config, ranks, config.harvest
        self._dtype = run_dtype(config.precision)
        self._corpus = Corpus(config.data, lanes=self._harvest.lanes)
        tokenizer = Tokenizer(config.model)
        check_lanes(self._corpus, tokenizer, lanes=self._harvest.lanes, batch_tokens=config.batch_tokens,
                    context_length=self._harvest.context_length, n_ranks=ranks.size)  # fmt: skip
        self.language_model = LanguageModel(config, device=ranks.device)
        self.d_model = self.language_model.facts.d_model
        self._site = f"{config.model.id}, {self.language_model.facts.label}"
        self.held_out = TextHeldOut(
            self._corpus.held_out_texts(), language_model=self.language_model, tokenizer=tokenizer, ranks=ranks,
            context_length=self._harvest.context_length, contexts_per_batch=self._harvest.contexts_per_forward,
            site=self._site,
        )  # fmt: skip
        self._share = config.batch_tokens // self._harvest.lanes
        self._lanes = self._build_lanes(tokenizer)

    def _build_lanes(self, tokenizer: Tokenizer) -> list[LiveLane]:
        """Return this rank's lanes: lanes / ranks consecutive ones."""
        harvest, seed = self._harvest, self._config.data.seed
        n_owned = harvest.lanes // self._ranks.size
        capacity = harvest.pool_batches * self._share
        rows_LCD = torch.empty(n_owned, capacity, self.d_model, dtype=self._dtype, device=self._ranks.device)
        lanes = []
        for number, rows_CD in enumerate(rows_LCD, start=self._ranks.rank * n_owned):
            text = Lane(number, lanes=harvest.lanes, corpus=self._corpus, tokenizer=tokenizer, seed=seed,
                        context_length=harvest.context_length, repeat=self._config.data.repeat)  # fmt: skip
            pool = LanePool(rows_CD, lane=number, share=self._share, seed=seed,
                            forward_rows=harvest.contexts_per_forward * harvest.context_length)  # fmt: skip
            lanes.append(LiveLane(text, pool, language_model=self.language_model, tokenizer=tokenizer,
                                  contexts_per_forward=harvest.contexts_per_forward, site=self._site))  # fmt: skip
        return lanes

    def start(self) -> None:
        """Fix the scaling from each lane's first tokens, then let those tokens be the first that fill its pool."""
        quota = -(-self._harvest.calibration_tokens // self._harvest.lanes)
        cursors = [lane.text.state() for lane in self._lanes]
        blocks = [self._calibration_blocks(lane, quota) for lane in self._lanes]
        parts = [torch.cat([block.raw_ND for block in own])[:quota] for own in blocks]
        self._set_scaling(fit_scaling(parts, ranks=self._ranks, site=self._site))
        del parts
        for lane, own, cursor in zip(self._lanes, blocks, cursors, strict=True):
            for block in own:
                if not lane.pool.has_room:
                    break
                lane.absorb(block, self.scaling, self._dtype)
                cursor = block.cursor
            lane.text.load_state(cursor)
            own.clear()
            lane.refill(self.scaling, self._dtype)
        self._check_supply()

    def batch(self, step: int) -> Tensor:
        assert all(lane.pool.taken == step * self._share for lane in self._lanes), "steps are asked for in order"
        batch_ND = torch.empty(len(self._lanes) * self._share, self.d_model, dtype=self._dtype,
                               device=self._ranks.device)  # fmt: skip
        due = [lane for lane in self._lanes if lane.pool.is_due]
        for lane in due:
            lane.refill(self.scaling, self._dtype)
        if due:
            self._check_supply()
        for lane, rows_ND in zip(self._lanes, torch.split(batch_ND, self._share), strict=True):
            lane.pool.take(rows_ND)
        return batch_ND

    def fingerprint(self) -> list[int]:
        return self._corpus.fingerprint()

    def replicated_state(self) -> dict[str, Tensor]:
        return {**self.scaling.state(), "corpus": torch.tensor(self.fingerprint())}

    def lane_states(self) -> dict[int, dict[str, Tensor]]:
        return {lane.text.index: lane.state() for lane in self._lanes}

    def restore(self, replicated: dict[str, Tensor], lane_state: Callable[[int], dict[str, Tensor]]) -> None:
        if replicated["corpus"].tolist() != self.fingerprint():
            raise DataError(f"data.id={self._config.data.id}: not the text that the checkpoint was made from. "
                            "Put the old text back, or start a new run with another name.")  # fmt: skip
        self._set_scaling(Scaling.from_state(replicated, device=self._ranks.device))
        for lane in self._lanes:
            lane.load_state(lane_state(lane.text.index))

    def dropped_share(self) -> float:
        counts = torch.tensor([[lane.seen, lane.dropped] for lane in self._lanes], device=self._ranks.device)
        seen, dropped = map(int, self._ranks.sum(counts.sum(0)))
        return dropped / max(1, seen)

    def close(self) -> None:
        self._lanes.clear()

    def _set_scaling(self, scaling: Scaling) -> None:
        self.scaling = replace(scaling, centre_D=scaling.centre_D.to(self._ranks.device))
        self.held_out.limit = scaling.limit

    def _calibration_blocks(self, lane: LiveLane, quota: int) -> list[Block]:
        blocks: list[Block] = []
        while sum(len(block.raw_ND) for block in blocks) < quota:
            block = lane.forward()
            if block is None:
                raise DataError(f"data.repeat=false: lane {lane.text.index} ends before its {quota} calibration "
                                "tokens. Lower harvest.calibration_tokens or harvest.lanes.")  # fmt: skip
            blocks.append(block)
        return blocks

    def _check_supply(self) -> None:
        """With `data.repeat` off, stop as soon as a lane is known to end before the run does."""
        if self._config.data.repeat:
            return
        needed = whole_batches(self._config) // self._harvest.lanes
        if all(lane.pool.taken + lane.pool.unread >= needed or not lane.text.has_ended for lane in self._lanes):
            return
        supply = min(lane.pool.taken + lane.pool.unread + lane.remaining_tokens() for lane in self._lanes)
        there = supply // self._share * self._config.batch_tokens
        raise DataError(f"data.repeat=false: the corpus gives {there} tokens with harvest.lanes={self._harvest.lanes}, "
                        f"and tokens={self._config.tokens}. Lower tokens, or set data.repeat=true.")  # fmt: skip
