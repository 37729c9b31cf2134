"""Counts of the work of a step, part by part: operations, bytes and calls. `Hardware` turns them into seconds.

Counts are of what the code does: how many passes over which tensors. None of them is fitted to a machine. Rates are in
`conf/hardware.yaml`. Letters: N tokens that a rank trains on, D d_model, F features of the rank, M matches of the rank.
"""

from dataclasses import dataclass, fields
from typing import Self

from sae_train.config import NoAuxLossConfig, PenalisedConfig, SaeConfig, TopKConfig
from sae_train.sae.sizes import SaeSizes
from sae_train.sparsifiers.topk import MULTIPLE

FLOAT = 4
"""Bytes of a number. Those of float64 are counted as operations are: `Hardware.seconds` doubles them."""
COARSE, CANDIDATES = 3, 1.2
"""Maxima that bound a cut, and entries that reach the bound, for each match that is kept."""
BATCH_LISTS, ROW_LISTS, COLUMN_LISTS, CODE_LISTS = 65, 85, 65, 20
"""Numbers of lists for each match, over all operations: to cut a batch, rows or columns, and to work with the code.

They are sums over the operators that torch dispatches in a step, which scripts/count_step.py counts.
"""
FLAGS = 3 / 8
"""Numbers of lists for each pre-activation: whether the maximum of 8 neighbours reaches a bound, and where."""
COLUMN_GROUPS = (64, 8)
"""Tokens whose largest entry bounds a column's cut: the first where twice its budget fits into such groups."""
CALLS = {"encode": 10, "select": 105, "decode": 100, "update": 60, "auxiliary": 200, "rest": 120}
"""Operators that torch dispatches."""
COLUMN_CALLS = 420
CHUNK = 1 << 17
"""Numbers of the decoder that a CPU projects at once, by four operators."""
MAPPED = 1 << 25
"""Bytes from which on glibc's allocator takes memory from the system, and gives it back, each time."""
DEAD_SHARE = 0.005
"""Share of the features that an auxiliary loss is assumed to work on: default runs stay below it once they settle."""
HISTOGRAM_BYTES = 12 * 16_384
"""Of the all-reduces that find a batch's cut (docs/ranks.md)."""
PENALISED_PASSES = 2.5
"""Passes over the pre-activations that find the positive ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Counts that add up. The functions of this module and `harvest_work` make them."""

    operations: float = 0
    """Floating-point operations of matrix products."""
    streamed: float = 0
    """Bytes that are read or written in order."""
    scanned: float = 0
    """Bytes of pre-activations that are read to take maxima or to compare."""
    gathered: float = 0
    """Bytes of rows that are read by index."""
    ordered: float = 0
    """Numbers that are sorted, or of which the largest are taken."""
    listed: float = 0
    """Numbers of lists of matches, over all operations on them."""
    fresh: float = 0
    """Bytes of new memory that the system hands out and takes back."""
    sent: float = 0
    """Bytes that this rank sends."""
    calls: float = 0
    """Operations that the host starts."""

    def __add__(self, other: Self) -> "Work":
        return Work(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})

    def times(self, factor: float) -> "Work":
        """Return this work done `factor` times."""
        return Work(**{each.name: factor * getattr(self, each.name) for each in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The part of an SAE's step that one rank computes. A prediction creates it for each SAE."""

    config: SaeConfig
    sizes: SaeSizes
    rows: int = 1
    """Ranks that split the tokens."""
    columns: int = 1
    """Ranks that split the features."""
    on_gpu: bool = False
    """Whether the counts are of the path of a GPU, which fuses passes and never waits for a number."""
    finds_candidates: bool = False
    """Whether the product is in bf16 and only finds candidates."""

    @property
    def n_tokens(self) -> float:
        return self.sizes.batch_tokens / self.rows

    @property
    def n_features(self) -> float:
        return self.sizes.n_features / self.columns

    @property
    def entries(self) -> float:
        """Pre-activations."""
        return self.n_tokens * self.n_features

    @property
    def matches(self) -> float:
        return self.config.usual_k * self.n_tokens / self.columns

    @property
    def numbers(self) -> float:
        """Numbers of the encoder, and as many of the decoder."""
        return self.n_features * self.sizes.d_model

    @property
    def token_numbers(self) -> float:
        """Numbers of the batch's activations."""
        return self.n_tokens * self.sizes.d_model


def step_work(share: Share) -> dict[str, Work]:
    """Return the work of an SAE's step on one rank, by part."""
    parts = {
        "encode": _encode(share),
        "select": _select(share),
        "decode": _decode(share),
        "update": _update(share),
        "rest": _rest(share),
    }
    if not isinstance(share.config.aux_loss, NoAuxLossConfig):
        parts["auxiliary"] = _auxiliary(share)
    if share.rows * share.columns > 1:
        parts["communication"] = _communication(share)
    calls = CALLS | ({"select": COLUMN_CALLS} if share.config.sparsifier.splits_budget else {})
    return {name: work + Work(calls=calls.get(name, 0)) for name, work in parts.items()}


def encode_operations(sizes: SaeSizes) -> float:
    """Return the operations of the encoder's product for one token."""
    return 2.0 * sizes.d_model * sizes.n_features


def _encode(share: Share) -> Work:
    """The product writes every pre-activation, and a copy or the bias reads and writes it again."""
    products = 2 if share.config.sparsifier.reads_gradients else 1
    return Work(
        operations=products * 2 * share.token_numbers * share.n_features,
        streamed=products * (2 if share.finds_candidates else 3) * FLOAT * share.entries + FLOAT * share.numbers,
    )


def _select(share: Share) -> Work:
    config, entries, matches = share.config, share.entries, share.matches
    if isinstance(config.sparsifier, PenalisedConfig):
        return Work(scanned=PENALISED_PASSES * FLOAT * entries, listed=BATCH_LISTS * matches)
    exact = Work()
    if share.finds_candidates:  # values of candidates are products of rows
        exact = Work(gathered=1.1 * matches * share.sizes.d_model * FLOAT, ordered=matches)
    if config.sparsifier.splits_budget:
        return exact + _select_columns(share)
    lists = ROW_LISTS if config.sparsifier.keeps_whole_k else BATCH_LISTS
    matches *= _multiple(config)
    return exact + Work(
        scanned=FLOAT * entries * (2 if _multiple(config) > 1 else 1),
        ordered=(COARSE + CANDIDATES) * matches,
        listed=lists * matches + FLAGS * entries,
    )


def _select_columns(share: Share) -> Work:
    """Every entry is read for the maxima and once more to be compared; the flags of the comparison are read, too."""
    entries, budget = share.entries, share.matches / share.n_features
    large, small = COLUMN_GROUPS
    group = large if 2 * budget <= share.n_tokens / large else small
    return Work(
        scanned=2 * FLOAT * entries,
        ordered=entries / group + 2 * CANDIDATES * share.matches,
        listed=COLUMN_LISTS * share.matches + FLAGS * entries,
    )


def _multiple(config: SaeConfig) -> int:
    """Return the matches of a step for each one of the code: more where Multi-TopK adds a second reconstruction."""
    return 1 + MULTIPLE if isinstance(config.sparsifier, TopKConfig) and config.sparsifier.multi_weight > 0 else 1


def _decode(share: Share) -> Work:
    """Four products of the matches: the reconstruction, the gradient of values and of two matrices of weights."""
    matches = _multiple(share.config) * share.matches
    return Work(
        gathered=4 * matches * share.sizes.d_model * FLOAT,
        streamed=(2 * 2 * share.numbers + 3 * share.token_numbers) * FLOAT,
        ordered=matches,
        listed=CODE_LISTS * matches,
        fresh=2 * _fresh(FLOAT * share.numbers, share),
    )


def _fresh(n_bytes: float, share: Share) -> float:
    """Return the bytes of a tensor whose memory the system hands out anew. A GPU's allocator keeps all of it."""
    return n_bytes if n_bytes >= MAPPED and not share.on_gpu else 0.0


def _update(share: Share) -> Work:
    """Adam moves 28 bytes a number; the decoder's projection, norms and renormalisation move the rest.

    A GPU's kernel does all of the decoder's update in two passes.
    """
    adam, norm, project, subtract, rescale = 28, 4, 32, 12, 12
    decoder = 8 + adam if share.on_gpu else project + subtract + adam + rescale
    passes = adam + norm + decoder + (24 if share.config.parametrisation.name == "aligned" else 0)
    rounded = 2 * (FLOAT + 2) if share.finds_candidates or share.on_gpu else 0
    chunks = 0 if share.on_gpu else 4 * share.numbers / CHUNK
    return Work(streamed=(passes + rounded) * share.numbers, calls=chunks)


def _rest(share: Share) -> Work:
    """Errors, loss and their gradient are passes over the batch; counters and totals are short lists."""
    prefixes = getattr(share.config.nesting, "prefixes", [1])
    return Work(streamed=12 * FLOAT * share.token_numbers * len(prefixes), listed=10 * share.n_features)


def _auxiliary(share: Share) -> Work:
    """Dead features are selected by token, and decode the error: as a step does with as many features and matches.

    A CPU copies the dead features' columns. A GPU reads all of them, and works on slots whether they are used or not.
    """
    d_model, dead = share.sizes.d_model, DEAD_SHARE * share.n_features
    k_aux = max(1, min(512, d_model // 2))
    slots = share.n_tokens * min(k_aux, share.n_features)
    matches = share.n_tokens * min(k_aux, dead / 2)
    read = 3 * share.entries if share.on_gpu else 3 * dead * share.n_tokens
    listed = slots if share.on_gpu else matches
    return Work(
        scanned=FLOAT * read,
        gathered=4 * matches * d_model * FLOAT,
        streamed=(2 * 2 * share.numbers + 16 * share.token_numbers) * FLOAT,
        ordered=(COARSE + CANDIDATES) * listed,
        listed=(ROW_LISTS + CODE_LISTS) * listed,
    )


def _communication(share: Share) -> Work:
    """The bytes of docs/ranks.md, but for the activations that ranks gather once for all SAEs of a site."""
    config, sent, sizes = share.config, 0.0, share.sizes
    split, shared = (2 * (n - 1) / n for n in (share.rows, share.columns))
    parameters = 2 * share.numbers + share.n_features + sizes.d_model
    sent += split * (FLOAT * parameters + 8 * share.n_features)
    reconstructions = 1 if isinstance(config.aux_loss, NoAuxLossConfig) else 2
    sent += shared * reconstructions * FLOAT * share.token_numbers
    if config.sparsifier.splits_budget:
        sent += split * FLOAT * share.matches / 2
    elif config.sparsifier.keeps_whole_k:
        sent += shared * FLOAT * share.matches * share.columns / 2
    elif not isinstance(config.sparsifier, PenalisedConfig):
        sent += HISTOGRAM_BYTES
    return Work(sent=sent)
