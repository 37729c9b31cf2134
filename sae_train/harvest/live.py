"""Activations harvested while training: lanes of text through the language model into pools.

Letters: B contexts, T positions, N tokens, D d_model, W width of a row (D; 2 D with gradients), L lanes of this rank,
C capacity of a lane's pool.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sae_train.config import LiveHarvestConfig, RunConfig
from sae_train.errors import DataError
from sae_train.harvest.corpus import Corpus
from sae_train.harvest.held_out import TextHeldOut
from sae_train.harvest.lanes import Lane, check_lanes
from sae_train.harvest.language_model import LanguageModel, Tokenizer
from sae_train.harvest.live_lane import Block, LiveLane
from sae_train.harvest.pool import LanePool
from sae_train.harvest.prefetch import Ahead
from sae_train.harvest.scaling import Scaling, fit_scaling
from sae_train.harvest.stream import Stream, prefetch_of, row_width, run_dtype, whole_batches
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks


class LiveStream(Stream):
    """A language model run while training; see `Stream`."""

    language_model: LanguageModel

    def __init__(
        self, config: RunConfig, *, ranks: Ranks, phases: Phases = SILENT, corpus: Corpus | None = None
    ) -> None:
        assert isinstance(config.harvest, LiveHarvestConfig)
        self._config, self._ranks, self._harvest, self._sizes = config, ranks, config.harvest, config.lane_sizes
        self._dtype = run_dtype(config.precision)
        self._corpus = corpus or Corpus(config.data, phases)
        tokenizer = Tokenizer(config.model)
        check_lanes(self._corpus, tokenizer, lanes=self._sizes.lanes, batch_tokens=config.batch_tokens,
                    context_length=self._harvest.context_length, n_ranks=ranks.size)  # fmt: skip
        phases.meet()
        self.language_model = LanguageModel(config, device=ranks.device, phases=phases)
        phases.meet()
        self.d_model = self.language_model.facts.d_model
        self._width = row_width(config, self.d_model)
        self._site = f"{config.model.id}, {self.language_model.facts.label}"
        self.held_out = TextHeldOut(
            self._corpus.held_out_parts(), language_model=self.language_model, tokenizer=tokenizer, ranks=ranks,
            context_length=self._harvest.context_length, contexts_per_batch=self._sizes.contexts_per_forward,
            site=self._site,
        )  # fmt: skip
        self._share = self._sizes.share
        self._lanes = self._build_lanes(tokenizer)
        self._prefetch = prefetch_of(config)
        self._ahead = Ahead(self._find_work, is_on=self._prefetch > 0, device=ranks.device)

    def _build_lanes(self, tokenizer: Tokenizer) -> list[LiveLane]:
        """Return this rank's lanes: lanes / ranks consecutive ones."""
        sizes, seed = self._sizes, self._config.data.seed
        stretches = self._corpus.stretches(sizes.lanes, context_length=sizes.context_length, tokenizer=tokenizer)
        n_owned = sizes.lanes // self._ranks.size
        rows_LCW = torch.empty(n_owned, sizes.capacity, self._width, dtype=self._dtype, device=self._ranks.device)
        lanes = []
        for number, rows_CW in enumerate(rows_LCW, start=self._ranks.rank * n_owned):
            text = Lane(number, stretches=stretches, corpus=self._corpus, tokenizer=tokenizer, seed=seed,
                        context_length=sizes.context_length, repeat=self._config.data.repeat)  # fmt: skip
            pool = LanePool(rows_CW, lane=number, share=self._share, seed=seed, forward_rows=sizes.forward_tokens)
            lanes.append(LiveLane(text, pool, language_model=self.language_model, tokenizer=tokenizer,
                                  contexts_per_forward=sizes.contexts_per_forward, site=self._site,
                                  reads_gradients=self._config.reads_gradients))  # fmt: skip
        return lanes

    def start(self, phases: Phases = SILENT) -> None:
        """Fix the scaling from each lane's first tokens, then let those tokens be the first that fill its pool."""
        quota = -(-self._harvest.calibration_tokens // self._sizes.lanes)
        cursors = [lane.text.state() for lane in self._lanes]
        blocks = []
        with phases.of("calibrating scale and centre", total=quota * len(self._lanes)):
            for lane in self._lanes:
                blocks.append(self._calibration_blocks(lane, quota, phases))
                phases.meet()
        parts = [torch.cat([block.raw_NW for block in own])[:quota] for own in blocks]
        rows, gradients = [part[:, : self.d_model] for part in parts], [part[:, self.d_model :] for part in parts]
        self._set_scaling(fit_scaling(rows, ranks=self._ranks, site=self._site,
                                      gradients=gradients if self._config.reads_gradients else None))  # fmt: skip
        del parts, rows, gradients
        with phases.of("filling pools", total=sum(lane.pool.room for lane in self._lanes)):
            for lane, own, cursor in zip(self._lanes, blocks, cursors, strict=True):
                for block in own:
                    if not lane.pool.has_room:
                        break
                    lane.absorb(lane.filtered(block, self.scaling, self._dtype))
                    cursor = block.cursor
                lane.go_to(cursor)
                own.clear()
                phases.count(lane.pool.unread)
                lane.refill(self.scaling, self._dtype, phases)
                phases.meet()
        self._check_supply()

    def batch(self, step: int) -> Tensor:
        assert all(lane.pool.taken == step * self._share for lane in self._lanes), "steps are asked for in order"
        batch_NW = torch.empty(len(self._lanes) * self._share, self._width, dtype=self._dtype,
                               device=self._ranks.device)  # fmt: skip
        self.fill()
        with self._ahead.changing():
            for lane, rows_NW in zip(self._lanes, torch.split(batch_NW, self._share), strict=True):
                lane.pool.take(rows_NW)
        return batch_NW

    def fill(self, phases: Phases = SILENT) -> None:
        due = [lane for lane in self._lanes if lane.pool.is_due]
        if due:
            with self._ahead.paused(), phases.of("harvesting", total=sum(lane.pool.room for lane in due)):
                for lane in due:
                    lane.refill(self.scaling, self._dtype, phases)
                self._check_supply()

    def fills_soon(self) -> bool:
        return any(lane.pool.is_due_soon for lane in self._lanes)

    def quiet(self) -> AbstractContextManager[None]:
        return self._ahead.paused()

    def beside_seconds(self) -> float:
        return self._ahead.seconds - self._ahead.blocked

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
        with self._ahead.paused():
            self._set_scaling(Scaling.from_state(replicated, device=self._ranks.device))
            for lane in self._lanes:
                lane.load_state(lane_state(lane.text.index))

    def dropped_share(self) -> float:
        counts = torch.tensor([[lane.seen, lane.dropped] for lane in self._lanes], device=self._ranks.device)
        seen, dropped = map(int, self._ranks.sum(counts.sum(0)))
        return dropped / max(1, seen)

    def notices(self) -> list[str]:
        return self._corpus.notices(self._flaws())

    def data_figures(self) -> dict[str, int]:
        return self._corpus.counts(self._flaws())

    def figures(self) -> dict[str, float]:
        """Return how often the slowest lane has read its text, and how much further the fastest is."""
        own = torch.tensor([lane.epochs for lane in self._lanes], dtype=torch.float64, device=self._ranks.device)
        epochs = self._ranks.gather(own).flatten()
        return {"data/epochs": float(epochs.min()), "data/epoch_spread": float(epochs.max() - epochs.min())}

    def _flaws(self) -> Tensor:
        """Return the flaws of all documents that any rank has met: a document has one flaw, whoever meets it."""
        return self._ranks.max(self._corpus.flaw_N.to(self._ranks.device)).cpu()

    def close(self) -> None:
        self._ahead.close()
        self._lanes.clear()

    def _find_work(self) -> Callable[[], None] | None:
        """Return the forward pass of the lane that needs one first, if a refill to come has use for any."""
        limits = {
            "most_rows": self._prefetch * self._share,
            "last_row": whole_batches(self._config) // self._sizes.lanes,
        }
        wanting = [lane for lane in self._lanes if lane.wants_more(**limits)]
        if not wanting:
            return None
        return partial(min(wanting, key=lambda lane: lane.in_hand).work_ahead, self.scaling, self._dtype)

    def _set_scaling(self, scaling: Scaling) -> None:
        self.scaling = replace(scaling, centre_D=scaling.centre_D.to(self._ranks.device))
        self.held_out.limit = scaling.limit

    def _calibration_blocks(self, lane: LiveLane, quota: int, phases: Phases) -> list[Block]:
        blocks: list[Block] = []
        there = 0
        while there < quota:
            block = lane.forward()
            if block is None:
                raise DataError(f"data.repeat=false: lane {lane.text.index} ends before its {quota} calibration "
                                "tokens. Lower harvest.calibration_tokens or harvest.lanes.")  # fmt: skip
            blocks.append(block)
            before, there = there, there + len(block.raw_NW)
            phases.advance(min(there, quota) - before)
        return blocks

    def _check_supply(self) -> None:
        """With `data.repeat` off, stop as soon as a lane is known to end before the run does."""
        if self._config.data.repeat:
            return
        needed = whole_batches(self._config) // self._sizes.lanes
        if all(lane.pool.taken + lane.pool.unread >= needed or not lane.has_ended for lane in self._lanes):
            return
        supply = min(lane.pool.taken + lane.pool.unread + lane.remaining_tokens() for lane in self._lanes)
        there = supply // self._share * self._config.batch_tokens
        raise DataError(f"data.repeat=false: the corpus gives {there} tokens with harvest.lanes={self._sizes.lanes}, "
                        f"and tokens={self._config.tokens}. Lower tokens, or set data.repeat=true.")  # fmt: skip
