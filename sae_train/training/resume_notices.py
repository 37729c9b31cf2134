"""What a resumed run computes otherwise than the processes before it, as far as it can tell."""

from typing import Any


def notices(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each thing that keeps a run from going on bit for bit.

    Args:
        before, now: 'threads', 'is_screened' and 'is_compiled', as a checkpoint notes them; older ones lack some.
    """
    lines = []
    if before.get("threads") != now["threads"]:
        lines.append(f"this run computed with {before.get('threads')} threads so far and now has {now['threads']}: "
                     "it goes on, but not bit for bit.")  # fmt: skip
    if before.get("is_screened") not in (None, now["is_screened"]):
        screened = "screened its pre-activations by a product in bf16"
        did = screened if before["is_screened"] else "computed its pre-activations whole"
        lines.append(f"this run {did} so far and does not on this processor or in this layout: it goes on, but not "
                     "bit for bit.")  # fmt: skip
    if before.get("is_compiled") not in (None, now["is_compiled"]):
        did, does = ("with", "lacks") if before["is_compiled"] else ("without", "has")
        lines.append(f"this run computed {did} compiled kernels so far and now {does} them: it goes on, but not bit "
                     "for bit.")  # fmt: skip
    return lines
