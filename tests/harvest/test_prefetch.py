"""Harvest ahead of the step: the same batches, states and errors as without, no thread left, and who waited is told."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_train import config as schema
from sae_train.cli.train import run_command
from sae_train.config import RunConfig
from sae_train.errors import DataError, UserError
from sae_train.harvest.batch import Batch
from sae_train.harvest.build import Stream, build_stream
from sae_train.harvest.live import LiveStream
from sae_train.harvest.pool import LanePool
from sae_train.harvest.prefetch import Prefetcher
from sae_train.harvest.tensors import TensorStream
from sae_train.ranks.interface import Ranks, Solo
from tools.grid_of_threads import LOADING, on_ranks
from tools.one_of_each import only
from tools.processes import checkpoints, finish, kill_after_progress, launch, rows, weights
from tools.small_runs import identity_of, torch_threads
from tools.tiny_models import live_config, save_model, save_sentences, tensors_config
from tools.tiny_runs import rows_run

STEPS = 24
TOKENS = STEPS * 64
KINDS = ("live", "gradients", "tensors")


def harvesters() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "harvest"]


@pytest.fixture(autouse=True)
def _none_is_left() -> Iterator[None]:
    before = harvesters()
    yield
    assert harvesters() == before


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a text and rows."""
    folder = tmp_path_factory.mktemp("source")
    save_model(folder / "model", "llama")
    save_sentences(folder, 200)
    (folder / "rows").mkdir()
    draw = torch.Generator().manual_seed(0)
    save_file({"activations": torch.randn(6000, 16, generator=draw)}, folder / "rows" / "a.safetensors")
    return folder


def config_of(source: Path, kind: str, prefetch: int, **values: Any) -> RunConfig:
    if kind == "tensors":
        return tensors_config(source / "rows", prefetch=prefetch, **{"tokens": TOKENS} | values)
    harvest = {"prefetch": prefetch} | values.pop("harvest", {})
    config = live_config(source / "model", source / "a.jsonl", harvest=harvest, **{"tokens": TOKENS} | values)
    gradient = schema.GradientConfig(name="gradient", beta=1.0, multi_weight=0.0, revival=1.0)
    return replace(config, sparsifier=gradient) if kind == "gradients" else config


def opened(config: RunConfig, ranks: Ranks | None = None) -> Any:
    with LOADING:
        return build_stream(config.source, ranks=ranks or Solo())


def until_idle(stream: Stream) -> None:
    """Wait until nothing is left to be done ahead: the thread has done all that it may."""
    assert isinstance(stream, LiveStream | TensorStream)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with stream._prefetcher.paused():
            if stream._find_work() is None:
                return
        time.sleep(0.001)
    raise AssertionError("the thread never comes to an end")


def batches_of(config: RunConfig, ranks: Ranks | None = None, *, patient: bool = False) -> list[Tensor]:
    """Return the batches of a run; `patient`: let the thread come as far ahead as it may before each."""
    stream = opened(config, ranks)
    try:
        stream.start()
        batches = []
        for step in range(STEPS):
            batches.append(only(stream.batch(step)).x_ND)
            if patient:
                until_idle(stream)
        return batches
    finally:
        stream.close()


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_bit_for_bit_those_without(source: Path, kind: str) -> None:
    expected = batches_of(config_of(source, kind, 0))
    for prefetch, patient in ((1, False), (3, True), (8, False)):
        found = batches_of(config_of(source, kind, prefetch), patient=patient)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_ranks_see_the_same_batches(source: Path) -> None:
    expected = batches_of(config_of(source, "live", 0))
    together = on_ranks(2, lambda ranks: batches_of(config_of(source, "live", 4), ranks))
    for batch, parts in zip(expected, zip(*together, strict=True), strict=True):
        assert torch.equal(batch, torch.cat(parts))


def states(stream: Stream) -> dict[str, Tensor]:
    lanes = {f"{lane}/{name}": value for lane, own in stream.lane_states().items() for name, value in own.items()}
    return stream.replicated_state() | lanes


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_of_its_step_and_not_of_what_is_harvested_ahead(source: Path, kind: str) -> None:
    plain, early = opened(config_of(source, kind, 0)), opened(config_of(source, kind, 8))
    again = opened(config_of(source, kind, 3))
    try:
        plain.start()
        early.start()
        for step in range(STEPS):
            assert torch.equal(only(plain.batch(step)).x_ND, only(early.batch(step)).x_ND)
            if step % 5 == 2:
                until_idle(early)
            expected, found = states(plain), states(early)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[name], found[name]) for name in expected)
            if step == 13:
                lanes = early.lane_states()
                again.restore(early.replicated_state(), lanes.__getitem__)
        for step in range(14, STEPS):
            again.batch(step)
        assert all(torch.equal(value, states(plain)[name]) for name, value in states(again).items())
    finally:
        for stream in (plain, early, again):
            stream.close()


