"""The site at which an SAE is attached: from a name, or from the SAE's own config, to a tensor of the model."""

import re
from typing import Any, NamedTuple

from torch import nn

from sae_train.config import BlockLayerConfig
from sae_train.errors import ConfigError, suggest
from sae_train.sites.families import blocks_name, text_part
from sae_train.sites.hooks import Place
from sae_train.sites.layers import list_of_blocks, sites_of_layer

KINDS = ("residual", "mlp", "attention")
_OF_A_BLOCK = re.compile(rf"({'|'.join(KINDS)}) ?(-?\d+|middle)")
INPUT = ".input"


class Site(NamedTuple):
    """A tensor of a model, and its name in messages. `find_site` makes it."""

    label: str
    place: Place


def find_site(model: nn.Module, site: str | None, *, config: dict[str, Any], d_model: int) -> Site:
    """Return the site that a name means in a model.

    Args:
        model: the language model.
        site: see `SparseAutoencoder.attach`. None: the site of `config`.
        config: of the SAE.
        d_model: width of the SAE.

    Raises:
        ConfigError: the model has no such site, or its width is known and is not d_model.
    """
    found = _named(model, site) if site is not None else _own(model, config)
    module = model.get_submodule(found.place.module)
    if type(module).forward is nn.Module.forward:
        raise ConfigError(
            f"site={found.label!r}: a {type(module).__name__}, which the model never calls. Choose a module inside it."
        )
    width = getattr(text_part(getattr(model, "config", None)), "hidden_size", None)
    is_stream = found.label.startswith(("residual", "mlp")) and _OF_A_BLOCK.fullmatch(found.label)
    if is_stream and isinstance(width, int) and width != d_model:
        raise ConfigError(
            f"site={found.label!r}: the activations of {type(model).__name__} are {width} wide there, and this SAE "
            f"takes d_model={d_model}. Attach it to the model that it was trained on."
        )
    return found


def _own(model: nn.Module, config: dict[str, Any]) -> Site:
    """Return the site that an SAE's config names, by its label or else by the name of its module."""
    label, source = str(config.get("site") or ""), config.get("source") or {}
    is_known = _blocks(model) is not None
    if is_known and _OF_A_BLOCK.fullmatch(label):
        return _named(model, label)
    if module := source.get("module"):
        return _named(model, module + (INPUT if source.get("side") == "input" else ""))
    if label.startswith("module."):
        return _named(model, label.removeprefix("module."))
    if _OF_A_BLOCK.fullmatch(label):
        return _named(model, label)
    raise ConfigError(
        "site: the config of this SAE names no site of a language model. Give site=, such as 'residual2' or the name "
        "of a module."
    )


def _named(model: nn.Module, site: str) -> Site:
    """Return the site of a name that was given."""
    modules = dict(model.named_modules())
    name = site.removesuffix(INPUT)
    if site and site in modules:
        return Site(site, Place(site, "output"))
    if name and name in modules and name != site:
        return Site(site, Place(name, "input"))
    blocks = _blocks(model)
    if (typed := _OF_A_BLOCK.fullmatch(site)) is None:
        n_blocks = 0 if blocks is None else len(list_of_blocks(model, blocks))
        known = [*filter(None, modules), *(f"{kind}{index}" for kind in KINDS for index in range(n_blocks))]
        hint = suggest(site, known) or f" Give 'residual0' or one of model.named_modules(), as {known[-1]!r}."
        raise ConfigError(f"site={site!r}: no such site or module of {type(model).__name__}.{hint}")
    kind, index = typed[1], typed[2] if typed[2] == "middle" else int(typed[2])
    if getattr(model, "config", None) is None:
        raise ConfigError(f"site={site!r}: {type(model).__name__} has no config, so its blocks are not known. Give the "
                          "name of a module.")  # fmt: skip
    layer = BlockLayerConfig(kind=kind, index=index)
    try:
        (found,) = sites_of_layer(
            layer, model_id=type(model).__name__, model=model, settings=model.config, blocks=blocks
        )
    except ConfigError as error:
        raise ConfigError(f"site={site!r}: {str(error).partition(': ')[2]}") from None
    return Site(found.label, found.place)


def _blocks(model: nn.Module) -> str | None:
    """Return the name of the list of a model's blocks; None for an unknown family and for modules without a config."""
    settings = getattr(model, "config", None)
    return None if settings is None else blocks_name(model, settings)
