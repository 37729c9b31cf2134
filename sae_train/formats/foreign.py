"""What all foreign formats share: the origin that headers name, an SAE as read, and the protocol of a format's file."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from sae_train.formats.manifest import ActivationSource, SaeManifest
from sae_train.sae.autoencoder import SparseAutoencoder

SITES = ("residual", "mlp", "attention")
"""Kinds of sites that foreign headers can name."""
UNKNOWN_MODEL = "unknown"
GIVES_ONE = "gives one."
"""End of the sentences in `Origin.assumed`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The model and site that foreign headers name. `origin_of` makes it; the writers read it."""

    model: str
    """Hub id or directory of the language model, or 'unknown'."""
    layer: int
    """Block of the site, from 0."""
    site: str
    """'residual', 'mlp' or 'attention'; as `layer` means them."""
    module: str | None
    """Dotted name of the hooked module, where it is known."""
    context_length: int | None
    prepends_bos: bool
    """Whether every context begins with the tokenizer's beginning token. True where it is not known."""
    assumed: tuple[str, ...]
    """A sentence for each fact above that nobody recorded."""


def origin_of(
    manifest: SaeManifest, *, model: str | None = None, layer: int | None = None, site: str | None = None
) -> Origin:
    """Return the origin that headers name, from the manifest and from what the user gave instead.

    Args:
        manifest: of the SAE.
        model: replaces the recorded model.
        layer: replaces the recorded block.
        site: replaces the recorded kind of site.
    """
    recorded = re.fullmatch(r"(residual|mlp|attention)(\d+)", manifest.site or "")
    assumed = []
    if (model or manifest.source.model) is None:
        assumed.append(f"model {UNKNOWN_MODEL!r}: none is recorded. --model {GIVES_ONE}")
    if layer is None and recorded is None:
        assumed.append(f"layer 0: {_unnamed(manifest)} names no block. --layer {GIVES_ONE}")
    if site is None and recorded is None:
        assumed.append(f"site residual: {_unnamed(manifest)} names no kind of site. --site {GIVES_ONE}")
    replaced = layer is not None or site is not None
    return Origin(
        model=model or manifest.source.model or UNKNOWN_MODEL,
        layer=layer if layer is not None else int(recorded[2]) if recorded else 0,
        site=site or (recorded[1] if recorded else "residual"),
        module=None if replaced else manifest.source.module,
        context_length=manifest.source.context_length,
        prepends_bos=manifest.source.prepends_bos is not False,
        assumed=tuple(assumed),
    )


def _unnamed(manifest: SaeManifest) -> str:
    return "nothing recorded" if manifest.site is None else f"the recorded site {manifest.site!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """An SAE as a reader found it. Each format's `read` makes it, and `load` returns its `sae`."""

    sae: SparseAutoencoder
    """On raw activations, fp32, in eval mode."""
    manifest: SaeManifest
    """All that the files say of it."""
    format_name: str
    assumed: tuple[str, ...] = ()
    """A sentence for each fact that the files do not hold."""

    def finished(self) -> SparseAutoencoder:
        """Return the SAE with the manifest, the format and the assumptions as its `config`; warn of the latter."""
        self.sae.config = self.manifest.as_json() | {"format": self.format_name, "assumed": list(self.assumed)}
        for sentence in self.assumed:
            warnings.warn(f"{self.format_name}: {sentence}", stacklevel=3)
        return self.sae.eval()


class Format(Protocol):
    """One foreign format: a module of this room with these names. `registry.py` lists them."""

    NAME: str
    """As typed after `--to`."""
    HOLDS: str
    """A phrase for messages: the SAEs that it holds exactly."""

    def refusal(self, sae: SparseAutoencoder) -> str | None:
        """Return the reason why the format cannot hold this SAE exactly, or None."""

    def folder(self, manifest: SaeManifest, origin: Origin) -> PurePosixPath | None:
        """Return the format's own folders below the export's directory. None where it has no layout of its own."""

    def write(self, sae: SparseAutoencoder, manifest: SaeManifest, origin: Origin, directory: Path) -> None:
        """Write the files of one SAE into an existing directory. `refusal` has returned None."""

    def find(self, path: Path) -> Path | None:
        """Return the main file of one SAE of this format in a directory, or `path` itself where it is that file."""

    def read(self, file: Path) -> Opened:
        """Return the SAE of a main file.

        Raises:
            CheckpointError: the files are damaged, or hold an SAE that the native form cannot.
        """


def refusal_of_k(sae: SparseAutoencoder) -> str | None:
    """Return the reason why no format can hold the k of an SAE, or None. All of them hold a whole number."""
    return f"k={sae.k:g} rounds to 0" if sae.inference == "topk" and round(sae.k) < 1 else None


def manifest_of(
    sae: SparseAutoencoder, *, source: ActivationSource, site: str | None = None, sparsifier: str | None = None
) -> SaeManifest:
    """Return the manifest of an SAE that a foreign file holds.

    Args:
        sae: as read.
        source: what the file says of the activations.
        site: label of the site, such as 'residual2', where the file names one.
        sparsifier: name of the sparsifier, where the file names one.
    """
    return SaeManifest(
        inference=sae.inference,
        k=sae.k,
        d_model=sae.d_model,
        n_features=sae.n_features,
        site=site,
        source=source,
        sparsifier=sparsifier,
    )


def label_of(text: Any, layer: Any, sites: Mapping[str, str]) -> str | None:
    """Return the label of a site, such as 'residual2', or None where a header does not name one.

    Args:
        text: what the header says of the site. It begins with the format's word.
        layer: the block that the header names.
        sites: the format's word for each kind of site.
    """
    if isinstance(text, str) and isinstance(layer, int) and not isinstance(layer, bool):
        for site, word in sites.items():
            if text.startswith(word):
                return f"{site}{layer}"
    return None
