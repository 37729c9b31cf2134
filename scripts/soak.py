"""Stop real runs at random moments, by every signal, and check that they end where they would have ended.

    python scripts/soak.py --kills 200                    # one process
    python scripts/soak.py --kills 100 --ranks 2          # torchrun; signals reach one rank of it, or all
    python scripts/soak.py --kills 50 --signals SIGTERM
    python scripts/soak.py --kills 50 --override checkpoint.beside=true

A run of 16 steps is made once without a fault. Then the same command is started again and again, each time hit by one
fault, until the run reaches its end. Weights and metrics must be the same, bit for bit, and every published checkpoint
must be whole. Then the next run begins, until there were enough faults. The script prints a table. It exits with 1 if
anything was wrong, and keeps those runs below --folder.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from tools.processes import checkpoints, launch, rows, weights, workers

Process = subprocess.Popen[str]

COLUMNS = ("faults", "while starting", "in time", "said why", "right end", "wrong")
ALONE = ("SIGKILL", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGTERM twice")
TOGETHER = ("SIGKILL of all", "SIGKILL of a rank", "SIGTERM of a rank", "SIGUSR2 of a rank", "SIGUSR2 of all", "pause")
STOPPED = ("saved at step", "nothing to save yet")
SAID = (*STOPPED, "lost touch with another rank", "has not been heard of", "(SIGKILL)")
"""What tells the user why a run stopped; the last by torchrun, of the rank that was killed."""
A_MINUTE = 75.0
"""Seconds in which all ranks must have stopped: the promise, and what a busy machine adds."""


class Torn:
    """A run that is hit by faults until it reaches its end."""

    def __init__(
        self, folder: Path, *, n_ranks: int, arguments: list[str], reference: "Reference", chance: random.Random
    ) -> None:
        self.arguments = arguments
        self.folder, self.n_ranks, self.reference, self.chance = folder, n_ranks, reference, chance
        self.faults: list[str] = []
        self.problems: list[str] = []
        folder.mkdir()

    def go(self, kinds: list[str], counts: dict[str, Counter[str]], budget: int) -> None:
        """Hit the run by at most `budget` faults, let it end, and count the outcomes."""
        while len(self.faults) < budget:
            kind = self.chance.choice(kinds)
            if not self._hit(kind, counts[kind]):
                break
        else:
            self._end(launch(self.folder, self.n_ranks, self.arguments))
        self._compare()
        for kind in self.faults:
            counts[kind]["wrong" if self.problems else "right end"] += 1

    def _hit(self, kind: str, count: Counter[str]) -> bool:
        """Start the run and hit it; return False if it reached its end before."""
        process = launch(self.folder, self.n_ranks, self.arguments)
        listens = self._wait_for_a_moment(process)
        self._wait(process, lambda: bool(self._ranks(process)))
        if process.poll() is not None:
            self._end(process)
            return False
        self.faults.append(kind)
        count["faults"] += 1
        count["while starting"] += not listens
        self._send(kind, process)
        began = time.monotonic()
        text = self._ended(process)
        in_time = time.monotonic() - began < A_MINUTE
        count["in time"] += in_time
        if not in_time:
            self.problems.append(f"{kind}: stopped after {time.monotonic() - began:.0f} s only")
        said = any(words in text for words in SAID)
        count["said why"] += said
        self._check(kind, process.returncode, text, said=said, listens=listens)
        return process.returncode != 0

    def _wait_for_a_moment(self, process: Process) -> bool:
        """Wait for a random moment of the run's life; return whether it had its directory by then."""
        draw = self.chance.random()
        if draw < 0.1:
            time.sleep(self.chance.uniform(0, self.reference.start))
            return False
        if draw < 0.5:
            started = time.time()
            self._wait(process, lambda: any(p.stat().st_mtime > started for p in self.folder.glob("runs/*/.lock")))
            time.sleep(self.chance.uniform(0, self.reference.rest))
        else:
            before = checkpoints(self.folder)
            self._wait(process, lambda: checkpoints(self.folder) != before)
            time.sleep(self.chance.uniform(0, self.reference.rest / 8))
        return True

    def _wait(self, process: Process, happened: Callable[[], bool]) -> None:
        while process.poll() is None and not happened():
            time.sleep(0.002)

    def _ranks(self, process: Process) -> list[int]:
        return [process.pid] if self.n_ranks == 1 else workers(process)

    def _send(self, kind: str, process: Process) -> None:
        """Make the fault of this name."""
        ranks = self._ranks(process)
        if kind == "pause":  # a slow rank: nothing may come of it
            slow = self.chance.choice(ranks)
            poke(slow, signal.SIGSTOP)
            time.sleep(self.chance.uniform(0.5, 3.0))
            poke(slow, signal.SIGCONT)
            return
        name, _, whom = kind.partition(" ")
        targets = [self.chance.choice(ranks)] if whom == "of a rank" else ranks
        if name == "SIGKILL" and whom != "of a rank":
            targets = [process.pid, *ranks] if self.n_ranks > 1 else ranks
        for _ in range(2 if whom == "twice" else 1):
            for target in targets:
                poke(target, signal.Signals[name])
            time.sleep(self.chance.uniform(0, 0.1) if whom == "twice" else 0)

    def _ended(self, process: Process) -> str:
        text, _ = process.communicate(timeout=600)
        return text

    def _check(self, kind: str, status: int, text: str, *, said: bool, listens: bool) -> None:
        """Check the aftermath of a fault: the status, the message, and that all checkpoints are whole."""
        asked = kind.startswith(("SIGTERM", "SIGUSR"))
        possible = {0, 75 if self.n_ranks == 1 else 1} if asked else {0} if kind == "pause" else set(range(-64, 256))
        if asked and not listens:
            possible |= {-signal.SIGTERM, -signal.SIGUSR1, -signal.SIGUSR2}
        if asked:
            said = any(words in text for words in STOPPED)
        spoke = said or not listens or status == 0 or kind in ("SIGKILL", "SIGKILL of all")
        own_traceback = "sae_train/" in text and "Traceback" in text
        if status not in possible or not spoke or own_traceback or "damaged" in text:
            self.problems.append(f"{kind}: status {status}\n{text}")
        for path in self.folder.glob("runs/*/checkpoints/step_*"):
            notes = json.loads((path / "checkpoint.json").read_text())
            for name, facts in notes["files"].items():
                if hashlib.sha256((path / name).read_bytes()).hexdigest() != facts["sha256"]:
                    self.problems.append(f"{kind}: {path / name} is damaged")

    def _end(self, process: Process) -> None:
        text = self._ended(process)
        if process.returncode != 0:
            self.problems.append(f"the run did not come to its end: status {process.returncode}\n{text}")

    def _compare(self) -> None:
        if not self.problems and weights(self.folder) != self.reference.weights:
            self.problems.append("other weights")
        if not self.problems and rows(self.folder) != self.reference.rows:
            self.problems.append("other metrics")
        if not self.problems:
            shutil.rmtree(self.folder)


