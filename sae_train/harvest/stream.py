"""The way in: what a stream will be (`check_stream`, before weights) and the stream itself (`build_stream`)."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch

from sae_train.config import LiveHarvestConfig, RunConfig, TensorsHarvestConfig
from sae_train.errors import ConfigError, UserError
from sae_train.harvest.lanes import check_lanes
from sae_train.harvest.language_model import Tokenizer
from sae_train.harvest.live import LiveStream
from sae_train.harvest.sites import SiteFacts, site_facts
from sae_train.harvest.source import Stream, StreamFacts, run_dtype
from sae_train.harvest.tensors import TensorStream, plan_rows
from sae_train.harvest.text import Corpus, check_data, is_local
from sae_train.place import find_place
from sae_train.ranks import Ranks

__all__ = ["Stream", "StreamFacts", "build_stream", "check_stream"]

T = TypeVar("T")
_USABLE_MEMORY = 0.8
"""Share of a machine's or accelerator's memory that pools may take."""


def build_stream(config: RunConfig, *, ranks: Ranks, dtype: torch.dtype) -> Stream:
    """Open data and language model; nothing is harvested before `start` or `restore`.

    Args:
        config: the run.
        ranks: who reads which lanes.
        dtype: of pools and batches: float64 under precision=float64, else fp32.

    Raises:
        ConfigError, DataError: see `check_stream`.
    """
    assert dtype == run_dtype(config.precision)
    if isinstance(config.harvest, TensorsHarvestConfig):
        return TensorStream(config, ranks=ranks)
    return LiveStream(config, ranks=ranks)


def check_stream(config: RunConfig, *, n_ranks: int) -> StreamFacts:
    """Check all that can be checked without weights and before heavy work, and return what is then known.

    Raises:
        ConfigError, DataError: with every independent finding, one a line.
    """
    if isinstance(config.harvest, TensorsHarvestConfig):
        return _check_tensors(config, n_ranks=n_ranks)
    assert isinstance(config.harvest, LiveHarvestConfig)
    return _check_live(config, config.harvest, n_ranks=n_ranks)


def _check_tensors(config: RunConfig, *, n_ranks: int) -> StreamFacts:
    assert isinstance(config.harvest, TensorsHarvestConfig)
    findings: list[UserError] = []
    _collect(findings, lambda: _check_batch(config.batch_tokens, n_ranks))
    plan = _collect(findings, lambda: plan_rows(config))
    _raise(findings)
    assert plan is not None
    record: dict[str, str | int | None] = {"data": config.harvest.path, "rows": plan.n_training}
    return StreamFacts(d_model=plan.d_model, label="tensors", n_blocks=None, pool_bytes=0, flops_per_token=0,
                       record=record)  # fmt: skip


def _check_live(config: RunConfig, harvest: LiveHarvestConfig, *, n_ranks: int) -> StreamFacts:
    findings: list[UserError] = []
    _collect(findings, lambda: _check_lanes(harvest.lanes, n_ranks, config.batch_tokens))
    _collect(findings, lambda: _check_pool_holds_forwards(config, harvest))
    facts = _collect(findings, lambda: site_facts(config))
    if facts is not None:
        _collect(findings, lambda: _check_positions(config, harvest, facts))
        _collect(findings, lambda: _check_memory(config, harvest, facts.d_model, n_ranks))
        _collect(findings, lambda: _check_text(config, harvest, n_ranks))
    else:
        _collect(findings, lambda: _check_text_only(config, harvest))
    _raise(findings)
    assert facts is not None
    record: dict[str, str | int | None] = {
        "model": config.model.id,
        "revision": facts.revision or config.model.revision,
        "site": facts.label,
        "module": facts.module,
        "side": facts.side,
        "data": config.data.id,
    }
    return StreamFacts(d_model=facts.d_model, label=f"{config.model.name}.{facts.label}", n_blocks=facts.n_blocks,
                       pool_bytes=_pool_bytes(config, harvest, facts.d_model), record=record,
                       flops_per_token=facts.flops_per_token)  # fmt: skip


def _check_batch(batch_tokens: int, n_ranks: int) -> None:
    if batch_tokens % n_ranks:
        nearest = sorted({max(1, batch_tokens // n_ranks) * n_ranks, (batch_tokens // n_ranks + 1) * n_ranks})
        raise ConfigError(f"batch_tokens={batch_tokens} over {n_ranks} ranks: not divisible. "
                          f"Nearest batch_tokens: {' or '.join(map(str, nearest))}. "
                          f"{_other_ranks(batch_tokens, n_ranks)}")  # fmt: skip


def _check_lanes(lanes: int, n_ranks: int, batch_tokens: int) -> None:
    if lanes % n_ranks == 0:
        return
    possible = [count for count in range(n_ranks, batch_tokens + 1, n_ranks) if batch_tokens % count == 0]
    nearest = sorted(sorted(possible, key=lambda count: abs(count - lanes))[:2])
    if nearest:
        way_out = f"Nearest harvest.lanes that divide batch_tokens={batch_tokens}: {' or '.join(map(str, nearest))}."
    else:
        way_out = f"No multiple divides batch_tokens={batch_tokens}."
    raise ConfigError(
        f"harvest.lanes={lanes} over {n_ranks} ranks: not divisible. {way_out} {_other_ranks(lanes, n_ranks)}"
    )


def _other_ranks(n: int, n_ranks: int) -> str:
    """Return which numbers of ranks divide `n`: all that a run may change that has begun."""
    below = max(count for count in range(1, n_ranks) if n % count == 0)
    above = next((count for count in range(n_ranks + 1, n + 1) if n % count == 0), None)
    return f"A run that has begun keeps its settings: go on with {below}{f' or {above}' if above else ''} ranks."


def _check_pool_holds_forwards(config: RunConfig, harvest: LiveHarvestConfig) -> None:
    """One forward pass must fit whenever a lane's pool is half empty, or a refill could add nothing."""
    share = config.batch_tokens // harvest.lanes
    forward, capacity = harvest.contexts_per_forward * harvest.context_length, harvest.pool_batches * share
    if 2 * forward > capacity:
        contexts = capacity // (2 * harvest.context_length)
        fewer = f"lower harvest.contexts_per_forward to {contexts}, or " if contexts else ""
        raise ConfigError(
            f"harvest.pool_batches={harvest.pool_batches}: a lane's pool holds {capacity} tokens, and half of it must "
            f"hold one forward pass of {forward} (contexts_per_forward x context_length). {fewer.capitalize()}"
            f"{'raise' if fewer else 'Raise'} harvest.pool_batches to {-(-2 * forward // share)}."
        )


