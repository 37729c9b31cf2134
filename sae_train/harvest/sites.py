"""Sites: the places in a language model where activations are taken.

`residual`, `mlp` and `attention` belong to a block, in the modules that `families.py` lists. `module` is the output or
input of any module. Facts come from a run of the architecture on tensors without storage, so no weight is ever read.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import AutoModel

from sae_train.config import BlockLayerConfig, ModuleLayerConfig
from sae_train.config.source import SourceConfig
from sae_train.errors import ConfigError, suggest
from sae_train.harvest.architecture import without_weights
from sae_train.harvest.checkpoints import check_quantised, loader_of, read_model_config
from sae_train.harvest.families import FAMILIES, blocks_name, text_part
from sae_train.harvest.probe import probe


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    """One site of one language model. `site_facts` makes it; the plan and `LanguageModel` read it."""

    d_model: int
    """Width of the site's activations."""
    n_blocks: int | None
    """Blocks of the model. None for an unknown family."""
    index: int | None
    """Block of the site. None for a module."""
    module: str
    """Dotted name of the hooked module."""
    side: str
    """'output' or 'input' of that module."""
    label: str
    """Short name: 'residual2', 'module.transformer.h.1.mlp'."""
    max_positions: int | None
    """Longest context of the model, if its configuration has one."""
    flops_per_token: int
    """Operations of the weight products before the site, for one token. With gradients, operations of the whole forward
    pass and of the backward pass down to the site."""
    has_loss: bool
    """Whether the model predicts the next token."""
    logits: int
    """Logits of a token where gradients are harvested, else 0."""
    revision: str | None
    """Commit of a model on the hub. None for a local one."""
    whole_flops_per_token: int
    """Operations of the weight products of a whole forward pass, for one token. All experts count."""
    note: str | None
    """A line of the plan about the model, for example that the architecture could not be run without storage."""
    settings: Any = field(repr=False, compare=False)
    """The model's Hugging Face configuration."""
    is_quantised: bool
    """Whether the checkpoint's weights are quantised."""


def site_facts(source: SourceConfig) -> SiteFacts:
    """Return the facts of the configured site, without reading weights.

    Raises:
        ConfigError: the model has no such site, or no such attention kernel.
        DataError: the model cannot be found, built or run, or needs a missing library.
    """
    settings = read_model_config(source.model)
    is_quantised = check_quantised(source.model, settings)
    model = without_weights(source.model, settings)
    blocks = blocks_name(model, settings)
    module, side, index, label = _find(source, model, settings, blocks=blocks)
    _refuse_decoder(source, model, settings, module)
    _refuse_inside_experts(source, model, module)
    has_loss = loader_of(settings) is not AutoModel
    found = probe(model, module, side, settings=settings, model=source.model, given=_given(source),
                  context_length=getattr(source.harvest, "context_length", 1),
                  reads_gradients=source.reads_gradients and has_loss)  # fmt: skip
    return SiteFacts(
        d_model=found.width,
        n_blocks=len(_list_of(model, blocks)) if blocks else None,
        index=index,
        module=module,
        side=side,
        label=label,
        max_positions=found.max_positions,
        flops_per_token=found.flops,
        has_loss=has_loss,
        logits=found.logits,
        revision=getattr(settings, "_commit_hash", None),
        whole_flops_per_token=2 * sum(map(_product_weights, model.modules())),
        note=found.note,
        settings=settings,
        is_quantised=is_quantised,
    )


def _given(source: SourceConfig) -> str:
    """Return the setting that a message about the site begins with."""
    layer = source.layer
    return f"layer.path={layer.path}" if isinstance(layer, ModuleLayerConfig) else f"layer={layer.kind}"


def _find(source: SourceConfig, model: nn.Module, settings: Any, *,
          blocks: str | None) -> tuple[str, str, int | None, str]:  # fmt: skip
    """Return module, side, block and label of the config's site."""
    layer = source.layer
    if isinstance(layer, ModuleLayerConfig):
        names = [name for name, _ in model.named_modules() if name]
        if layer.path not in names:
            hint = suggest(layer.path, names) or f" One is named {names[len(names) // 2]!r}."
            raise ConfigError(f"layer.path={layer.path}: no such module in {source.model.id}.{hint}")
        label = f"module.{layer.path}" + (".input" if layer.side == "input" else "")
        return layer.path, layer.side, None, label
    if not isinstance(layer, BlockLayerConfig):
        raise ConfigError(f"layer={layer.kind}: no such kind of site. Choose residual, mlp, attention or module.")
    kind = text_part(settings).model_type
    if blocks is None:
        raise ConfigError(f"layer={layer.kind}: not known for models of type {kind!r}, only for "
                          f"{', '.join(FAMILIES)}. Choose layer=module with layer.path=NAME.")  # fmt: skip
    n_blocks = len(_list_of(model, blocks))
    index = n_blocks // 2 if layer.index == "middle" else int(layer.index)
    if not -n_blocks <= index < n_blocks:
        raise ConfigError(f"layer.index={layer.index}: {source.model.id} has {n_blocks} blocks. "
                          f"Choose {-n_blocks} to {n_blocks - 1}, or 'middle'.")  # fmt: skip
    index %= n_blocks
    block, label = f"{blocks}.{index}", f"{layer.kind}{index}"
    if layer.kind == "residual":
        return block, "output", index, label
    family = FAMILIES[kind]
    part, side = (family.mlp, "output") if layer.kind == "mlp" else (family.attention, "input")
    if part is None or part not in dict(model.get_submodule(block).named_modules()):
        raise ConfigError(f"layer={layer.kind}: not known for block {index} of models of type {kind!r}. Choose "
                          f"layer=residual, or layer=module with layer.path={block}.NAME.")  # fmt: skip
    return f"{block}.{part}", side, index, label


def _list_of(model: nn.Module, blocks: str) -> nn.ModuleList:
    found = model.get_submodule(blocks)
    assert isinstance(found, nn.ModuleList)
    return found


def _refuse_decoder(source: SourceConfig, model: nn.Module, settings: Any, module: str) -> None:
    """Refuse sites of a decoder that reads an encoder's output, because it needs a text of its own."""
    if not getattr(settings, "is_encoder_decoder", False):
        return
    decoders = {name for name, part in model.named_modules() if name.rpartition(".")[2] == "decoder"}
    if any(f"{module}.".startswith(f"{name}.") for name in decoders):
        raise ConfigError(f"{_given(source)}: {module} belongs to the decoder of an encoder-decoder "
                          f"({settings.model_type}), which needs a second text. Choose a site of its encoder, or a "
                          "causal language model.")  # fmt: skip


def _holds_experts(part: nn.Module) -> bool:
    return any(weight.ndim == 3 and len(weight) > 1 for weight in part.parameters(recurse=False))


def _product_weights(part: nn.Module) -> int:
    """Return the number of a module's own weights that multiply activations."""
    if isinstance(part, nn.Embedding):
        return 0
    return sum(weight.numel() for weight in part.parameters(recurse=False) if weight.ndim == 2)


def _refuse_inside_experts(source: SourceConfig, model: nn.Module, module: str) -> None:
    """Refuse modules that see tokens in the order of the experts they were sent to."""
    for name, part in model.named_modules():
        if module.startswith(f"{name}.") and _holds_experts(part):
            raise ConfigError(f"{_given(source)}: {module} lies inside {name}, which sorts tokens by expert. "
                              f"Choose {name} or a module around it.")  # fmt: skip
