"""The process that speaks to Weights & Biases for a run: the only importer of wandb. `tracking.Wandb` starts it.

It runs as a script and imports nothing of this package. It reads JSON lines on stdin and answers with JSON lines on
stdout. A process of its own bounds wandb: it can be killed when it hangs, and its output and exit handlers end with it.
"""

import json
import os
import re
import signal
import sys
import time
from typing import Any

LONGEST_REASON = 300
"""Characters of an error of wandb's that are passed on."""


def main() -> None:
    """Serve one run, then leave at once: wandb's exit handlers may wait for its service forever."""
    try:
        serve()
    finally:
        os._exit(0)


def serve() -> None:
    """Start the wandb run that the first line describes, and pass rows on until the run finishes or is gone."""
    replies = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # whatever wandb and its service print
    os.dup2(nowhere, 2)
    request = json.loads(sys.stdin.buffer.readline())
    try:
        answer, run, histogram = begin(request)
    except BaseException as error:
        answer, run, histogram = {"error": reason(error)}, None, None
    reply(replies, answer)
    if run is None:
        return
    is_finished, problem = pass_on(run, histogram)
    if not is_finished:  # the run was killed: what wandb's service holds in memory would be lost with it
        signal.alarm(round(request["finish_seconds"]) + 5)  # kills this process, too, where wandb hangs
    try:
        run.finish(exit_code=0 if is_finished else 1)
    except BaseException as error:
        problem = problem or reason(error)
    reply(replies, {"error": problem} if problem else {})


def pass_on(run: Any, histogram: Any) -> tuple[bool, str]:
    """Give wandb what comes; return whether the last line said that the run is finished, and the first problem."""
    problem = ""
    for line in sys.stdin.buffer:
        message = json.loads(line)
        if "finish" in message:
            return True, problem
        try:
            if "row" in message:
                run.log(with_histogram(message["row"], histogram))
            else:
                run.summary.update(message["summary"])
        except BaseException as error:
            problem = problem or reason(error)
    return False, problem


def begin(request: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Return the answer to a request for a run, the run (None where wandb is off), and what makes a histogram."""
    sys.argv = request["argv"]  # wandb records the command
    import wandb

    options = request["options"]
    mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
    if mode == "disabled":
        return {"mode": mode}, None, None
    is_offline = mode in ("offline", "dryrun")
    why = ""
    if not is_offline and not has_credentials(wandb):
        is_offline, why = True, "not logged in"
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=max(1.0, request["deadline"] - time.monotonic()),
        finish_timeout=request["finish_seconds"],
        finish_timeout_raises=True,
        x_stats_pid=request["pid"],  # whose use of the processor and of memory is shown
    )
    run = wandb.init(mode="offline" if is_offline else None, settings=settings, **options)
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    edges = request["edges"]
    answer = {"mode": "offline" if is_offline else "online", "directory": run.settings.sync_dir, "why": why}
    return answer, run, lambda counts: wandb.Histogram(np_histogram=(counts, edges))


def has_credentials(wandb: Any) -> bool:
    """Return whether wandb can speak to its server without asking the user anything."""
    import inspect

    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)  # before 0.31


def with_histogram(row: dict[str, Any], histogram: Any) -> dict[str, Any]:
    """Return a row whose counts are histograms of wandb's."""
    return {key: histogram(value) if key.endswith("density/histogram") else value for key, value in row.items()}


def reason(error: BaseException) -> str:
    """Return an error as one line of bounded length, without control characters."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error) or type(error).__name__)
    text = text.partition("For further information")[0]  # as pydantic ends
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + "..."


def reply(descriptor: int, answer: dict[str, Any]) -> None:
    """Write one line for the run."""
    os.write(descriptor, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
