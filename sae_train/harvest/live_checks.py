"""What can be checked of harvest=live before weights are loaded: the model's configuration, memory, text."""

import os

import torch

from sae_train.config import LaneSizes, LiveHarvestConfig
from sae_train.config.source import SourceConfig
from sae_train.errors import ConfigError
from sae_train.harvest.checkpoints import check_weights
from sae_train.harvest.corpus import Corpus
from sae_train.harvest.findings import Findings
from sae_train.harvest.hub import local_path
from sae_train.harvest.lanes import check_lanes
from sae_train.harvest.language_model import Tokenizer
from sae_train.harvest.open_text import check_data, is_local
from sae_train.harvest.shares import check_lane_count
from sae_train.harvest.sites import SiteFacts, site_facts
from sae_train.harvest.stream import StreamFacts, prefetch_of, row_width
from sae_train.phases import Phases
from sae_train.ranks.launcher_env import find_place

_USABLE_MEMORY = 0.8
"""Share of a machine's or accelerator's memory that pools may take."""
_LOGITS_HELD = 4
"""Matrices of fp32 as large as a forward pass's logits that their gradient holds at most (peak memory, measured in fp32
and bf16)."""


def check_live(source: SourceConfig, harvest: LiveHarvestConfig, *, n_ranks: int, phases: Phases) -> StreamFacts:
    """Return what is known before weights are loaded.

    Raises:
        ConfigError, DataError: with every independent finding, one a line.
    """
    findings = Findings()
    sizes = source.lane_sizes
    findings.collect(lambda: check_lane_count(sizes.lanes, n_ranks, source.batch_tokens))
    findings.collect(lambda: _check_revision(source))
    findings.collect(lambda: check_weights(source.model))
    facts = findings.collect(lambda: site_facts(source))
    if facts is not None:
        findings.collect(lambda: _check_loss(source, facts))
        findings.collect(lambda: _check_positions(source, harvest, facts))
        findings.collect(lambda: _check_memory(source, harvest, row_width(source, facts.d_model), n_ranks))
        corpus = findings.collect(lambda: _check_text(source, n_ranks, phases))
    else:
        corpus = findings.collect(lambda: _check_text_only(source, phases))
    findings.raise_any()
    assert facts is not None
    notices = corpus.notices() if corpus is not None else []
    record: dict[str, str | int | None] = {
        "model": source.model.id,
        "revision": facts.revision or source.model.revision,
        "site": facts.label,
        "module": facts.module,
        "side": facts.side,
        "data": source.data.id,
    }
    prefetch = prefetch_of(source)
    width = row_width(source, facts.d_model)
    return StreamFacts(d_model=facts.d_model, label=f"{source.model.name}.{facts.label}", n_blocks=facts.n_blocks,
                       pool_bytes=_pool_bytes(source, harvest, width), record=record,
                       prefetch=prefetch, ahead_bytes=_ahead_bytes(source, width, prefetch),
                       flops_per_token=facts.flops_per_token, logit_bytes=_logit_bytes(sizes, facts),
                       notices=tuple(notices), note=facts.note or "", sizes=sizes, corpus=corpus,
                       whole_flops_per_token=facts.whole_flops_per_token if facts.has_loss else 0)  # fmt: skip


def _check_revision(source: SourceConfig) -> None:
    if source.model.revision and local_path(source.model.id) is not None:
        raise ConfigError(
            f"model.revision={source.model.revision}: of models on the hub, and model.id={source.model.id} is a "
            "directory, so this would change nothing. Remove it."
        )


def _check_loss(source: SourceConfig, facts: SiteFacts) -> None:
    if source.reads_gradients and not facts.has_loss:
        raise ConfigError("sparsifier=gradient: needs the gradient of a language model's loss, and "
                          f"{source.model.id} does not predict the next token. Choose sparsifier=topk, or a causal "
                          "language model.")  # fmt: skip


def _check_positions(source: SourceConfig, harvest: LiveHarvestConfig, facts: SiteFacts) -> None:
    if facts.max_positions is not None and harvest.context_length > facts.max_positions:
        raise ConfigError(f"harvest.context_length={harvest.context_length}: {source.model.id} takes at most "
                          f"{facts.max_positions} positions. Lower it.")  # fmt: skip


def _pool_bytes(source: SourceConfig, harvest: LiveHarvestConfig, width: int) -> int:
    """Return the bytes of all pools, and of the calibration tokens that are held beside them at the start."""
    row = width * source.element_size
    raw = width * (4 if source.model.dtype == "float32" else 2)
    return source.lane_sizes.pool_batches * source.batch_tokens * row + harvest.calibration_tokens * raw


def _ahead_bytes(source: SourceConfig, width: int, prefetch: int) -> int:
    """Return the bytes of what all lanes may have harvested ahead: up to one forward pass more than `prefetch` says."""
    row = width * source.element_size
    sizes = source.lane_sizes
    forwards = sizes.lanes * sizes.forward_tokens
    rows = min(prefetch * source.batch_tokens + forwards, sizes.pool_batches * source.batch_tokens)
    return rows * row if prefetch else 0


def _logit_bytes(sizes: LaneSizes, facts: SiteFacts) -> int:
    """Return the bytes of what one forward pass's logits need on their way to a gradient."""
    return _LOGITS_HELD * 4 * sizes.forward_tokens * facts.logits


def _check_memory(source: SourceConfig, harvest: LiveHarvestConfig, width: int, n_ranks: int) -> None:
    local_ranks = min(n_ranks, find_place().local_size)
    cuda = torch.cuda.is_available()
    memory = _cuda_memory() if cuda else _host_memory()
    share = 1 / n_ranks if cuda else local_ranks / n_ranks
    needed, usable = _pool_bytes(source, harvest, width) * share, _USABLE_MEMORY * memory
    if needed > usable:
        batch = source.batch_tokens * width * source.element_size * share
        pool_batches = source.lane_sizes.pool_batches
        fits = int(pool_batches - (needed - usable) / batch)
        way_out = (f"Largest that fits: {fits}." if fits >= 2 else
                   "Lower batch_tokens or harvest.calibration_tokens, or use more ranks.")  # fmt: skip
        raise ConfigError(f"harvest.pool_batches={pool_batches}: pools of {needed / 1e9:.1f} GB do not fit "
                          f"{usable / 1e9:.1f} GB of usable memory. {way_out}")  # fmt: skip


def _cuda_memory() -> int:
    return torch.cuda.get_device_properties(find_place().local_rank).total_memory


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_text(source: SourceConfig, n_ranks: int, phases: Phases) -> Corpus | None:
    """Open local text and see that every lane has a context; of hub data, see that it exists."""
    tokenizer = Tokenizer(source.model)
    corpus = _check_text_only(source, phases)
    if corpus is not None:
        sizes = source.lane_sizes
        check_lanes(corpus, tokenizer, lanes=sizes.lanes, context_length=sizes.context_length,
                    batch_tokens=source.batch_tokens, n_ranks=n_ranks)  # fmt: skip
    return corpus


def _check_text_only(source: SourceConfig, phases: Phases) -> Corpus | None:
    """As far as text can be checked when the model, and so its tokenizer, is not there; None for hub data."""
    if is_local(source.data):
        return Corpus(source.data, phases)
    check_data(source.data)
    return None
