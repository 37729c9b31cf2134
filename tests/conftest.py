"""What the tests share: small runs of the real program, its command line, and a clean slate for accelerate."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait take a busy machine from each other
}
os.environ.update(QUIET)  # before any of those libraries is imported

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

from sae_train.compose import compose_config
from sae_train.config import RunConfig
from sae_train.training.stop import WISHES

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where Triton is imported: by tests/test_triton.py alone, and by no run

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


LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")


class Outcome(NamedTuple):
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str


Command = Callable[..., Outcome]


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


def tiny_run(folder: Path) -> list[str]:
    """Return the overrides of the `tiny` fixture for any folder."""
    return [
        "n_features=256",
        "k=8",
        "tokens=8192",
        "batch_tokens=512",
        "harvest.lanes=8",
        "harvest.context_length=32",
        "harvest.contexts_per_forward=8",
        "harvest.pool_batches=8",
        "harvest.calibration_tokens=2048",
        "evaluation_tokens=4000",
        "log_every=2048",
        "tracking=none",
        f"runs={folder / 'runs'}",
    ]


def rows_run(folder: Path) -> list[str]:
    """Return the overrides of a run of 16 steps on random rows in `folder`: it starts in a fraction of the time."""
    (folder / "rows").mkdir(exist_ok=True)
    rows = torch.randn(8192, 16, generator=torch.Generator().manual_seed(0))
    save_file({"activations": rows}, folder / "rows" / "rows.safetensors")
    return [
        "harvest=tensors",
        f"harvest.path={folder / 'rows'}",
        "harvest.calibration_tokens=512",
        "n_features=64",
        "k=4",
        "tokens=4096",
        "batch_tokens=256",
        "evaluation_tokens=256",
        "log_every=512",
        "tracking=none",
        f"runs={folder / 'runs'}",
    ]


@pytest.fixture
def compose() -> Callable[..., RunConfig]:
    """Return `compose(*overrides)`: the checked configuration that the command line would run."""
    return lambda *overrides: compose_config(list(overrides))


def changed(overrides: list[str], *more: str) -> list[str]:
    """Return `overrides` with those keys that `more` gives anew replaced: the command line refuses a key twice."""
    keys = {override.split("=")[0] for override in more}
    return [override for override in overrides if override.split("=")[0] not in keys] + list(more)
