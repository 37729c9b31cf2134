"""A frozen Hugging Face language model: activations at its sites, logits with sites replaced, the tokenizer.

Letters: B contexts, T positions, D width of a site, V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from sae_train.config import ModelConfig
from sae_train.config.source import SourceConfig
from sae_train.errors import ConfigError, DataError
from sae_train.harvest.checkpoints import load_error, load_weights, source_of
from sae_train.harvest.model_facts import ModelFacts, model_facts
from sae_train.hub import hub_error, missing_library
from sae_train.phases import SILENT, Phases
from sae_train.sites.families import text_part
from sae_train.sites.hooks import Place, hooked, run_until


class Tokenizer:
    """Text to token ids, without special tokens added. `check_stream` loads it; lanes and filters use it.

    Attributes:
        bos: token at the start of every context (BERT-like models: the classification token), or None.
        eos: token after every document (BERT-like models: the separator), or None.
        special_ids: tokens that are never trained on: all that the tokenizer declares special, such as beginning, end,
            padding and marks of a chat.
    """

    def __init__(self, model: ModelConfig) -> None:
        name, options = source_of(model)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
        except Exception as error:  # its files and its code are foreign, and each kind fails in its own way
            if missing_library(error) or "trust_remote_code" in str(error):
                raise load_error(model, error, part="tokenizer") from error
            if "local_files_only" in options:
                why = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
                raise DataError(f"model.id={model.id}: no tokenizer there that can be read ({why}). "
                                "Save one in the model's directory.") from error  # fmt: skip
            raise hub_error("model.id", model.id, error) from error
        known = self._tokenizer
        self.bos: int | None = _first(known.bos_token_id, known.cls_token_id)
        self.eos: int | None = _first(known.eos_token_id, known.sep_token_id)
        self.special_ids = _special_ids(known)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def lengths(self, texts: list[str]) -> list[int]:
        """Return the number of tokens of each text."""
        if not texts:
            return []
        return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


class LanguageModel:
    """A frozen language model with its sites. `LiveStream` loads it; raw rows and evaluation use it.

    Attributes:
        facts: the model and its sites.
        sites: the sites by label.
        has_loss: whether `logits` predicts the next token.
        vocab: number of tokens in its embedding.
        model: the Hugging Face module, in eval mode, without gradients.
    """

    def __init__(self, source: SourceConfig, *, device: torch.device, facts: ModelFacts | None = None,
                 phases: Phases = SILENT) -> None:  # fmt: skip
        """Args:
        source: names the model and the sites.
        device: where the model runs.
        facts: from `model_facts(source)`; None: find them here.
        phases: shows the progress.
        """
        self.facts = facts or model_facts(source)
        self.sites, self.has_loss = self.facts.sites, self.facts.has_loss
        self.device, self._id = device, source.model.id
        loaded = load_weights(source.model, self.facts.settings, is_quantised=self.facts.is_quantised, device=device,
                              phases=phases)  # fmt: skip
        self.model = loaded.eval().requires_grad_(False)
        for part in (self.model.config, text_part(self.model.config)):
            part.use_cache = False
        self.vocab: int = self.model.get_input_embeddings().num_embeddings

    def describe(self, label: str) -> str:
        """Return the model and a site, for messages: 'bundled, residual2'."""
        return f"{self._id}, {label}"

    @torch.no_grad()
    def activations(self, ids_BT: Tensor, sites: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return the activations [B, T, D] of sites by label, in the model's dtype.

        The model does not run beyond the last of them.

        Args:
            ids_BT: token ids.
            sites: labels of the sites; None: all.
        """
        places = self._places(sites)
        found = run_until(self.model, places, ids_BT.to(self.device))
        assert len(found) == len(places), "the probe without weights reached these sites"
        return {label: self._by_position(found[label], ids_BT) for label in places}

    @torch.no_grad()
    def activations_and_logits(
        self, ids_BT: Tensor, sites: Iterable[str] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the activations [B, T, D] of sites and next-token logits [B, T, V] of one whole forward pass."""
        places, found = self._places(sites), dict[str, Tensor]()

        def take(label: str, site: Tensor) -> None:
            found[label] = site.clone()  # the rest of the model may write into it

        with hooked(self.model, places, take):
            logits = self.logits(ids_BT)
        return {label: self._by_position(found[label], ids_BT) for label in places}, logits

    def activations_and_gradients(self, ids_BT: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the activations [B, T, D] of all sites and the loss's gradient at each, in the model's dtype.

        The loss is the sum, not the mean, of the cross-entropy (nats) of every next token of the contexts. So a
        gradient does not depend on the number of contexts that go together. It covers the prediction of the next token
        and, through attention, of all later tokens of its context. In packed contexts these include special tokens and
        the documents that follow. The last position of a context predicts nothing, so its gradient is zero. The
        backward pass stores only tensors after the first site, and no weight gets a gradient.

        Raises:
            ConfigError: the loss does not depend on a site.
        """
        assert self.has_loss, "check_stream refuses models without a loss"
        ids_BT = ids_BT.to(self.device)
        found: dict[str, Tensor] = {}

        def branch(label: str, site: Tensor) -> Tensor:
            own = site.clone()  # the rest of the model may write into the site's tensor
            # a tensor that depends on an earlier site keeps its graph, which leads to that site's gradient
            found[label] = own if own.requires_grad else own.requires_grad_()
            return own.clone()  # the model may write into the tensor that replaces the site's, too

        with torch.enable_grad(), hooked(self.model, self._places(None), branch):
            logits = self.model(ids_BT).logits[:, :-1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")
        gradients = self._gradients(loss, {label: found[label] for label in self.sites})
        return (
            {label: self._by_position(found[label].detach(), ids_BT) for label in self.sites},
            {label: self._by_position(gradient, ids_BT) for label, gradient in gradients.items()},
        )

    def _gradients(self, loss: Tensor, sites: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient of the loss at each site, from one backward pass."""
        found: Sequence[Tensor | None] = [None] * len(sites)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(sites.values()), allow_unused=True)
        gradients = {label: gradient for label, gradient in zip(sites, found, strict=True) if gradient is not None}
        for label in sites:
            if label not in gradients:
                raise ConfigError(f"layer.path={self.sites[label].place.module}: the language model's loss does not "
                                  "depend on it, so there is no gradient. Choose another module, or another "
                                  "sparsifier.")  # fmt: skip
        return gradients

    def _places(self, sites: Iterable[str] | None) -> dict[str, Place]:
        """Return the places of sites by label; None: of all."""
        return {label: self.sites[label].place for label in (self.sites if sites is None else sites)}

    @staticmethod
    def _by_position(site: Tensor, ids_BT: Tensor) -> Tensor:
        """Return a site's tensor as [B, T, D]. Some modules compute [B * T, D]."""
        return site.unflatten(0, ids_BT.shape) if site.ndim == 2 else site

    def why_not_finite(self) -> str:
        """Return a message with the likely cause of activations or gradients that are not finite."""
        weights = (name for name, weight in self.model.named_parameters()
                   if weight.is_floating_point() and not torch.isfinite(weight).all())  # fmt: skip
        broken, dtype = next(weights, None), str(self.model.dtype).removeprefix("torch.")
        what = "the language model's activations, or their gradients, are not finite"
        if dtype == "float16":
            cause = f", and neither is its weight {broken}" if broken else ""
            return (f"{what} in float16{cause}: no number above 65504 is there. "
                    "Choose model.dtype=float32 or bfloat16.")  # fmt: skip
        if broken:
            return (f"{what}, because its weight {broken} is not. No other model.dtype changes that. Fetch the "
                    "checkpoint again, or choose another one.")  # fmt: skip
        other = " Try model.dtype=float32." if dtype != "float32" else " Try model.attention=eager."
        return f"{what} in {dtype}, though all its weights are.{other} Else choose another site or checkpoint."

    @torch.no_grad()
    def logits(self, ids_BT: Tensor, *, replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Return next-token logits [B, T, V].

        Args:
            ids_BT: token ids.
            replace: by label of a site, a function from its activations [B, T, D] to those that the rest of the model
                reads, of the same shape.
        """
        assert self.has_loss, "an encoder without a language-modelling head has no logits"
        ids_BT, replace = ids_BT.to(self.device), replace or {}

        def splice(label: str, site: Tensor) -> Tensor:
            return replace[label](self._by_position(site, ids_BT)).to(site.dtype).view_as(site)

        with hooked(self.model, self._places(replace), splice):
            logits: Tensor = self.model(ids_BT).logits
        return logits


def _special_ids(tokenizer: Any) -> list[int]:
    """Return the ids of all tokens that a tokenizer declares special, in order."""
    named = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
    ids = {getattr(tokenizer, name, None) for name in named} | set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids |= {number for number, token in added.items() if getattr(token, "special", False)}
    return sorted(number for number in ids if number is not None)


def _first(*tokens: int | None) -> int | None:
    return next((token for token in tokens if token is not None), None)
