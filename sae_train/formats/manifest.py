"""The manifest of an exported SAE: everything about it that its tensors do not hold. `sae.json` is this, as JSON."""

import math
import reprlib
import sys
from dataclasses import asdict, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

FORMAT_VERSION = 1
RULES = ("threshold", "topk")
"""Values of `SaeManifest.inference`."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationSource:
    """Where the activations of an SAE came from. A field that does not apply is None."""

    model: str | None = None
    """Hub id or directory of the language model."""
    revision: str | None = None
    """Commit of the language model on the Hub."""
    site: str | None = None
    """Short name of the site, such as 'residual2'."""
    module: str | None = None
    """Dotted name of the hooked module, as in `model.named_modules()`."""
    side: str | None = None
    """Hooked tensor of the module: 'output' or 'input'."""
    dtype: str | None = None
    """Number format of the language model's forward pass."""
    context_length: int | None = None
    """Tokens a context, the beginning token included."""
    prepends_bos: bool | None = None
    """Whether every context begins with the tokenizer's beginning token."""
    data: str | None = None
    """Hub id of the dataset, path of the text, or directory of the activations."""
    data_revision: str | None = None
    """Commit of the dataset on the Hub."""
    subset: str | None = None
    """The dataset's configuration on the Hub."""
    split: str | None = None
    """Split of the dataset that was trained on."""
    text_column: str | None = None
    """Column or JSON key of the text."""
    rows: int | None = None
    """Activations that were trained on, where they came from files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalisation:
    """How activations were normalised in training: (x - centre) / scale."""

    scale: float
    """Root mean square norm of the centred activations."""
    centre_norm: float
    """Norm of the centre."""
    gamma: float
    """Norm of the mean activation over `scale`."""
    outlier_limit: float
    """Norm above which an activation was left out of training."""
    folded: bool
    """Whether the tensors take raw activations. True for every export of this program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaeManifest:
    """What an exported SAE is and where it comes from.

    `training/export.py` creates it, `native.save` writes it to sae.json, and `native.read_manifest` reads it. Exporters
    to foreign formats fill their headers from it. Only the first four fields are required.
    """

    inference: str
    """'threshold': f = pre where pre > threshold. 'topk': the round(k) largest positive pre of a token."""
    k: float
    """Mean number of active features a token that the SAE was trained for."""
    d_model: int
    """Width of the activations."""
    n_features: int
    """Width of the dictionary."""
    format_version: int = FORMAT_VERSION
    site: str | None = None
    """Label of the site, such as 'residual2', or 'tensors' for activations from files."""
    source: ActivationSource = field(default_factory=ActivationSource)
    tokens: int | None = None
    """Tokens that the SAE was trained on."""
    sparsifier: str | None = None
    """Name of the sparsifier, such as 'mutual_choice'."""
    prefixes: list[int] | None = None
    """Sizes of the nested prefixes, in features."""
    seed: int | None = None
    """Seed of the SAE's own random numbers."""
    normalisation: Normalisation | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    """Figures of the summary: l0, fvu, delta_ce and so on (docs/metrics.md)."""
    sae_train_version: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values. A fact that does not apply is absent."""
        return asdict(self, dict_factory=lambda items: {key: value for key, value in items if value is not None})

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "SaeManifest":
        """Return the manifest that JSON values hold. Keys that this version does not have are ignored.

        Raises:
            ValueError: a required key is missing, a value has the wrong type, or a newer version wrote the values.
        """
        version = values.get("format_version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ValueError(
                f"format_version={version}: a newer sae-train wrote it, and this one reads up to {FORMAT_VERSION}. "
                "Update sae-train"
            )
        missing = [name for name in ("inference", "k", "d_model", "n_features") if name not in values]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}; this is not a sae-train export")
        manifest = _made(cls, values)
        if manifest.inference not in RULES:
            raise ValueError(f"inference={reprlib.repr(manifest.inference)}: no such rule. Known: {', '.join(RULES)}")
        if not 0 <= manifest.k < math.inf:
            raise ValueError(f"k={manifest.k!r}: must be a finite number of at least 0")
        return manifest


def _made(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """Return an instance of a dataclass from JSON values, with dataclasses among its fields made likewise."""
    hints = get_type_hints(cls)
    found = {}
    for each in fields(cls):  # type: ignore[arg-type] # T is a dataclass of this file
        if each.name not in values:
            continue
        key, value = f"{prefix}{each.name}", values[each.name]
        kinds = _kinds(hints[each.name])
        inner = next((kind for kind in kinds if kind in (ActivationSource, Normalisation)), None)
        if inner is not None and isinstance(value, dict):
            value = _made(inner, value, f"{key}.")
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < sys.float_info.max else math.inf
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{key}={reprlib.repr(value)}: not {' or '.join(kind.__name__ for kind in kinds)}")
        found[each.name] = value
    try:
        return cls(**found)
    except TypeError as error:  # a field of a nested part is missing
        raise ValueError(f"{prefix.rstrip('.') or 'sae.json'}: {error}") from error


def _kinds(hint: Any) -> tuple[type, ...]:
    """Return the classes of a type hint's values: those of `list[int] | None` are list and NoneType."""
    members = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(NoneType if member is None else get_origin(member) or member for member in members)
