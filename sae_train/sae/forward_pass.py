"""The forward pass that a language model is in: its tokens, and which of them an SAE is trained on.

A hook at a site sees activations alone. The token ids, the padding and the length of the key-value cache are arguments
of the model, so `PassWatcher` reads them as the model is called. Letters: B contexts, T positions of the pass.
"""

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sae_train.errors import ConfigError
from sae_train.sites.families import text_part

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")


def special_ids(model: nn.Module) -> set[int]:
    """Return the special tokens that a model's `config` and `generation_config` name: bos, eos, pad, cls and sep."""
    settings = getattr(model, "config", None)
    found: set[int] = set()
    for each in (settings, text_part(settings), getattr(model, "generation_config", None)):
        for name in _SPECIAL:
            ids = getattr(each, name, None)
            found |= {number for number in (ids if isinstance(ids, list | tuple) else [ids]) if isinstance(number, int)}
    return found


class ForwardPass:
    """One call of a language model. `PassWatcher` creates it; `Attached` reads it at its site.

    Attributes:
        depth: how far inside the model the call began: 0 for the model itself.
        shape: (B, T) where it is known, else ().
        is_visited: whether the site has been reached.
    """

    def __init__(self, *, depth: int, special: Collection[int], is_later: bool) -> None:
        self.depth, self._special = depth, torch.tensor(sorted(special), dtype=torch.int64)
        self._is_later = is_later
        self.shape: tuple[int, ...] = ()
        self.is_visited = False
        self._ids_BT: Tensor | None = None
        self._attention: Tensor | None = None
        self._n_before = 0

    def read(self, arguments: dict[str, Any]) -> None:
        """Take the arguments of the model, or of a model inside it, such as a decoder with tokens of its own."""
        ids, embedded, attention = (arguments.get(k) for k in ("input_ids", "inputs_embeds", "attention_mask"))
        if isinstance(ids, Tensor) and ids.ndim == 2:
            if self._ids_BT is not None and not _is_same(ids, self._ids_BT):
                self._attention = None  # the mask of the other tokens
            self._ids_BT, self.shape = ids, tuple(ids.shape)
        elif isinstance(embedded, Tensor) and embedded.ndim == 3 and not self.shape:
            self.shape = tuple(embedded.shape[:2])
        cache = arguments.get("past_key_values")
        length = getattr(cache, "get_seq_length", None)
        if length is not None:
            self._n_before = int(length())
        seen_BS = _seen(attention, n_positions=self._n_before + (self.shape[1] if self.shape else 0))
        if seen_BS is not None:
            self._attention = seen_BS

    def plain(self, shape: torch.Size, *, device: torch.device) -> Tensor:
        """Return [B, T] bool: true but for special tokens, padding, and the first token of each context.

        The first token is the first one that the attention mask shows, so padding on the left may precede it. Later
        steps of a generation with a cache have none.
        """
        plain_BT = torch.ones(shape, dtype=torch.bool, device=device)
        if self._ids_BT is not None and self._ids_BT.shape == shape:
            plain_BT &= ~torch.isin(self._ids_BT.to(device), self._special.to(device))
        position_T = self._n_before + torch.arange(shape[-1], device=device)
        if self._attention is None or self._attention.shape[0] != shape[0] or self._attention.shape[1] < shape[-1]:
            return plain_BT & (position_T > 0)
        seen_BS = self._attention.to(device).bool()
        first_B1 = seen_BS.int().argmax(1, keepdim=True) + (self._n_before + shape[-1] - seen_BS.shape[1])
        return plain_BT & seen_BS[:, -shape[-1] :] & (position_T != first_B1)

    def mask(self, where: Tensor | Literal["all"] | None, rule_BT: Tensor) -> Tensor:
        """Return the mask [B, T] of the tokens that change.

        Args:
            where: None for the rule, 'all', or a mask by context and position. Positions of a generation that are
                after its last column do not change.
            rule_BT: the mask where there is no other.

        Raises:
            ConfigError: the mask has another number of contexts, or is not of the first forward pass.
        """
        if where is None:
            return rule_BT
        if not isinstance(where, Tensor):
            return torch.ones_like(rule_BT)
        shape, n_positions = rule_BT.shape, rule_BT.shape[-1]
        is_first = self._n_before == 0 and not self._is_later
        if where.shape != shape if is_first else where.shape[:-1] != shape[:-1]:
            raise ConfigError(
                f"where: a mask of shape {list(where.shape)}, and the forward pass has tokens {list(shape)}. Give a "
                "mask of that shape, or 'all'."
            )
        own_BT = where[..., self._n_before :][..., :n_positions].to(rule_BT.device)
        return torch.nn.functional.pad(own_BT, (0, n_positions - own_BT.shape[-1]))


