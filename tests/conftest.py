"""What the tests share: small runs of the real program, its command line, and a clean slate for accelerate."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.command_line import LAUNCHERS, QUIET, Command, Outcome

os.environ.update(QUIET)  # before any of those libraries is imported

import pytest
import torch
from hypothesis import settings

from sae_train.cli.compose import compose_config
from sae_train.config import RunConfig
from sae_train.training.signals import WISHES
from tools.tiny_runs import tiny_run

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, by tests/kernels/test_triton.py

settings.register_profile("tests", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tests")
torch.set_num_threads(2)

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in the background of a shell; what is started here inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)  # there is no such hook without pytest-xdist
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Start no workers for a few files that are named: they would take longer to come than the tests."""
    named = [each for each in config.args if not Path(each).is_dir()]
    return 0 if 0 < len(named) == len(config.args) <= 3 else None


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Let no test inherit another one's processes: accelerate keeps them in class attributes."""
    yield
    if "accelerate" not in sys.modules:
        return
    from accelerate.state import AcceleratorState, GradientState

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """Let no test leave the handlers of a run behind: whoever ends the tests by SIGTERM would not be heard."""
    before = {number: signal.getsignal(number) for number in WISHES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Return `command(*arguments, timeout=, **environment)`: `sae-train` in a process of its own, in tmp_path."""

    def run(*arguments: str, timeout: float = 300, **environment: str) -> Outcome:
        variables = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
        done = subprocess.run(
            [sys.executable, "-m", "sae_train", *arguments],
            cwd=tmp_path,
            env={**variables, **QUIET, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def torchrun(tmp_path: Path) -> Command:
    """Return `torchrun(n, *arguments, timeout=)`: `sae-train` on n CPU processes, in tmp_path."""

    def run(n: int, *arguments: str, timeout: float = 300, **environment: str) -> Outcome:
        variables = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m",
             "sae_train", *arguments],
            cwd=tmp_path,
            env={**variables, **QUIET, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Return the overrides of a run of 16 steps on the bundled model and corpus, written below tmp_path."""
    return tiny_run(tmp_path)


@pytest.fixture
def compose() -> Callable[..., RunConfig]:
    """Return `compose(*overrides)`: the checked configuration that the command line would run."""
    return lambda *overrides: compose_config(list(overrides))
