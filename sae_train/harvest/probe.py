"""A run of a language model without its weights: widths and cost of its sites, and the end of tables of positions.

Weights are FakeTensors, which have shapes and no storage. So a model of any size runs in a second. Token ids, positions
and masks are real, because some code reads their values. FakeTensorMode is private to torch, and test_probe.py tests
the behaviour that is used here. Letters: B contexts, T positions.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from sae_train.config import ModelConfig
from sae_train.errors import ConfigError, DataError, UserError, raise_all
from sae_train.harvest.architecture import without_weights
from sae_train.sites.families import text_part
from sae_train.sites.hooks import Place, Reached, hooked, run_until

_SHAPE = (2, 4)
_LARGEST_REAL = 4 * 2**30
"""Most bytes of weights with which an architecture that needs storage is run."""
_LONGEST_TABLE = 4096
"""Most positions with which the end of a table is searched, for any context length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The findings of a forward pass without weights. `probe` makes it, and `model_facts` reads it."""

    widths: dict[str, int]
    """Width of each site, by its label."""
    flops: int
    """Operations of a token's weight products, see `ModelFacts`."""
    logits: int
    max_positions: int | None
    note: str | None
    """A sentence about an unusual way of running, if there was one."""


class TableEnds(Exception):
    """Raised for a lookup `excess` rows beyond the end of a table. `_positions` catches it."""

    def __init__(self, excess: int) -> None:
        self.excess = excess


class _TablesEnd(TorchFunctionMode):
    """Raises TableEnds for lookups beyond the end of a table. A FakeTensor would raise nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.embedding:
            ids, table = args[0], args[1]
            if not isinstance(ids, FakeTensor) and ids.numel() and int(ids.max()) >= len(table):
                raise TableEnds(int(ids.max()) - len(table) + 1)
        return func(*args, **(kwargs or {}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log of fake tensors, which repeats every error that they raise."""
    log = logging.getLogger(FakeTensor.__module__)
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


@_quiet()
def probe(built: nn.Module, places: Mapping[str, Place], *, settings: Any, model: ModelConfig,
          given: Mapping[str, str], context_length: int, reads_gradients: bool) -> Probe:  # fmt: skip
    """Run the architecture without storage. Where that fails and it is small enough, run it with storage.

    Args:
        built: from `without_weights`.
        places: the sites by label.
        given: the setting with which a message about a site begins, by the site's label.
        context_length: positions that must lie within all tables.

    Raises:
        ConfigError: a module is no site, or contexts of this length cannot be run.
        DataError: the architecture cannot be run on token ids, or not without its weights.
    """
    kind, note = settings.model_type, None
    try:
        widths, flops, logits = _run(built, places, settings, given=given, reads_gradients=reads_gradients)
    except UserError:
        raise
    except Exception as error:  # foreign code, which may not run without values
        n_bytes = sum(weight.numel() * weight.element_size() for weight in built.parameters())
        if n_bytes > _LARGEST_REAL:
            raise DataError(f"model.id={model.id}: the architecture {kind!r} cannot be run without its weights "
                            f"({_said(error)}), and is too large to be tried with others ({n_bytes / 1e9:.0f} GB). "
                            "Choose another model or site.") from error  # fmt: skip
        built = without_weights(model, settings, real=True)
        try:
            widths, flops, logits = _run(built, places, settings, given=given, reads_gradients=reads_gradients)
        except UserError:
            raise
        except Exception as failure:  # foreign code again, now with arbitrary values
            modules = ", ".join(place.module for place in places.values())
            raise DataError(f"model.id={model.id}: the architecture {kind!r} cannot be run on token ids alone as far "
                            f"as {modules} ({_said(failure)}). Choose another site.") from failure  # fmt: skip
        note = f"{kind} was run with arbitrary weights: without any it cannot be run ({type(error).__name__})"
    positions = _positions(built, places, settings, context_length=context_length)
    said = configured_positions(settings)
    if positions is None and said is not None and context_length > said:
        longer = (f"harvest.context_length={context_length} is longer than the {said} positions in the "
                  f"configuration of {kind}: it runs, but perhaps beyond the lengths of its training")  # fmt: skip
        note = f"{note}. {longer}" if note else longer
    return Probe(widths=widths, flops=flops, logits=logits, max_positions=positions, note=note)


