"""The plan's estimate of memory has room for what a step holds, and for little more; what lacks memory says of what."""

import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_train.cli.compose import compose_config
from sae_train.config.lanes import LaneSizes
from sae_train.errors import ConfigError
from sae_train.harvest.build import check_stream
from sae_train.harvest.prefetch import Result
from sae_train.ranks.interface import Solo
from sae_train.sparsifiers import SPARSIFIERS
from sae_train.training.memory import Holding, OutOfMemory, available_bytes, largest_pool, named_when_it_runs_out
from sae_train.training.run import plan_of
from sae_train.training.scratch import Scratch
from sae_train.training.trainer import Trainer
from tools import grid_world as world
from tools.command_line import changed
from tools.tiny_runs import rows_run

F = 2048
CASES = {name: [f"sparsifier={name}"] for name in SPARSIFIERS if name not in ("batch_topk", "topk")} | {
    "temporal_mask": ["sparsifier=temporal_mask", "sparsifier.warmup=0", "sparsifier.ramp=0"],
    "gated": ["sparsifier=gated", "nesting=matryoshka"],
}
"""Each as it takes the most."""
QUICK = ("gradient", "temporal_mask")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    world.write_activations(folder)
    return folder


def peak_bytes(trainer: Trainer) -> int:
    """Return the largest number of bytes that the next step holds in addition to those before it."""
    batch = trainer.stream.batch(trainer.n_done)
    trainer.learners[0]._scratch = Scratch()  # kept from the step before; made anew, it counts
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        trainer.step(batch)
    results = profile.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_a_bf16_run_holds_rounded_weights_besides(rows: Path) -> None:
    """Wide, so that weights are most of what is held."""
    held = {}
    for precision in ("float32", "bf16"):
        config = world.config_of(rows, ["sparsifier=topk"], precision=precision, n_features=200 * F)
        trainer = world.build(replace(config, batch_tokens=16), Solo())
        trainer.step(trainer.stream.batch(0))
        held[precision] = peak_bytes(trainer), trainer.plan.memory_bytes
    more, expected = (held["bf16"][i] - held["float32"][i] for i in (0, 1))
    assert expected > 0
    assert more <= 1.05 * expected


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES])
def test_the_estimate_is_of_a_step_that_begins_dense(rows: Path, case: str, precision: str) -> None:
    """In matrices as large as the batch's pre-activations, beside weights, moments and gradients."""
    config = world.config_of(rows, CASES[case], precision=precision, n_features=F)
    trainer = world.build(config, Solo())
    trainer.step(trainer.stream.batch(0))
    parameters, matrix = 4 * trainer.learners[0].plan.parameters, 4 * world.N * F
    held = (peak_bytes(trainer) - parameters) / matrix
    estimated = (trainer.plan.memory_bytes - 4 * parameters) / matrix
    assert held <= estimated <= held + 2.5


NAMES = ("moments, 4 of [", "pre-activations and what is as large, 2 of [")
KNOBS = ("lower n_features", "lower batch_tokens", "parallel=features")


def test_what_cannot_fit_is_refused_with_the_largest_tensors_and_what_shrinks_them(rows: Path) -> None:
    config = world.config_of(rows, [], precision="float32", n_features=10_000_000)
    config = replace(config, batch_tokens=2000, tokens=10**8)
    with pytest.raises(ConfigError) as caught:
        plan_of(config, check_stream(config.source, n_ranks=1), n_ranks=1)
    said = str(caught.value)
    assert all(part in said for part in (*NAMES, *KNOBS))
    assert said.index(NAMES[1]) < said.index(NAMES[0])  # the larger first
    assert "pre-activations and what is as large, 2 of [2000, 10000000] 160.0 GB" in said


@given(
    pool=st.integers(2, 400), lanes=st.integers(1, 8), share=st.integers(1, 64), forward=st.integers(1, 300),
    batch_bytes=st.integers(1, 10**6), too_much=st.integers(1, 10**9),
)  # fmt: skip
def test_the_largest_pool_is_the_one_that_a_search_finds(
    pool: int, lanes: int, share: int, forward: int, batch_bytes: int, too_much: int
) -> None:
    sizes = LaneSizes(lanes=lanes, share=share, context_length=forward, contexts_per_forward=1, pool_batches=pool)
    fit = [n for n in range(2, pool) if n * share >= 2 * forward and (pool - n) * batch_bytes >= too_much]
    assert largest_pool(sizes, batch_bytes=batch_bytes, too_much=too_much) == max(fit, default=None)


def test_a_limit_of_the_process_counts() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = available_bytes() // 2
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        assert available_bytes() == limit
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def allocated_early() -> torch.Tensor:
    return Result(lambda: torch.empty(2**52)).get()


@pytest.mark.parametrize(
    "work", [lambda: torch.empty(2**52), lambda: bytearray(2**62), allocated_early], ids=["torch", "python", "early"]
)
def test_memory_that_runs_out_is_named(work: Callable[[], object]) -> None:
    holdings = (Holding("small", 0, ("nothing",)), Holding("weights", 10**9, ("lower n_features",)))
    with pytest.raises(OutOfMemory) as caught, named_when_it_runs_out(holdings):
        work()
    assert "Largest, estimated: weights 1.0 GB. What shrinks them: lower n_features." in str(caught.value)
    assert caught.value.status == 2


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("shapes differ"), ValueError("no")):
        with pytest.raises(type(error), match=str(error)), named_when_it_runs_out(()):
            raise error


@pytest.mark.slow
def test_a_run_without_memory_says_what_is_large(tmp_path: Path) -> None:
    """Address space is what a process can be denied here: as much as the program alone takes, and a little more."""
    arguments = [
        *changed(rows_run(tmp_path), "n_features=400_000", "batch_tokens=1024", "tokens=4096"),
        "aux_loss=none",
    ]
    script = f"ulimit -v {4 * 1024 * 1024}; exec '{sys.executable}' -m sae_train {' '.join(arguments)}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert "memory ran out (" in done.stderr
    assert all(part in done.stderr for part in NAMES)
    assert "Traceback" not in done.stderr


def test_the_language_model_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_config([])
    facts = check_stream(config.source, n_ranks=1)
    plan = plan_of(config, facts, n_ranks=1)
    assert {each.what: each.n_bytes for each in plan.holdings}["language model"] == facts.model_bytes > 0
    for available, fits in ((plan.memory_bytes, True), (plan.memory_bytes - 1, False)):
        monkeypatch.setattr("sae_train.training.plan.available_bytes", lambda available=available: available)
        with nullcontext() if fits else pytest.raises(ConfigError, match=r"language model 0\.0"):
            plan_of(config, facts, n_ranks=1)