def _check_positions(config: RunConfig, harvest: LiveHarvestConfig, facts: SiteFacts) -> None:
    if facts.max_positions is not None and harvest.context_length > facts.max_positions:
        raise ConfigError(f"harvest.context_length={harvest.context_length}: {config.model.id} takes at most "
                          f"{facts.max_positions} positions. Lower it.")  # fmt: skip


def _pool_bytes(config: RunConfig, harvest: LiveHarvestConfig, d_model: int) -> int:
    """Return the bytes of all pools, and of the calibration tokens that are held beside them at the start."""
    row = d_model * (8 if config.precision == "float64" else 4)
    raw = d_model * (4 if config.model.dtype == "float32" else 2)
    return harvest.pool_batches * config.batch_tokens * row + harvest.calibration_tokens * raw


def _check_memory(config: RunConfig, harvest: LiveHarvestConfig, d_model: int, n_ranks: int) -> None:
    local_ranks = min(n_ranks, find_place().local_size)
    cuda = torch.cuda.is_available()
    memory = _cuda_memory() if cuda else _host_memory()
    share = 1 / n_ranks if cuda else local_ranks / n_ranks
    needed, usable = _pool_bytes(config, harvest, d_model) * share, _USABLE_MEMORY * memory
    if needed > usable:
        batch = config.batch_tokens * d_model * (8 if config.precision == "float64" else 4) * share
        fits = int(harvest.pool_batches - (needed - usable) / batch)
        way_out = (f"Largest that fits: {fits}." if fits >= 2 else
                   "Lower batch_tokens or harvest.calibration_tokens, or use more ranks.")  # fmt: skip
        raise ConfigError(f"harvest.pool_batches={harvest.pool_batches}: pools of {needed / 1e9:.1f} GB do not fit "
                          f"{usable / 1e9:.1f} GB of usable memory. {way_out}")  # fmt: skip


def _cuda_memory() -> int:
    return torch.cuda.get_device_properties(find_place().local_rank).total_memory


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_text(config: RunConfig, harvest: LiveHarvestConfig, n_ranks: int) -> None:
    """Open local text and see that every lane has a context; of hub data, see that it exists."""
    if not is_local(config.data):
        check_data(config.data)
        return
    check_lanes(Corpus(config.data, lanes=harvest.lanes), Tokenizer(config.model), lanes=harvest.lanes,
                context_length=harvest.context_length, batch_tokens=config.batch_tokens, n_ranks=n_ranks)  # fmt: skip


def _check_text_only(config: RunConfig, harvest: LiveHarvestConfig) -> None:
    """As far as text can be checked when the model, and so its tokenizer, is not there."""
    if is_local(config.data):
        Corpus(config.data, lanes=harvest.lanes)
    else:
        check_data(config.data)


def _collect(findings: list[UserError], check: Callable[[], T]) -> T | None:
    try:
        return check()
    except UserError as error:
        findings.append(error)
        return None


def _raise(findings: list[UserError]) -> None:
    if len(findings) == 1:
        raise findings[0]
    if findings:
        raise ConfigError("\n".join(map(str, findings))) from findings[0]