def _run(built: nn.Module, places: Mapping[str, Place], settings: Any, *, given: Mapping[str, str],
         reads_gradients: bool) -> tuple[dict[str, int], int, int]:  # fmt: skip
    """Return the width of each site, and the number of operations and of logits of a token."""
    ids_BT = torch.full(_SHAPE, plain_token(settings))
    before_sites: list[int] = []
    with _counted(built) as weights, torch.no_grad():
        with hooked(built, places, lambda _label, _tensor: before_sites.append(sum(weights))):
            sites = run_until(built, places, ids_BT)
        raise_all([problem for label, place in places.items()
                   if (problem := _site_problem(given[label], sites.get(label), place.side))])  # fmt: skip
        widths = {label: sites[label].shape[-1] for label in places}
        if not reads_gradients:
            return widths, 2 * sum(weights), 0
        weights.clear()
        logits = getattr(built(ids_BT), "logits", None)
        after_first = sum(weights) - before_sites[0]  # frozen weights cost no gradient of their own
    return widths, 2 * (sum(weights) + after_first), 0 if logits is None else logits.shape[-1]


def _site_problem(given: str, site: Tensor | None, side: str) -> str | None:
    """Return the reason why a tensor is no site, or None. `given` is the setting with which the message begins."""
    if site is None:
        return f"{given}: this module never runs in a forward pass. Choose one inside it."
    shaped = site.shape[:-1] in (_SHAPE, (_SHAPE[0] * _SHAPE[1],))  # some modules see all tokens in one row
    if shaped and site.is_floating_point():
        return None
    return f"{given}: its {side} has shape {list(site.shape)}, not [contexts, positions, width]. Choose another module."


@contextmanager
def _counted(built: nn.Module) -> Iterator[list[int]]:
    """Collect the number of weights that multiply a token, from each module that runs."""
    weights: list[int] = []

    def count(part: nn.Module, args: Any) -> None:
        if isinstance(part, nn.Embedding):
            return
        for weight in part.parameters(recurse=False):
            if weight.ndim == 2:
                weights.append(weight.numel())
            elif weight.ndim == 3 and len(args) > 1 and isinstance(args[1], Tensor) and not args[1].is_floating_point():
                weights.append(
                    args[1].shape[-1] * weight[0].numel()
                )  # experts: chosen experts times the weights of one

    handles = [part.register_forward_pre_hook(count) for part in built.modules()]
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()


def _positions(built: nn.Module, places: Mapping[str, Place], settings: Any, *, context_length: int) -> int | None:
    """Return the longest context of the model: as its configuration has it, or shorter where a table ends.

    Rotary positions are computed, not looked up, so the configuration of such a model sets no limit.
    """
    said = None if _is_rotary(settings) else configured_positions(settings)
    tried = said if said is not None and said <= _LONGEST_TABLE else context_length
    if said is not None:
        tried = min(tried, said)
    try:
        _run_to_first_block(built, places, torch.full((1, tried), plain_token(settings)))
    except TableEnds as table:
        return tried - table.excess
    except Exception as error:  # foreign code fails in its own way beyond its positions
        raise ConfigError(f"harvest.context_length={context_length}: the architecture {settings.model_type!r} cannot "
                          f"be run on contexts of {tried} tokens ({_said(error)}). Lower it.") from error  # fmt: skip
    return said


def configured_positions(settings: Any) -> int | None:
    """Return the number of positions in the model's configuration, or None."""
    said = getattr(text_part(settings), "max_position_embeddings", None)
    return said if isinstance(said, int) and said > 0 else None


def _is_rotary(settings: Any) -> bool:
    return bool(getattr(text_part(settings), "rope_parameters", None))


def _run_to_first_block(built: nn.Module, places: Mapping[str, Place], ids_BT: Tensor) -> None:
    """Run the part of the model before its blocks, which holds all tables of positions."""
    reached = Reached()

    def stop(_part: nn.Module, _args: Any) -> None:
        raise reached

    lists = [part for part in built.modules() if isinstance(part, nn.ModuleList)]
    handles = [block.register_forward_pre_hook(stop) for blocks in lists for block in blocks]
    try:
        with _TablesEnd(), torch.no_grad():
            run_until(built, places, ids_BT)
    except Reached as caught:
        if caught is not reached:
            raise
    finally:
        for handle in handles:
            handle.remove()


def plain_token(settings: Any) -> int:
    """Return a token that the model's code does not treat specially: neither padding nor an image's place."""
    special: set[Any] = set()
    for part in (settings, text_part(settings)):
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list) else [value])
    return next(token for token in range(len(special) + 1) if token not in special)


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