def _is_same(ids: Tensor, before: Tensor) -> bool:
    """Return whether a model inside got the tokens of the outer one, and not tokens of its own."""
    return ids.shape == before.shape and (ids.data_ptr() == before.data_ptr() or torch.equal(ids, before))


def _seen(attention: Any, *, n_positions: int) -> Tensor | None:
    """Return [B, S] bool: the positions that are no padding; None where a mask does not tell.

    Args:
        attention: a mask [B, S], or one by pairs [B, 1, T, S] of truth values, or of numbers that are 0 where a token
            is seen. A static cache makes the latter, with columns that are still empty. Some models have a mapping
            with several of them.
        n_positions: positions up to the end of this pass.
    """
    if isinstance(attention, Mapping):
        attention = attention.get("full_attention")
    if not isinstance(attention, Tensor) or attention.ndim not in (2, 4):
        return None
    if attention.ndim == 2:
        return attention.bool()
    pairs_BTS = attention[:, 0, :, :n_positions]
    pairs_BTS = pairs_BTS if pairs_BTS.dtype == torch.bool else pairs_BTS == 0
    if pairs_BTS.shape[-1] < n_positions:
        return None
    is_whole_BT1 = pairs_BTS.all(2, keepdim=True)  # rows of padding may see everything, because softmax needs something
    return (pairs_BTS & ~is_whole_BT1).any(1) | pairs_BTS[:, -1]


class PassWatcher:
    """Reads the arguments of a model each time it is called. `attach` makes one for each attached SAE.

    A wrapper, such as an adapter or a model for several kinds of input, may call the inner model without being called
    itself, or give it embeddings in place of token ids. So every module around the site that takes token ids is
    watched, and a pass begins at the outermost one that is called.
    """

    def __init__(self, special: Collection[int]) -> None:
        self._special = special
        self._pass: ForwardPass | None = None
        self.n_passes = 0
        """Passes that have begun."""

    def current(self, site: str) -> ForwardPass:
        """Return the pass that the model is in.

        Raises:
            ConfigError: the site was reached by another way than a call of the model.
        """
        if self._pass is None:
            raise ConfigError(
                f"site={site!r}: was reached outside of a call of the model, so its tokens are not known. Call the "
                "whole model, and switch gradient checkpointing off."
            )
        return self._pass

    @contextmanager
    def watching(self, model: nn.Module, module: str) -> Iterator[None]:
        """Watch the modules that take token ids and contain `module`, inside the block."""
        parts = module.split(".")
        around = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts))]
        takers = [each for each in around if "input_ids" in inspect.signature(each.forward).parameters] or around[:1]
        with ExitStack() as stack:
            for depth, each in enumerate(takers):
                before = each.register_forward_pre_hook(partial(self._enter, depth), with_kwargs=True, prepend=True)
                stack.callback(before.remove)
                after = each.register_forward_hook(partial(self._leave, depth), always_call=True)
                stack.callback(after.remove)
            try:
                yield
            finally:
                self._pass = None

    def _enter(self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._pass is None or depth <= self._pass.depth:
            self._pass = ForwardPass(depth=depth, special=self._special, is_later=self.n_passes > 0)
            self.n_passes += 1
        names = [*inspect.signature(module.forward).parameters]
        self._pass.read(dict(zip(names, args, strict=False)) | kwargs)

    def _leave(self, depth: int, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._pass is not None and depth == self._pass.depth:
            self._pass = None
