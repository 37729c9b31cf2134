"""Ranges against plain comparisons, at their ends and beyond; messages and help name them."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_train.cli.compose import compose_config, offer
from sae_train.cli.help import usage
from sae_train.cli.schemas import SCHEMAS
from sae_train.config import RunConfig
from sae_train.config.launcher import SlurmLauncher
from sae_train.config.ranges import Range, Settings, ranges
from sae_train.errors import ConfigError

RANGED = [
    pytest.param(settings, name, id=f"{settings.__name__}.{name}")
    for settings in dict.fromkeys([*SCHEMAS.values(), SlurmLauncher])
    for name in ranges(settings)
]
number = st.none() | st.integers(-5, 5) | st.floats(-5, 5)


@given(at_least=number, above=number, at_most=number, below=number, value=st.integers(-6, 6) | st.floats(-6, 6))
def test_a_range_is_its_comparisons(
    at_least: float | None, above: float | None, at_most: float | None, below: float | None, value: float
) -> None:
    slow = True
    if at_least is not None and value < at_least:
        slow = False
    if above is not None and value <= above:
        slow = False
    if at_most is not None and value > at_most:
        slow = False
    if below is not None and value >= below:
        slow = False
    assert Range(at_least=at_least, above=above, at_most=at_most, below=below).holds(value) == slow


def test_nan_lies_in_no_range() -> None:
    for each in (Range(at_least=0), Range(above=0), Range(at_most=0), Range(below=0)):
        assert not each.holds(math.nan)


def beyond(limits: Range) -> Iterator[object]:
    """Yield values just outside of each end."""
    if limits.choices:
        yield "nonsense"
    if limits.at_least is not None:
        yield limits.at_least - 1
    if limits.above is not None:
        yield limits.above
    if limits.at_most is not None:
        yield limits.at_most + 1
    if limits.below is not None:
        yield limits.below


@pytest.mark.parametrize(("settings", "name"), RANGED)
def test_a_value_beyond_its_range_is_refused_by_key_value_and_range(settings: type[Settings], name: str) -> None:
    limits = ranges(settings)[name]
    values = list(beyond(limits))
    assert values, "a range without an end"
    for value in values:
        assert not limits.holds(value)
        message = limits.problem(f"group.{name}", value)
        assert message.startswith(f"group.{name}=")
        says = {"at least 0": "must not be negative", "above 0": "must be positive"}
        assert says.get(limits.words, limits.words) in message


def test_a_run_checks_the_ranges_of_all_its_groups_at_once() -> None:
    config = compose_config(["parallel=mesh"])
    with pytest.raises(ConfigError) as caught:
        replace(
            config,
            log_every=0,
            optimizer=replace(config.optimizer, beta1=1.0),
            parallel=replace(config.parallel, feature_ranks=0),
            model=replace(config.model, dtype="float8"),
        )
    assert str(caught.value).splitlines() == [
        "log_every=0: must be at least 1.",
        "model.dtype=float8: no such number format. Choose float32, bfloat16 or float16.",
        "optimizer.beta1=1: must be at least 0 and below 1.",
        "parallel.feature_ranks=0: must be at least 1.",
    ]


def test_help_shows_the_range_of_every_setting() -> None:
    text = " ".join(usage(offer([])).partition("Dials")[2].split())
    for name, limits in ranges(RunConfig).items():
        assert f"{limits.words}." in text.partition(f" {name}=")[2][:400], name
    assert "clip. Range: at least 0." in text
    assert "One of: auto, bf16, float32 or float64." in text
