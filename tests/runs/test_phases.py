"""Long parts of a run: what they cost is in the plan, what they share is made once, and a stop changes nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_train.cli.compose import compose_config
from sae_train.config import RunConfig
from sae_train.errors import Preempted
from sae_train.evaluation.evaluate import evaluate_all
from sae_train.harvest.build import build_stream, check_stream
from sae_train.harvest.language_model import LanguageModel
from sae_train.harvest.live import LiveStream
from sae_train.phases import NoBar, Phases
from sae_train.ranks.interface import Solo
from sae_train.training.plan_text import describe
from sae_train.training.run import plan_of
from tools.held_out_rows import subject
from tools.one_of_each import only
from tools.small_runs import CPU
from tools.tiny_models import live_config, save_model, save_sentences, tensors_config
from tools.tiny_runs import rows_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sentences(tmp_path_factory.mktemp("text"), 200)


@pytest.fixture(scope="module")
def usual() -> RunConfig:
    return compose_config(["batch_tokens=64"])


def told_after(n: int) -> Phases:
    """Return phases that end the run at the n-th look at the signals, and at each one after that."""
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks > n:
            raise Preempted("told")

    return Phases(alone=look)


def opened(config: RunConfig) -> LiveStream:
    stream = build_stream(config.source, ranks=Solo())
    assert isinstance(stream, LiveStream)
    return stream


@pytest.mark.parametrize("prefetch", [0, 4])
def test_a_harvest_that_is_left_at_any_forward_pass_goes_on_bit_for_bit(model: Path, text: Path, prefetch: int) -> None:
    config = live_config(model, text, harvest={"prefetch": prefetch})
    whole = opened(config)
    whole.start()
    expected = [only(whole.batch(step)).x_ND for step in range(12)]
    whole.close()
    torn = opened(config)
    torn.start()
    batches: list[Tensor] = []
    left_in = set()
    for n in range(400):
        step = len(batches)
        try:
            torn.fill(told_after(n % 7))
            batches.append(only(torn.batch(step)).x_ND)
        except Preempted:
            left_in.add(step)
            lanes, replicated = torn.lane_states(), torn.replicated_state()
            torn.close()
            torn = opened(replace(config))
            torn.restore(replicated, lanes.__getitem__)
        if len(batches) == len(expected):
            break
    torn.close()
    assert len(left_in) >= 3  # in as many refills, each of them several times
    for one, other in zip(batches, expected, strict=True):
        assert torch.equal(one, other)


def test_calibration_ends_at_the_forward_pass_that_is_told(model: Path, text: Path) -> None:
    stream = opened(live_config(model, text))
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    stream.language_model.model.register_forward_pre_hook(count)
    with pytest.raises(Preempted):
        stream.start(told_after(2))
    assert passes == 3


def test_the_whole_pass_gives_the_bits_of_the_pass_up_to_the_site(model: Path) -> None:
    lm = LanguageModel(live_config(model).source, device=CPU)
    ids_BT = torch.randint(0, 200, (3, 16), generator=torch.Generator().manual_seed(0))
    acts, logits_BTV = lm.activations_and_logits(ids_BT)
    assert torch.equal(only(acts), only(lm.activations(ids_BT)))
    assert torch.equal(logits_BTV, lm.logits(ids_BT))


class Counting(NoBar):
    """A bar that remembers."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.n, self.is_closed = name, total, 0, False

    def advance(self, n: int) -> None:
        self.n += n

    def close(self) -> None:
        self.is_closed = True


def test_bars_end_where_their_phase_ends(model: Path, text: Path) -> None:
    """What a bar's time left is worth: the total is what is then counted, whatever the source."""
    bars: list[Counting] = []

    def show(name: str, *, total: int, unit: str, done: int, is_nested: bool) -> Counting:
        bars.append(Counting(name, total))
        return bars[-1]

    phases = Phases(show=show)
    stream = build_stream(live_config(model, text).source, ranks=Solo(), phases=phases)
    stream.start(phases)
    lm = stream.language_model
    subjects, held_out = [subject("one threshold", Solo(), site="residual1")], stream.held_out
    with phases.of("evaluating", total=held_out.n_tokens("evaluation", max_tokens=100)):
        evaluate_all(subjects, held_out, max_tokens=100, language_model=lm, ranks=Solo(), phases=phases)
    assert [bar.name for bar in bars] == [
        "opening text, file 1 of 1", "reading text", "loading the language model", "calibrating scale and centre",
        "filling pools", "evaluating",
    ]  # fmt: skip
    assert all(bar.is_closed for bar in bars)
    filling = bars.pop(4)
    assert [bar.n for bar in bars] == [bar.total for bar in bars]
    assert 0.5 * filling.total < filling.n <= filling.total  # as far as whole forward passes fit


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(800_000, 50_000), (10_000_000, 50_000), (160_000, 10_000), (20_480, 1280), (1000, 256), (64, 256)],
)
def test_held_out_tokens_follow_from_the_run(usual: RunConfig, tokens: int, expected: int) -> None:
    assert usual.evaluation_tokens is None
    assert replace(usual, tokens=tokens).held_out_tokens == expected
    assert replace(usual, tokens=tokens, evaluation_tokens=777).held_out_tokens == 777


def test_held_out_tokens_fill_two_contexts_or_blocks(tmp_path: Path) -> None:
    assert live_config(evaluation_tokens=None).held_out_tokens == 40  # 640 / 16; two contexts are 32
    assert live_config(evaluation_tokens=None, tokens=64).held_out_tokens == 32
    assert tensors_config(tmp_path, evaluation_tokens=None).held_out_tokens == 512


def test_the_plan_says_what_held_out_data_costs(model: Path, text: Path) -> None:
    def planned(**dials: object) -> str:
        config = live_config(model, text, **{"evaluation_tokens": None, "tokens": 6400, **dials})
        plan = plan_of(config, check_stream(config.source, n_ranks=1), n_ranks=1)
        return describe(plan, config.source, path="here")

    once = planned()
    assert "400 held-out tokens, 1 forward pass of the language model up to the site" in once
    assert "400 other held-out tokens, 3 whole forward passes of the language model: clean, spliced" in once
    assert "once, at the end" in once
    often = planned(evaluate_every=640)
    assert "10 times, each with its thresholds" in often

    def share(text: str) -> int:
        return int(text.split("of which ")[-1].split("%")[0])

    assert 0 < share(once) < share(often) < 100


def test_the_plan_of_files_names_no_language_model(tmp_path: Path, compose: Callable[..., RunConfig]) -> None:
    config = compose(*rows_run(tmp_path))
    text = describe(plan_of(config, check_stream(config.source, n_ranks=1), n_ranks=1), config.source, path="here")
    (line,) = [line for line in text.splitlines() if line.startswith("thresholds")]
    assert line.split(maxsplit=1)[1] == "256 held-out tokens"
