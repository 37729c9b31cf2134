"""Hydra's grammar: from the text of one argument to an override, and from a sweep to its points.

Both need an open library (library.py), because `glob(*)` is looked up among its choices.
"""

import itertools
from collections.abc import Sequence

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from sae_train.cli.quoting import text_of, typed_values
from sae_train.cli.schemas import holds_text


def parse(argument: str) -> Override | None:
    """Return an argument as Hydra's parser reads it, or None where it cannot."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    try:
        (override,) = parser.parse_overrides([argument])
    except HydraException:
        return None
    return override


def is_one_value(argument: str) -> bool:
    """Return whether Hydra's parser reads an argument, and as one value."""
    override = parse(argument)
    return override is not None and not override.is_sweep_override()


def expand(overrides: Sequence[Override]) -> list[list[Override]]:
    """Return the points of a sweep, the last of the swept keys changing fastest."""
    columns = [
        [value for text in _swept(o) if (value := parse(f"{o.get_key_element()}={text}")) is not None]
        if o.is_sweep_override()
        else [o]
        for o in overrides
    ]
    return [list(point) for point in itertools.product(*columns)]


def _swept(override: Override) -> list[str]:
    """Return the values of a sweep, each as text to parse.

    A value for a key that holds text stays as it was typed. Hydra would return 1000.0 for 1e3.
    """
    values = list(override.sweep_string_iterator())
    text = text_of(override).partition("=")[2].strip()
    if "(" in text.removeprefix("choice(") or not holds_text(override.get_key_element()):
        return values
    typed = typed_values(text)
    return typed if len(typed) == len(values) else values