class Reference:
    """The run without a fault, and the seconds of its parts."""

    def __init__(self, folder: Path, *, n_ranks: int) -> None:
        folder.mkdir()
        began = time.monotonic()
        process = launch(folder, n_ranks, [])
        while process.poll() is None and not list(folder.glob("runs/*/.lock")):
            time.sleep(0.002)
        self.start = time.monotonic() - began
        text, _ = process.communicate(timeout=600)
        self.rest = time.monotonic() - began - self.start
        if process.returncode != 0:
            raise SystemExit(f"the run without a fault failed:\n{text}")
        self.weights, self.rows = weights(folder), rows(folder)


def poke(target: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(target, number)


def table(counts: dict[str, Counter[str]]) -> str:
    total: Counter[str] = sum(counts.values(), Counter())
    lines = [f"| fault | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, count in [*counts.items(), ("all", total)]:
        lines.append(f"| {name} | {' | '.join(str(count[column]) for column in COLUMNS)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument(
        "--signals", default="mixed", help="faults, joined by commas (SIGKILL,SIGTERM); default: all of them, mixed"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--override", nargs="*", default=[], help="further key=value of the runs that are hit")
    parser.add_argument("--folder", type=Path, help="folder of the runs; default: a temporary one")
    options = parser.parse_args()
    known = ALONE if options.ranks == 1 else TOGETHER
    kinds = list(known) if options.signals == "mixed" else options.signals.split(",")
    if not set(kinds) <= set(known):
        parser.error(f"--signals: with {options.ranks} ranks there are {', '.join(known)}")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    chance, counts = random.Random(options.seed), {kind: Counter[str]() for kind in kinds}
    reference = Reference(folder / "whole", n_ranks=options.ranks)
    print(f"without a fault: {reference.start:.1f} s to the start, {reference.rest:.1f} s from there", flush=True)
    n_runs = n_wrong = 0
    while (left := options.kills - sum(count["faults"] for count in counts.values())) > 0:
        given = {"n_ranks": options.ranks, "arguments": options.override, "reference": reference, "chance": chance}
        torn = Torn(folder / f"torn{n_runs}", **given)
        torn.go(kinds, counts, left)
        n_runs += 1
        n_wrong += bool(torn.problems)
        verdict = "; ".join(torn.problems) or "the same end"
        print(f"run {n_runs}: {', '.join(torn.faults) or 'no fault'}: {verdict}", flush=True)
    print(f"\n{n_runs} runs, {n_wrong} wrong\n\n{table(counts)}")
    if n_wrong == 0 and options.folder is None:
        shutil.rmtree(folder)
    return int(n_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
