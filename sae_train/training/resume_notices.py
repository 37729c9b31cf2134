"""Notices of a resumed run: why it does not go on bit for bit."""

from typing import Any


def notices(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each thing that keeps a run from going on bit for bit.

    Args:
        before: 'threads', 'processor' and 'precision' of the process that wrote the checkpoint.
        now: 'threads', 'processor' and 'precision' of this process.
    """
    lines = []
    if before.get("threads") != now["threads"]:
        lines.append(f"this run computed with {before.get('threads')} threads so far and now has {now['threads']}: "
                     "it goes on, but not bit for bit.")  # fmt: skip
    if before.get("processor") != now["processor"]:
        lines.append(f"this run computed on {before.get('processor')} so far and now computes on {now['processor']}: "
                     f"it goes on in {now['precision']}, but not bit for bit.")  # fmt: skip
    return lines
