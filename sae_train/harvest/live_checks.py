"""Checks of harvest=live that need no weights: the model's configuration and tokenizer, the sites, the text."""

from dataclasses import dataclass

from sae_train.config import LaneSizes
from sae_train.config.source import SourceConfig
from sae_train.errors import ConfigError
from sae_train.harvest.checkpoints import check_weights
from sae_train.harvest.checks import Findings, check_lane_count
from sae_train.harvest.corpus import Corpus
from sae_train.harvest.lanes import check_lanes
from sae_train.harvest.language_model import Tokenizer
from sae_train.harvest.model_facts import ModelFacts, model_facts
from sae_train.harvest.open_text import check_data, is_local
from sae_train.harvest.stream import StreamFacts, StreamSite, prefetch_of, row_bytes
from sae_train.hub import local_path
from sae_train.phases import Phases
from sae_train.sites.layers import LayerSite

_LOGITS_HELD = 4
"""Matrices of fp32 as large as a forward pass's logits that their gradient holds at most (peak memory, measured in fp32
and bf16)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveParts:
    """The parts of a live harvest that are open before weights are loaded. `LiveStream` continues with them."""

    model: ModelFacts
    tokenizer: Tokenizer
    corpus: Corpus | None
    """Local text, of which every lane has at least one context. None for text on the hub, which is not fetched yet."""


def check_live(source: SourceConfig, *, n_ranks: int, phases: Phases) -> StreamFacts:
    """Return the facts of a live harvest, with the parts that were opened to find them.

    Raises:
        ConfigError, DataError: with every independent finding, one a line.
    """
    findings = Findings()
    sizes = source.lane_sizes
    findings.collect(lambda: check_lane_count(sizes.lanes, n_ranks, source.batch_tokens))
    findings.collect(lambda: _check_revision(source))
    findings.collect(lambda: check_weights(source.model))
    model = findings.collect(lambda: model_facts(source))
    tokenizer = None
    if model is not None:
        findings.collect(lambda: _check_loss(source, model))
        findings.collect(lambda: _check_positions(source, model))
        tokenizer = findings.collect(lambda: Tokenizer(source.model))
    corpus = findings.collect(lambda: _open_text(source, tokenizer, n_ranks, phases))
    findings.raise_any()
    assert model is not None
    assert tokenizer is not None
    return _facts(source, LiveParts(model=model, tokenizer=tokenizer, corpus=corpus))


def _facts(source: SourceConfig, parts: LiveParts) -> StreamFacts:
    sizes, model, prefetch = source.lane_sizes, parts.model, prefetch_of(source)
    numbers = sum(site.d_model for site in model.sites.values())
    batch_bytes = source.batch_tokens * row_bytes(source, numbers)
    layers = tuple((layer, tuple(_site(model, each) for each in sites)) for layer, sites in model.layers)
    distinct: dict[str, StreamSite] = {}
    for site in (site for _, sites in layers for site in sites):
        distinct.setdefault(site.label, site)
    return StreamFacts(
        sites=tuple(distinct.values()),
        layers=layers,
        name=source.model.name,
        pool_bytes=sizes.pool_batches * batch_bytes + _calibration_bytes(source, numbers),
        pool_batch_bytes=batch_bytes,
        prefetch=prefetch,
        ahead_bytes=_ahead_rows(source, prefetch) * row_bytes(source, numbers),
        flops_per_token=model.flops_per_token,
        model_bytes=model.weight_bytes,
        whole_flops_per_token=model.whole_flops_per_token if model.has_loss else 0,
        logit_bytes=_logit_bytes(sizes, model),
        notices=tuple(parts.corpus.notices() if parts.corpus is not None else []),
        note=model.note or "",
        sizes=sizes,
        opened=parts,
        record={
            "model": source.model.id,
            "revision": model.revision or source.model.revision,
            "prepends_bos": parts.tokenizer.bos is not None,
            "data": source.data.id,
        },
    )


def _site(model: ModelFacts, site: LayerSite) -> StreamSite:
    record = {"site": site.label, "module": site.place.module, "side": site.place.side}
    return StreamSite(label=site.label, d_model=model.sites[site.label].d_model, layer=site.layer, record=dict(record))


def _check_revision(source: SourceConfig) -> None:
    if source.model.revision and local_path(source.model.id) is not None:
        raise ConfigError(
            f"model.revision={source.model.revision}: of models on the hub, and model.id={source.model.id} is a "
            "directory, so this would change nothing. Remove it."
        )


def _check_loss(source: SourceConfig, model: ModelFacts) -> None:
    if source.reads_gradients and not model.has_loss:
        raise ConfigError("sparsifier=gradient: needs the gradient of a language model's loss, and "
                          f"{source.model.id} does not predict the next token. Choose sparsifier=topk, or a causal "
                          "language model.")  # fmt: skip


def _check_positions(source: SourceConfig, model: ModelFacts) -> None:
    length = source.lane_sizes.context_length
    if model.max_positions is not None and length > model.max_positions:
        raise ConfigError(f"harvest.context_length={length}: {source.model.id} takes at most "
                          f"{model.max_positions} positions. Lower it.")  # fmt: skip


def _calibration_bytes(source: SourceConfig, numbers: int) -> int:
    """Return the bytes of the calibration tokens, which are in memory together with the pools at the start.

    Args:
        source: the settings of the stream.
        numbers: activations of one token at all sites.
    """
    numbers *= 2 if source.reads_gradients else 1
    return source.harvest.calibration_tokens * numbers * (4 if source.model.dtype == "float32" else 2)


def _ahead_rows(source: SourceConfig, prefetch: int) -> int:
    """Return the rows that all lanes may have harvested ahead: `prefetch` batches and one forward pass of each lane."""
    sizes = source.lane_sizes
    rows = prefetch * source.batch_tokens + sizes.lanes * sizes.forward_tokens
    return min(rows, sizes.pool_batches * source.batch_tokens) if prefetch else 0


def _logit_bytes(sizes: LaneSizes, model: ModelFacts) -> int:
    """Return the bytes that the logits of one forward pass need on the way to a gradient."""
    return _LOGITS_HELD * 4 * sizes.forward_tokens * model.logits


def _open_text(source: SourceConfig, tokenizer: Tokenizer | None, n_ranks: int, phases: Phases) -> Corpus | None:
    """Open local text and check that every lane has a context. Check that text on the hub exists, and return None.

    Args:
        source: the settings of the stream.
        tokenizer: None where it cannot be loaded; then lanes are not checked.
        n_ranks: ranks that share the lanes.
        phases: shows the progress.
    """
    if not is_local(source.data):
        check_data(source.data)
        return None
    corpus, sizes = Corpus(source.data, phases), source.lane_sizes
    if tokenizer is not None:
        check_lanes(corpus, tokenizer, lanes=sizes.lanes, context_length=sizes.context_length,
                    batch_tokens=source.batch_tokens, n_ranks=n_ranks)  # fmt: skip
    return corpus
