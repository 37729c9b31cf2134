"""Arguments as text: how one is quoted so that it can be pasted into a shell, and what a comma list was typed as.

Hydra's grammar takes a value with other signs than those of words and numbers in quotes, and a shell takes quotes away.
"""

import re
import shlex

_OF_THE_SHELL = set('"$`\\!')
"""What a shell reads inside of double quotes."""


def pasted(key: str, value: str) -> str:
    """Return `key=value` as it can be pasted into a shell, so that this program reads `value` as one text."""
    argument = f"{key}={_quoted(value)}"
    return shlex.quote(argument) if _OF_THE_SHELL & set(argument) else f'"{argument}"'


def _quoted(value: str) -> str:
    """Return a value in Hydra's quotes: a quote in it takes a backslash, as do backslashes before a quote."""
    quote = '"' if "'" in value and '"' not in value else "'"
    inner = re.sub(rf"(\\*){quote}", lambda found: f"{found[1]}{found[1]}\\{quote}", value)
    trailing = len(inner) - len(inner.rstrip("\\"))
    return f"{quote}{inner}{trailing * chr(92)}{quote}"


def typed_values(text: str) -> list[str]:
    """Return the values of a list `a,b` or `choice(a,b)` as they were typed; of anything else, the one text."""
    if text.startswith("choice(") and text.endswith(")"):
        text = text[len("choice(") : -1]
    values, quote, depth, is_escaped = [""], "", 0, False
    for sign in text:
        if sign == "," and not (quote or depth or is_escaped):
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
