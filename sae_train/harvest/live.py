"""Activations harvested while training: lanes of text through the language model into pools.

Letters: D d_model.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sae_train.config.source import SourceConfig
from sae_train.errors import DataError
from sae_train.harvest.batch import Batch
from sae_train.harvest.corpus import Corpus
from sae_train.harvest.held_out import TextHeldOut
from sae_train.harvest.lanes import Lane, check_lanes
from sae_train.harvest.language_model import LanguageModel, Tokenizer
from sae_train.harvest.live_checks import LiveParts
from sae_train.harvest.live_lane import LiveLane
from sae_train.harvest.meter import Meter
from sae_train.harvest.pool import LanePool
from sae_train.harvest.prefetch import Prefetcher
from sae_train.harvest.raw_rows import Block, RawRows
from sae_train.harvest.scaling import Scaling, fit_scaling, from_states, states_of
from sae_train.harvest.stream import Stream, prefetch_of, run_dtype, whole_batches
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks


class LiveStream(Stream):
    """A language model that runs while training; see `Stream`.

    A rank owns lanes / ranks consecutive lanes. A background thread may run forward passes of the lanes ahead of the
    step.
    """

    language_model: LanguageModel

    def __init__(self, source: SourceConfig, parts: LiveParts, *, ranks: Ranks, phases: Phases = SILENT) -> None:
        self._source, self._ranks, self._harvest, self._sizes = source, ranks, source.live, source.lane_sizes
        self._dtype, tokenizer, self.meter = run_dtype(source.precision), parts.tokenizer, Meter()
        self._corpus = self._fetch(tokenizer, phases) if parts.corpus is None else parts.corpus
        self.data_revision = self._corpus.revision
        phases.meet()
        self.language_model = LanguageModel(source, device=ranks.device, facts=parts.model, phases=phases)
        phases.meet()
        self.held_out = TextHeldOut(
            self._corpus.held_out_parts(), language_model=self.language_model, tokenizer=tokenizer,
            context_length=self._harvest.context_length, contexts_per_batch=self._sizes.contexts_per_forward,
        )  # fmt: skip
        self._lanes = self._build_lanes(tokenizer)
        self._prefetch = prefetch_of(source)
        self._prefetcher = Prefetcher(self._find_work, is_on=self._prefetch > 0, device=ranks.device)

    def _fetch(self, tokenizer: Tokenizer, phases: Phases) -> Corpus:
        """Return a corpus of text on the hub, of which every lane has at least one context."""
        corpus = Corpus(self._source.data, phases)
        check_lanes(corpus, tokenizer, lanes=self._sizes.lanes, context_length=self._sizes.context_length,
                    batch_tokens=self._source.batch_tokens, n_ranks=self._ranks.size)  # fmt: skip
        return corpus

    def _build_lanes(self, tokenizer: Tokenizer) -> list[LiveLane]:
        """Return this rank's lanes: lanes / ranks consecutive ones."""
        source, sizes = self._source, self._sizes
        stretches = self._corpus.stretches(sizes.lanes, context_length=sizes.context_length, tokenizer=tokenizer)
        n_owned = sizes.lanes // self._ranks.size
        storage = self._empty(n_owned, sizes.capacity)
        lanes = []
        for place in range(n_owned):
            number = self._ranks.rank * n_owned + place
            text = Lane(number, stretches=stretches, corpus=self._corpus, tokenizer=tokenizer, seed=source.data.seed,
                        context_length=sizes.context_length, repeat=source.data.repeat, meter=self.meter)  # fmt: skip
            raw = RawRows(text, language_model=self.language_model, tokenizer=tokenizer,
                          contexts_per_forward=sizes.contexts_per_forward,
                          reads_gradients=source.reads_gradients, meter=self.meter)  # fmt: skip
            own = {site: rows[place] for site, rows in storage.items()}
            pool = LanePool(own, lane=number, share=sizes.share, seed=source.data.seed,
                            forward_rows=sizes.forward_tokens)  # fmt: skip
            lanes.append(LiveLane(raw, pool, meter=self.meter))
        return lanes

    def _empty(self, *shape: int) -> dict[str, Batch]:
        """Return uninitialised rows [*shape, D] of each site, for batches of this stream."""
        gradients, device = self._source.reads_gradients, self._ranks.device
        return {
            label: Batch.empty(*shape, site.d_model, gradients=gradients, dtype=self._dtype, device=device)
            for label, site in self.language_model.sites.items()
        }

    def start(self, phases: Phases = SILENT) -> None:
        """Fix the scalings from each lane's first tokens, which are also the first tokens of its pool."""
        quota = -(-self._harvest.calibration_tokens // self._sizes.lanes)
        cursors = [lane.raw.cursor() for lane in self._lanes]
        blocks = []
        with phases.of("calibrating scale and centre", total=quota * len(self._lanes)):
            for lane in self._lanes:
                blocks.append(self._calibration_blocks(lane, quota, phases))
                phases.meet()
        self._calibrate(blocks, quota)
        with phases.of("filling pools", total=sum(lane.pool.room for lane in self._lanes)):
            for lane, own, cursor in zip(self._lanes, blocks, cursors, strict=True):
                for block in own:
                    if not lane.pool.has_room:
                        break
                    lane.absorb(lane.keep(block, self.scalings, self._dtype))
                    cursor = block.cursor
                lane.go_to(cursor)
                own.clear()
                phases.count(lane.pool.unread)
                lane.refill(self.scalings, self._dtype, phases)
                phases.meet()
        self._check_supply()

    def _calibrate(self, blocks: list[list[Block]], quota: int) -> None:
        """Fix the scaling of each site from the first `quota` rows of each lane."""
        scalings = {}
        for site in self.language_model.sites:
            rows = [torch.cat([block.raw[site] for block in own])[:quota] for own in blocks]
            gradients = None
            if self._source.reads_gradients:
                gradients = [torch.cat([block.gradients[site] for block in own])[:quota] for own in blocks]
            scalings[site] = fit_scaling(rows, ranks=self._ranks, site=self.language_model.describe(site),
                                         gradients=gradients)  # fmt: skip
        self._set_scalings(scalings)

    def batch(self, step: int) -> dict[str, Batch]:
        share = self._sizes.share
        assert all(lane.pool.taken == step * share for lane in self._lanes), "steps are read in order"
        batch = self._empty(len(self._lanes) * share)
        self.fill()
        with self._prefetcher.changing(), self.meter.timed("pooled", len(self._lanes) * share):
            for place, lane in enumerate(self._lanes):
                lane.pool.take({site: rows[place * share : (place + 1) * share] for site, rows in batch.items()})
        return batch

    def fill(self, phases: Phases = SILENT) -> None:
        due = [lane for lane in self._lanes if lane.pool.is_due]
        if due:
            with self._prefetcher.paused(), phases.of("harvesting", total=sum(lane.pool.room for lane in due)):
                for lane in due:
                    lane.refill(self.scalings, self._dtype, phases)
                self._check_supply()

    def fills_soon(self) -> bool:
        return any(lane.pool.is_due_soon for lane in self._lanes)

    def quiet(self) -> AbstractContextManager[None]:
        return self._prefetcher.paused()

    def beside_seconds(self) -> float:
        return self._prefetcher.seconds - self._prefetcher.blocked

    def fingerprint(self) -> list[int]:
        return self._corpus.fingerprint()

    def replicated_state(self) -> dict[str, Tensor]:
        return {**states_of(self.scalings), "corpus": torch.tensor(self.fingerprint())}

    def lane_states(self) -> dict[int, dict[str, Tensor]]:
        return {lane.raw.lane: lane.state() for lane in self._lanes}

    def restore(self, replicated: dict[str, Tensor], lane_state: Callable[[int], dict[str, Tensor]]) -> None:
        if replicated["corpus"].tolist() != self.fingerprint():
            raise DataError(f"data.id={self._source.data.id}: not the text that the checkpoint was made from. "
                            "Put the old text back, or start a new run with another name.")  # fmt: skip
        with self._prefetcher.paused():
            self._set_scalings(from_states(replicated, self.language_model.sites, device=self._ranks.device))
            for lane in self._lanes:
                lane.load_state(lane_state(lane.raw.lane))

    def dropped_shares(self) -> dict[str, float]:
        sites = tuple(self.language_model.sites)
        counts = [[lane.seen, *(lane.dropped[site] for site in sites)] for lane in self._lanes]
        seen, *dropped = self._ranks.sum(torch.tensor(counts, device=self._ranks.device).sum(0)).tolist()
        return {site: n_rows / max(1, seen) for site, n_rows in zip(sites, dropped, strict=True)}

    def notices(self) -> list[str]:
        return self._corpus.notices(self._flaws())

    def data_figures(self) -> dict[str, int]:
        return self._corpus.counts(self._flaws())

    def figures(self) -> dict[str, float]:
        """Return the epochs that the slowest lane has read, and the distance from it to the fastest lane."""
        own = torch.tensor([lane.epochs for lane in self._lanes], dtype=torch.float64, device=self._ranks.device)
        epochs = self._ranks.gather(own).flatten()
        return {"data/epochs": float(epochs.min()), "data/epoch_spread": float(epochs.max() - epochs.min())}

    def _flaws(self) -> Tensor:
        """Return the flaws of all documents that any rank has read. All ranks find the same flaw in a document."""
        return self._ranks.max(self._corpus.flaw_N.to(self._ranks.device)).cpu()

    def close(self) -> None:
        self._prefetcher.close()
        self._lanes.clear()

    def _find_work(self) -> Callable[[], None] | None:
        """Return the work of the lane that needs a forward pass first, or None where no coming refill needs one."""
        limits = {
            "most_rows": self._prefetch * self._sizes.share,
            "last_row": whole_batches(self._source) // self._sizes.lanes,
        }
        wanting = [lane for lane in self._lanes if lane.wants_more(**limits)]
        if not wanting:
            return None
        return partial(min(wanting, key=lambda lane: lane.in_hand).work_ahead, self.scalings, self._dtype)

    def _set_scalings(self, scalings: dict[str, Scaling]) -> None:
        device = self._ranks.device
        self.scalings = {site: replace(each, centre_D=each.centre_D.to(device)) for site, each in scalings.items()}
        self.held_out.limits = {site: scaling.limit for site, scaling in scalings.items()}

    def _calibration_blocks(self, lane: LiveLane, quota: int, phases: Phases) -> list[Block]:
        blocks: list[Block] = []
        there = 0
        while there < quota:
            block = lane.raw.next()
            if block is None:
                raise DataError(f"data.repeat=false: lane {lane.raw.lane} ends before its {quota} calibration "
                                "tokens. Lower harvest.calibration_tokens or harvest.lanes.")  # fmt: skip
            blocks.append(block)
            before, there = there, there + len(block)
            phases.advance(min(there, quota) - before)
        return blocks

    def _check_supply(self) -> None:
        """With `data.repeat` off, refuse a run as soon as one of its lanes is certain to end before it."""
        if self._source.data.repeat:
            return
        needed = whole_batches(self._source) // self._sizes.lanes
        if all(lane.pool.taken + lane.pool.unread >= needed or not lane.has_ended for lane in self._lanes):
            return
        supply = min(lane.pool.taken + lane.pool.unread + lane.count_rest() for lane in self._lanes)
        there = supply // self._sizes.share * self._source.batch_tokens
        raise DataError(f"data.repeat=false: the corpus gives {there} tokens with harvest.lanes={self._sizes.lanes}, "
                        f"and tokens={self._source.tokens}. Lower tokens, or set data.repeat=true.")  # fmt: skip
