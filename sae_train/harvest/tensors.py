"""`harvest=tensors`: train on ready-made activations, epoch after epoch, in an order keyed by (data.seed, epoch).

What is kept out of training: held-out rows, and rows whose norm is over the outlier limit. One scan at the start
finds those, and refuses rows that are not finite. Gradients are read with the rows that are trained on, and with no
others. Letters: N tokens in a batch, D d_model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sae_train.config import RunConfig, TensorsHarvestConfig
from sae_train.config.source import HELD_OUT_BLOCK
from sae_train.errors import DataError
from sae_train.harvest.held_out import HALVES, Half, HeldOut, HeldOutBatch
from sae_train.harvest.prefetch import Ahead, Outcome
from sae_train.harvest.scaling import Scaling, fit_scaling, row_norms
from sae_train.harvest.stream import Stream, prefetch_of, run_dtype, whole_batches
from sae_train.harvest.tensor_files import TensorTable, read_headers
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks, Solo
from sae_train.sae.random import keyed_order

HELD_OUT_SHARE = 0.05
MOST_HELD_OUT = 100_000
NOTED_ZERO_SHARE = 0.01
"""Share of all-zero rows from which on the user is told."""
BLOCK_ROWS = HELD_OUT_BLOCK
"""Rows that count as one context: neighbours in a file are rarely independent."""
_BLOCKS_A_BATCH = 16
_ROWS_A_READ = 4096
"""Calibration rows that are read between two looks at whether the run was told to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """Which rows are for what."""

    d_model: int
    n_training: int
    """Rows 0..n_training-1 of harvest.path are trained on."""
    n_held_out: int
    """Held-out rows: those after, or all of harvest.held_out."""


def plan_rows(config: RunConfig) -> RowPlan:
    """Split the rows from the files' headers alone.

    Raises:
        DataError: unusable files, too few rows to hold any out, or fewer than `tokens` with data.repeat=false.
    """
    harvest = config.harvest
    assert isinstance(harvest, TensorsHarvestConfig)
    facts = read_headers(harvest.path, key="harvest.path", gradients=config.reads_gradients)
    d_model, n_rows = facts[0].d_model, sum(fact.n_rows for fact in facts)
    if harvest.held_out is None:
        n_held_out = min(int(HELD_OUT_SHARE * n_rows), MOST_HELD_OUT)
        n_training = n_rows - n_held_out
        if n_held_out <= BLOCK_ROWS:
            least = int((BLOCK_ROWS + 1) / HELD_OUT_SHARE)
            raise DataError(f"harvest.path={harvest.path}: {n_rows} rows; the last 5% are held out, and must be more "
                            f"than {BLOCK_ROWS}. Give at least {least} rows, or harvest.held_out=DIR.")  # fmt: skip
    else:
        held_out = read_headers(harvest.held_out, key="harvest.held_out")
        n_training, n_held_out = n_rows, sum(fact.n_rows for fact in held_out)
        _check_held_out(harvest, d_model, held_out[0].d_model, n_held_out)
    if not config.data.repeat and whole_batches(config) > n_training:
        raise DataError(f"data.repeat=false: harvest.path={harvest.path} holds {n_training} rows to train on, and "
                        f"tokens={config.tokens} is {whole_batches(config)} in whole batches. Lower tokens, or set "
                        "data.repeat=true.")  # fmt: skip
    return RowPlan(d_model=d_model, n_training=n_training, n_held_out=n_held_out)


def _check_held_out(harvest: TensorsHarvestConfig, d_model: int, width: int, n_held_out: int) -> None:
    if width != d_model:
        raise DataError(f"harvest.held_out={harvest.held_out}: {width} columns, but harvest.path has {d_model}. "
                        "Both must come from one site.")  # fmt: skip
    if n_held_out <= BLOCK_ROWS:
        raise DataError(f"harvest.held_out={harvest.held_out}: {n_held_out} rows. Give more than {BLOCK_ROWS}: "
                        "one half sets thresholds while the other is evaluated.")  # fmt: skip