@pytest.mark.parametrize("prefetch", [1, 8])
def test_what_the_thread_does_is_what_would_be_done_anyway(
    source: Path, monkeypatch: pytest.MonkeyPatch, prefetch: int
) -> None:
    """No forward pass is made for nothing: not beyond the bound, not beyond a refill, not behind the run's end."""

    def forwards(config: RunConfig) -> int:
        stream, count = opened(config), 0
        activations = stream.language_model.activations

        def counted(ids_BT: Tensor) -> dict[str, Tensor]:
            nonlocal count
            count += 1
            return activations(ids_BT)

        monkeypatch.setattr(stream.language_model, "activations", counted)
        stream.start()
        for step in range(STEPS):
            stream.batch(step)
            until_idle(stream)
            ahead = [sum(len(outcome.get()) for outcome in lane._early) for lane in stream._lanes]
            assert max(ahead) < prefetch * 16 + 2 * 15 or not prefetch
        stream.close()
        return count

    assert forwards(config_of(source, "live", prefetch)) == forwards(config_of(source, "live", 0))


def first_error(config: RunConfig, spoil: Any) -> tuple[int, type, str]:
    """Return at which step a run ends, with what, and what it says."""
    stream, step = opened(config), 0
    try:
        stream.start()
        spoil(stream)
        for step in range(STEPS):
            stream.batch(step)
            if config.harvest.prefetch:
                until_idle(stream)
    except (UserError, OSError, RuntimeError) as error:
        return step, type(error), str(error)
    finally:
        stream.close()
    raise AssertionError("nothing went wrong")


def failing(what: Exception, *, after: int) -> Any:
    """Return a function that makes the n-th next reading of its text fail, in every lane."""

    def torn(contexts: Callable[[int], Tensor], lane: int, left: Iterator[int], n: int) -> Tensor:
        if next(left, None) is None:
            raise type(what)(f"{what} of lane {lane}")
        return contexts(n)

    def spoil(stream: LiveStream) -> None:
        for lane in stream._lanes:
            text = lane.raw._text
            text.contexts = partial(torn, text.contexts, text.index, iter(range(after)))

    return spoil


@pytest.mark.parametrize(
    "error", [DataError("a line that is no JSON"), OSError("a disk that is gone"), RuntimeError("no memory")]
)
def test_errors_come_at_the_same_step_with_the_same_text(source: Path, error: Exception) -> None:
    expected = first_error(config_of(source, "live", 0), failing(error, after=5))
    assert 0 < expected[0] < STEPS - 1
    for prefetch in (1, 8):
        assert first_error(config_of(source, "live", prefetch), failing(error, after=5)) == expected


def test_a_file_that_goes_bad_stops_the_run_at_its_step(source: Path) -> None:
    def spoil(stream: TensorStream) -> None:
        read = stream._read

        def torn(step: int) -> Tensor:
            if step == 9:
                raise OSError("Input/output error")
            return read(step)

        stream._read = torn

    found = [first_error(config_of(source, "tensors", prefetch), spoil) for prefetch in (0, 1, 5)]
    assert found == [(9, OSError, "Input/output error")] * 3


def test_text_that_ends_stops_the_run_where_it_did(source: Path) -> None:
    values: dict[str, Any] = {"repeat": False, "tokens": 64_000}

    def ends(prefetch: int) -> tuple[int, str]:
        stream, step = opened(config_of(source, "live", prefetch, **values)), 0
        try:
            stream.start()
            for step in range(1000):
                stream.batch(step)
                if prefetch:
                    until_idle(stream)
        except DataError as error:
            return step, str(error)
        finally:
            stream.close()
        raise AssertionError("the text never ends")

    expected = ends(0)
    assert "the corpus gives" in expected[1]
    assert ends(8) == expected


def test_it_stands_still_while_the_language_model_is_used_elsewhere(source: Path) -> None:
    stream = opened(config_of(source, "live", 8))
    try:
        stream.start()
        stream.batch(0)
        for _ in range(20):
            with stream.quiet():
                before = stream._prefetcher.seconds, [lane.in_hand for lane in stream._lanes]
                list(stream.held_out.batches("evaluation", max_tokens=64, ranks=Solo()))
                assert before == (stream._prefetcher.seconds, [lane.in_hand for lane in stream._lanes])
        until_idle(stream)
        assert stream.beside_seconds() > 0
    finally:
        stream.close()


def test_a_pool_knows_its_next_refill() -> None:
    """Against a pool that is taken from until it is due."""
    for filled in range(32, 97):
        for last_row in (0, 40, 64, 1000):
            pool = LanePool({"here": Batch(torch.zeros(96, 1))}, lane=0, share=8, forward_rows=20, seed=0)
            pool.add({"here": Batch(torch.zeros(filled, 1))})
            pool.shuffle()
            pool.take({"here": Batch(torch.empty(8, 1))})
            told = [pool.will_have_room(n, last_row=last_row) for n in range(96)]
            while not pool.is_due:
                pool.take({"here": Batch(torch.empty(8, 1))})
            made = pool.taken < last_row
            assert told == [made and pool.unread + n + 20 <= 96 for n in range(96)]


