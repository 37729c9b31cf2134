"""The way in: the facts of a stream before weights are loaded (`check_stream`), and the stream (`build_stream`).

Modules that need transformers are imported only where activations come from a language model. Their import takes longer
than a short run.
"""

from sae_train.config.source import SourceConfig
from sae_train.harvest.checks import Findings, check_batch
from sae_train.harvest.row_plan import RowPlan, plan_rows
from sae_train.harvest.stream import Stream, StreamFacts, StreamSite, prefetch_of, row_bytes, whole_batches
from sae_train.harvest.tensors import TENSORS, TensorStream
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks

__all__ = ["Stream", "StreamFacts", "StreamSite", "build_stream", "check_stream"]


def check_stream(source: SourceConfig, *, n_ranks: int, phases: Phases = SILENT) -> StreamFacts:
    """Return the facts of a stream, after every check that needs neither weights nor heavy work.

    Raises:
        ConfigError, DataError: with every independent finding, one a line.
    """
    if source.harvest.runs_model:
        from sae_train.harvest.live_checks import check_live

        return check_live(source, n_ranks=n_ranks, phases=phases)
    return _check_tensors(source, n_ranks=n_ranks)


def build_stream(
    source: SourceConfig, *, ranks: Ranks, phases: Phases = SILENT, facts: StreamFacts | None = None
) -> Stream:
    """Return a stream whose data and language model are open. It harvests nothing before `start` or `restore`.

    Args:
        source: the settings of the stream.
        ranks: the ranks that share the lanes.
        phases: shows the progress.
        facts: from `check_stream` of the same settings; the stream continues with the parts that it opened. None:
            check now.

    Raises:
        ConfigError, DataError: see `check_stream`.
    """
    facts = facts or check_stream(source, n_ranks=ranks.size, phases=phases)
    if isinstance(facts.opened, RowPlan):
        return TensorStream(source, facts.opened, ranks=ranks)
    from sae_train.harvest.live import LiveStream

    assert facts.opened is not None
    return LiveStream(source, facts.opened, ranks=ranks, phases=phases)


def _check_tensors(source: SourceConfig, *, n_ranks: int) -> StreamFacts:
    findings = Findings()
    findings.collect(lambda: check_batch(source.batch_tokens, n_ranks))
    plan = findings.collect(lambda: plan_rows(source))
    findings.raise_any()
    assert plan is not None
    prefetch = prefetch_of(source)
    steps = whole_batches(source) // source.batch_tokens
    return StreamFacts(
        sites=(StreamSite(label=TENSORS, d_model=plan.d_model, layer=None, record={}),),
        name=TENSORS,
        pool_bytes=0,
        flops_per_token=0,
        record={"data": source.tensors.path, "rows": plan.n_training},
        prefetch=prefetch,
        ahead_bytes=min(prefetch, steps) * source.batch_tokens * row_bytes(source, plan.d_model),
        opened=plan,
    )