class TensorStream(Stream):
    """See `Stream`; any rank can read any row, so there are no lanes to save."""

    def __init__(self, config: RunConfig, *, ranks: Ranks) -> None:
        harvest = config.harvest
        assert isinstance(harvest, TensorsHarvestConfig)
        self._config, self._ranks, self._harvest = config, ranks, harvest
        self._plan = plan_rows(config)
        self.d_model = self._plan.d_model
        self.language_model = None
        dtype = run_dtype(config.precision)
        plain = TensorTable(harvest.path, key="harvest.path", dtype=dtype)
        self._table = plain
        if config.reads_gradients:
            self._table = TensorTable(harvest.path, key="harvest.path", dtype=dtype, gradients=True)
        if harvest.held_out is None:
            held_out, first = plain, self._plan.n_training
        else:
            held_out, first = TensorTable(harvest.held_out, key="harvest.held_out", dtype=dtype), 0
        self.held_out = self._held_out = TensorHeldOut(held_out, first=first, ranks=ranks)
        self._outliers = torch.empty(0, dtype=torch.int64)
        self._n_zero = 0
        self._epochs: dict[int, Tensor] = {}
        self._prefetch = prefetch_of(config)
        self._early: dict[int, Outcome[Tensor]] = {}
        self._next_step = 0
        self._ahead = Ahead(self._find_work, is_on=self._prefetch > 0, device=ranks.device, threads=1)

    def start(self, phases: Phases = SILENT) -> None:
        calibration = self._draw(0)[: self._harvest.calibration_tokens]
        site = f"harvest.path={self._harvest.path}"
        rows_NW = self._read_calibration(calibration, phases)
        _refuse_bad(rows_NW, calibration, self._table)
        whole, *gradients = rows_NW.to(self._ranks.device).split(self.d_model, dim=1)
        alone = Solo(self._ranks.device)  # the same rows on every rank: nothing to gather
        self._set_scaling(fit_scaling([whole], ranks=alone, site=site, gradients=gradients or None))
        phases.meet()
        self._outliers, self._n_zero = self._scan(phases)
        phases.meet()
        self._check_supply()

    def _read_calibration(self, index_N: Tensor, phases: Phases) -> Tensor:
        parts = []
        with phases.of("calibrating scale and centre", total=len(index_N), unit="row"):
            for part_N in index_N.split(_ROWS_A_READ):
                parts.append(self._table.rows(part_N))
                phases.advance(len(part_N))
        return torch.cat(parts)

    def batch(self, step: int) -> Tensor:
        batch_NW = None
        if step not in self._early:
            with self._ahead.paused():  # the piece under way may be this very step
                if step not in self._early:
                    batch_NW = self._read(step)
        with self._ahead.changing():
            if batch_NW is None:
                batch_NW = self._early[step].get()
            self._early = {later: batch for later, batch in self._early.items() if later > step}
            self._next_step = max(self._early, default=step) + 1
        return batch_NW

    def _read(self, step: int) -> Tensor:
        n_local = self._config.batch_tokens // self._ranks.size
        first = step * self._config.batch_tokens + self._ranks.rank * n_local
        index_N = self._indices(first, first + n_local)
        if self._ranks.device.type == "cpu":
            return self.scaling.normalise_rows(self._table.halves, index_N, dtype=self._table.dtype)
        rows_NW = self._table.rows(index_N)
        return self.scaling.normalise(rows_NW.to(self._ranks.device))

    def _find_work(self) -> Callable[[], None] | None:
        """Return the reading of the next batch that is not there, if it may be ahead and the run has it."""
        steps = whole_batches(self._config) // self._config.batch_tokens
        wanted = len(self._early) < self._prefetch and self._next_step < steps
        return partial(self._work_ahead, self._next_step) if wanted else None

    def _work_ahead(self, step: int) -> None:
        outcome = Outcome(partial(self._read, step))
        with self._ahead.changing():
            self._early[step], self._next_step = outcome, step + 1

    def beside_seconds(self) -> float:
        return self._ahead.seconds - self._ahead.blocked

    def close(self) -> None:
        self._ahead.close()

    def fingerprint(self) -> list[int]:
        return self._table.fingerprint()

    def replicated_state(self) -> dict[str, Tensor]:
        files = torch.tensor(self.fingerprint())
        zero = torch.tensor(self._n_zero)
        return {**self.scaling.state(), "outliers": self._outliers, "zero_rows": zero, "files": files}

    def lane_states(self) -> dict[int, dict[str, Tensor]]:
        return {}

    def restore(self, replicated: dict[str, Tensor], lane_state: Callable[[int], dict[str, Tensor]]) -> None:
        if replicated["files"].tolist() != self.fingerprint():
            raise DataError(f"harvest.path={self._harvest.path}: not the files that the checkpoint was made from. "
                            "Put the old ones back, or start a new run with another name.")  # fmt: skip
        self._set_scaling(Scaling.from_state(replicated, device=self._ranks.device))
        self._outliers = replicated["outliers"]
        self._n_zero = int(replicated.get("zero_rows", 0))  # checkpoints before 0.1.0 lack it
        self._epochs.clear()

    def notices(self) -> list[str]:
        share = self._n_zero / self._plan.n_training
        if share < NOTED_ZERO_SHARE:
            return []
        return [f"harvest.path={self._harvest.path}: {self._n_zero:,} of {self._plan.n_training:,} rows to train on "
                f"({share:.1%}) are all zero, and are trained on. Leave them out where they are padding."]  # fmt: skip

    def data_figures(self) -> dict[str, int]:
        return {"rows": self._plan.n_training, "zero_rows": self._n_zero, "outliers": len(self._outliers)}

    def dropped_share(self) -> float:
        return len(self._outliers) / self._plan.n_training

    def _set_scaling(self, scaling: Scaling) -> None:
        self.scaling = scaling
        self.held_out.limit = scaling.limit

    def _draw(self, epoch: int) -> Tensor:
        return keyed_order(self._plan.n_training, self._config.data.seed, "tensors", epoch)

    def _epoch(self, epoch: int) -> Tensor:
        """Return the epoch's order of kept rows; the last two drawn are remembered."""
        if epoch not in self._epochs:
            self._epochs = {known: order for known, order in self._epochs.items() if known == epoch - 1}
            order = self._draw(epoch)
            keep = torch.ones(self._plan.n_training, dtype=torch.bool)
            keep[self._outliers] = False
            self._epochs[epoch] = order[keep[order]] if len(self._outliers) else order
        return self._epochs[epoch]

    def _indices(self, first: int, stop: int) -> Tensor:
        """Return the table's rows at positions first..stop of the stream, over epoch boundaries."""
        n_kept = self._plan.n_training - len(self._outliers)
        parts = []
        while first < stop:
            epoch, offset = divmod(first, n_kept)
            part = self._epoch(epoch)[offset : offset + stop - first]
            parts.append(part)
            first += len(part)
        return torch.cat(parts)

    def _scan(self, phases: Phases) -> tuple[Tensor, int]:
        """Return the training rows over the outlier limit, and how many are all zero; every rank reads its share.

        Raises:
            DataError: a row is not finite, in training or held-out data; the same on every rank.
        """
        table, start = self._held_out.table, self._held_out.first
        n_training, limit = self._plan.n_training, self.scaling.limit
        n_rows = n_training + table.n_rows - start
        with phases.of("reading norms", total=n_rows // self._ranks.size, unit="row"):
            outliers, bad, n_zero = _scan_rows(self._table, n_training, limit, self._ranks, phases)
            _, bad_held_out, _ = _scan_rows(table, table.n_rows, limit, self._ranks, phases, start=start)
        if bad is not None:
            raise _not_finite(self._table, bad)
        if bad_held_out is not None:
            raise _not_finite(table, bad_held_out)
        return outliers, n_zero

    def _check_supply(self) -> None:
        n_kept = self._plan.n_training - len(self._outliers)
        if not self._config.data.repeat and whole_batches(self._config) > n_kept:
            raise DataError(f"data.repeat=false: {n_kept} rows are left to train on without the {len(self._outliers)} "
                            f"of outlying norm, and tokens={self._config.tokens} is {whole_batches(self._config)} in "
                            "whole batches. Lower tokens, or set data.repeat=true.")  # fmt: skip


class TensorHeldOut(HeldOut):
    """Rows `first` and on of a table, in blocks of 256 that count as contexts."""

    def __init__(self, table: TensorTable, *, first: int, ranks: Ranks) -> None:
        self.table, self.first = table, first
        self._ranks = ranks

    def batches(self, half: Half, *, max_tokens: int, with_logits: bool = False) -> Iterator[HeldOutBatch]:
        blocks = self._blocks(half, max_tokens)
        for number, start in enumerate(range(0, len(blocks), _BLOCKS_A_BATCH)):
            if number % self._ranks.size == self._ranks.rank:
                yield self._read(blocks[start : start + _BLOCKS_A_BATCH])

    def n_tokens(self, half: Half, *, max_tokens: int) -> int:
        return len(self._rows_of(self._blocks(half, max_tokens)))

    def _blocks(self, half: Half, max_tokens: int) -> range:
        n_blocks = -(-(self.table.n_rows - self.first) // BLOCK_ROWS)
        return range(HALVES.index(half), n_blocks, 2)[: -(-max_tokens // BLOCK_ROWS)]

    def _rows_of(self, blocks: range) -> Tensor:
        index_N = (torch.tensor(blocks)[:, None] * BLOCK_ROWS + torch.arange(BLOCK_ROWS)).flatten()
        return index_N[index_N < self.table.n_rows - self.first]

    def _read(self, blocks: range) -> HeldOutBatch:
        index_N = self._rows_of(blocks)
        raw_ND = self.table.rows(index_N + self.first).to(self._ranks.device)
        kept = row_norms(raw_ND) <= self.limit
        context_N = (index_N // BLOCK_ROWS).to(raw_ND.device)[kept]
        return HeldOutBatch(raw_ND=raw_ND[kept].float(), context_N=context_N, ids_BT=None, kept_BT=None)


def _scan_rows(
    table: TensorTable, stop: int, limit: float, ranks: Ranks, phases: Phases, *, start: int = 0
) -> tuple[Tensor, int | None, int]:
    """Return the rows of start..stop over the limit, the first that is not finite, and how many are all zero.

    The same on every rank; after a row that is not finite nothing is counted.
    """
    size = -(-(stop - start) // ranks.size)
    mine = start + ranks.rank * size
    found = [torch.empty(0, dtype=torch.int64)]
    bad, n_zero = stop, 0
    for first, (rows_ND, *gradients) in table.spans(mine, min(mine + size, stop)):
        norms = row_norms(rows_ND)
        over = (~(norms <= limit)).nonzero()[:, 0]
        finite = torch.isfinite(rows_ND[over]).all(dim=1)
        not_finite = [over[~finite], *((~torch.isfinite(each).all(dim=1)).nonzero()[:, 0] for each in gradients)]
        if any(map(len, not_finite)):
            bad = min(bad, first + int(torch.cat(not_finite).min()))
            break
        found.append(first + over)
        n_zero += int((norms == 0).sum())
        phases.advance(len(rows_ND))
    firsts = ranks.gather(torch.tensor([bad], device=ranks.device))
    outliers = ranks.gather_rows(torch.cat(found).to(ranks.device)).cpu()
    n_zero = int(ranks.sum(torch.tensor(n_zero, device=ranks.device)))
    return outliers, None if int(firsts.min()) == stop else int(firsts.min()), n_zero


def _refuse_bad(rows_NW: Tensor, index_N: Tensor, table: TensorTable) -> None:
    finite = torch.isfinite(rows_NW).all(dim=1)
    if not finite.all():
        raise _not_finite(table, int(index_N[~finite].min()))


def _not_finite(table: TensorTable, row: int) -> DataError:
    return DataError(f"{table.place(row)}: not finite (NaN or infinite). Remove such rows, or harvest again in "
                     "float32 or bfloat16.")  # fmt: skip
