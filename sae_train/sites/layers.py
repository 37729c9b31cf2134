"""The sites that a setting `layer` means in an architecture. `families.py` lists the modules of each family."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sae_train.config import BlockLayerConfig, ModuleLayerConfig
from sae_train.config.harvest import LayerConfig
from sae_train.errors import ConfigError, suggest
from sae_train.sites.families import FAMILIES, text_part
from sae_train.sites.hooks import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSite:
    """A site that a setting `layer` means. `sites_of_layer` makes it, and `model_facts` reads it."""

    layer: LayerConfig
    """The setting of this one site: a single block where the typed setting means several."""
    label: str
    place: Place
    index: int | None
    """Block of the site. None for a module."""


def sites_of_layer(layer: LayerConfig, *, model_id: str, model: nn.Module, settings: Any,
                   blocks: str | None) -> tuple[LayerSite, ...]:  # fmt: skip
    """Return the sites that a setting means: one, or several for 'all' and 'every=N'.

    Args:
        layer: the setting.
        model_id: name of the model, for messages.
        model: the architecture, from `without_weights`.
        settings: the model's Hugging Face configuration.
        blocks: name of the list of the text part's blocks. None for an unknown family.

    Raises:
        ConfigError: the model has no such site, or none that can be harvested.
    """
    if isinstance(layer, ModuleLayerConfig):
        found = [_of_module(layer, model_id, model)]
    elif isinstance(layer, BlockLayerConfig):
        kind = text_part(settings).model_type
        if blocks is None:
            raise ConfigError(f"layer={layer.kind}: not known for models of type {kind!r}, only for "
                              f"{', '.join(FAMILIES)}. Choose layer=module with layer.path=NAME.")  # fmt: skip
        n_blocks = len(list_of_blocks(model, blocks))
        singles = [replace(layer, index=index) for index in _indices(layer, n_blocks, model_id)]
        found = [_of_block(single, model_id, model, blocks=blocks, kind=kind) for single in singles]
    else:
        raise ConfigError(f"layer={layer.kind}: no such kind of site. Choose residual, mlp, attention or module.")
    for site in found:
        _refuse_decoder(given(site.layer), model, settings, site.place.module)
        _refuse_inside_experts(given(site.layer), model, site.place.module)
    return tuple(found)


def given(layer: LayerConfig) -> str:
    """Return the settings that a message about a site begins with."""
    if isinstance(layer, ModuleLayerConfig):
        return f"layer.path={layer.path}"
    assert isinstance(layer, BlockLayerConfig)
    return f"layer={layer.kind}, layer.index={layer.index}"


def list_of_blocks(model: nn.Module, blocks: str) -> nn.ModuleList:
    """Return the list of the text part's blocks by its name."""
    found = model.get_submodule(blocks)
    assert isinstance(found, nn.ModuleList)
    return found


def _indices(layer: BlockLayerConfig, n_blocks: int, model_id: str) -> list[Any]:
    """Return the index of each block that a setting means. Only those of 'all' and 'every=N' differ from the typed."""
    if layer.stride is None:
        return [layer.index]
    if layer.stride > n_blocks:
        raise ConfigError(f"layer.index={layer.index}: {model_id} has {n_blocks} blocks. Choose every=1 to "
                          f"every={n_blocks}, or all.")  # fmt: skip
    return list(range(layer.stride - 1, n_blocks, layer.stride))


def _of_module(layer: ModuleLayerConfig, model_id: str, model: nn.Module) -> LayerSite:
    names = [name for name, _ in model.named_modules() if name]
    if layer.path not in names:
        hint = suggest(layer.path, names) or f" One is named {names[len(names) // 2]!r}."
        raise ConfigError(f"layer.path={layer.path}: no such module in {model_id}.{hint}")
    label = f"module.{layer.path}" + (".input" if layer.side == "input" else "")
    return LayerSite(layer=layer, label=label, place=Place(layer.path, layer.side), index=None)


def _of_block(layer: BlockLayerConfig, model_id: str, model: nn.Module, *, blocks: str, kind: str) -> LayerSite:
    """Return the site of a setting that means one block."""
    n_blocks = len(list_of_blocks(model, blocks))
    index = n_blocks // 2 if layer.index == "middle" else int(layer.index)
    if not -n_blocks <= index < n_blocks:
        raise ConfigError(f"layer.index={layer.index}: {model_id} has {n_blocks} blocks. "
                          f"Choose {-n_blocks} to {n_blocks - 1}, or 'middle'.")  # fmt: skip
    index %= n_blocks
    block, label = f"{blocks}.{index}", f"{layer.kind}{index}"
    if layer.kind == "residual":
        return LayerSite(layer=layer, label=label, place=Place(block, "output"), index=index)
    family = FAMILIES[kind]
    part, side = (family.mlp, "output") if layer.kind == "mlp" else (family.attention, "input")
    if part is None or part not in dict(model.get_submodule(block).named_modules()):
        raise ConfigError(f"layer={layer.kind}: not known for block {index} of models of type {kind!r}. Choose "
                          f"layer=residual, or layer=module with layer.path={block}.NAME.")  # fmt: skip
    return LayerSite(layer=layer, label=label, place=Place(f"{block}.{part}", side), index=index)


def _refuse_decoder(given: str, model: nn.Module, settings: Any, module: str) -> None:
    """Refuse sites of a decoder that reads an encoder's output, because it needs a text of its own."""
    if not getattr(settings, "is_encoder_decoder", False):
        return
    decoders = {name for name, part in model.named_modules() if name.rpartition(".")[2] == "decoder"}
    if any(f"{module}.".startswith(f"{name}.") for name in decoders):
        raise ConfigError(f"{given}: {module} belongs to the decoder of an encoder-decoder "
                          f"({settings.model_type}), which needs a second text. Choose a site of its encoder, or a "
                          "causal language model.")  # fmt: skip


def _refuse_inside_experts(given: str, model: nn.Module, module: str) -> None:
    """Refuse modules that see tokens in the order of the experts they were sent to."""
    for name, part in model.named_modules():
        if module.startswith(f"{name}.") and _holds_experts(part):
            raise ConfigError(f"{given}: {module} lies inside {name}, which sorts tokens by expert. "
                              f"Choose {name} or a module around it.")  # fmt: skip


def _holds_experts(part: nn.Module) -> bool:
    return any(weight.ndim == 3 and len(weight) > 1 for weight in part.parameters(recurse=False))
