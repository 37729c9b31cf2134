"""Every dial can be turned alone: to half, double and eight times its default there is a plan."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sae_train.cli.compose import compose_config, offer
from sae_train.cli.point import flat
from sae_train.config import LaneSizes, LiveHarvestConfig
from sae_train.config.lanes import MOST_LANES, USUAL_CONTEXTS, lane_problems, lane_sizes
from sae_train.errors import ConfigError
from sae_train.harvest.build import StreamFacts, check_stream
from sae_train.training.run import plan_of
from tools.tiny_models import planned_config, save_model

BY_RULE = {
    "n_features": 2048,
    "dead_window": 32_030,
    "evaluation_tokens": 50_000,
    "harvest.prefetch": 2,
    "optimizer.lr": 0.005,
    "optimizer.warmup_tokens": 40_000,
    "optimizer.decay_tokens": 160_000,
    "checkpoint.every_tokens": 200_000,
}
"""What null means for a default run, roughly, where it is not a matter of lanes."""
RANGES = {"optimizer.beta1": 1, "optimizer.beta2": 1}
"""Below which a dial must stay, whatever else is set."""
FACTORS = (0.5, 2, 8)


def dials(*typed: str) -> dict[str, Any]:
    """Return every number that can be turned, with its default; those of lanes as they follow from what is typed."""
    known = flat(OmegaConf.create(offer(list(typed)).values))
    sizes = compose_config(list(typed)).lane_sizes
    for key in ("lanes", "contexts_per_forward", "pool_batches"):
        known[f"harvest.{key}"] = getattr(sizes, key)
    known = {key: BY_RULE.get(key) if value is None else value for key, value in known.items()}
    numbers = {key: value for key, value in known.items() if isinstance(value, int | float) and value}
    return {key: value for key, value in numbers.items() if not isinstance(value, bool)}


def turned(key: str, value: float, factor: float) -> str:
    return f"{key}={value * factor:g}" if isinstance(value, float) else f"{key}={max(1, int(value * factor))}"


def test_the_walk_meets_every_dial_of_the_readme() -> None:
    there = dials()
    for key in ("k", "expansion", "n_features", "tokens", "batch_tokens", "dead_window", "harvest.context_length",
                "harvest.lanes", "harvest.contexts_per_forward", "harvest.pool_batches", "log_every"):  # fmt: skip
        assert key in there


@pytest.mark.parametrize("typed", [[], ["harvest.context_length=1024"]])
def test_the_dials_of_a_batch_agree_when_one_is_turned(typed: list[str]) -> None:
    """A configuration checks itself when it is made."""
    config = compose_config(typed)
    for key, value in dials(*typed).items():
        for factor in FACTORS:
            changed = max(1, int(value * factor))
            if key == "batch_tokens":
                replace(config, batch_tokens=changed)
            elif key.startswith("harvest."):
                replace(config, harvest=replace(config.harvest, **{key.partition(".")[2]: changed}))


def test_a_dial_that_has_a_range_says_so() -> None:
    for key, end in RANGES.items():
        with pytest.raises(ConfigError, match=rf"^{key}=1.8: must be at least 0 and below {end}\.$"):
            compose_config([f"{key}=1.8"])


@pytest.mark.slow
@pytest.mark.parametrize("context", [128, 1024])
def test_there_is_a_plan_when_one_is_turned(context: int, tmp_path: Path) -> None:
    typed = []
    if context == 1024:
        model = save_model(tmp_path)
        settings = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 8192}
        (model / "config.json").write_text(json.dumps(settings))
        typed = ["model=huggingface", f"model.id={model}", "harvest.context_length=1024"]
    usual = check_stream(compose_config(typed).source, n_ranks=1)
    for key, value in dials(*typed).items():
        for factor in FACTORS:
            if key not in RANGES:
                own = [text for text in typed if not text.startswith(f"{key}=")]
                config = compose_config([*own, turned(key, value, factor)])
                facts = check_stream(config.source, n_ranks=1) if _changes_the_stream(key) else usual
                assert plan_of(config, facts, n_ranks=1).steps > 0


def _changes_the_stream(key: str) -> bool:
    return key.startswith(("harvest.", "model.", "data.")) or key == "batch_tokens"


@pytest.fixture(scope="module")
def harvest() -> LiveHarvestConfig:
    found = compose_config([]).harvest
    assert isinstance(found, LiveHarvestConfig)
    return found


@given(
    batch_tokens=st.integers(1, 70_000),
    context=st.integers(4, 5000),
    pool=st.none() | st.integers(2, 1000),
    contexts=st.none() | st.integers(1, 20),
)
def test_sizes_that_are_left_open(
    harvest: LiveHarvestConfig, batch_tokens: int, context: int, pool: int | None, contexts: int | None
) -> None:
    harvest = replace(harvest, context_length=context, pool_batches=pool, contexts_per_forward=contexts)
    problems = lane_problems(harvest, batch_tokens=batch_tokens)
    if problems:
        assert pool is not None, "only typed sizes contradict each other"
        assert problems[0].startswith(f"harvest.pool_batches={pool}: a lane's pool holds")
        assert pool * batch_tokens < 2 * context * (contexts or 1), "one lane would not do either"
        return
    sizes = lane_sizes(harvest, batch_tokens=batch_tokens)
    assert batch_tokens % sizes.lanes == 0
    assert sizes.lanes <= MOST_LANES
    assert 2 * sizes.forward_tokens <= sizes.capacity
    assert sizes.contexts_per_forward >= 1
    if contexts is None:
        assert sizes.contexts_per_forward <= USUAL_CONTEXTS
    if pool is None:
        larger = [n for n in range(sizes.lanes + 1, MOST_LANES + 1) if batch_tokens % n == 0]
        assert not larger
        assert sizes.pool_batches >= 64


def test_the_sizes_of_a_default_run() -> None:
    expected = LaneSizes(lanes=64, share=32, context_length=128, contexts_per_forward=8, pool_batches=64)
    assert compose_config([]).lane_sizes == expected


def test_the_plan_names_both_ways_out_of_ranks_that_do_not_divide_the_lanes() -> None:
    with pytest.raises(ConfigError) as caught:
        check_stream(compose_config([]).source, n_ranks=3)
    said = str(caught.value)
    assert "harvest.lanes=64 over 3 ranks: not divisible" in said
    assert "Set harvest.lanes=63 and batch_tokens=2016 or 2079" in said
    assert "go on with 2 or 4 ranks" in said
    config = compose_config(["harvest.lanes=63", "batch_tokens=2016"])
    facts: StreamFacts = check_stream(config.source, n_ranks=3)
    assert facts.sizes == config.lane_sizes


def test_a_schedule_that_is_longer_than_the_run_is_said_in_the_plan() -> None:
    config = planned_config("bundled", tokens=640)
    config = replace(config, optimizer=replace(config.optimizer, decay_tokens=1280, warmup_tokens=640))
    (note,) = plan_of(config, check_stream(config.source, n_ranks=1), n_ranks=1).notices
    assert note.startswith("optimizer.decay_tokens=1280: longer than the run of tokens=640")
