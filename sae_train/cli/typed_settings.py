"""Settings of Python code as the command line takes them: from values to texts of the form `key=value`.

So both ways into this program have one grammar, one set of checks and one identity of a run.
"""

import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any

from sae_train.cli.overrides import LISTS, NAMES_OF_CHOICES
from sae_train.cli.quoting import grammar_text, quoted
from sae_train.errors import raise_all


def settings_texts(settings: Sequence[Any]) -> list[str]:
    """Return the arguments of the command line that mean these settings.

    Example: `["k=16", {"sparsifier": "topk", "harvest": {"lanes": 8}}]` gives "k=16", "sparsifier=topk" and
    "harvest.lanes=8".

    Args:
        settings: each a text `key=value`, or a mapping from keys to values. A mapping inside a mapping is a group.

    Raises:
        ConfigError: lists the keys and values that are no settings.
    """
    texts, problems = list[str](), list[str]()
    for each in settings:
        if isinstance(each, str):
            texts.append(each)
        elif isinstance(each, Mapping):
            _add(each, "", texts, problems)
        else:
            problems.append(
                f"{each!r}: a {type(each).__name__} is no setting. Give texts such as 'k=32', or dictionaries such as "
                "{'k': 32}."
            )
    raise_all(problems)
    return texts


def _add(values: Mapping[Any, Any], prefix: str, texts: list[str], problems: list[str]) -> None:
    """Add the text of each value of a mapping, or its problem. `prefix` is the group of a nested mapping."""
    for key, value in _flat(values, prefix, problems).items():
        try:
            texts.append(f"{key}={_text(key, value)}")
        except ValueError as error:
            problems.append(f"{key}: {error}")


def _flat(values: Mapping[Any, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
    """Return nested mappings as one with dotted keys. The key of a choice, as in config.yaml, becomes its group."""
    found: dict[str, Any] = {}
    for each, value in values.items():
        if not isinstance(each, str) or not each or "=" in each:
            problems.append(f"{each!r}: is no key of a setting. Keys are texts, as in {{'k': 32}}.")
            continue
        key = f"{prefix}{each}"
        key = key.rpartition(".")[0] if prefix and key in NAMES_OF_CHOICES else key
        inner = _flat(value, f"{key}.", problems) if isinstance(value, Mapping) and key not in LISTS else {key: value}
        problems += [f"{again}: is given twice, nested and with a dot. Keep one." for again in inner.keys() & found]
        found |= inner
    return found


def _text(key: str, value: Any) -> str:
    """Return a value as Hydra's grammar reads it.

    Raises:
        ValueError: it has no such text; the message says why.
    """
    if key == "grid" and isinstance(value, Mapping):
        return _grid(value)
    if key == "variants" and isinstance(value, list | tuple):
        return f"[{','.join(map(_variant, value))}]"
    return grammar_text(_plain(value))


def _grid(value: Mapping[Any, Any]) -> str:
    problems = list[str]()
    parts = [f"{key}:{grammar_text(_plain(each))}" for key, each in _flat(value, "", problems).items()]
    if problems:
        raise ValueError(problems[0])
    return f"{{{','.join(parts)}}}"


def _variant(value: Any) -> str:
    """Return an entry of `variants` as a quoted text. It is a text already, or a mapping."""
    if isinstance(value, Mapping):
        value = " ".join(settings_texts([value]))
    return quoted(value) if isinstance(value, str) else grammar_text(_plain(value))


def _plain(value: Any) -> Any:
    """Return a value as None, a truth value, a number, a text or a list of these."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral):  # numpy's
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, list | tuple | range):
        return [_plain(each) for each in value]
    raise ValueError(
        f"a {type(value).__name__} is no value of a setting. Give a number, a text, True, False, None or a list."
    )
