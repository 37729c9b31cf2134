"""A frozen Hugging Face language model: activations at one site, logits with the site replaced, the tokenizer.

Letters: B contexts, T positions, D width of the site, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_tqdm_hook

from sae_train.config import ModelConfig
from sae_train.config.source import SourceConfig
from sae_train.errors import ConfigError, DataError
from sae_train.harvest.architecture import DTYPES
from sae_train.harvest.checkpoints import load_error, loader_of, source_of
from sae_train.harvest.families import text_part
from sae_train.harvest.hooks import hooked, run_until
from sae_train.harvest.hub import hub_error, missing_library
from sae_train.harvest.sites import SiteFacts, site_facts
from sae_train.phases import SILENT, Phases


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
    """A frozen language model with one site. `LiveStream` loads it; raw rows and evaluation use it.

    Attributes:
        facts: the site.
        has_loss: whether `logits` predicts the next token.
        vocab: number of tokens in its embedding.
        model: the Hugging Face module, in eval mode, without gradients.
    """

    def __init__(self, source: SourceConfig, *, device: torch.device, facts: SiteFacts | None = None,
                 phases: Phases = SILENT) -> None:  # fmt: skip
        """Args:
        source: names the model and the site.
        device: where the model runs.
        facts: from `site_facts(source)`; None: find them here.
        phases: shows the progress.
        """
        self.facts = facts or site_facts(source)
        self.has_loss = self.facts.has_loss
        self.device = device
        with _reported(phases):
            self.model = _load(source.model, self.facts, device)
        self.model = self.model.eval().requires_grad_(False)
        for part in (self.model.config, text_part(self.model.config)):
            part.use_cache = False
        self.vocab: int = self.model.get_input_embeddings().num_embeddings

    @torch.no_grad()
    def activations(self, ids_BT: Tensor) -> Tensor:
        """Return the site's activations [B, T, D] in the model's dtype. The rest of the model does not run."""
        site = run_until(self.model, self.facts.module, self.facts.side, ids_BT.to(self.device))
        assert site is not None, "the probe without weights reached this site"
        return self._by_position(site, ids_BT)

    @torch.no_grad()
    def activations_and_logits(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the site's activations [B, T, D] and next-token logits [B, T, V] of one whole forward pass."""
        sites: list[Tensor] = []
        with hooked(self.model, self.facts.module, self.facts.side, lambda site: sites.append(site.clone())):
            logits = self.logits(ids_BT)
        (site,) = sites
        return self._by_position(site, ids_BT), logits

    def activations_and_gradients(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the site's activations [B, T, D] and the loss's gradient at each, both in the model's dtype.

        The loss is the sum, not the mean, of the cross-entropy (nats) of every next token of the contexts. So a
        gradient does not depend on the number of contexts that go together. It covers the prediction of the next token
        and, through attention, of all later tokens of its context. In packed contexts these include special tokens and
        the documents that follow. The last position of a context predicts nothing, so its gradient is zero. The
        backward pass stores only tensors after the site, and no weight gets a gradient.

        Raises:
            ConfigError: the loss does not depend on the site.
        """
        assert self.has_loss, "check_stream refuses models without a loss"
        ids_BT = ids_BT.to(self.device)
        sites: list[Tensor] = []

        def branch(site: Tensor) -> Tensor:
            sites.append(site.detach().requires_grad_())
            return sites[0].clone()  # the model may write into the tensor that replaces the site's

        with torch.enable_grad(), hooked(self.model, self.facts.module, self.facts.side, branch):
            logits = self.model(ids_BT).logits[:, :-1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")
        if not loss.requires_grad:
            raise ConfigError(f"layer.path={self.facts.module}: the language model's loss does not depend on it, so "
                              "there is no gradient. Choose another module, or another sparsifier.")  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, sites)
        return self._by_position(sites[0].detach(), ids_BT), self._by_position(gradient, ids_BT)

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
    def logits(self, ids_BT: Tensor, *, replace: dict[str, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Return next-token logits [B, T, V].

        Args:
            ids_BT: token ids.
            replace: maps the site's activations [B, T, D] to those that the rest of the model reads, of the same shape.
        """
        assert self.has_loss, "an encoder without a language-modelling head has no logits"
        ids_BT = ids_BT.to(self.device)
        if replace is None:
            logits: Tensor = self.model(ids_BT).logits
            return logits

        def splice(site: Tensor) -> Tensor:
            return replace[self.facts.label](self._by_position(site, ids_BT)).to(site.dtype).view_as(site)

        with hooked(self.model, self.facts.module, self.facts.side, splice):
            spliced: Tensor = self.model(ids_BT).logits
        return spliced


@contextmanager
def _reported(phases: Phases) -> Iterator[None]:
    """Show how many weights are loaded. A signal to stop ends the loading between two weights."""

    def counted(items: Iterable[Any], total: int) -> Iterator[Any]:
        with phases.of("loading the language model", total=total, unit="weight"):
            for item in items:
                phases.advance(1)
                yield item

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        items = args[0] if args else None
        if options.get("desc") != "Loading weights" or not isinstance(items, Sized):
            return factory(*args, **options)
        return counted(cast("Iterable[Any]", items), len(items))

    before = set_tqdm_hook(bar)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def _load(model: ModelConfig, facts: SiteFacts, device: torch.device) -> Any:
    name, options = source_of(model)
    if "local_files_only" in options:
        disable_progress_bar()  # a bar is for downloads
    if facts.is_quantised:
        options["device_map"] = {"": device}  # such weights cannot be moved afterwards
    try:
        loaded, report = loader_of(facts.settings).from_pretrained(
            name, dtype=DTYPES[model.dtype], attn_implementation=model.attention, output_loading_info=True, **options
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # files of any kind, and the checkpoint's own code
        if missing_library(error) or "trust_remote_code" in str(error):
            raise load_error(model, error, part="architecture") from error
        if "local_files_only" in options:
            raise load_error(model, error, part="weights") from error
        raise hub_error("model.id", model.id, error) from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise DataError(f"model.id={model.id}: its files lack {len(missing)} of its weights, {missing[0]} among them, "
                        "which would be random numbers. Fetch or save it again.")  # fmt: skip
    if not facts.is_quantised:
        return loaded.to(device)
    if getattr(loaded.config, "quantization_config", None) is None:  # expanded on loading: no GPU here takes FP8
        for weight in loaded.parameters():  # no buffers: rotary frequencies stay fp32
            weight.data = weight.data.to(DTYPES[model.dtype])
    return loaded


def _special_ids(tokenizer: Any) -> list[int]:
    """Return the ids of all tokens that a tokenizer declares special, in order."""
    named = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
    ids = {getattr(tokenizer, name, None) for name in named} | set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids |= {number for number, token in added.items() if getattr(token, "special", False)}
    return sorted(number for number in ids if number is not None)


def _first(*tokens: int | None) -> int | None:
    return next((token for token in tokens if token is not None), None)
