"""Quoting of arguments for a shell, and the parts of a list or mapping as they were typed.

Hydra's grammar needs quotes around a value with other signs than words and numbers have. A shell removes quotes.
"""

import re
import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

_OF_THE_SHELL = set('"$`\\!')
"""Signs that a shell reads inside of double quotes."""


def pasted(key: str, value: str) -> str:
    """Return `key=value`, quoted so that a shell and then Hydra read `value` as one text.

    Example: `pasted("name", "a=b")` is `"name='a=b'"`, double quotes included.
    """
    argument = f"{key}={quoted(value)}"
    return shlex.quote(argument) if _OF_THE_SHELL & set(argument) else f'"{argument}"'


def quoted(value: str) -> str:
    """Return a value in Hydra's quotes. A quote in it takes a backslash, as do backslashes before a quote."""
    quote = '"' if "'" in value and '"' not in value else "'"
    inner = re.sub(rf"(\\*){quote}", lambda found: f"{found[1]}{found[1]}\\{quote}", value)
    trailing = len(inner) - len(inner.rstrip("\\"))
    return f"{quote}{inner}{trailing * chr(92)}{quote}"


def grammar_text(value: Any) -> str:
    """Return a value as Hydra's grammar reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(grammar_text(each) for each in value)}]"
    if not isinstance(value, str):
        return str(value)
    is_plain = re.fullmatch(r"[A-Za-z_][\w./-]*|\$\{[\w.]+\}", value) and value.lower() not in _WORDS
    return value if is_plain else quoted(value)


_WORDS = ("null", "true", "false", "nan", "inf")
"""Words that Hydra's grammar reads as values of another type than text."""


def typed_values(text: str) -> list[str]:
    """Return the values of a list `a,b` or `choice(a,b)` as they were typed; any other text is one value."""
    if text.startswith("choice(") and text.endswith(")"):
        text = text[len("choice(") : -1]
    return _split(text, at=",")


def typed_keys(text: str) -> list[str]:
    """Return the keys of a mapping `{a:1,b:[2,3]}` as they were typed, repeated ones, too."""
    inner = text.strip().removeprefix("{").removesuffix("}").strip()
    return [part.partition(":")[0].strip() for part in _split(inner, at=",")] if inner else []


def typed_words(text: str) -> list[str]:
    """Return the words of a text, separated by spaces outside of quotes and brackets."""
    return [word for word in _split(text, at=" \t\n") if word]


def _split(text: str, *, at: str) -> list[str]:
    """Return the parts of a text between signs of `at` that lie outside of quotes and brackets."""
    values, quote, depth, is_escaped = [""], "", 0, False
    for sign in text:
        if sign in at and not (quote or depth or is_escaped):
            values.append("")
            continue
        values[-1] += sign
        if is_escaped or sign == "\\":
            is_escaped = not is_escaped
        elif quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "([{") - (sign in ")]}")
    return [value.strip() for value in values]


def text_of(override: "Override") -> str:
    """Return an override as it was typed."""
    assert override.input_line is not None
    return override.input_line


def typed_value(override: "Override") -> Any:
    """Return the value for a setting that may hold text: numbers and truth values as they were typed."""
    value, text = override.value(), text_of(override).partition("=")[2].strip()
    return (
        text if isinstance(value, bool | int | float) and "(" not in text else value
    )  # "(": of a function of Hydra's grammar
