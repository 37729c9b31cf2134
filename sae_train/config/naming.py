"""Names of a run's directories: their greatest length, how longer ones are cut, and which typed names are usable."""

import hashlib
import os
import unicodedata

LONGEST_NAME = 119
"""Largest name of a directory, in bytes. File systems take 255, encrypted ones 143, and a temporary name is longer."""
DIGITS = 8
"""Hex digits at the end of a name that was cut."""
UNUSABLE = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories of control characters, of bytes that are no characters, and of line ends."""


def shortened(text: str, longest: int = LONGEST_NAME) -> str:
    """Return `text`, cut to `longest` bytes where it is longer.

    A name that was cut ends in hex digits of a hash of the whole text.
    """
    raw = _bytes(text)
    if len(raw) <= longest:
        return text
    digest = hashlib.sha256(raw).hexdigest()[:DIGITS]
    return raw[: longest - DIGITS - 1].decode("utf-8", errors="ignore") + f"-{digest}"


def name_problem(name: str) -> str | None:
    """Return the problem of a name for a directory below `runs`, or None where it is usable.

    A name may be several names joined by '/'.
    """
    if any(unicodedata.category(character) in UNUSABLE for character in name):
        return f"name={name!a}: holds control characters, or bytes that are not UTF-8. Choose another name."
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return f"name={name}: this locale has no such characters. Set LC_ALL=C.UTF-8, or choose another name."
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return f"name={name}: not a directory below the one that runs= names. Choose a name such as mine or group/mine."
    size = max(len(_bytes(part)) for part in parts)
    if size > LONGEST_NAME:
        return f"name={name}: {size} bytes long, and the name of a directory may have {LONGEST_NAME}. Shorten it."
    return None


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")
