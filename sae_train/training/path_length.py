"""Paths that are too long for the file system are refused before anything is written."""

import os
from pathlib import Path

from sae_train.errors import ConfigError
from sae_train.formats.durable import explained

NAME_MAX = 255
"""Bytes of a name that file systems take."""
SHOWN = 120
"""Characters of a path that a message about its length shows."""


def check_length(path: Path, *, below: int) -> None:
    """Refuse `path` if the system takes no paths that are `below` bytes longer, or no names as long as its own.

    Raises:
        ConfigError: saying how long they are and may be.
    """
    with explained(path, what="read"):
        whole = os.fsencode(os.path.abspath(path))
    most = os.pathconf("/", "PC_PATH_MAX") - 1  # the byte that ends it counts
    length = len(whole) + 1 + below
    if length > most:
        raise ConfigError(
            f"{_start(path)}: a path of {len(whole)} bytes. Files in it have up to {below} more, and this system takes "
            f"{most} in all. Choose a shorter directory with runs=DIR."
        )
    longest = max(len(part) for part in whole.split(b"/"))
    if longest > NAME_MAX:
        raise ConfigError(
            f"{_start(path)}: one of its names has {longest} bytes, and file systems take {NAME_MAX}. Choose another "
            "directory with runs=DIR."
        )


def _start(path: Path) -> str:
    """Return a path for a message, cut to the characters that a message shows."""
    text = str(path)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
