"""`harvest=tensors`: train on ready-made activations, epoch after epoch, in an order keyed by (data.seed, epoch).

Held-out rows and rows over the outlier limit are not trained on. One scan at the start finds the rows over the limit,
and refuses rows that are not finite. Gradients are read only for rows that are trained on.
Letters: N tokens in a batch, D d_model.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sae_train.config.source import SourceConfig
from sae_train.errors import DataError
from sae_train.harvest.batch import Batch
from sae_train.harvest.held_out import TensorHeldOut
from sae_train.harvest.meter import Meter
from sae_train.harvest.prefetch import Prefetcher, Result
from sae_train.harvest.row_plan import RowPlan
from sae_train.harvest.scaling import Scaling, fit_scaling, from_states, states_of
from sae_train.harvest.stream import Stream, prefetch_of, run_dtype, whole_batches
from sae_train.harvest.tensor_files import TensorTable
from sae_train.harvest.tensor_scan import refuse_broken, scan_rows
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks, Solo
from sae_train.sae.random import keyed_order

TENSORS = "tensors"
"""Label of the one site that files have."""
NOTED_ZERO_SHARE = 0.01
"""Share of all-zero rows from which on a notice is shown."""
_ROWS_A_READ = 4096
"""Calibration rows that are read between two checks for a signal to stop."""


class TensorStream(Stream):
    """Ready-made activations; see `Stream`. `build_stream` creates it.

    Any rank can read any row, so there are no lanes to save.
    """

    def __init__(self, source: SourceConfig, plan: RowPlan, *, ranks: Ranks) -> None:
        self._source, self._ranks, self._harvest = source, ranks, source.tensors
        self._plan, self.language_model, self.meter = plan, None, Meter()
        dtype = run_dtype(source.precision)
        self._table = TensorTable(plan.files, dtype=dtype, gradients=source.reads_gradients)
        first = plan.n_training if plan.held_out_files is None else 0
        held_out = TensorTable(plan.held_out_files or plan.files, dtype=dtype)
        self.held_out = self._held_out = TensorHeldOut(held_out, first=first, site=TENSORS)
        self._outliers = torch.empty(0, dtype=torch.int64)
        self._n_zero = 0
        self._epochs: dict[int, Tensor] = {}
        self._prefetch = prefetch_of(source)
        self._early: dict[int, Result[Batch]] = {}
        self._next_step = 0
        self._prefetcher = Prefetcher(self._find_work, is_on=self._prefetch > 0, device=ranks.device, threads=1)

    def start(self, phases: Phases = SILENT) -> None:
        index_N = self._draw(0)[: self._harvest.calibration_tokens]
        site = f"harvest.path={self._harvest.path}"
        raw_ND, gradient_ND = self._read_calibration(index_N, phases)
        refuse_broken(raw_ND, gradient_ND, index_N, self._table)
        device = self._ranks.device
        gradients = None if gradient_ND is None else [gradient_ND.to(device)]
        alone = Solo(device)  # every rank reads the same rows, so there is nothing to gather
        self._set_scaling(fit_scaling([raw_ND.to(device)], ranks=alone, site=site, gradients=gradients))
        phases.meet()
        self._outliers, self._n_zero = self._scan(phases)
        phases.meet()
        self._check_supply()

    def _read_calibration(self, index_N: Tensor, phases: Phases) -> tuple[Tensor, Tensor | None]:
        """Return activations and gradients of rows, a part at a time."""
        rows, gradients = [], []
        with phases.of("calibrating scale and centre", total=len(index_N), unit="row"):
            for part_N in index_N.split(_ROWS_A_READ):
                rows.append(self._table.rows(part_N))
                gradient_ND = self._table.gradient_rows(part_N)
                gradients += [] if gradient_ND is None else [gradient_ND]
                phases.advance(len(part_N))
        return torch.cat(rows), torch.cat(gradients) if gradients else None

    def batch(self, step: int) -> dict[str, Batch]:
        batch = None
        if step not in self._early:
            with self._prefetcher.paused():  # the work in progress may be this very step
                if step not in self._early:
                    batch = self._read(step)
        with self._prefetcher.changing():
            if batch is None:
                batch = self._early[step].get()
            self._early = {later: early for later, early in self._early.items() if later > step}
            self._next_step = max(self._early, default=step) + 1
        return {TENSORS: batch}

    def _read(self, step: int) -> Batch:
        n_local = self._source.batch_tokens // self._ranks.size
        first = step * self._source.batch_tokens + self._ranks.rank * n_local
        with self.meter.timed("read", n_local):
            index_N, device = self._indices(first, first + n_local), self._ranks.device
            raw_ND, gradient_ND = self._table.rows(index_N), self._table.gradient_rows(index_N)
            return self._scaling.normalise(raw_ND.to(device), None if gradient_ND is None else gradient_ND.to(device))

    def _find_work(self) -> Callable[[], None] | None:
        """Return the work that reads the next missing batch, or None where enough batches are there."""
        steps = whole_batches(self._source) // self._source.batch_tokens
        wanted = len(self._early) < self._prefetch and self._next_step < steps
        return partial(self._work_ahead, self._next_step) if wanted else None

    def _work_ahead(self, step: int) -> None:
        result = Result(partial(self._read, step))
        with self._prefetcher.changing():
            self._early[step], self._next_step = result, step + 1

    def beside_seconds(self) -> float:
        return self._prefetcher.seconds - self._prefetcher.blocked

    def close(self) -> None:
        self._prefetcher.close()

    def fingerprint(self) -> list[int]:
        return self._table.fingerprint()

    def replicated_state(self) -> dict[str, Tensor]:
        files = torch.tensor(self.fingerprint())
        zero = torch.tensor(self._n_zero)
        return {**states_of(self.scalings), "outliers": self._outliers, "zero_rows": zero, "files": files}

    def lane_states(self) -> dict[int, dict[str, Tensor]]:
        return {}

    def restore(self, replicated: dict[str, Tensor], lane_state: Callable[[int], dict[str, Tensor]]) -> None:
        if replicated["files"].tolist() != self.fingerprint():
            raise DataError(f"harvest.path={self._harvest.path}: not the files that the checkpoint was made from. "
                            "Put the old ones back, or start a new run with another name.")  # fmt: skip
        self._set_scaling(from_states(replicated, [TENSORS], device=self._ranks.device)[TENSORS])
        self._outliers = replicated["outliers"]
        self._n_zero = int(replicated["zero_rows"])
        self._epochs.clear()

    def notices(self) -> list[str]:
        share = self._n_zero / self._plan.n_training
        if share < NOTED_ZERO_SHARE:
            return []
        return [f"harvest.path={self._harvest.path}: {self._n_zero:,} of {self._plan.n_training:,} rows to train on "
                f"({share:.1%}) are all zero, and are trained on. Leave them out where they are padding."]  # fmt: skip

    def data_figures(self) -> dict[str, int]:
        return {"rows": self._plan.n_training, "zero_rows": self._n_zero, "outliers": len(self._outliers)}

    def dropped_shares(self) -> dict[str, float]:
        return {TENSORS: len(self._outliers) / self._plan.n_training}

    def _set_scaling(self, scaling: Scaling) -> None:
        self._scaling, self.scalings = scaling, {TENSORS: scaling}
        self.held_out.limits = {TENSORS: scaling.limit}

    def _draw(self, epoch: int) -> Tensor:
        return keyed_order(self._plan.n_training, self._source.data.seed, "tensors", epoch)

    def _epoch(self, epoch: int) -> Tensor:
        """Return the epoch's order of kept rows. The last two orders are cached."""
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
        """Return the training rows over the outlier limit, and the number of training rows that are all zero.

        Raises:
            DataError: a row is not finite, in training or held-out data; the same on every rank.
        """
        table, start = self._held_out.table, self._held_out.first
        n_training, limit = self._plan.n_training, self._scaling.limit
        n_rows = n_training + table.n_rows - start
        with phases.of("reading norms", total=n_rows // self._ranks.size, unit="row"):
            outliers, n_zero = scan_rows(self._table, n_training, limit, self._ranks, phases)
            scan_rows(table, table.n_rows, limit, self._ranks, phases, start=start)
        return outliers, n_zero

    def _check_supply(self) -> None:
        n_kept = self._plan.n_training - len(self._outliers)
        if not self._source.data.repeat and whole_batches(self._source) > n_kept:
            raise DataError(f"data.repeat=false: {n_kept} rows are left to train on without the {len(self._outliers)} "
                            f"of outlying norm, and tokens={self._source.tokens} is {whole_batches(self._source)} in "
                            "whole batches. Lower tokens, or set data.repeat=true.")  # fmt: skip
