"""The way in: what a stream will be (`check_stream`, before weights) and the stream itself (`build_stream`).

What needs transformers is imported where activations come from a language model: it takes longer than a short run.
"""

from typing import TYPE_CHECKING

import torch

from sae_train.config import LiveHarvestConfig, RunConfig, TensorsHarvestConfig
from sae_train.harvest.findings import Findings
from sae_train.harvest.shares import check_batch
from sae_train.harvest.stream import Stream, StreamFacts, prefetch_of, row_width, run_dtype, whole_batches
from sae_train.harvest.tensors import TensorStream, plan_rows
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks

if TYPE_CHECKING:
    from sae_train.harvest.corpus import Corpus

__all__ = ["Stream", "StreamFacts", "build_stream", "check_stream"]


def build_stream(
    config: RunConfig, *, ranks: Ranks, dtype: torch.dtype, phases: Phases = SILENT, corpus: "Corpus | None" = None
) -> Stream:
    """Open data and language model; nothing is harvested before `start` or `restore`.

    Args:
        config: the run.
        ranks: who reads which lanes.
        dtype: of pools and batches: float64 under precision=float64, else fp32.
        phases: told of what takes long.
        corpus: local text that `check_stream` has opened; None: open it here.

    Raises:
        ConfigError, DataError: see `check_stream`.
    """
    assert dtype == run_dtype(config.precision)
    if isinstance(config.harvest, TensorsHarvestConfig):
        return TensorStream(config, ranks=ranks)
    from sae_train.harvest.live import LiveStream

    return LiveStream(config, ranks=ranks, phases=phases, corpus=corpus)


def check_stream(config: RunConfig, *, n_ranks: int, phases: Phases = SILENT) -> StreamFacts:
    """Check all that can be checked without weights and before heavy work, and return what is then known.

    Raises:
        ConfigError, DataError: with every independent finding, one a line.
    """
    if isinstance(config.harvest, TensorsHarvestConfig):
        return _check_tensors(config, n_ranks=n_ranks)
    assert isinstance(config.harvest, LiveHarvestConfig)
    from sae_train.harvest.live_checks import check_live

    return check_live(config, config.harvest, n_ranks=n_ranks, phases=phases)


def _check_tensors(config: RunConfig, *, n_ranks: int) -> StreamFacts:
    assert isinstance(config.harvest, TensorsHarvestConfig)
    findings = Findings()
    findings.collect(lambda: check_batch(config.batch_tokens, n_ranks))
    plan = findings.collect(lambda: plan_rows(config))
    findings.raise_any()
    assert plan is not None
    prefetch = prefetch_of(config)
    steps = whole_batches(config) // config.batch_tokens
    batch = config.batch_tokens * row_width(config, plan.d_model) * run_dtype(config.precision).itemsize
    record: dict[str, str | int | None] = {"data": config.harvest.path, "rows": plan.n_training}
    return StreamFacts(d_model=plan.d_model, label="tensors", n_blocks=None, pool_bytes=0, flops_per_token=0,
                       record=record, prefetch=prefetch, ahead_bytes=min(prefetch, steps) * batch)  # fmt: skip
