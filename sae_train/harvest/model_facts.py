"""Sites: the places in a language model where activations are taken.

`residual`, `mlp` and `attention` belong to a block, in the modules that `sites/families.py` lists. `module` is the
output or input of any module. Facts come from a run of the architecture on tensors without storage, so no weight is
ever read.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from transformers import AutoModel

from sae_train.config.harvest import LayerConfig
from sae_train.config.source import SourceConfig
from sae_train.harvest.architecture import without_weights
from sae_train.harvest.checkpoints import check_quantised, loader_of, read_model_config
from sae_train.harvest.checks import Findings
from sae_train.harvest.probe import probe
from sae_train.sites.families import blocks_name
from sae_train.sites.hooks import Place
from sae_train.sites.layers import LayerSite, given, list_of_blocks, sites_of_layer


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    """One site of a language model. `model_facts` makes it; the plan and `LanguageModel` read it."""

    label: str
    """Short name: 'residual2', 'module.transformer.h.1.mlp'."""
    place: Place
    """The hooked tensor."""
    index: int | None
    """Block of the site. None for a module."""
    d_model: int
    """Width of the site's activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A language model before its weights are loaded. `model_facts` makes it; the plan and `LanguageModel` read it."""

    sites: dict[str, SiteFacts]
    """The sites by label, in order of first use."""
    layers: tuple[tuple[LayerConfig, tuple[LayerSite, ...]], ...]
    """Each setting `layer` with the sites that it means."""
    n_blocks: int | None
    """Blocks of the model. None for an unknown family."""
    max_positions: int | None
    """Longest context of the model, if its configuration has one."""
    flops_per_token: int
    """Operations of the weight products before the last site, for one token. With gradients, operations of the whole
    forward pass and of the backward pass down to the first site."""
    has_loss: bool
    """Whether the model predicts the next token."""
    logits: int
    """Logits of a token where gradients are harvested, else 0."""
    revision: str | None
    """Commit of a model on the hub. None for a local one."""
    whole_flops_per_token: int
    """Operations of the weight products of a whole forward pass, for one token. All experts count."""
    weight_bytes: int
    """Bytes of all weights in `model.dtype`."""
    note: str | None
    """A line of the plan about the model, for example that the architecture could not be run without storage."""
    settings: Any = field(repr=False, compare=False)
    """The model's Hugging Face configuration."""
    is_quantised: bool
    """Whether the checkpoint's weights are quantised."""


def model_facts(source: SourceConfig) -> ModelFacts:
    """Return the facts of the language model and of the configured sites, without reading weights.

    Raises:
        ConfigError: the model lacks some of the sites, or there is no such attention kernel.
        DataError: the model cannot be found, built or run, or needs a missing library.
    """
    settings = read_model_config(source.model)
    is_quantised = check_quantised(source.model, settings)
    model = without_weights(source.model, settings)
    blocks = blocks_name(model, settings)
    layers = _find(source, model, settings, blocks=blocks)
    sites: dict[str, LayerSite] = {}
    for site in (site for _, several in layers for site in several):
        sites.setdefault(site.label, site)
    has_loss = loader_of(settings) is not AutoModel
    found = probe(model, {label: site.place for label, site in sites.items()}, settings=settings, model=source.model,
                  given={label: given(site.layer) for label, site in sites.items()},
                  context_length=getattr(source.harvest, "context_length", 1),
                  reads_gradients=source.reads_gradients and has_loss)  # fmt: skip
    return ModelFacts(
        sites={
            label: SiteFacts(label=label, place=site.place, index=site.index, d_model=found.widths[label])
            for label, site in sites.items()
        },
        layers=layers,
        n_blocks=len(list_of_blocks(model, blocks)) if blocks else None,
        max_positions=found.max_positions,
        flops_per_token=found.flops,
        has_loss=has_loss,
        logits=found.logits,
        revision=getattr(settings, "_commit_hash", None),
        whole_flops_per_token=2 * sum(map(_product_weights, model.modules())),
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in model.parameters()),
        note=found.note,
        settings=settings,
        is_quantised=is_quantised,
    )


def _find(
    source: SourceConfig, model: nn.Module, settings: Any, *, blocks: str | None
) -> tuple[tuple[LayerConfig, tuple[LayerSite, ...]], ...]:
    """Return each setting `layer` with the sites that it means.

    Raises:
        ConfigError: with the problem of each setting that has one.
    """
    findings = Findings()
    find = partial(sites_of_layer, model_id=source.model.id, model=model, settings=settings, blocks=blocks)
    found = tuple((layer, findings.collect(partial(find, layer)) or ()) for layer in source.layers)
    findings.raise_any()
    return found


def _product_weights(part: nn.Module) -> int:
    """Return the number of a module's own weights that multiply activations."""
    if isinstance(part, nn.Embedding):
        return 0
    return sum(weight.numel() for weight in part.parameters(recurse=False) if weight.ndim == 2)