def look_again(ahead: Prefetcher) -> None:
    with ahead.changing():
        return


def test_a_thread_that_fails_beside_its_work_is_heard() -> None:
    """Whoever waits for it gets the error instead of waiting for ever; closing it is no error."""

    def broken() -> None:
        raise MemoryError("no room to note a piece")

    for find in (lambda: broken, broken):
        ahead = Prefetcher(find, is_on=True, device=torch.device("cpu"))
        look_again(ahead)
        assert ahead._thread is not None
        ahead._thread.join(10)
        with pytest.raises(MemoryError, match="no room"), ahead.paused():
            raise AssertionError("nothing was heard")
        with pytest.raises(MemoryError, match="no room"):
            look_again(ahead)
        ahead.close()


def test_threads_of_the_work_are_those_of_no_other_thread() -> None:
    """Though torch keeps one number for all threads that begin, and gives it to one that has not computed yet."""
    found: dict[str, int] = {}
    done = threading.Event()

    def note(name: str) -> None:
        torch.ones(100_000).mul(2).sum()
        found[name] = torch.get_num_threads()

    def piece() -> None:
        note("its own")
        done.set()

    def caller() -> None:
        pieces = [piece]
        ahead = Prefetcher(lambda: pieces.pop() if pieces else None, is_on=True, device=torch.device("cpu"), threads=1)
        look_again(ahead)
        assert done.wait(10)
        note("who began it")
        ahead.close()

    with torch_threads(2):
        for work in (caller, lambda: note("later")):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        note("main")
    assert found == {"its own": 1, "who began it": 2, "later": 2, "main": 2}


def test_closing_waits_for_the_piece_under_way_and_is_final() -> None:
    began, may_end, done = threading.Event(), threading.Event(), []

    def piece() -> None:
        began.set()
        may_end.wait(10)
        done.append(1)

    ahead = Prefetcher(lambda: piece, is_on=True, device=torch.device("cpu"))
    look_again(ahead)
    assert began.wait(10)
    threading.Timer(0.1, may_end.set).start()
    ahead.close()
    assert done == [1]
    look_again(ahead)  # as a stream that is closed and asked again
    ahead.close()
    assert done == [1]


def test_when_it_is_harvested_is_not_part_of_what_a_run_is(source: Path) -> None:
    digests = [identity_of(config_of(source, "live", prefetch)) for prefetch in (0, 8)]
    assert digests[0] == digests[1]
    for bad, said in ((-1, "must not be negative"), (9, "harvest.pool_batches=8 never takes as many")):
        with pytest.raises(UserError, match=said):
            config_of(source, "live", bad)
    config_of(source, "tensors", 9)


def perf(folder: Path, name: str) -> list[float]:
    (file,) = (folder / "runs").glob("*/metrics.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [row[f"perf/{name}"] for row in found if f"perf/{name}" in row]


@pytest.mark.parametrize("prefetch", [0, 4])
def test_who_waits_is_told(tmp_path: Path, prefetch: int) -> None:
    assert run_command([*rows_run(tmp_path), f"harvest.prefetch={prefetch}"]) == 0
    waited, harvested = perf(tmp_path, "wait_fraction"), perf(tmp_path, "harvest_fraction")
    assert all(0 < share < 1 for share in waited)
    assert (waited == harvested) == (prefetch == 0)


AHEAD = ["harvest.prefetch=4"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [AHEAD, [*AHEAD, "sparsifier=gradient"]], ids=["mutual_choice", "gradient"])
def test_killed_runs_end_as_one_that_harvests_nothing_ahead(tmp_path: Path, arguments: list[str]) -> None:
    import random

    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
    assert finish(launch(whole, 1, ["harvest.prefetch=0", *arguments[1:]])).status == 0
    kills = sum(kill_after_progress(launch(torn, 1, arguments), torn, random.Random(n)) for n in range(3))
    last = finish(launch(torn, 1, arguments))
    assert last.status == 0, last.stdout
    assert kills >= 2
    assert weights(torn) == weights(whole)
    assert rows(torn) == rows(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_the_same_command_goes_on(tmp_path: Path, number: int, status: int) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
    assert finish(launch(whole, 1, AHEAD)).status == 0
    process = launch(torn, 1, AHEAD)
    while not checkpoints(torn) and process.poll() is None:
        time.sleep(0.005)
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)
    done = finish(process)  # within its time: nothing hangs
    assert done.status == status, done.stdout
    assert "sae_train/" not in done.stdout
    assert finish(launch(torn, 1, AHEAD)).status == 0
    assert weights(torn) == weights(whole)
