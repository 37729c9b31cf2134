"""Print the state of a sweep, a row a point: index, state, job, tokens so far, arguments, error.

    python scripts/sweep_status.py runs/sweep-3fa9c1

It reads and changes nothing. A point is done (its run has a summary), running, waiting (in the queue, or never
submitted), preempted (saved, to be resumed), stopped (by the numbers) or failed, with the last line of its message.
Where squeue exists, a run whose job is gone counts as failed. Elsewhere states are as they were recorded.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from sae_train.errors import UserError
from sae_train.sweeps.directory import PointState, SweepDirectory

HEADINGS = ("point", "state", "job", "tokens", "arguments", "note")


def row(state: PointState) -> tuple[str, ...]:
    """Return a point's cells."""
    tokens = "-" if state.tokens is None else f"{state.tokens:,}"
    return (str(state.index), state.state, state.job or "-", tokens, state.text, state.note)


def table(rows: list[tuple[str, ...]]) -> str:
    """Return rows as columns of text under their headings."""
    rows = [HEADINGS, *rows]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="a sweep's directory")
    try:
        states, asked = SweepDirectory(parser.parse_args().directory).states()
    except UserError as error:
        print(error, file=sys.stderr)
        return error.status
    print(table([row(state) for state in states]))
    counts = Counter(state.state for state in states)
    print(", ".join(f"{state} {n}" for state, n in counts.most_common()))
    if not asked:
        print("SLURM does not answer here: states are as they were recorded.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
