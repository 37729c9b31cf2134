"""What can be checked of harvest=live before weights are loaded: the model's configuration, memory, text."""

import os

import torch

from sae_train.config import LaneSizes, LiveHarvestConfig, RunConfig
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


def check_live(config: RunConfig, harvest: LiveHarvestConfig, *, n_ranks: int, phases: Phases) -> StreamFacts:
    """Return what is known before weights are loaded.

    Raises:
        ConfigError, DataError: with every independent finding, one a line.
    """
    findings = Findings()
    sizes = config.lane_sizes
    findings.collect(lambda: check_lane_count(sizes.lanes, n_ranks, config.batch_tokens))
    findings.collect(lambda: _check_revision(config))
    findings.collect(lambda: check_weights(config.model))
    facts = findings.collect(lambda: site_facts(config))
    if facts is not None:
        findings.collect(lambda: _check_loss(config, facts))
        findings.collect(lambda: _check_positions(config, harvest, facts))
        findings.collect(lambda: _check_memory(config, harvest, row_width(config, facts.d_model), n_ranks))
        corpus = findings.collect(lambda: _check_text(config, n_ranks, phases))
    else:
        corpus = findings.collect(lambda: _check_text_only(config, phases))
    findings.raise_any()
    assert facts is not None
    notices = corpus.notices() if corpus is not None else []
    record: dict[str, str | int | None] = {
        "model": config.model.id,
        "revision": facts.revision or config.model.revision,
        "site": facts.label,
        "module": facts.module,
        "side": facts.side,
        "data": config.data.id,
    }
    prefetch = prefetch_of(config)
    width = row_width(config, facts.d_model)
    return StreamFacts(d_model=facts.d_model, label=f"{config.model.name}.{facts.label}", n_blocks=facts.n_blocks,
                       pool_bytes=_pool_bytes(config, harvest, width), record=record,
                       prefetch=prefetch, ahead_bytes=_ahead_bytes(config, width, prefetch),
                       flops_per_token=facts.flops_per_token, logit_bytes=_logit_bytes(sizes, facts),
                       notices=tuple(notices), note=facts.note or "", sizes=sizes, corpus=corpus,
                       whole_flops_per_token=facts.whole_flops_per_token if facts.has_loss else 0)  # fmt: skip


def _check_revision(config: RunConfig) -> None:
    if config.model.revision and local_path(config.model.id) is not None:
        raise ConfigError(
            f"model.revision={config.model.revision}: of models on the hub, and model.id={config.model.id} is a "
            "directory, so this would change nothing. Remove it."
        )


def _check_loss(config: RunConfig, facts: SiteFacts) -> None:
    if config.reads_gradients and not facts.has_loss:
        raise ConfigError(f"sparsifier={config.sparsifier.name}: needs the gradient of a language model's loss, and "
                          f"{config.model.id} does not predict the next token. Choose sparsifier=topk, or a causal "
                          "language model.")  # fmt: skip


def _check_positions(config: RunConfig, harvest: LiveHarvestConfig, facts: SiteFacts) -> None:
    if facts.max_positions is not None and harvest.context_length > facts.max_positions:
        raise ConfigError(f"harvest.context_length={harvest.context_length}: {config.model.id} takes at most "
                          f"{facts.max_positions} positions. Lower it.")  # fmt: skip


def _pool_bytes(config: RunConfig, harvest: LiveHarvestConfig, width: int) -> int:
    """Return the bytes of all pools, and of the calibration tokens that are held beside them at the start."""
    row = width * (8 if config.precision == "float64" else 4)
    raw = width * (4 if config.model.dtype == "float32" else 2)
    return config.lane_sizes.pool_batches * config.batch_tokens * row + harvest.calibration_tokens * raw


def _ahead_bytes(config: RunConfig, width: int, prefetch: int) -> int:
    """Return the bytes of what all lanes may have harvested ahead: up to one forward pass more than `prefetch` says."""
    row = width * (8 if config.precision == "float64" else 4)
    sizes = config.lane_sizes
    forwards = sizes.lanes * sizes.forward_tokens
    rows = min(prefetch * config.batch_tokens + forwards, sizes.pool_batches * config.batch_tokens)
    return rows * row if prefetch else 0


def _logit_bytes(sizes: LaneSizes, facts: SiteFacts) -> int:
    """Return the bytes of what one forward pass's logits need on their way to a gradient."""
    return _LOGITS_HELD * 4 * sizes.forward_tokens * facts.logits


def _check_memory(config: RunConfig, harvest: LiveHarvestConfig, width: int, n_ranks: int) -> None:
    local_ranks = min(n_ranks, find_place().local_size)
    cuda = torch.cuda.is_available()
    memory = _cuda_memory() if cuda else _host_memory()
    share = 1 / n_ranks if cuda else local_ranks / n_ranks
    needed, usable = _pool_bytes(config, harvest, width) * share, _USABLE_MEMORY * memory
    if needed > usable:
        batch = config.batch_tokens * width * (8 if config.precision == "float64" else 4) * share
        pool_batches = config.lane_sizes.pool_batches
        fits = int(pool_batches - (needed - usable) / batch)
        way_out = (f"Largest that fits: {fits}." if fits >= 2 else
                   "Lower batch_tokens or harvest.calibration_tokens, or use more ranks.")  # fmt: skip
        raise ConfigError(f"harvest.pool_batches={pool_batches}: pools of {needed / 1e9:.1f} GB do not fit "
                          f"{usable / 1e9:.1f} GB of usable memory. {way_out}")  # fmt: skip


def _cuda_memory() -> int:
    return torch.cuda.get_device_properties(find_place().local_rank).total_memory


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_text(config: RunConfig, n_ranks: int, phases: Phases) -> Corpus | None:
    """Open local text and see that every lane has a context; of hub data, see that it exists."""
    tokenizer = Tokenizer(config.model)
    corpus = _check_text_only(config, phases)
    if corpus is not None:
        sizes = config.lane_sizes
        check_lanes(corpus, tokenizer, lanes=sizes.lanes, context_length=sizes.context_length,
                    batch_tokens=config.batch_tokens, n_ranks=n_ranks)  # fmt: skip
    return corpus


def _check_text_only(config: RunConfig, phases: Phases) -> Corpus | None:
    """As far as text can be checked when the model, and so its tokenizer, is not there; None for hub data."""
    if is_local(config.data):
        return Corpus(config.data, phases)
    check_data(config.data)
    return None
